"""Small random models made on the spot, for a first run without any file: a Flux of one head, and a T5 that teaches it nothing."""

from __future__ import annotations

import math
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ..encoder.files import write_student
from ..encoder.layout import StudentLayout
from ..encoder.metadata import StudentMetadata

NAME = "stand-in"
# The width of a head is fixed by Flux's rotary embedding (16 + 56 + 56).
HEAD_WIDTH = 128
WIDTH, DOUBLE_BLOCKS, SINGLE_BLOCKS = HEAD_WIDTH, 1, 1
PATCH_VALUES, POOLED_WIDTH, TIME_WIDTH, TEXT_WIDTH = 64, 768, 256, 4096
TEACHER = StudentLayout(d_model=64, d_ff=128, num_layers=2, num_heads=4, d_kv=16, hidden_width=128, projected_width=TEXT_WIDTH)

Shapes = dict[str, tuple[int, ...]]


def teacher_file(folder: Path) -> Path:
    """A small random encoder of Flux's text width, as a file of ours."""
    return write_student(folder / "teacher.safetensors", drawn(TEACHER.tensors(), seed=1), StudentMetadata(title="stand-in teacher"))


def flux_file(folder: Path) -> Path:
    """A small random Flux with guidance embedding, in the layout that ComfyUI detects."""
    path = folder / "flux.safetensors"
    safetensors.torch.save_file(drawn(flux_shapes(), seed=2), path)
    return path


def drawn(shapes: Shapes, seed: int) -> dict[str, Tensor]:
    """Random float32 weights that keep activations near 1: norms 1, biases 0, token tables of deviation 1, the rest 1/sqrt(inputs)."""
    generator = torch.Generator().manual_seed(seed)
    return {name: _weight(name, shape, generator) for name, shape in shapes.items()}


def _weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
    deviation = 1.0 if "shared" in name else math.prod(shape[1:]) ** -0.5
    # T5 does not divide attention by the root of the head's width; it draws queries that much smaller instead.
    return torch.randn(shape, generator=generator) * (deviation / 4 if name.endswith(".q.weight") else deviation)


def flux_shapes(
    text_width: int = TEXT_WIDTH, double_blocks: int = DOUBLE_BLOCKS, single_blocks: int = SINGLE_BLOCKS, width: int = WIDTH
) -> Shapes:
    """Every tensor of a small Flux with guidance embedding; `width` is a multiple of HEAD_WIDTH."""
    shapes = _linear("img_in", width, PATCH_VALUES) | _linear("txt_in", width, text_width)
    for name, inputs in {"time_in": TIME_WIDTH, "vector_in": POOLED_WIDTH, "guidance_in": TIME_WIDTH}.items():
        shapes |= _linear(f"{name}.in_layer", width, inputs) | _linear(f"{name}.out_layer", width, width)
    for stream in (f"double_blocks.{index}.{kind}" for index in range(double_blocks) for kind in ("img", "txt")):
        shapes |= _linear(f"{stream}_mod.lin", 6 * width, width) | _head_norms(f"{stream}_attn.norm")
        shapes |= _linear(f"{stream}_attn.qkv", 3 * width, width) | _linear(f"{stream}_attn.proj", width, width)
        shapes |= _linear(f"{stream}_mlp.0", 4 * width, width) | _linear(f"{stream}_mlp.2", width, 4 * width)
    for block in (f"single_blocks.{index}" for index in range(single_blocks)):
        shapes |= _linear(f"{block}.linear1", 7 * width, width) | _linear(f"{block}.linear2", width, 5 * width)
        shapes |= _linear(f"{block}.modulation.lin", 3 * width, width) | _head_norms(f"{block}.norm")
    return shapes | _linear("final_layer.linear", PATCH_VALUES, width) | _linear("final_layer.adaLN_modulation.1", 2 * width, width)


def _linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _head_norms(name: str) -> Shapes:
    return {f"{name}.query_norm.scale": (HEAD_WIDTH,), f"{name}.key_norm.scale": (HEAD_WIDTH,)}
