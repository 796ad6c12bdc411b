"""What a text encoder costs on a CPU: distilled T5 Small, Base and Large against stock T5-XXL in bf16 and fp8, each with CLIP-L.

Weights are random, sizes are real. Each encoder is measured in fresh processes: the first reads its file from the disk, the others from the
page cache.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from distilled_t5.benchmarks.support import measuring
from distilled_t5.benchmarks.support.encoders import XXL, Encoder, measure_encoder, write_clip_l
from distilled_t5.devtools.comfyui.in_process import start_comfyui
from distilled_t5.devtools.docs.markdown import table
from distilled_t5.students.t5.layout import StudentLayout

REFERENCE = "xxl-bf16"


def encoders(quick: bool) -> dict[str, Encoder]:
    """The rows of the table."""
    small, base, large = (Encoder(StudentLayout.named(size)) for size in ("small", "base", "large"))
    if quick:
        return {"base": base, REFERENCE: Encoder(dataclasses.replace(XXL, num_layers=1))}
    checked = dataclasses.replace(base, with_checksum=True)
    stock = {REFERENCE: Encoder(XXL), "xxl-fp8": Encoder(XXL, torch.float8_e4m3fn)}
    return {"small": small, "base": base, "base, checksum": checked, "large": large, **stock}


def perform(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Measure an encoder in this process."""
    start_comfyui("--cpu")
    yield measure_encoder(encoders(task["quick"])[task["encoder"]], Path(task["path"]), Path(task["clip_l"]))


def combine(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A row from the runs of an encoder: `load_cold_s` of the first, which read from the disk; otherwise medians."""
    loads = [run["load_s"] for run in runs]
    row = {key: statistics.median(run[key] for run in runs) if isinstance(value, float) else value for key, value in runs[0].items()}
    del row["load_s"]
    return {"load_cold_s": loads[0], "load_warm_s": statistics.median(loads[1:] or loads)} | row


def measure_all(folder: Path, quick: bool) -> dict[str, Any]:
    """Write, measure and delete each file: rows of the encoders, and their runs."""
    clip_l = write_clip_l(folder / "clip_l.safetensors")
    found: dict[str, Any] = {"encoders": {}, "runs": {}}
    for name, encoder in encoders(quick).items():
        print(f"{name}: measuring", flush=True)
        path = encoder.write(folder / f"{name}.safetensors")
        measuring.evict(path)
        task = {"encoder": name, "path": str(path), "clip_l": str(clip_l), "quick": quick}
        runs = found["runs"][name] = [run for _ in range(1 if quick else 3) for run in measuring.in_fresh_process(__file__, task)]
        found["encoders"][name] = {"file_gb": path.stat().st_size / 1e9, **combine(runs)}
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
    options = measuring.with_task(measuring.command_line(__doc__ or ""), perform)
    if options is None:
        return
    start_comfyui("--cpu")
    facts = measuring.machine(options.note)
    with measuring.scratch_folder(4 if options.quick else 11) as folder:
        found = measure_all(folder, options.quick)
    measured = found["encoders"]
    ratios = {name: {key: measured[REFERENCE][key] / row[key] for key in COMPARED} for name, row in measured.items()}
    print(f"\n{rows(measured, (*TIMES, *SIZES))}\n\nhow many times less than {REFERENCE}\n{rows(ratios, COMPARED)}")
    result = {"machine": facts, "quick": options.quick, **found, "ratios": ratios}
    print(f"\nwritten: {measuring.save_result(result, measuring.result_path('cpu', options))}")


if __name__ == "__main__":
    main()
