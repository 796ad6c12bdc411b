"""What `gpu.py` measures, in a process in which ComfyUI is started: each part is a function that yields rows. Times are in seconds."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.sd
import folder_paths
import torch
from torch.utils.flop_counter import FlopCounterMode

from ...devtools.models import random_models
from ...encoder.files import open_student
from ...families import DEFAULT
from ...families.family import Family
from ...families.flux_tensors import FluxLayout
from ...runtime.accelerator import device_name
from ...runtime.disk import sha256
from ...runtime.ranks import Ranks
from ...students.t5.layout import Shape, StudentLayout
from ...train.checkpoint_files import STUDENT, TENSORS
from ...train.distill import train_step
from ...train.memory import check_memory, check_ram, ram_parts
from ...train.models import rehearsal_of
from ...train.recipe import Recipe, load_recipe
from ...train.run import train
from ...train.teacher_chunks import texts_of
from ...train.workshop import Workshop, open_workshop
from . import measuring
from .encoders import CLIP_L_SHAPES, PROMPTS, XXL, Encoder, encode, measure_encoder
from .random_files import Draw, draw_any, draw_t5, fill, lay_out, published_shapes

Row = dict[str, Any]
STUDENT_FILE, BF16_FILE, FP8_FILE = "distilled_t5_base.safetensors", "t5xxl_fp16.safetensors", "t5xxl_fp8_e4m3fn.safetensors"
CLIP_L, CLIP_G, FLUX_DEV = "clip_l.safetensors", "clip_g.safetensors", "flux1-dev.safetensors"
# A stage's steps end after this time, but not before the third.
STAGE_S = 60.0
PROMPTS_FILE = '[{ kind = "lines", path = "prompts/starter.txt" }]'
# Two stages, a checkpoint inside a trajectory of the second one.
RESUMED = [
    *("stage.0.steps=2", "stage.1.steps=6", "sampling.steps=4", "sampling.token_lengths=[16]", "student.dropout=0.1"),
    *("validation.every_steps=8", "validation.prompts=2", "checkpoints.every_steps=5", "checkpoints.keep_last=9"),
]
FORMATS = {"fp32": [], "bf16": ["diffusion_model.dtype=bf16", "optimizer.autocast=bf16"], "fp16": ["diffusion_model.dtype=fp16"]}


@dataclasses.dataclass(frozen=True)
class Scale:
    """The sizes to measure: encoders by file name, images, trainer steps. `full`: diffusion models have the published sizes."""

    full: bool
    encoders: dict[str, Encoder]
    side_px: int
    denoising_steps: int
    images: int
    trainer_steps: int


def _encoders(student: StudentLayout, teacher: StudentLayout) -> dict[str, Encoder]:
    fp8 = Encoder(teacher, torch.float8_e4m3fn)
    return {STUDENT_FILE: Encoder(student), BF16_FILE: Encoder(teacher), FP8_FILE: fp8}


TINY_STUDENT, TINY = StudentLayout(64, 128, 2, 2, hidden_width=64, projected_width=4096), StudentLayout(4096, 64, 1, 1)
SMALL_FLUX = FluxLayout(128, 1, 1)
FULL = Scale(True, _encoders(StudentLayout.named("base"), XXL), 1024, 8, 3, 10)
SMALL = Scale(False, _encoders(TINY_STUDENT, TINY), 64, 2, 2, 2)


@dataclasses.dataclass(frozen=True)
class ModelFile:
    """A model file in ComfyUI's folders: its tensors, and what draws them; its content is a hole until `filled`."""

    path: Path
    shapes: dict[str, Shape]
    dtype: torch.dtype
    draw: Draw

    def laid_out(self) -> bool:
        """Make the file with a hole for its numbers; False if it is there already."""
        if self.path.exists():
            return False
        lay_out(self.path, self.shapes, self.dtype)
        return True

    def filled(self) -> Path:
        """The path of the complete file, which is written if it is missing."""
        return fill(self.path, self.draw) if self.laid_out() else self.path


def model_file(scale: Scale, name: str, family: Family = DEFAULT) -> ModelFile:
    """The encoder, CLIP or diffusion model of this name."""
    folder = Path(folder_paths.models_dir, "diffusion_models" if name in family.published else "text_encoders")
    if name in scale.encoders:
        encoder = scale.encoders[name]
        return ModelFile(folder / name, encoder.shapes, encoder.dtype, draw_t5(encoder.layout))
    if name == CLIP_L:
        return ModelFile(folder / name, CLIP_L_SHAPES, torch.float16, draw_any())
    if name == CLIP_G:
        shapes = {key: tuple(tensor.shape) for key, tensor in random_models.clip_g().items()}
        return ModelFile(folder / name, shapes, torch.float16, draw_any())
    return ModelFile(folder / name, published_shapes(family, name) if scale.full else SMALL_FLUX.tensors(), torch.bfloat16, draw_any())


def measure_encoders(scale: Scale, encoders: Sequence[str]) -> Iterator[Row]:
    """Load, encode and change of prompt of each encoder, one after the other."""
    for name in encoders:
        path, clip_l = model_file(scale, name).filled(), model_file(scale, CLIP_L).filled()
        comfy.model_management.unload_all_models()
        row = measure_encoder(scale.encoders[name], path, clip_l)
        yield {"encoder": name} | {key: value for key, value in row.items() if not key.startswith(("rss", "private"))}


@torch.inference_mode()
def measure_pipeline(scale: Scale, encoders: Sequence[str], modes: Sequence[str]) -> Iterator[Row]:
    """Seconds per image, each of a new prompt, without VAE.

    Mode `offload`: all models leave the device between encoding and sampling. `resident`: ComfyUI moves what does not fit.
    """
    model = comfy.sd.load_diffusion_model(str(model_file(scale, FLUX_DEV).filled()))
    for name in encoders:
        clip = scale.encoders[name].load(model_file(scale, name).filled(), model_file(scale, CLIP_L).filled())
        for mode in modes:
            comfy.model_management.unload_all_models()
            measuring.restart_peak()
            images = [_image(scale, model, clip, seed, mode == "offload") for seed in range(scale.images)]
            encodings, totals, latents = zip(*images, strict=True)
            yield {
                "encoder": name,
                "mode": mode,
                "first_image_s": totals[0],
                "next_image_s": statistics.median(totals[1:]),
                "next_encode_s": statistics.median(encodings[1:]),
                "device_peak_gb": measuring.peak_gb(),
                **_placement(model),
                "latent_sha256": hashlib.sha256(latents[-1].float().numpy().tobytes()).hexdigest(),
            }


def _image(scale: Scale, model: Any, clip: Any, seed: int, offload: bool) -> tuple[float, float, torch.Tensor]:
    """Seconds of encoding, of everything, and the latent."""
    unload: Callable[[], object] = comfy.model_management.unload_all_models if offload else lambda: None
    empty = torch.zeros(1, 16, scale.side_px // 8, scale.side_px // 8)
    noise = comfy.sample.prepare_noise(empty, seed)

    def sample() -> torch.Tensor:
        unload()
        how = (scale.denoising_steps, 1.0, "euler", "simple", positive, positive, empty)
        return comfy.sample.sample(model, noise, *how, disable_pbar=True, seed=seed)

    unload()
    encoding, positive = measuring.timed(lambda: encode(clip, PROMPTS[seed]))
    sampling, latent = measuring.timed(sample)
    return encoding.wall_s, encoding.wall_s + sampling.wall_s, latent.cpu()


def _placement(patcher: Any) -> Row:
    return {"model_gb": patcher.model_size() / 1e9, "on_device_gb": patcher.loaded_size() / 1e9}


def recipe_of(scale: Scale, name: str, settings: Sequence[str] = ()) -> Recipe:
    """A shipped recipe for its cost alone: starter prompts at its longest length, a random student, one batch per optimizer step."""
    recipe = load_recipe(name)
    sets = ["student.start=random", "preview.vae=", "teacher.chunk_prompts=1", "validation.prompts=1", "optimizer.warmup_steps=0"]
    sets.append("teacher.cache=")
    sets.append(f"sampling.token_lengths=[{max(recipe.sampling.token_lengths) if scale.full else 16}]")
    for number in range(len(recipe.stages)):
        sets += [f"stage.{number}.accumulate=1", f"stage.{number}.corpora={PROMPTS_FILE}"]
        if not scale.full:
            sets += [f"stage.{number}.batch=2", f"stage.{number}.resolution_px={max(scale.side_px, recipe.family.least_side_px)}"]
    if not scale.full:
        sets += ["teacher.t5=stand-in", "teacher.clip_l=none", "teacher.clip_g=none", "diffusion_model.file=stand-in"]
        sets += ["sampling.guidance=[3.5]"] if recipe.family.name == "flux" else []
    recipe = load_recipe(name, [*sets, *settings])
    return recipe if scale.full else recipe.model_copy(update={"students": load_recipe("smoke").students})


def _write_models(scale: Scale, recipe: Recipe) -> None:
    """Write the models of a recipe if its run fits: a rehearsal reads headers alone, so that it comes first."""
    names = (recipe.diffusion_model.file, recipe.teacher.t5, *recipe.teacher.companions.values())
    missing = [file for name in names if (file := model_file(scale, name, recipe.family)).laid_out()]
    try:
        _check_fits(recipe)
    except ValueError:
        for file in missing:
            file.path.unlink()
        raise
    for file in missing:
        fill(file.path, file.draw)


def _check_fits(recipe: Recipe) -> None:
    """Raise ValueError as the trainer does, which would also rehearse with which changes the run fits."""
    device, total_of, advice = measuring.device(), comfy.model_management.get_total_memory, "see `train RECIPE --rehearse --memory`."
    found = rehearsal_of(recipe, device)
    check_memory(found, total_of(device), str(device), lambda: advice)
    if found.on_gpu:
        check_ram(ram_parts(recipe, found, 1, found.model), total_of(torch.device("cpu")), 1, lambda: advice)


def measure_recipe(scale: Scale, name: str, settings: Sequence[str] = ()) -> Iterator[Row]:
    """Trainer steps of each stage of a recipe that costs something else than those before. Raises ValueError if the run does not fit."""
    recipe = recipe_of(scale, name, settings)
    if scale.full:
        _write_models(scale, recipe)
    load, workshop = measuring.timed(lambda: open_workshop(recipe, Ranks()))
    different = {
        (stage.objective, stage.blocks, stage.resolution_px, stage.batch): number for number, stage in reversed([*enumerate(recipe.stages)])
    }
    with workshop.model.differentiable(recipe.diffusion_model.checkpoint_blocks):
        for number in sorted(different.values()):
            yield {"recipe": name, "dtype": recipe.diffusion_model.dtype, "load_s": load.wall_s} | _measure_stage(scale, workshop, number)


def _measure_stage(scale: Scale, workshop: Workshop, number: int) -> Row:
    stage, learner, model = workshop.recipe.stages[number], workshop.learner, workshop.model
    batches, objective = workshop.schedule.batches(number, 0), workshop.objective(number)
    encoding, texts = measuring.timed(lambda: texts_of(workshop.teacher, batches))
    swap, start = measuring.timed(lambda: workshop.starts(batches, texts, workshop.recipe.sampling.steps))

    def step(positions: list[Any]) -> Any:
        return train_step(start if positions[0].done else positions, model, [learner], objective)

    # The first step allocates the optimizer's state and chooses kernels: its operations are counted, its time is not.
    with FlopCounterMode(display=False) as counter:
        [report], positions = step(start)
    measuring.restart_peak()
    times, losses = [], [report.loss]
    while len(times) < scale.trainer_steps and (len(times) < 3 or sum(times) < STAGE_S):
        timing, ([report], positions) = measuring.timed(lambda positions=positions: step(positions))
        times.append(timing.wall_s)
        losses.append(report.loss)
    step_s, flops = statistics.median(times), counter.get_total_flops()
    rehearsed = workshop.rehearsal.stages[number] if workshop.rehearsal else None
    return {
        "stage": stage.name,
        "resolution_px": stage.resolution_px,
        "batch": stage.batch,
        "tokens": max(workshop.recipe.sampling.token_lengths),
        "steps": len(times),
        "encode_s": encoding.wall_s,
        "swap_s": swap.wall_s,
        "step_s": step_s,
        "fastest_step_s": min(times),
        "samples_per_s": stage.batch / step_s,
        "step_tflop": flops / 1e12,
        "tflop_per_s": flops / step_s / 1e12,
        "device_peak_gb": measuring.peak_gb(),
        "rehearsed_peak_gb": rehearsed and rehearsed.need.total / 1e9,
        "rehearsed_offloaded_gb": rehearsed and sum(rehearsed.need.offloaded.values()) / 1e9,
        "rehearsed_tflop": rehearsed and sum(rehearsed.flops.values()) / 1e12,
        **_placement(model.patcher),
        "losses": losses,
        "skipped": learner.skipped,
        "loss_scale": learner.scaler.get_scale(),
    }


def measure_resume(_scale: Scale, formats: Sequence[str] = tuple(FORMATS)) -> Iterator[Row]:
    """The smoke recipe to its end, and twice from its checkpoint at step 5: the same bits?

    Where two resumes differ, the device itself is not repeatable.
    """
    for name in formats:
        recipe = load_recipe("smoke", [*RESUMED, *FORMATS[name]])
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder, "whole")
            train(recipe, whole, False, Ranks())
            found = [_bits(whole)]
            for again in ("first", "second"):
                cut = Path(shutil.copytree(whole, Path(folder, again)))
                shutil.rmtree(cut / "checkpoints" / "step-000008")
                train(recipe, cut, True, Ranks())
                found.append(_bits(cut))
        yield {"format": name, "same_bits": found[1] == found[0], "repeatable": found[2] == found[1]}


def _bits(run: Path) -> tuple[str, str | None]:
    """Digests of student, optimizer, random states and latents at the end of a run."""
    last = run / "checkpoints" / "step-000008"
    return sha256(last / TENSORS), open_student(last / STUDENT).metadata.sha256


def measure_device(quick: bool, note: str) -> Iterator[Row]:
    """Facts about machine and device, its rates, and the sizes to measure: small ones where there is no accelerator."""
    where, management = measuring.device(), comfy.model_management
    scale = SMALL if quick or where.type == "cpu" else FULL
    numbers = torch.ones(1 << (28 if scale.full else 20), dtype=torch.float32)
    copying, _ = measuring.timed(lambda: numbers.to(where))
    written = Path(folder_paths.base_path, "write-speed")
    writing, _ = measuring.timed(lambda: written.write_bytes(numbers.numpy().data.cast("B")))
    written.unlink()
    side = 8192 if scale.full else 256
    left, right = (torch.randn(side, side).to(where, torch.bfloat16) for _ in range(2))
    product_s = min(measuring.timed(lambda: left @ right)[0].wall_s for _ in range(10))
    yield {
        **measuring.machine(note),
        "device": str(where),
        "device_name": device_name(str(where)),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "full": scale.full,
        "device_gb": management.get_total_memory(where) / 1e9,
        "device_free_gb": management.get_free_memory(where) / 1e9,
        "product_flops_per_s": 2 * side**3 / product_s,
        "to_device_gb_per_s": numbers.nbytes / copying.wall_s / 1e9,
        "write_gb_per_s": numbers.nbytes / writing.wall_s / 1e9,
    }


def _driver() -> str | None:
    """The first line that the driver's module says about itself; None where there is none."""
    for path in map(Path, ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version")):
        if path.is_file():
            return path.read_text(encoding="utf-8").splitlines()[0]
    return None


PARTS: dict[str, Callable[..., Iterator[Row]]] = {
    "encoders": measure_encoders,
    "pipeline": measure_pipeline,
    "recipe": measure_recipe,
    "resume": measure_resume,
}
