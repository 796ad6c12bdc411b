"""What a text encoder costs: distilled T5 Small, Base and Large against stock T5-XXL in bf16 and fp8, each with CLIP-L.

Weights are random, sizes are real. Each encoder is measured in fresh processes: the first reads its file from the disk, the others from the
page cache. With --gpu also the Flux pipeline, with and without offload, for comparison with Table 5 of arXiv:2503.19897 (README.md).
"""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import psutil
import torch
from distilled_t5.benchmarks.support import measuring
from distilled_t5.benchmarks.support.model_sizes import FluxSizes
from distilled_t5.devtools.comfyui.in_process import start_comfyui
from distilled_t5.devtools.docs.markdown import table
from distilled_t5.devtools.models import random_models
from distilled_t5.encoder.files import write_student
from distilled_t5.students.t5.layout import StudentLayout
from safetensors.torch import save_file

PROMPTS = (
    "a photograph of a red fox that sleeps on a green bench in front of a yellow house, early morning, long shadows, film grain",
    "an oil painting of three sailing ships in a storm, waves as high as houses, a lighthouse far away, dramatic light from the left",
    "the word HELLO written with white chalk on a black board, above it a row of five paper stars, a wooden frame, soft light",
    "an isometric drawing of a small workshop with a blue table, two chairs, a lamp, a shelf full of books and a cat on the floor",
)
REFERENCE = "xxl-bf16"


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A row of the table: the T5 and the format of its file.

    with_checksum: the file has our metadata, whose checksum is verified when it is loaded. layers: fewer layers of T5-XXL, for --quick.
    """

    name: str
    size: str
    dtype: torch.dtype = torch.bfloat16
    with_checksum: bool = False
    layers: int | None = None

    @property
    def stock(self) -> bool:
        return self.size == "xxl"

    @property
    def layout(self) -> StudentLayout:
        layout = StudentLayout.named(self.size, output_width=None if self.stock else 4096)
        return dataclasses.replace(layout, num_layers=self.layers or layout.num_layers)

    def write(self, path: Path) -> None:
        """Write the file as it is published: a student by its names, T5-XXL by those that the stock loader reads."""
        shapes = self.layout.tensors()
        draw = measuring.initial_weight(self.layout, torch.Generator().manual_seed(0))
        if self.with_checksum:
            write_student(path, {name: draw(name, shape).to(self.dtype) for name, shape in shapes.items()})
            return
        if self.stock:
            # ComfyUI detects T5-XXL by a tensor of its last block.
            detected_by = "encoder.encoder.block.23.layer.1.DenseReluDense.wi_1.weight"
            shapes = {name.removeprefix("encoder."): shape for name, shape in {detected_by: (10240, 4096), **shapes}.items()}
        measuring.write_streamed(path, shapes, self.dtype, draw)

    def load(self, path: Path, clip_l: Path) -> Any:
        """The CLIP, as the loader nodes make it."""
        if not self.stock:
            from distilled_t5.encoder.served import ServingOptions, load_encoder

            return load_encoder(str(path), {"clip_l": str(clip_l)}, ServingOptions()).clip
        import comfy.sd

        options: dict[str, Any] = {"t5xxl_model_config": {"num_layers": self.layers}} if self.layers else {}
        return comfy.sd.load_clip([str(clip_l), str(path)], clip_type=comfy.sd.CLIPType.FLUX, model_options=options)


def encoders(quick: bool) -> dict[str, Encoder]:
    """The rows of the table."""
    if quick:
        return {row.name: row for row in (Encoder("base", "base"), Encoder(REFERENCE, "xxl", layers=1))}
    students = [Encoder("small", "small"), Encoder("base", "base")]
    others = [Encoder("base, checksum", "base", with_checksum=True), Encoder("large", "large"), Encoder(REFERENCE, "xxl")]
    return {row.name: row for row in (*students, *others, Encoder("xxl-fp8", "xxl", torch.float8_e4m3fn))}


def encode(clip: Any, prompt: str) -> Any:
    """What a text encode node does."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(prompt), add_dict={"guidance": 3.5})


@torch.inference_mode()
def measure_encoder(encoder: Encoder, path: Path, clip_l: Path, gpu: bool) -> dict[str, Any]:
    """Load and encode in this fresh process: times in seconds, memory in GB."""
    import comfy.sd  # noqa: F401 (its import is not part of the loading time)

    before = measuring.memory_gb()["rss"]
    load, clip = measuring.timed(lambda: encoder.load(path, clip_l), gpu)
    loaded = measuring.memory_gb()["private"]
    first, conditioning = measuring.timed(lambda: encode(clip, PROMPTS[0]), gpu)
    again = [measuring.timed(lambda: encode(clip, PROMPTS[0]), gpu)[0] for _ in range(2)]
    change = [measuring.timed(lambda prompt=prompt: encode(clip, prompt), gpu)[0] for prompt in PROMPTS[1:3]]
    model = clip.cond_stage_model
    parts = {"t5": model.t5base if hasattr(model, "t5base") else model.t5xxl, "clip_l": model.clip_l}
    memory = measuring.memory_gb()
    return {
        "load_s": load.wall_s,
        "load_cpu_s": load.cpu_s,
        "first_encode_s": first.wall_s,
        "next_encode_s": statistics.median(timing.wall_s for timing in again),
        "new_prompt_s": statistics.median(timing.wall_s for timing in change),
        "best_encode_s": min(timing.wall_s for timing in again + change),
        "best_encode_cpu_s": min(timing.cpu_s for timing in again + change),
        **{f"{name}_weights_gb": sum(weight.nbytes for weight in part.parameters()) / 1e9 for name, part in parts.items()},
        "rss_before_load_gb": before,
        "private_after_load_gb": loaded,
        "private_at_end_gb": memory["private"],
        "rss_peak_gb": memory["peak"],
        "gpu_peak_gb": torch.cuda.max_memory_allocated() / 1e9 if gpu else None,
        "tokens": conditioning[0][0].shape[1],
        "runs_on": str(clip.patcher.load_device),
        "load_average": psutil.getloadavg()[0],
    }


def write_flux(path: Path, quick: bool) -> None:
    """A random Flux dev in bf16: of full size (24 GB), for --quick with two blocks."""
    generator = torch.Generator().manual_seed(0)
    shapes = (FluxSizes(width=256, double=1, single=1) if quick else FluxSizes()).tensors()
    measuring.write_streamed(
        path, shapes, torch.bfloat16, lambda _, shape: torch.empty(shape).normal_(0.0, shape[-1] ** -0.5, generator=generator)
    )


@torch.inference_mode()
def measure_pipeline(encoder: Encoder, path: Path, clip_l: Path, task: dict[str, Any]) -> dict[str, Any]:
    """Seconds per image, each of a new prompt, without VAE; peak GPU memory.

    With offload only the model at work is on the GPU, as ComfyUI does on a small card; otherwise all models stay there.
    """
    import comfy.model_management
    import comfy.sample
    import comfy.sd

    model, clip = comfy.sd.load_diffusion_model(task["flux"]), encoder.load(path, clip_l)
    side, steps = (8, 2) if task["quick"] else (128, 8)
    latent = torch.zeros(1, 16, side, side)

    def sample(seed: int) -> torch.Tensor:
        if task["offload"]:
            comfy.model_management.unload_all_models()
        positive = encode(clip, PROMPTS[seed])
        if task["offload"]:
            comfy.model_management.unload_all_models()
        noise = comfy.sample.prepare_noise(latent, seed)
        return comfy.sample.sample(model, noise, steps, 1.0, "euler", "simple", positive, positive, latent, disable_pbar=True, seed=seed)

    first, *later = (measuring.timed(lambda seed=seed: sample(seed), task["gpu"])[0].wall_s for seed in range(4))
    return {
        "first_image_s": first,
        "next_image_s": statistics.median(later),
        "gpu_peak_gb": torch.cuda.max_memory_allocated() / 1e9 if task["gpu"] else None,
        "steps": steps,
        "side_px": 8 * side,
    }


def perform(task: dict[str, Any]) -> dict[str, Any]:
    """Measure in this process what a task names."""
    encoder, path, clip_l, pipeline = encoders(task["quick"])[task["encoder"]], Path(task["path"]), Path(task["clip_l"]), "offload" in task
    start_comfyui(task["gpu"], gpu_only=pipeline and task["gpu"] and not task["offload"])
    return measure_pipeline(encoder, path, clip_l, task) if pipeline else measure_encoder(encoder, path, clip_l, task["gpu"])


def combine(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A row from the runs of an encoder: `load_cold_s` of the first, which read from the disk; otherwise medians."""
    loads = [run["load_s"] for run in runs]
    row = {key: statistics.median(run[key] for run in runs) if isinstance(value, float) else value for key, value in runs[0].items()}
    del row["load_s"]
    return {"load_cold_s": loads[0], "load_warm_s": statistics.median(loads[1:] or loads)} | row


def measure_all(folder: Path, quick: bool, gpu: bool) -> dict[str, Any]:
    """Write, measure and delete each file: rows of the encoders, their runs, rows of the pipeline (GPU only; --quick tries one)."""
    clip_l, flux = folder / "clip_l.safetensors", folder / "flux.safetensors"
    save_file(random_models.clip_l(), clip_l)
    if gpu or quick:
        write_flux(flux, quick)
    found: dict[str, Any] = {"encoders": {}, "runs": {}, "pipeline": {}}
    for name, encoder in encoders(quick).items():
        path = folder / f"{name}.safetensors"
        print(f"{name}: measuring", flush=True)
        encoder.write(path)
        measuring.evict(path)
        task = {"encoder": name, "path": str(path), "clip_l": str(clip_l), "gpu": gpu, "quick": quick}
        runs = found["runs"][name] = [measuring.in_fresh_process(__file__, task) for _ in range(1 if quick else 3)]
        found["encoders"][name] = {"file_gb": path.stat().st_size / 1e9, **combine(runs)}
        for mode in (("offload",) if name == "base" else ()) if quick else ("offload", "resident") if gpu else ():
            pipeline = {**task, "flux": str(flux), "offload": mode == "offload"}
            found["pipeline"][f"{name} {mode}"] = measuring.in_fresh_process(__file__, pipeline)
        path.unlink()
    return found


TIMES = (
    *("load_cold_s", "load_warm_s", "first_encode_s", "next_encode_s", "new_prompt_s", "best_encode_s"),
    *("load_cpu_s", "best_encode_cpu_s"),
)
SIZES = ("t5_weights_gb", "clip_l_weights_gb", "rss_peak_gb", "private_at_end_gb")
COMPARED = (*TIMES, "t5_weights_gb", "rss_peak_gb")


def rows(found: dict[str, Any], columns: tuple[str, ...]) -> str:
    """A table of these columns."""
    return table(["", *columns], [[name, *(row[key] for key in columns)] for name, row in found.items()])


def main() -> None:
    """Measure, print the tables, write the JSON."""
    options = measuring.options_or_task(__doc__ or "", perform)
    if options is None:
        return
    start_comfyui(options.gpu)
    facts = measuring.machine(options.note)
    with measuring.scratch_folder(4 if options.quick else 36 if options.gpu else 11) as folder:
        found = measure_all(folder, options.quick, options.gpu)
    measured = found["encoders"]
    ratios = {name: {key: measured[REFERENCE][key] / row[key] for key in COMPARED} for name, row in measured.items()}
    print(f"\n{rows(measured, (*TIMES, *SIZES))}\n\nhow many times less than {REFERENCE}\n{rows(ratios, COMPARED)}")
    print(rows(found["pipeline"], ("first_image_s", "next_image_s", "gpu_peak_gb")))
    result = {"machine": facts, "quick": options.quick, **found, "ratios": ratios}
    print(f"\nwritten: {measuring.save_result(result, 'gpu' if options.gpu else 'cpu', options)}")


if __name__ == "__main__":
    main()
