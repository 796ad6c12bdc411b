"""What a text encoder costs: distilled T5 Small, Base and Large against stock T5-XXL in bf16 and fp8, CLIP-L included in all.

Weights are random, sizes are real. Each encoder is measured in processes of its own: in the first its file comes from the disk, in the
others from the page cache. With --gpu also the whole Flux pipeline, with offload and without, beside Table 5 of arXiv:2503.19897.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import psutil
import torch
from distilled_t5.benchmarks.support import measuring as measure
from distilled_t5.benchmarks.support.model_sizes import FluxSizes
from distilled_t5.devtools.comfyui.in_process import start_comfyui
from distilled_t5.devtools.models import random_models as stand_ins
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
# What a prototype reached with Base on a CPU at 256 tokens, and what is therefore expected.
EXPECTED = {"next_encode_s": 38, "best_encode_cpu_s": 38, "load_warm_s": 14, "load_cpu_s": 14}
EXPECTED_WEIGHTS_GB = 0.27
# arXiv:2503.19897, Table 5: diffusers on an A100, T5-Base and T5-XXL, 8 steps; MB and seconds.
PAPER = {
    "base": {"encoder_mb": 285, "pipeline_mb": 23401, "offload_s": 16.61, "resident_s": 8.89},
    "xxl-bf16": {"encoder_mb": 11004, "pipeline_mb": 34113, "offload_s": 24.71, "resident_s": 8.95},
}


@dataclasses.dataclass(frozen=True)
class Encoder:
    """One row of the table: the T5 and the number format of its file.

    with_checksum: the file carries the metadata that our own files have, and its checksum is verified on loading; the published file has
    neither. layers: cuts T5-XXL short for --quick.
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
        """Write the file as it is published: a student with its names, T5-XXL with those that the stock loader knows."""
        shapes = self.layout.tensors()
        draw = measure.initial_weight(self.layout, torch.Generator().manual_seed(0))
        if self.with_checksum:
            write_student(path, {name: draw(name, shape).to(self.dtype) for name, shape in shapes.items()})
            return
        if self.stock:
            # ComfyUI knows T5-XXL by a tensor of its last block.
            telling = "encoder.encoder.block.23.layer.1.DenseReluDense.wi_1.weight"
            shapes = {name.removeprefix("encoder."): shape for name, shape in {telling: (10240, 4096), **shapes}.items()}
        measure.write_streamed(path, shapes, self.dtype, draw)

    def load(self, path: Path, clip_l: Path) -> Any:
        """The CLIP, as the loader nodes make it."""
        if not self.stock:
            from distilled_t5.encoder.served import ServingOptions, load_encoder

            return load_encoder(str(path), str(clip_l), ServingOptions()).clip
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
    start_comfyui(gpu)
    import comfy.sd  # noqa: F401 (its import is no part of the loading time)

    before = measure.memory_gb()["rss"]
    load, clip = measure.timed(lambda: encoder.load(path, clip_l), gpu)
    loaded = measure.memory_gb()["private"]
    first, conditioning = measure.timed(lambda: encode(clip, PROMPTS[0]), gpu)
    again = [measure.timed(lambda: encode(clip, PROMPTS[0]), gpu)[0] for _ in range(2)]
    change = [measure.timed(lambda prompt=prompt: encode(clip, prompt), gpu)[0] for prompt in PROMPTS[1:3]]
    parts = {"t5": getattr(clip.cond_stage_model, "t5xxl" if encoder.stock else "t5base"), "clip_l": clip.cond_stage_model.clip_l}
    memory = measure.memory_gb()
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
    """A random Flux dev in bf16: of full size (24 GB), or for --quick two blocks."""
    generator = torch.Generator().manual_seed(0)
    shapes = (FluxSizes(width=256, double=1, single=1) if quick else FluxSizes()).tensors()
    measure.write_streamed(
        path, shapes, torch.bfloat16, lambda _, shape: torch.empty(shape).normal_(0.0, shape[-1] ** -0.5, generator=generator)
    )


@torch.inference_mode()
def measure_pipeline(encoder: Encoder, path: Path, clip_l: Path, flux: Path, gpu: bool, quick: bool, offload: bool) -> dict[str, Any]:
    """Seconds per picture (a new prompt each; no VAE) and peak GPU memory.

    offload: nothing stays on the GPU that is not at work, which is what a small card forces upon ComfyUI; else everything stays there.
    """
    start_comfyui(gpu, gpu_only=gpu and not offload)
    import comfy.model_management
    import comfy.sample
    import comfy.sd

    model, clip = comfy.sd.load_diffusion_model(str(flux)), encoder.load(path, clip_l)
    side, steps = (8, 2) if quick else (128, 8)
    latent = torch.zeros(1, 16, side, side)

    def picture(seed: int) -> torch.Tensor:
        if offload:
            comfy.model_management.unload_all_models()
        positive = encode(clip, PROMPTS[seed])
        if offload:
            comfy.model_management.unload_all_models()
        noise = comfy.sample.prepare_noise(latent, seed)
        return comfy.sample.sample(model, noise, steps, 1.0, "euler", "simple", positive, positive, latent, disable_pbar=True, seed=seed)

    first, _ = measure.timed(lambda: picture(0), gpu)
    later = [measure.timed(lambda seed=seed: picture(seed), gpu)[0].wall_s for seed in (1, 2, 3)]
    peak_gb = torch.cuda.max_memory_allocated() / 1e9 if gpu else None
    return {
        "first_picture_s": first.wall_s,
        "next_picture_s": statistics.median(later),
        "gpu_peak_gb": peak_gb,
        "steps": steps,
        "side_px": 8 * side,
    }


def perform(task: dict[str, Any]) -> None:
    """Do one task and print its result, as JSON in the last line."""
    encoder, path, clip_l = encoders(task["quick"])[task["encoder"]], Path(task["path"]), Path(task["clip_l"])
    if "offload" in task:
        result = measure_pipeline(encoder, path, clip_l, Path(task["flux"]), task["gpu"], task["quick"], task["offload"])
    else:
        result = measure_encoder(encoder, path, clip_l, task["gpu"])
    print("\n" + json.dumps(result))


def combine(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One row from the runs of an encoder: the first read its file from the disk, the others from the page cache; otherwise medians.

    Of a single run, which has no other, one number stands for both.
    """
    loads = [run["load_s"] for run in runs]
    row = {key: statistics.median(run[key] for run in runs) if isinstance(value, float) else value for key, value in runs[0].items()}
    del row["load_s"]
    return {"load_cold_s": loads[0], "load_warm_s": statistics.median(loads[1:] or loads)} | row


def measure_all(folder: Path, quick: bool, gpu: bool) -> dict[str, Any]:
    """Make each file, measure it, delete it: rows of the encoders, their single runs, rows of the pipeline (GPU; --quick tries one)."""
    clip_l, flux = folder / "clip_l.safetensors", folder / "flux.safetensors"
    save_file(stand_ins.clip_l(), clip_l)
    if gpu or quick:
        write_flux(flux, quick)
    found: dict[str, Any] = {"encoders": {}, "runs": {}, "pipeline": {}}
    for name, encoder in encoders(quick).items():
        path = folder / f"{name}.safetensors"
        print(f"{name}: writing its file", flush=True)
        encoder.write(path)
        task = {"encoder": name, "path": str(path), "clip_l": str(clip_l), "gpu": gpu, "quick": quick}
        runs = found["runs"][name] = []
        for number in range(1 if quick else 3):
            cold = number == 0 and measure.evict(path)
            runs.append(measure.in_fresh_process(__file__, task))
            source = "the disk" if cold else "the page cache"
            print(f"{name}: loaded from {source} in {runs[-1]['load_s']:.2f} s, encodes in {runs[-1]['next_encode_s']:.2f} s", flush=True)
        found["encoders"][name] = {"file_gb": path.stat().st_size / 1e9, **combine(runs)}
        for mode in (("offload",) if name == "base" else ()) if quick else ("offload", "resident") if gpu else ():
            row = measure.in_fresh_process(__file__, {**task, "flux": str(flux), "offload": mode == "offload"})
            found["pipeline"][f"{name} {mode}"] = row
            print(f"{name}: a picture in {row['next_picture_s']:.2f} s ({mode})", flush=True)
        path.unlink()
    return found


TIMES = (
    "load_cold_s",
    "load_warm_s",
    "first_encode_s",
    "next_encode_s",
    "new_prompt_s",
    "best_encode_s",
    "load_cpu_s",
    "best_encode_cpu_s",
)
SIZES = ("t5_weights_gb", "clip_l_weights_gb", "rss_peak_gb", "private_at_end_gb")


def ratios(rows: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How many times less than the reference each encoder takes."""
    return {name: {key: rows[REFERENCE][key] / row[key] for key in (*TIMES, "t5_weights_gb", "rss_peak_gb")} for name, row in rows.items()}


def print_report(result: dict[str, Any]) -> None:
    """The tables."""
    rows, against = result["encoders"], result["ratios"]
    columns = (*TIMES, *SIZES)
    print("\n" + measure.table(["encoder", *columns], [[name, *(row[key] for key in columns)] for name, row in rows.items()]))
    print(f"\nhow many times less than {REFERENCE}")
    print(measure.table(["encoder", *against[REFERENCE]], [[name, *row.values()] for name, row in against.items()]))
    if result["pipeline"]:
        heads = ("first_picture_s", "next_picture_s", "gpu_peak_gb")
        body = [[name, *(row[key] for key in heads), paper_seconds(name)] for name, row in result["pipeline"].items()]
        print("\n" + measure.table(["pipeline", *heads, "paper, A100, s"], body))
    base = rows["base"]
    print(f"\nBase in bf16: {base['t5_weights_gb']:.3f} GB of weights (expected at most {EXPECTED_WEIGHTS_GB})")
    for key, least in EXPECTED.items():
        print(f"Base, {key}: {against['base'][key]:.1f} times less than {REFERENCE} (expected at least {least} on idle CPU cores)")


def paper_seconds(row: str) -> float | None:
    """The paper's figure for a row of the pipeline, if it has one."""
    name, mode = row.rsplit(maxsplit=1)
    return PAPER.get(name, {}).get(f"{mode}_s")


def main() -> None:
    """Measure, print the tables, write the JSON."""
    options = measure.options_or_task(__doc__ or "", perform)
    if options is None:
        return
    comfyui = start_comfyui(options.gpu)
    facts = measure.machine(comfyui, options.gpu, options.note)
    with measure.scratch_folder(4 if options.quick else 36 if options.gpu else 11) as folder:
        found = measure_all(folder, options.quick, options.gpu)
    result = {"machine": facts, "quick": options.quick, **found, "ratios": ratios(found["encoders"]), "paper": PAPER}
    print_report(result)
    print(f"\nwritten: {measure.save_result(result, 'gpu' if options.gpu else 'cpu', options)}")


if __name__ == "__main__":
    main()
