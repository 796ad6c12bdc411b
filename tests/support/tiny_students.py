"""Distilled T5 files of a few kilobytes, and the bytes of safetensors files taken apart and put together: for tests without ComfyUI."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...students.t5.layout import T5_VOCABULARY, Shape, StudentLayout

# The attention width 3 x 4 is not d_model, as in T5-Small; the output width is the one that Flux asks for.
TINY = StudentLayout(d_model=8, d_ff=12, num_layers=2, num_heads=3, d_kv=4, vocab_size=40, hidden_width=10, projected_width=4096)
# The same with all the rows that ComfyUI's tokenizer has numbers for.
FULL_VOCABULARY = dataclasses.replace(TINY, vocab_size=T5_VOCABULARY)
DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I8": 1}


def tiny_tensors(layout: StudentLayout = TINY, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of a layout by published name, all different; norm weights are around 1."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for name, shape in layout.tensors().items()}
    return {name: (tensor + 1 if "layer_norm" in name else tensor).to(dtype) for name, tensor in drawn.items()}


def published_file(path: Path, tensors: Mapping[str, Tensor] | None = None, metadata: dict[str, str] | None = None) -> Path:
    """A file as its authors publish it: safetensors with tensors under the names given, without metadata unless some is given."""
    save_file(dict(tiny_tensors() if tensors is None else tensors), path, metadata=metadata)
    return path


def sparse_file(path: Path, shapes: Mapping[str, Shape], dtype: str = "BF16", metadata: dict[str, str] | None = None) -> Path:
    """A whole safetensors file of zeros whose tensors take no room on the disk: a header, then a hole."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata is not None else {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    begin = joined(header, b"")
    with path.open("wb") as file:
        file.write(begin)
        file.truncate(len(begin) + end)
    return path


def joined(header: Mapping[str, Any] | bytes, data: bytes) -> bytes:
    """The bytes of a safetensors file."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return len(text).to_bytes(8, "little") + text + data


def taken_apart(file: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of the bytes of a safetensors file; ValueError if the header is not valid JSON."""
    end = 8 + int.from_bytes(file[:8], "little")
    return json.loads(file[8:end]), file[end:]


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
    """A hash that two tables of tensors share only if names, dtypes, shapes and every bit are the same."""
    return _digest(
        {
            name: (DTYPES[tensor.dtype], list(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes())
            for name, tensor in tensors.items()
        }
    )


def digest_of_bytes(file: bytes) -> str:
    """The same hash read from the bytes of a safetensors file with a JSON parser alone."""
    header, data = taken_apart(file)
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    return _digest({name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])]) for name, entry in entries.items()})


def _digest(table: Mapping[str, tuple[str, list[int], bytes]]) -> str:
    digest = hashlib.sha256()
    for name, (dtype, shape, content) in sorted(table.items()):
        digest.update(f"{name} {dtype} {shape} {len(content)}\n".encode() + content)
    return digest.hexdigest()
