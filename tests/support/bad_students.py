"""Files that are not a distilled T5, each with its maker and with words of the message that refuses it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...devtools.models.random_models import clip_l_shapes
from ...students.t5.layout import SHARED, StudentLayout
from .tiny_students import FULL_VOCABULARY, joined, published_file, sparse_file, taken_apart, tiny_tensors

STUDENT = tiny_tensors(FULL_VOCABULARY)
TABLE = (32128, 8)
Maker = Callable[[Path], Any]


def changed(**changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The tensors of a student with some of them replaced, added or (None) taken away; `__` stands for a dot."""
    table = STUDENT | {name.replace("__", "."): tensor for name, tensor in changes.items() if tensor is not None}
    return {name: tensor for name, tensor in table.items() if changes.get(name.replace(".", "__"), tensor) is not None}


def xxl() -> dict[str, tuple[int, ...]]:
    return {name.removeprefix("encoder."): shape for name, shape in StudentLayout.named("xxl", output_width=None).tensors().items()}


def wrong_metadata(path: Path) -> None:
    published_file(path, STUDENT, {"distilled_t5.format_version": "1", "distilled_t5.projection": "none"})


def truncated(path: Path) -> None:
    published_file(path, STUDENT)
    os.truncate(path, path.stat().st_size - 1000)


def damaged(path: Path) -> None:
    """Tensor bytes that are not those whose hash the file names."""
    header, data = taken_apart(published_file(path, STUDENT).read_bytes())
    header["__metadata__"] = {"distilled_t5.format_version": "1", "modelspec.hash_sha256": "0x" + "12" * 32}
    path.write_bytes(joined(header, data))


FILES: dict[str, tuple[Maker, tuple[str, ...]]] = {
    "CLIP-L": (lambda path: sparse_file(path, clip_l_shapes(), "F16"), ("a CLIP text encoder", "clip_name1")),
    "Flux": (lambda path: sparse_file(path, {"double_blocks.0.img_mod.lin.weight": (3072, 64)}), ("a diffusion model",)),
    "T5-XXL": (lambda path: sparse_file(path, xxl(), "F16"), ("a plain T5-XXL", "Load CLIP, DualCLIPLoader or TripleCLIPLoader")),
    "stripped student": (
        lambda path: published_file(path, {name: t for name, t in STUDENT.items() if "projection" not in name}),
        ("without a projection", "final_projection.0 and .3"),
    ),
    "LoRA": (lambda path: sparse_file(path, {"lora_unet_single_blocks_0.lora_down.weight": (4, 8)}), ("a LoRA", "LoraLoader")),
    "VAE": (lambda path: sparse_file(path, {"decoder.conv_in.weight": (8, 16, 3, 3)}), ("a VAE", "Load VAE")),
    "empty": (lambda path: path.touch(), ("is empty (0 bytes)", "download")),
    "truncated": (truncated, ("not a complete safetensors file", "cut off")),
    "renamed GGUF": (lambda path: path.write_bytes(b"GGUF" + bytes(999)), ("GGUF", "ComfyUI-GGUF")),
    "wrong width": (
        lambda path: published_file(path, tiny_tensors(StudentLayout(8, 12, 1, 2, 4, hidden_width=8, projected_width=768))),
        ("width 768", "flux requires 4096"),
    ),
    "missing tensor": (lambda path: published_file(path, changed(encoder__encoder__final_layer_norm__weight=None)), ("final_layer_norm",)),
    "extra tensor": (lambda path: published_file(path, changed(lm_head=torch.zeros(3))), ("1 unexpected", "  lm_head\n")),
    "NaN": (
        lambda path: published_file(path, changed(encoder__shared__weight=torch.full(TABLE, torch.nan, dtype=torch.bfloat16))),
        ("hold NaN or infinity", f"  {SHARED}\n"),
    ),
    "integers": (
        lambda path: published_file(path, changed(encoder__shared__weight=torch.zeros(*TABLE, dtype=torch.int8))),
        (f"  {SHARED}: I8\n", "BF16"),
    ),
    "wrong metadata": (wrong_metadata, ("distilled_t5.projection = 'none'", "a projection")),
    "other data than its hash says": (damaged, ("changed or damaged", "Expected 1212", "Got")),
}
