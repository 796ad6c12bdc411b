"""The README's numbers are those of a kept benchmark run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "benchmarks" / "results"
NAMES = {
    "small": "T5-Small, bf16",
    "base": "T5-Base, bf16",
    "large": "T5-Large, bf16",
    "xxl-fp8": "T5-XXL, fp8",
    "xxl-bf16": "T5-XXL, bf16",
}


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("key", NAMES)
def test_speed_and_memory_are_those_of_the_kept_run(key):
    encoders = read("2026-11-21-cpu.json")["encoders"]
    row, largest = encoders[key], encoders["xxl-bf16"]
    speeds = [largest[name] / row[name] for name in ("load_cpu_s", "best_encode_cpu_s")]
    cells = [NAMES[key], f"{row['t5_weights_gb']:.2f} GB", f"{row['rss_peak_gb']:.1f} GB", *(f"{speed:.1f} x" for speed in speeds)]
    assert "| " + " | ".join(cells) + " |" in README


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8_e4m3fn"])
def test_precision_is_that_of_the_kept_run(dtype):
    rows = read("2026-11-21-precision.json")["rows"]["the same with layer norms spread as by training"]
    row = rows[dtype]
    cells = [dtype, f"{row['mb']:.0f} MB", f"{100 * row['relative_error']:.2f} %", f"{row['cosine_mean']:.5f}", f"{row['cosine_min']:.5f}"]
    assert "| " + " | ".join(cells) + " |" in README
