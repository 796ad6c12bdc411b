"""A safetensors file written piece by piece: with progress, a chance to cancel, and the hash of its data on the way."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

# What is on its way to the disk at a time; brought there before the next piece, so that no wait is long.
PIECE_BYTES = 1 << 25
# In the order in which the safetensors library writes them.
SAFETENSORS_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}

Sizes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def write_stream(
    path: Path,
    sizes: Sizes,
    tensor_of: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> str:
    """Write a safetensors file and bring it to the disk; returns the SHA-256 of its data in hexadecimal digits.

    `sizes` names dtype and shape of every tensor; `tensor_of(name)` gives each once, when its turn comes, so that they need not all be in
    memory. `progress(bytes done, bytes in all)` is called between pieces and may raise to cancel: the file is left unfinished then. What
    is written is byte for byte what the safetensors library writes, but for the order of the metadata.
    """
    header, total = _header(sizes, metadata)
    digest, done = hashlib.sha256(), 0
    progress(0, total)
    with path.open("wb") as file:
        file.write(header)
        for piece in _pieces(map(tensor_of, _order(sizes))):
            digest.update(piece)
            file.write(piece)
            done += len(piece)
            if done // PIECE_BYTES > (done - len(piece)) // PIECE_BYTES:
                file.flush()
                os.fsync(file.fileno())
            progress(done, total)
        file.flush()
        os.fsync(file.fileno())
    assert done == total, "a tensor was not of the size that was announced"
    return digest.hexdigest()


def _order(sizes: Sizes) -> list[str]:
    ranks = {dtype: rank for rank, dtype in enumerate(SAFETENSORS_NAMES)}
    return sorted(sizes, key=lambda name: (ranks[sizes[name][0]], name))


def _header(sizes: Sizes, metadata: Mapping[str, str] | None) -> tuple[bytes, int]:
    """The header with its length before it, and the number of bytes that follow."""
    entries: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in _order(sizes):
        dtype, shape = sizes[name]
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, end


def _pieces(tensors: Iterable[Tensor]) -> Iterator[memoryview]:
    for tensor in tensors:
        # Through bytes, because NumPy knows no bf16; little-endian, like every machine that torch runs on.
        numbers = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(numbers), PIECE_BYTES):
            yield numbers[start : start + PIECE_BYTES]
