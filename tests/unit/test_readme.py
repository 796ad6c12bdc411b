"""Figures on the pages are those of a kept benchmark run, or computed from the sizes of tensors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from distilled_t5.families.flux_tensors import FluxLayout
from distilled_t5.students.t5.layout import StudentLayout

ROOT = Path(__file__).resolve().parent.parent.parent
README, BENCHMARKS = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "benchmarks/README.md"))
RESULTS = ROOT / "benchmarks" / "results"
NAMES = {
    "small": "T5-Small, bf16",
    "base": "T5-Base, bf16",
    "large": "T5-Large, bf16",
    "xxl-fp8": "T5-XXL, fp8",
    "xxl-bf16": "T5-XXL, bf16",
}
# Bits per weight; a block of GGUF's Q4_K has 144 bytes for 256 weights, one of Q6_K 210.
BITS = {"bf16": 16, "fp16": 16, "fp8": 8, "GGUF Q4_K": 4.5, "GGUF Q6_K": 6.5625}
CARDS = {8: "GGUF Q4_K", 12: "GGUF Q6_K", 16: "fp8", 24: "bf16"}
TO_SPARE_GB = 1.0


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def gb(parameters: int, number_format: str) -> float:
    return parameters * BITS[number_format] / 8 / 1e9


def encoders_gb() -> list[float]:
    """T5-XXL in fp16, fp8 and Q4_K, and the distilled T5-Base in bf16."""
    xxl = StudentLayout.named("xxl", None).parameters
    return [*(gb(xxl, number_format) for number_format in ("fp16", "fp8", "GGUF Q4_K")), gb(StudentLayout.named("base").parameters, "bf16")]


def bold_last(cells: list[str]) -> str:
    return " | ".join([*cells[:-1], f"**{cells[-1]}**"])


def test_weights_of_the_text_encoders_are_those_of_their_tensors() -> None:
    assert f"| {bold_last([f'{size:.2f} GB' for size in encoders_gb()])} | computed |" in README


@pytest.mark.parametrize("card", CARDS)
def test_memory_by_card_is_the_sum_of_the_weights(card: int) -> None:
    number_format = CARDS[card]
    flux = sum(map(math.prod, FluxLayout().tensors().values()))
    clip_l_gb = read("2026-11-21-cpu.json")["encoders"]["base"]["clip_l_weights_gb"]
    sums = [gb(flux, number_format) + size + clip_l_gb for size in encoders_gb()]
    fits = [", fits" if total <= card * 2**30 / 1e9 - TO_SPARE_GB else "" for total in sums]
    cells = [f"{total:.1f} GB{fit}" for total, fit in zip(sums, fits, strict=True)]
    assert f"| VRAM on a card of {card} GB, Flux in {number_format} | {bold_last(cells)} | computed |" in README


@pytest.mark.parametrize(("figure", "unit", "digits"), [("rss_peak_gb", "GB", 1), ("best_encode_cpu_s", "s", 0)])
def test_measured_figures_are_those_of_the_kept_run(figure: str, unit: str, digits: int) -> None:
    encoders = read("2026-11-21-cpu.json")["encoders"]
    xxl, fp8, base = (encoders[name][figure] for name in ("xxl-bf16", "xxl-fp8", "base"))
    assert f"| {xxl:.{digits}f} {unit} | {fp8:.{digits}f} {unit} | not measured | **{base:.1f} {unit}** | measured |" in README


@pytest.mark.parametrize("key", NAMES)
def test_speed_and_memory_are_those_of_the_kept_run(key: str) -> None:
    encoders = read("2026-11-21-cpu.json")["encoders"]
    row, largest = encoders[key], encoders["xxl-bf16"]
    speeds = [largest[name] / row[name] for name in ("load_cpu_s", "best_encode_cpu_s")]
    cells = [NAMES[key], f"{row['t5_weights_gb']:.2f} GB", f"{row['rss_peak_gb']:.1f} GB", *(f"{speed:.1f} x" for speed in speeds)]
    assert "| " + " | ".join(cells) + " |" in BENCHMARKS


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8_e4m3fn"])
def test_precision_is_that_of_the_kept_run(dtype: str) -> None:
    rows = read("2026-11-21-precision.json")["rows"]["the same with layer norms spread as by training"]
    row = rows[dtype]
    cells = [dtype, f"{row['mb']:.0f} MB", f"{100 * row['relative_error']:.2f} %", f"{row['cosine_mean']:.5f}", f"{row['cosine_min']:.5f}"]
    assert "| " + " | ".join(cells) + " |" in BENCHMARKS
