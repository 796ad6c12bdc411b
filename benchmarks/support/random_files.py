"""Weight files of any size with random numbers, written as fast as the disk takes them. Sizes and names are those of published files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ...families.family import Family
from ...runtime.header import read_entries
from ...runtime.random_weights import draw_weight
from ...runtime.weights import FLOATS, SAFETENSORS_NAMES
from ...students.t5.layout import Shape, StudentLayout

Draw = Callable[[str, Shape], Tensor]
# So many numbers of a tensor are drawn; its other rows repeat them. Speed and memory do not depend on that.
DRAWN = 1 << 18


def published_shapes(family: Family, file: str) -> dict[str, Shape]:
    """Tensors of a published diffusion model by ComfyUI's names, which its loader takes. ComfyUI must be importable."""
    from ...train.unloaded import published_config

    config = published_config(family, file)
    config.set_inference_dtype(torch.bfloat16, None)
    model = config.get_model({}, "", device="meta").diffusion_model
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def draw_any(seed: int = 0) -> Draw:
    """Draws the weights of any model, so that activations stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    return lambda name, shape: draw_weight(name, shape, generator)


def draw_t5(layout: StudentLayout, seed: int = 0) -> Draw:
    """Draws float32 tensors by their published names with T5's initialisation.

    Deviations as in transformers' T5PreTrainedModel; the projection as torch.nn.Linear.
    """
    width, inner, generator = layout.d_model, layout.num_heads * layout.d_kv, torch.Generator().manual_seed(seed)
    deviations = {
        "shared": 1.0,
        "relative_attention_bias": width**-0.5,
        "q": (width * layout.d_kv) ** -0.5,
        **dict.fromkeys(("k", "v", "wi", "wi_0", "wi_1"), width**-0.5),
        "o": inner**-0.5,
        "wo": layout.d_ff**-0.5,
    }

    def draw(name: str, shape: Shape) -> Tensor:
        if "norm" in name:
            return torch.ones(shape)
        deviation = deviations.get(name.split(".")[-2], (3 * shape[-1]) ** -0.5)
        return torch.empty(shape).normal_(0.0, deviation, generator=generator)

    return draw


def lay_out(path: Path, shapes: Mapping[str, Shape], dtype: torch.dtype) -> Path:
    """Write a safetensors file whose tensors are a hole: its header says what a loader would need. Returns the path."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def fill(path: Path, draw: Draw) -> Path:
    """Put random numbers into a file of `lay_out`: few are drawn, their rows are repeated. Returns the path."""
    with path.open("r+b") as file:
        for name, entry in read_entries(path).items():
            rows = max(1, min(entry.shape[0], DRAWN // math.prod(entry.shape[1:])))
            numbers = draw(name, (rows, *entry.shape[1:])).to(FLOATS[entry.dtype])
            piece = numbers.reshape(-1).view(torch.uint8).numpy().tobytes()
            whole, rest = divmod(entry.size, len(piece))
            file.seek(entry.begin)
            file.writelines([piece] * whole)
            file.write(piece[:rest])
    return path
