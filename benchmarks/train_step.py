"""What a step of the trainer costs on a CPU: ours against the order of the method's authors.

Both get the same random weights, prompts and noise and must have the same losses. A small Flux, on one thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.utils.checkpoint
from distilled_t5.benchmarks.support import measuring
from distilled_t5.benchmarks.support.training_worlds import GUIDANCE, TRAJECTORY_STEPS, TrainingWorld, small_world
from distilled_t5.devtools.comfyui.in_process import start_comfyui
from distilled_t5.devtools.docs.markdown import table
from torch import Tensor

OURS, AUTHORS = "ours", "authors"
RATES = ("ratio", "ratio_cpu", "sample_cost_cpu")


@dataclasses.dataclass(frozen=True)
class Case:
    """A world to measure: batches, with and without block checkpointing, timed steps."""

    world: TrainingWorld
    batches: tuple[int, ...] = (1, 2, 4, 8)
    checkpointing: tuple[bool, ...] = (False, True)
    repeats: int = 4


def cases(quick: bool) -> dict[str, Case]:
    """What is measured."""
    if quick:
        return {"tiny": Case(small_world(128, 1, 1, side_px=64, text_tokens=16), batches=(1, 2), repeats=1)}
    return {"real proportions": Case(small_world(384, 2, 4)), "small diffusion model": Case(small_world(128, 1, 2), checkpointing=(False,))}


def torch_checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A block's forward with torch's own checkpointing; inputs are cloned, since ComfyUI's blocks overwrite them."""

    def on_clones(*inputs: Any, **named: Any) -> Any:
        return forward(*map(cloned, inputs), **{name: cloned(value) for name, value in named.items()})

    def cloned(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) and value.ndim == 3 else value

    def checkpointed(*inputs: Any, **named: Any) -> Any:
        again = torch.is_grad_enabled()
        return torch.utils.checkpoint.checkpoint(on_clones, *inputs, use_reentrant=False, **named) if again else forward(*inputs, **named)

    return checkpointed


class Models:
    """The models of a case in this process, and a step of each order of operations."""

    def __init__(self, world: TrainingWorld, folder: Path) -> None:
        self.world, self.flow, self.teacher = world, world.load_flow(folder), world.load_teacher(folder)

    def encode(self, batch: int) -> Any:
        """What the trainer does once per trajectory: encode the prompts, move the diffusion model back to its device."""
        text = self.teacher.encode(self.world.prompts(batch), self.world.text_tokens)
        self.flow.load()
        return text

    def start(self, text: Any) -> Any:
        """The start of a trajectory."""
        from distilled_t5.train.trajectory import Position, draw

        world, device = self.world, self.flow.device
        drawn = draw(0, 0, len(text.text_BLD), self.flow.family.latent_shape(world.side_px), GUIDANCE, (world.text_tokens,))
        assert drawn.guidance_B is not None
        sigmas_T = self.flow.training_sigmas(TRAJECTORY_STEPS, *drawn.noise.shape[-2:])
        extras = {"pooled_output": text.pooled_BP.to(device)}
        guidance_B, token_ids_BL = drawn.guidance_B.to(device), text.token_ids_BL.to(device)
        return Position(0, drawn.noise.to(device), sigmas_T, text.text_BLD.to(device), extras, guidance_B, token_ids_BL)

    def our_step(self, position: Any, learner: Any) -> tuple[float, Any]:
        """An optimizer step of the trainer: its loss, and the next position."""
        from distilled_t5.train.distill import train_step
        from distilled_t5.train.objectives import OBJECTIVES

        report, positions = train_step([position], self.flow, learner, OBJECTIVES["velocity"])
        return report.loss, positions[0]

    def authors_step(self, position: Any, learner: Any) -> tuple[float, Any]:
        """The same step in the order of the authors' trainer: teacher, CLIP-L and student encode every prompt again.

        Only the order is theirs; models, precision, noise, loss and clipping are ours, so that losses are equal.
        """
        token_ids_BL, text_BLD, pooled_BP = self.encode_again(len(position.x))
        student_text_BLD = learner.embed(token_ids_BL)
        position = dataclasses.replace(position, extras={"pooled_output": pooled_BP})
        with torch.no_grad():
            teacher_velocity = position.velocity(self.flow, text_BLD)
        student_velocity = position.velocity(self.flow, student_text_BLD)
        loss = (student_velocity - teacher_velocity).square().mean(dim=(1, 2, 3)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learner.student.parameters(), learner.max_gradient_norm)
        for group in learner.optimizer.param_groups:
            group["lr"] = learner.learning_rate(learner.step)
        learner.optimizer.step()
        learner.optimizer.zero_grad()
        learner.step += 1
        step_size = position.sigmas_T[position.step + 1] - position.sigmas_T[position.step]
        moved = dataclasses.replace(position, step=position.step + 1, x=position.x + step_size * teacher_velocity)
        return float(loss), moved

    @torch.no_grad()
    def encode_again(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids [B, L], embeddings [B, L, D] and pooled vectors [B, P] by loaded encoders, on the device of the diffusion model."""
        prompts, teacher, device = self.world.prompts(batch), self.teacher, self.flow.device
        clip_l = teacher.clip.cond_stage_model.clip_l
        token_ids_BL = torch.tensor(teacher.token_ids(prompts, self.world.text_tokens))
        text_BLD = teacher.text_model.encode(token_ids_BL.tolist())[0].float().to(device)
        chunks = [teacher.clip.tokenizer.clip_l.tokenize_with_weights(prompt) for prompt in prompts]
        pooled_BP = torch.cat([clip_l.encode_token_weights(chunk)[1].float() for chunk in chunks]).to(device)
        return token_ids_BL.to(device), text_BLD, pooled_BP

    @contextlib.contextmanager
    def in_order(self, order: str, checkpointed: bool) -> Iterator[Callable[[Any, Any], tuple[float, Any]]]:
        """The step of an order of operations; the authors checkpoint with torch's own function."""
        from distilled_t5.diffusion.block_checkpoint import replaced_forward

        model = self.flow.model.diffusion_model
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.flow.differentiable(checkpointed and order == OURS))
            for block in [*model.double_blocks, *model.single_blocks] if checkpointed and order == AUTHORS else []:
                stack.enter_context(replaced_forward(block, torch_checkpointed(block.forward)))
            yield self.authors_step if order == AUTHORS else self.our_step


@dataclasses.dataclass
class Progress:
    """One order of operations during a measurement: learner, position, losses and times of its steps."""

    order: str
    learner: Any
    position: Any
    losses: list[float] = dataclasses.field(default_factory=list)
    times: list[measuring.Timing] = dataclasses.field(default_factory=list)

    def step(self, models: Models, checkpointed: bool) -> None:
        # The same dropout in both orders.
        torch.manual_seed(len(self.losses))
        with models.in_order(self.order, checkpointed) as step:
            timing, (loss, self.position) = measuring.timed(lambda: step(self.position, self.learner))
        self.losses.append(loss)
        self.times.append(timing)


def median_timing(times: list[measuring.Timing]) -> measuring.Timing:
    """Medians of both clocks."""
    return measuring.Timing(statistics.median(time.wall_s for time in times), statistics.median(time.cpu_s for time in times))


def measure(models: Models, batch: int, checkpointed: bool, repeats: int) -> dict[str, Any]:
    """Both orders alternately, after a step to warm up: seconds per step, losses. Raises RuntimeError if the losses differ."""
    texts = [measuring.timed(lambda: models.encode(batch)) for _ in range(1 + repeats)]
    encoding = median_timing([timing for timing, _ in texts[1:]])
    both = [Progress(order, models.world.learner(models.flow.device), models.start(texts[0][1])) for order in (OURS, AUTHORS)]
    for number in range(1 + repeats):
        for progress in both if number % 2 else reversed(both):
            progress.step(models, checkpointed)
    row: dict[str, Any] = {"checkpointing": checkpointed, "batch": batch, "encode_s": encoding.wall_s, "encode_cpu_s": encoding.cpu_s}
    for progress in both:
        step = median_timing(progress.times[1:])
        shared = 1 / TRAJECTORY_STEPS if progress.order == OURS else 0
        wall_s, cpu_s = step.wall_s + shared * encoding.wall_s, step.cpu_s + shared * encoding.cpu_s
        rates = {"step_s": wall_s, "step_cpu_s": cpu_s, "steps_per_s": 1 / wall_s, "samples_per_s": batch / wall_s}
        row[progress.order] = rates | {"losses": progress.losses}
    ours, authors = both
    if authors.losses != ours.losses:
        raise RuntimeError(f"The losses of both orders differ: {ours.losses} and {authors.losses}")
    return row


def compared(row: dict[str, Any], smallest: dict[str, Any]) -> dict[str, float]:
    """By both clocks, the authors' time over ours, and our cost per sample over that of the smallest batch."""
    found = {}
    for key, suffix in (("step_s", ""), ("step_cpu_s", "_cpu")):
        per_sample, least = (which[OURS][key] / which["batch"] for which in (row, smallest))
        found |= {f"ratio{suffix}": row[AUTHORS][key] / row[OURS][key], f"sample_cost{suffix}": per_sample / least}
    return found


def perform(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Measure a case: a row per checkpointing and batch."""
    torch.set_num_threads(1)
    # ComfyUI uses torch's attention on NVIDIA cards; here on the CPU as well.
    start_comfyui("--cpu", "--use-pytorch-cross-attention")
    case = cases(task["quick"])[task["case"]]
    models, rows = Models(case.world, Path(task["folder"])), []
    for checkpointed in case.checkpointing:
        part = [measure(models, batch, checkpointed, case.repeats) for batch in case.batches]
        rows += [row | compared(row, part[0]) for row in part]
    yield {"rows": rows}


def measure_case(name: str, case: Case, folder: Path, quick: bool) -> dict[str, Any]:
    """Write the files of a case and measure it in a fresh process."""
    world = case.world
    world.write(folder, torch.float32)
    found: dict[str, Any] = {"world": dataclasses.asdict(world)}
    for measured in measuring.in_fresh_process(__file__, {"case": name, "folder": str(folder), "quick": quick}):
        found |= measured
    print(f"\n{name}\n{rows_table(found['rows'])}", flush=True)
    return found


def rows_table(rows: list[dict[str, Any]]) -> str:
    """Speeds of both orders and how they compare."""
    heads = ["checkpointing", "batch", "steps/s", "samples/s", "authors: steps/s", *RATES]
    body = []
    for row in rows:
        ours, authors = row[OURS], row[AUTHORS]
        speeds = [ours["steps_per_s"], ours["samples_per_s"], authors["steps_per_s"], *(row[key] for key in RATES)]
        body.append(["with" if row["checkpointing"] else "without", row["batch"], *speeds])
    return table(heads, body)


def main() -> None:
    """Measure, print the tables, write the JSON."""
    options = measuring.with_task(measuring.command_line(__doc__ or ""), perform)
    if options is None:
        return
    start_comfyui("--cpu")
    facts = measuring.machine(options.note) | {"torch_threads": 1}
    with measuring.scratch_folder(1) as folder:
        found = {name: measure_case(name, case, folder, options.quick) for name, case in cases(options.quick).items()}
    result = {"machine": facts, "quick": options.quick, "trajectory_steps": TRAJECTORY_STEPS, "cases": found}
    print(f"\nwritten: {measuring.save_result(result, measuring.result_path('train-step', options))}")


if __name__ == "__main__":
    main()
