"""What a step of the trainer costs: ours against the order of work of the method's authors, and against the arithmetic it cannot avoid.

The same random weights, prompts and noise in both orders, and the same losses, or the benchmark stops. On a CPU a small Flux, one thread;
with --gpu Flux dev, T5-XXL, CLIP-L and T5-Base of full size at 512 px.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.utils.checkpoint
from distilled_t5.benchmarks.support import measuring as measure
from distilled_t5.benchmarks.support.training_worlds import GUIDANCE, TRAJECTORY_STEPS, World, real_world, small_world
from distilled_t5.devtools.comfyui.in_process import start_comfyui
from torch import Tensor

REAL_TEXT_TOKENS = (77, 256, 512)
EXPECTED = {"ratio at batch 4": 1.3, "share of the floor on a GPU": 0.55}
# Losses of two orders of work may not differ by more, relatively. On a CPU they are equal; a GPU takes sums in any order, and the students
# drift apart a little.
SAME_LOSS = 1e-2
# Orders of work. The third is ours with the checkpointing that the authors' has, torch's own: what ours is worth.
OURS, AUTHORS, TORCHS = "ours", "authors", "ours with torch's checkpointing"


@dataclasses.dataclass(frozen=True)
class Case:
    """A world that is measured: in which formats of the diffusion model's weights, at which batches, with checkpointing or without."""

    world: World
    weights: tuple[str, ...]
    batches: tuple[int, ...]
    checkpointing: tuple[bool, ...]
    memory: tuple[int, ...]  # batches whose memory is measured, in a fresh process each; a GPU's is measured on the way
    least_repeats: int = 3
    repeats_of_one: int = 8

    def repeats(self, batch: int) -> int:
        """Timed steps; more of small batches, which noise disturbs more."""
        return max(self.least_repeats, self.repeats_of_one // batch)


def cases(quick: bool, gpu: bool) -> dict[str, Case]:
    """What is measured."""
    if gpu and not quick:
        return {"full size": Case(real_world(256), ("bf16", "fp8_e4m3fn"), (1, 2, 4), (True,), ())}
    both = (False, True)
    if quick:
        return {
            "tiny": Case(
                small_world(128, 1, 1, side_px=64, text_tokens=16), ("fp32",), (1, 2), both, (2,), least_repeats=1, repeats_of_one=1
            )
        }
    return {
        "real proportions": Case(small_world(384, 2, 4), ("fp32",), (1, 2, 4, 8), both, (1, 2, 4, 8)),
        "small diffusion model": Case(small_world(128, 1, 2), ("fp32",), (1, 2, 4, 8), (False,), ()),
    }


def torch_checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A block's forward with torch's own checkpointing, inputs cloned because the host's blocks overwrite them."""

    def on_clones(*inputs: Any, **named: Any) -> Any:
        return forward(*map(cloned, inputs), **{name: cloned(value) for name, value in named.items()})

    def cloned(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) and value.ndim == 3 else value

    def checkpointed(*inputs: Any, **named: Any) -> Any:
        again = torch.is_grad_enabled()
        return torch.utils.checkpoint.checkpoint(on_clones, *inputs, use_reentrant=False, **named) if again else forward(*inputs, **named)

    return checkpointed


class Bench:
    """The models of a case in this process, and the orders of work on them."""

    def __init__(self, case: Case, folder: Path, weights: str, gpu: bool) -> None:
        self.world, self.gpu = case.world, gpu
        self.flow = case.world.load_flow(folder, weights)
        self.teacher = case.world.load_teacher(folder)
        self.autocast = torch.bfloat16 if gpu else None

    def learner(self) -> Any:
        return self.world.learner(self.flow.device, self.autocast)

    def encode(self, batch: int) -> Any:
        """What the trainer does once per trajectory: encode the prompts, bring the diffusion model back to its device."""
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

    def our_step(self, place: Any, learner: Any) -> tuple[float, Any]:
        """An optimizer step of the trainer: its loss, and the next position."""
        from distilled_t5.train.distill import train_step
        from distilled_t5.train.objectives import OBJECTIVES

        report, places = train_step([place], self.flow, learner, OBJECTIVES["velocity"])
        return report.loss, places[0]

    def authors_step(self, place: Any, learner: Any) -> tuple[float, Any]:
        """The same optimizer step in the order of the authors' trainer: every prompt through teacher, CLIP-L and student again.

        Only the order is theirs; models, precision, noise, loss and clipping are ours, so that losses are the same.
        """
        token_ids_BL, text_BLD, pooled_BP = self.encode_again(len(place.x))
        student_text_BLD = learner.embed(token_ids_BL)
        place = dataclasses.replace(place, extras={"pooled_output": pooled_BP})
        with torch.no_grad():
            teacher_velocity = place.velocity(self.flow, text_BLD)
        student_velocity = place.velocity(self.flow, student_text_BLD)
        loss = (student_velocity - teacher_velocity).square().mean(dim=(1, 2, 3)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learner.student.parameters(), learner.max_gradient_norm)
        for group in learner.optimizer.param_groups:
            group["lr"] = learner.learning_rate(learner.step)
        learner.optimizer.step()
        learner.optimizer.zero_grad()
        learner.step += 1
        step_size = place.sigmas_T[place.step + 1] - place.sigmas_T[place.step]
        moved = dataclasses.replace(place, step=place.step + 1, x=place.x + step_size * teacher_velocity)
        return float(loss), moved

    @torch.no_grad()
    def encode_again(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids [B, L], embeddings [B, L, D] and pooled vectors [B, P], by encoders that are kept loaded, on the model's device."""
        prompts, teacher, device = self.world.prompts(batch), self.teacher, self.flow.device
        token_ids_BL = teacher.token_ids(prompts, self.world.text_tokens)
        text_BLD = teacher.text_model.encode(token_ids_BL.tolist())[0].float().to(device)
        chunks = [teacher.clip.tokenizer.clip_l.tokenize_with_weights(prompt) for prompt in prompts]
        pooled_BP = torch.cat([teacher.clip_l.encode_token_weights(chunk)[1].float() for chunk in chunks]).to(device)
        return token_ids_BL.to(device), text_BLD, pooled_BP

    @contextlib.contextmanager
    def in_order(self, order: str, checkpointed: bool) -> Iterator[Callable[[Any, Any], tuple[float, Any]]]:
        """The step of an order of work, with the diffusion model made ready for it."""
        from distilled_t5.diffusion.block_checkpoint import replaced_forward

        model = self.flow.model.diffusion_model
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.flow.differentiable(checkpointed and order == OURS))
            for block in [*model.double_blocks, *model.single_blocks] if checkpointed and order != OURS else []:
                stack.enter_context(replaced_forward(block, torch_checkpointed(block.forward)))
            yield self.authors_step if order == AUTHORS else self.our_step


@dataclasses.dataclass
class Runner:
    """One order of work under way: its student, where it is, the losses and times of its steps, its peak of GPU memory."""

    order: str
    checkpointed: bool
    learner: Any
    place: Any
    losses: list[float] = dataclasses.field(default_factory=list)
    times: list[measure.Timing] = dataclasses.field(default_factory=list)
    peak_bytes: int = 0

    def step(self, bench: Bench) -> None:
        # Dropout is to fall on the same activations in both orders.
        torch.manual_seed(len(self.losses))
        if bench.gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        with bench.in_order(self.order, self.checkpointed) as step:
            timing, (loss, self.place) = measure.timed(lambda: step(self.place, self.learner), bench.gpu)
        self.losses.append(loss)
        self.times.append(timing)
        self.peak_bytes = torch.cuda.max_memory_allocated() if bench.gpu else 0


def median_timing(times: list[measure.Timing]) -> measure.Timing:
    """Medians of both clocks."""
    return measure.Timing(statistics.median(time.wall_s for time in times), statistics.median(time.cpu_s for time in times))


def pace(bench: Bench, batch: int, checkpointed: bool, repeats: int) -> dict[str, Any]:
    """The orders of work by turns, after a step to warm up: seconds per step, losses."""
    texts = [measure.timed(lambda: bench.encode(batch), bench.gpu) for _ in range(1 + repeats)]
    encoding = median_timing([timing for timing, _ in texts[1:]])
    orders = (OURS, AUTHORS, TORCHS) if checkpointed else (OURS, AUTHORS)
    runners = [Runner(order, checkpointed, bench.learner(), bench.start(texts[0][1])) for order in orders]
    for number in range(1 + repeats):
        for runner in runners if number % 2 else reversed(runners):
            runner.step(bench)
    row: dict[str, Any] = {"checkpointing": checkpointed, "batch": batch, "encode_s": encoding.wall_s, "encode_cpu_s": encoding.cpu_s}
    for runner in runners:
        step = median_timing(runner.times[1:])
        shared = 0 if runner.order == AUTHORS else 1 / TRAJECTORY_STEPS
        wall_s, cpu_s = step.wall_s + shared * encoding.wall_s, step.cpu_s + shared * encoding.cpu_s
        rates = {"step_s": wall_s, "step_cpu_s": cpu_s, "steps_per_s": 1 / wall_s, "samples_per_s": batch / wall_s}
        row[runner.order] = rates | {"gpu_peak_gb": runner.peak_bytes / 1e9 or None, "losses": runner.losses}
        check_losses(row[OURS]["losses"], runner)
    return row


def check_losses(ours: list[float], runner: Runner) -> None:
    """Raises RuntimeError if another order of work did not do the same."""
    if any(abs(loss - expected) > SAME_LOSS * expected for loss, expected in zip(runner.losses, ours, strict=True)):
        raise RuntimeError(f"{runner.order} does something else than ours: losses {runner.losses} and {ours}")


def matmul_flops_per_s(gpu: bool) -> dict[str, float]:
    """The machine's rate at one large product in the format of the run, by both clocks: the best of several."""
    side, dtype = (8192, torch.bfloat16) if gpu else (1536, torch.float32)
    left, right = (torch.randn(side, side, device="cuda" if gpu else "cpu").to(dtype) for _ in range(2))
    times = [measure.timed(lambda: left @ right, gpu)[0] for _ in range(6)]
    return {clock: 2 * side**3 / min(getattr(time, clock) for time in times) for clock in ("wall_s", "cpu_s")}


def measure_speed(case: Case, bench: Bench) -> dict[str, Any]:
    """A row per checkpointing and batch, with ratios, the share of the floor, and the cost per sample relative to the smallest batch."""
    rate, rows = matmul_flops_per_s(bench.gpu), []
    for checkpointed in case.checkpointing:
        part = [pace(bench, batch, checkpointed, case.repeats(batch)) for batch in case.batches]
        rows += [row | judged(case.world, row, rate, part[0]) for row in part]
    return {"matmul_flops_per_s": rate, "rows": rows}


def judged(world: World, row: dict[str, Any], rate: dict[str, float], smallest: dict[str, Any]) -> dict[str, float]:
    """What a row's times mean, by the clock and by processor time."""
    found = {}
    for clock, key, suffix in (("wall_s", "step_s", ""), ("cpu_s", "step_cpu_s", "_cpu")):
        floor_s = row["batch"] * world.step_flops(row["checkpointing"]) / rate[clock]
        per_sample, least = (which[OURS][key] / which["batch"] for which in (row, smallest))
        others = {"ratio": AUTHORS, "checkpoint_ratio": TORCHS}
        found |= {f"{name}{suffix}": row[order][key] / row[OURS][key] for name, order in others.items() if order in row}
        found |= {f"floor{suffix}_s": floor_s, f"floor_share{suffix}": floor_s / row[OURS][key], f"sample_cost{suffix}": per_sample / least}
    return found


def measure_memory(case: Case, folder: Path, weights: str) -> list[dict[str, Any]]:
    """A row per batch, checkpointing and order of work, each measured in a process that was forked before any model was loaded."""
    rows = []
    for batch, checkpointed, order in itertools.product(case.memory, case.checkpointing, (OURS, AUTHORS)):
        with multiprocessing.get_context("fork").Pool(1) as forked:
            memory = forked.apply(memory_of_steps, (case, folder, weights, order, checkpointed, batch))
        rows.append({"batch": batch, "checkpointing": checkpointed, "order": order, **memory})
    return rows


def memory_of_steps(case: Case, folder: Path, weights: str, order: str, checkpointed: bool, batch: int) -> dict[str, float]:
    """Resident memory of this process in GB: with the models loaded, and the most during two steps of one order of work."""
    bench = Bench(case, folder, weights, gpu=False)
    bench.flow.load()
    loaded = measure.memory_gb()["rss"]
    runner = Runner(order, checkpointed, bench.learner(), bench.start(bench.encode(batch)))
    for _ in range(2):
        runner.step(bench)
    return {"loaded_gb": loaded, "peak_gb": measure.memory_gb()["peak"]}


def perform(task: dict[str, Any]) -> None:
    """Measure a case with one format of weights and print what was found, as JSON in the last line."""
    torch.set_num_threads(1)
    # On NVIDIA cards the host takes torch's attention by itself; it is to be the same on a CPU.
    start_comfyui(task["gpu"], use_pytorch_cross_attention=True)
    # Imported before anything is forked: once for all.
    import comfy.sd  # noqa: F401
    import distilled_t5.train.models  # noqa: F401

    case, folder = cases(task["quick"], task["gpu"])[task["case"]], Path(task["folder"])
    memory = [] if task["gpu"] else measure_memory(case, folder, task["weights"])
    found = measure_speed(case, Bench(case, folder, task["weights"], task["gpu"]))
    print("\n" + json.dumps({**found, "memory": memory}))


def measure_case(name: str, case: Case, folder: Path, quick: bool, gpu: bool) -> dict[str, Any]:
    """Write the files of a case, measure it in a fresh process for each format of weights, delete the files."""
    case.world.write(folder, torch.bfloat16 if gpu else torch.float32)
    found: dict[str, Any] = {"world": dataclasses.asdict(case.world), "forward_flops": case.world.forward_flops()}
    found |= {"checkpointed_forwards": case.world.checkpointed_forwards(), "teacher_share": case.world.teacher_share(), "weights": {}}
    for weights in case.weights:
        print(f"{name}, {weights}: measuring", flush=True)
        task = {"case": name, "folder": str(folder), "weights": weights, "quick": quick, "gpu": gpu}
        found["weights"][weights] = measure.in_fresh_process(__file__, task)
    for file in folder.iterdir():
        file.unlink()
    return found


SPEED_KEYS = ("ratio", "ratio_cpu", "checkpoint_ratio_cpu", "floor_share", "floor_share_cpu", "sample_cost_cpu")


def speed_table(rows: list[dict[str, Any]]) -> str:
    """Speeds of ours and of the authors' order, and how they compare."""
    body = []
    for row in rows:
        rates = [row[OURS]["steps_per_s"], row[OURS]["samples_per_s"], row[AUTHORS]["steps_per_s"]]
        memory = [row[order]["gpu_peak_gb"] for order in (OURS, AUTHORS)]
        body.append([with_or_without(row), row["batch"], *rates, *(row.get(key) for key in SPEED_KEYS), *memory])
    heads = ["checkpointing", "batch", "steps/s", "samples/s", "authors: steps/s", *SPEED_KEYS, "GPU GB", "authors: GPU GB"]
    return measure.table(heads, body)


def memory_table(rows: list[dict[str, Any]]) -> str:
    """Resident memory of both orders."""
    body = [[f"{row['order']}, {with_or_without(row)}", row["batch"], row["loaded_gb"], row["peak_gb"]] for row in rows]
    return measure.table(["order, checkpointing", "batch", "loaded, GB", "peak, GB"], body)


def with_or_without(row: dict[str, Any]) -> str:
    return "with" if row["checkpointing"] else "without"


def print_case(name: str, found: dict[str, Any]) -> None:
    """The tables of a case."""
    for weights, rows in found["weights"].items():
        rate = rows["matmul_flops_per_s"]["wall_s"] / 1e9
        print(
            f"\n{name}, {weights}: teacher and CLIP-L do {found['teacher_share']:.1%} of the authors' arithmetic; matmul {rate:.0f} GFLOP/s"
        )
        print(speed_table(rows["rows"]))
        if rows["memory"]:
            print("\n" + memory_table(rows["memory"]))


def real_shares() -> dict[str, float]:
    """The teacher's share in the authors' step for Flux dev at 512 px, by text tokens."""
    return {str(tokens): real_world(tokens).teacher_share() for tokens in REAL_TEXT_TOKENS}


def main() -> None:
    """Measure, print the tables, write the JSON."""
    options = measure.options_or_task(__doc__ or "", perform)
    if options is None:
        return
    quick, gpu, found = options.quick, options.gpu, {}
    facts = measure.machine(start_comfyui(gpu), gpu, options.note) | {"torch_threads": 1}
    with measure.scratch_folder(36 if gpu and not quick else 1) as folder:
        for name, case in cases(quick, gpu).items():
            found[name] = measure_case(name, case, folder, quick, gpu)
            print_case(name, found[name])
    real = real_shares()
    print(f"\nFlux dev, 512 px: {', '.join(f'at {tokens} tokens {share:.1%}' for tokens, share in real.items())} of it")
    result = {"machine": facts, "quick": quick, "trajectory_steps": TRAJECTORY_STEPS, "expected": EXPECTED}
    result |= {"real_teacher_share": real, "cases": found}
    print(f"\nwritten: {measure.save_result(result, 'train-step', options)}")


if __name__ == "__main__":
    main()
