"""The memory that a run needs, by part, estimated from its recipe before training, and compared with that of the device."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..config.files import SHIPPED
from ..students.t5.layout import StudentLayout
from .objectives import OBJECTIVES
from .recipe import Recipe, Stage
from .teacher_chunks import chunk_of

GB = 1e9
# AdamW: weight, gradient and two moments, float32. Autocast: a bf16 copy of each weight while the student computes.
# A checkpoint: weight and moments.
TRAINED_BYTES, AUTOCAST_BYTES, FLOAT32_BYTES, SAVED_BYTES = 16, 2, 4, 12
# Measured with torch's profiler on Flux blocks of widths 512 and 1024 (forward and backward): numbers per token and channel that a block
# keeps for the backward pass (with checkpointing only its inputs), and those of the block that is being computed, mostly float32.
KEPT_WITH_CHECKPOINTS, KEPT_WITHOUT = 1, 14
AT_WORK_WITH_CHECKPOINTS, AT_WORK_WITHOUT, AT_WORK_BYTES = 28, 12, 4
# Measured likewise on transformers' T5 under bf16 autocast with dropout (a least-squares fit over ten shapes, within 0.1%): bytes per
# token and channel of d_model, of attention and of the feed-forward layer, and per head and pair of tokens.
T5_MODEL, T5_ATTENTION, T5_FEED_FORWARD, T5_PAIR, PROJECTION = 30, 14, 16, 12, 12
# Without autocast, numbers have twice as many bytes.
WIDER = 2
# Memory taken by the GPU's driver and lost to fragmentation.
GPU_BYTES = 1_000_000_000
PATCH_PX = 16
# What a fast desktop CPU sustains, an assumption: floating-point operations per second.
CPU_FLOPS = 1e12
# In forward passes of the diffusion model: teacher's and student's, the student's backward pass, and blocks that are computed again.
PASSES, RECOMPUTED = 3, 1
NOT_PRACTICAL_DAYS = 10
STATED_GB = re.compile(r"-(\d+)gb$")
# A card sold as 12 GB has a little less than 12 x 2^30 bytes available.
SHOWN_BYTES_PER_GB = 0.97 * 2**30


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


def memory_need(recipe: Recipe, layout: StudentLayout, model: ModelSize, teacher_bytes: int, on_gpu: bool) -> MemoryNeed:
    """What a process of the run needs on its device. On a CPU that includes the teacher, which leaves a GPU while the student trains."""
    return max((_stage_need(recipe, stage, layout, model, teacher_bytes, on_gpu) for stage in recipe.stages), key=lambda need: need.total)


def _stage_need(recipe: Recipe, stage: Stage, layout: StudentLayout, model: ModelSize, teacher_bytes: int, on_gpu: bool) -> MemoryNeed:
    part, longest = recipe.diffusion_model, max(recipe.sampling.token_lengths)
    others = {
        "student, gradients and AdamW": layout.parameters * TRAINED_BYTES,
        "student's activations": student_activations(layout, stage.batch, longest, recipe.optimizer.autocast == "bf16"),
        "teacher's embeddings of one trajectory": stage.batch * stage.accumulate * longest * layout.output_width * 4,
    }
    if OBJECTIVES[stage.objective].needs_velocity:
        tokens = stage.batch * ((stage.resolution_px // PATCH_PX) ** 2 + longest)
        others |= model_activations(model, tokens, part.checkpoint_blocks)
    others |= {"GPU driver and fragments": GPU_BYTES} if on_gpu else {"teacher and CLIP-L": teacher_bytes}
    # Without checkpoints, the graph keeps every weight that was cast or brought for it; with them, those of one block at a time.
    kept = model.largest_block if part.checkpoint_blocks else model.weights
    casts = model.held_bytes < model.weights * model.compute_bytes
    return MemoryNeed(stage.name, model.held_bytes, kept * model.compute_bytes, casts, others, offload=on_gpu)


def ram_parts(recipe: Recipe, layout: StudentLayout, model_bytes: int, teacher_bytes: int, processes: int) -> dict[str, int]:
    """Upper bound of the RAM of each process of a run on a GPU, in bytes by part, in the stage that needs most.

    Python and its libraries (about 2 GB) and the system's file cache are not included.
    """
    text = max(recipe.sampling.token_lengths) * layout.output_width * FLOAT32_BYTES
    validated = recipe.stages[-1].batch
    return {
        "teacher and CLIP-L": teacher_bytes,
        "diffusion model, while the teacher works": model_bytes,
        "teacher's embeddings of one chunk": max(_chunk_prompts(recipe, stage, processes) for stage in recipe.stages) * text,
        "teacher's embeddings of held-out prompts": min(
            recipe.validation.prompts, -(-recipe.validation.prompts // (validated * processes)) * validated
        )
        * text,
        "a checkpoint, while it is saved": layout.parameters * SAVED_BYTES,
    }


def _chunk_prompts(recipe: Recipe, stage: Stage, processes: int) -> int:
    prompts = stage.batch * stage.batches_per_rank(processes)
    return prompts * len(chunk_of(0, prompts, recipe.teacher.chunk_prompts, -(-stage.steps // recipe.sampling.steps)))


def model_activations(model: ModelSize, tokens: int, checkpoint_blocks: bool) -> dict[str, int]:
    """Upper bound of the bytes that the diffusion model's passes take for `tokens` text and image tokens of a batch, by part."""
    channels = tokens * model.width
    kept = KEPT_WITH_CHECKPOINTS if checkpoint_blocks else KEPT_WITHOUT
    at_work = AT_WORK_WITH_CHECKPOINTS if checkpoint_blocks else AT_WORK_WITHOUT
    kind = "inputs" if checkpoint_blocks else "activations"
    return {
        f"{kind} of {model.blocks} blocks": model.blocks * channels * kept * model.compute_bytes,
        "activations of the current block": channels * at_work * AT_WORK_BYTES,
    }


def student_activations(layout: StudentLayout, batch: int, length: int, autocast: bool) -> int:
    """Upper bound of the bytes that the student keeps for its backward pass over `batch` prompts of `length` tokens."""
    per_token = T5_MODEL * layout.d_model + T5_ATTENTION * layout.num_heads * layout.d_kv + T5_FEED_FORWARD * layout.d_ff
    per_layer = batch * (length * per_token + T5_PAIR * layout.num_heads * length**2)
    projection = batch * length * PROJECTION * ((layout.hidden_width or 0) + layout.output_width)
    # Everything outside the layers takes less than one of them.
    kept = (layout.num_layers + 1) * per_layer + projection
    return kept + layout.parameters * AUTOCAST_BYTES if autocast else kept * WIDER


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


def without_gpu(recipe: Recipe, weights: int) -> str:
    """What a run on the CPU means in time, for a diffusion model of this many weights."""
    tokens = 0.0
    for stage in recipe.stages:
        if OBJECTIVES[stage.objective].needs_velocity:
            text = sum(recipe.sampling.token_lengths) / len(recipe.sampling.token_lengths)
            tokens += stage.steps * stage.batch * stage.accumulate * ((stage.resolution_px // PATCH_PX) ** 2 + text)
    passes = PASSES + (RECOMPUTED if recipe.diffusion_model.checkpoint_blocks else 0)
    hours = 2 * weights * passes * tokens / CPU_FLOPS / 3600
    said = "No GPU is used (none was found, or --cpu was given): the run is computed on the CPU."
    if hours < 1:
        return said
    time = f"{hours / 24:,.0f} days" if hours >= 48 else f"{hours:.0f} hours"
    said += f" It takes about {time} at an assumed {CPU_FLOPS / 1e12:g} TFLOP/s."
    return said + (" That is not practical: use a GPU; schnell-12gb runs on 12 GB." if hours > 24 * NOT_PRACTICAL_DAYS else "")


def advice(recipe: Recipe, total_bytes: int, on_gpu: bool) -> str:
    """What lowers the memory of a run, and the shipped recipe for a device of this memory."""
    remedies = []
    if any(stage.batch > 1 for stage in recipe.stages):
        remedies.append("lower batch and raise accumulate by the same factor, which keeps the prompts per step")
    if not recipe.diffusion_model.checkpoint_blocks:
        remedies.append("set diffusion_model.checkpoint_blocks = true")
    remedies.append("lower resolution_px or the longest of sampling.token_lengths, or choose a smaller student")
    fitting = shipped_for(total_bytes, (path.stem for path in SHIPPED.glob("*.toml")))
    if not on_gpu:
        return f"{'; '.join(remedies)}; the shipped recipe smoke runs on any machine, but {recipe.family.display_name} needs a GPU."
    return f"{'; '.join(remedies)}; " + (
        f"the shipped recipe {fitting} is made for this much memory." if fitting else "no shipped recipe is made for so little memory."
    )


def shipped_for(total_bytes: int, names: Iterable[str]) -> str | None:
    """Of recipes with a memory size in their name (`schnell-12gb`), the largest that a device of this memory can hold."""
    stated = {int(match[1]): name for name in names if (match := STATED_GB.search(name))}
    return max(((size, name) for size, name in stated.items() if size * SHOWN_BYTES_PER_GB <= total_bytes), default=(0, None))[1]
