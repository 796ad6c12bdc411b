"""The memory that a run needs, by part, estimated from its recipe before training, and compared with that of the device."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..config.files import SHIPPED
from ..families.family import Family
from ..students import KINDS
from .objectives import OBJECTIVES
from .recipe import Recipe, Stage, load_recipe
from .teacher_chunks import chunk_of

if TYPE_CHECKING:
    from ..students.kind import Layout

GB = 1e9
# AdamW: weight, gradient and two moments, float32. Autocast: a bf16 copy of each weight while the student computes.
# A checkpoint: weight and moments.
TRAINED_BYTES, AUTOCAST_BYTES, FLOAT32_BYTES, SAVED_BYTES = 16, 2, 4, 12
# The numbers of the block that is being computed are mostly float32. With checkpointing, a block keeps only its inputs.
AT_WORK_BYTES = 4
# Without autocast, numbers have twice as many bytes.
WIDER = 2
# Memory taken by the GPU's driver and lost to fragmentation.
GPU_BYTES = 1_000_000_000
# What a fast desktop CPU sustains, an assumption: floating-point operations per second.
CPU_FLOPS = 1e12
# In forward passes of the diffusion model: teacher's and student's, the student's backward pass, blocks that are computed again, and the
# teacher's for the empty prompt.
PASSES, RECOMPUTED, UNCONDITIONAL = 3, 1, 1
NOT_PRACTICAL_DAYS = 10
STATED_GB = re.compile(r"-(\d+)gb$")
# A card sold as 12 GB has a little less than 12 x 2^30 bytes available.
SHOWN_BYTES_PER_GB = 0.97 * 2**30
# Parts of the RAM beside a GPU.
TEACHER, DIFFUSION_MODEL, CHECKPOINT = "teacher's encoders", "diffusion model, while the teacher works", "a checkpoint, while it is saved"


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a frozen diffusion model that decide its memory.

    held_bytes: its weights as they are held. weights, largest_block: number of weights, in all and in the largest block. blocks: number of
    blocks. width: their channels. compute_bytes: bytes of a number in computation.
    """

    held_bytes: int
    weights: int
    largest_block: int
    blocks: int
    width: int
    compute_bytes: int


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes on the device in the stage that needs most.

    held: the diffusion model's weights. at_work: copies of weights that the autograd graph holds, cast to the computation's format or
    brought from RAM; none if `casts` is false and the model is on the device. others: everything else, by part. offload: whether ComfyUI
    can leave the diffusion model in RAM.
    """

    stage: str
    held: int
    at_work: int
    casts: bool
    others: dict[str, int]
    offload: bool

    @property
    def parts(self) -> dict[str, int]:
        """Every part, with all of the diffusion model on the device."""
        return {"diffusion model, frozen": self.held, "copies of its weights": self.at_work if self.casts else 0} | self.others

    @property
    def least_parts(self) -> dict[str, int]:
        """Every part, with as much of the diffusion model in RAM as ComfyUI can leave there."""
        return {"copies of the diffusion model's weights": self.at_work} | self.others if self.offload else self.parts

    def room(self, weights: int, has_moments: bool, device_bytes: int) -> int:
        """Bytes that an optimizer step takes in addition to what is on the device: ComfyUI is asked to keep them free.

        By default it keeps only what inference needs. The student's weights are there already, and AdamW's moments after the first step.
        Weights that are not cast take memory twice only if a device of `device_bytes` cannot hold all of them, so that some are brought
        from RAM.
        """
        at_work = self.at_work if self.casts or self.total > device_bytes else 0
        return at_work + sum(self.others.values()) - weights * (FLOAT32_BYTES * (3 if has_moments else 1))

    @property
    def total(self) -> int:
        """Bytes with all of the diffusion model on the device."""
        return sum(self.parts.values())

    @property
    def least(self) -> int:
        """Bytes that are needed even if ComfyUI leaves in RAM all that it can."""
        return min(self.total, sum(self.least_parts.values()))


def memory_need(recipe: Recipe, layout: Layout, model: ModelSize, teacher_bytes: int, on_gpu: bool) -> MemoryNeed:
    """What a process of the run needs on its device. On a CPU that includes the teacher, which leaves a GPU while the student trains."""
    return max((_stage_need(recipe, stage, layout, model, teacher_bytes, on_gpu) for stage in recipe.stages), key=lambda need: need.total)


def _stage_need(recipe: Recipe, stage: Stage, layout: Layout, model: ModelSize, teacher_bytes: int, on_gpu: bool) -> MemoryNeed:
    part, longest = recipe.diffusion_model, max(recipe.sampling.token_lengths)
    rows = longest + recipe.family.most_rows_before
    others = {
        "student, gradients and AdamW": layout.parameters * TRAINED_BYTES,
        "student's activations": _student_activations(recipe, layout, stage.batch, longest),
        "teacher's embeddings of one trajectory": stage.batch * stage.accumulate * rows * layout.output_width * 4,
    }
    if OBJECTIVES[stage.objective].needs_velocity:
        tokens = stage.batch * (recipe.family.image_tokens(stage.resolution_px) + rows)
        others |= model_activations(recipe.family, model, tokens, part.checkpoint_blocks)
    others |= {"GPU driver and fragments": GPU_BYTES} if on_gpu else {TEACHER: teacher_bytes}
    # Without checkpoints, the graph keeps every weight that was cast or brought for it; with them, those of one block at a time.
    kept = model.largest_block if part.checkpoint_blocks else model.weights
    casts = model.held_bytes < model.weights * model.compute_bytes
    return MemoryNeed(stage.name, model.held_bytes, kept * model.compute_bytes, casts, others, offload=on_gpu)


def ram_parts(recipe: Recipe, layout: Layout, model_bytes: int, teacher_bytes: int, processes: int) -> dict[str, int]:
    """Upper bound of the RAM of each process of a run on a GPU, in bytes by part, in the stage that needs most.

    Python and its libraries (about 2 GB), the system's file cache, and what ComfyUI holds of the graph's own models are not included.
    """
    text = (max(recipe.sampling.token_lengths) + recipe.family.most_rows_before) * layout.output_width * FLOAT32_BYTES
    validated = recipe.stages[-1].batch
    return {
        TEACHER: teacher_bytes,
        DIFFUSION_MODEL: model_bytes,
        "teacher's embeddings of one chunk": max(_chunk_prompts(recipe, stage, processes) for stage in recipe.stages) * text,
        "teacher's embeddings of held-out prompts": min(
            recipe.validation.prompts, -(-recipe.validation.prompts // (validated * processes)) * validated
        )
        * text,
        CHECKPOINT: layout.parameters * SAVED_BYTES,
    }


def _chunk_prompts(recipe: Recipe, stage: Stage, processes: int) -> int:
    prompts = stage.batch * stage.batches_per_rank(processes)
    return prompts * len(chunk_of(0, prompts, recipe.teacher.chunk_prompts, -(-stage.steps // recipe.sampling.steps)))


def model_activations(family: Family, model: ModelSize, tokens: int, checkpoint_blocks: bool) -> dict[str, int]:
    """Upper bound of the bytes that the diffusion model's passes take for `tokens` text and image tokens of a batch, by part."""
    channels = tokens * model.width
    kept, at_work = (1, family.recomputed_numbers) if checkpoint_blocks else (family.kept_numbers, family.computed_numbers)
    kind = "inputs" if checkpoint_blocks else "activations"
    return {
        f"{kind} of {model.blocks} blocks": model.blocks * channels * kept * model.compute_bytes,
        "activations of the current block": channels * at_work * AT_WORK_BYTES,
    }


def _student_activations(recipe: Recipe, layout: Layout, batch: int, length: int) -> int:
    kept = KINDS[layout.kind].activation_bytes(layout, batch, length)
    return kept + layout.parameters * AUTOCAST_BYTES if recipe.optimizer.autocast == "bf16" else kept * WIDER


def part_lines(parts: Mapping[str, int]) -> list[str]:
    """A line for each part, in GB of 10^9 bytes."""
    return [f"  {name:<42}{size / GB:>9.3f} GB" for name, size in parts.items() if size]


def check_memory(need: MemoryNeed, recipe: Recipe, total_bytes: int, device: str) -> None:
    """Raise ValueError if the device cannot hold the run, with what is needed, what is available and which shipped recipe fits."""
    if need.least <= total_bytes:
        return
    offloaded = " even with as much left in RAM as ComfyUI can" if need.offload else ""
    raise ValueError(
        f"Not enough memory on {device}: stage {need.stage} needs {need.least / GB:.1f} GB{offloaded}; "
        f"{device} has {total_bytes / GB:.1f} GB.\n"
        + "\n".join(part_lines(need.least_parts))
        + f"\nWhat to do: {advice(recipe, total_bytes, need.offload)}"
    )


def check_ram(parts: Mapping[str, int], total_bytes: int, processes: int) -> None:
    """Raise ValueError if the RAM of a machine with GPUs cannot hold what its processes have there at the same time.

    That is teacher and diffusion model while they are loaded, or the diffusion model and the teacher's embeddings while the teacher works.
    """
    loading = {name: parts[name] for name in (TEACHER, DIFFUSION_MODEL)}
    encoding = {name: size for name, size in parts.items() if name not in (TEACHER, CHECKPOINT)}
    least = max(loading, encoding, key=lambda at_once: sum(at_once.values()))
    needed = processes * sum(least.values())
    if needed <= total_bytes:
        return
    who = "the run needs" if processes == 1 else f"the {processes} processes on this machine need"
    raise ValueError(
        f"Not enough RAM beside the GPU: {who} {needed / GB:.1f} GB; this machine has {total_bytes / GB:.1f} GB.\n"
        + "\n".join(part_lines(least))
        + "\nWhat to do: use a machine with more RAM, or name smaller files of teacher.t5 and diffusion_model.file (fp8), or set "
        'diffusion_model.dtype = "fp8_e4m3fn"' + (", or lower teacher.chunk_prompts." if least is encoding else ".")
    )


def without_gpu(recipe: Recipe, weights: int) -> str:
    """What a run on the CPU means in time, for a diffusion model of this many weights; "" for less than an hour."""
    tokens = 0.0
    for stage in recipe.stages:
        if OBJECTIVES[stage.objective].needs_velocity:
            text = sum(recipe.sampling.token_lengths) / len(recipe.sampling.token_lengths)
            tokens += stage.steps * stage.batch * stage.accumulate * (recipe.family.image_tokens(stage.resolution_px) + text)
    passes = PASSES + (RECOMPUTED if recipe.diffusion_model.checkpoint_blocks else 0) + (UNCONDITIONAL if recipe.sampling.cfg else 0)
    hours = 2 * weights * passes * tokens / CPU_FLOPS / 3600
    if hours < 1:
        return ""
    time = f"{hours / 24:,.0f} days" if hours >= 48 else f"{hours:.0f} hours"
    said = "No GPU is used (none was found, or --cpu was given): the run is computed on the CPU."
    said += f" It takes about {time} at an assumed {CPU_FLOPS / 1e12:g} TFLOP/s."
    if hours <= 24 * NOT_PRACTICAL_DAYS:
        return said
    smallest = min(_stated_gb(recipe.family).items(), default=None)
    return f"{said} That is not practical: use a GPU{f'; {smallest[1]} runs on {smallest[0]} GB' if smallest else ''}."


def advice(recipe: Recipe, total_bytes: int, on_gpu: bool) -> str:
    """What lowers the memory of a run, and the shipped recipe for a device of this memory."""
    remedies = []
    if any(stage.batch > 1 for stage in recipe.stages):
        remedies.append("lower batch and raise accumulate by the same factor, which keeps the prompts per step")
    if not recipe.diffusion_model.checkpoint_blocks:
        remedies.append("set diffusion_model.checkpoint_blocks = true")
    remedies.append("lower resolution_px or the longest of sampling.token_lengths, or choose a smaller student")
    fitting = shipped_for(total_bytes, recipe.family)
    if not on_gpu:
        return f"{'; '.join(remedies)}; the shipped recipe smoke runs on any machine, but {recipe.family.display_name} needs a GPU."
    return f"{'; '.join(remedies)}; " + (
        f"the shipped recipe {fitting} is made for this much memory." if fitting else "no shipped recipe is made for so little memory."
    )


def shipped_for(total_bytes: int, family: Family) -> str | None:
    """Of the family's recipes with a memory size in their name (`schnell-12gb`), the largest that a device of this memory can hold."""
    fitting = ((size, name) for size, name in _stated_gb(family).items() if size * SHOWN_BYTES_PER_GB <= total_bytes)
    return max(fitting, default=(0, None))[1]


def _stated_gb(family: Family) -> dict[int, str]:
    """The family's shipped recipes by the memory size in their names, GB."""
    stated = [(int(match[1]), path.stem) for path in SHIPPED.glob("*.toml") if (match := STATED_GB.search(path.stem))]
    return {size: name for size, name in sorted(stated) if load_recipe(name).family == family}
