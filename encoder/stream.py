"""A safetensors file written piece by piece, with progress and the hash of its data.

The safetensors library writes a file in one call: no progress, no cancel for as long as the disk takes, a second reading for the hash, and
all tensors in memory at once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import safetensors
import torch
from torch import Tensor

from ..runtime.header import Entry
from ..runtime.progress import Progress, silent
from ..runtime.weights import SAFETENSORS_NAMES, changed, reading

# Flushed to the disk before the next piece, so that no wait is long.
PIECE_BYTES = 1 << 25

Sizes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def write_stream(
    path: Path,
    sizes: Sizes,
    tensor_of: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
    progress: Progress = silent,
) -> str:
    """Write a safetensors file and flush it to the disk; returns the SHA-256 of its data in hexadecimal digits.

    `sizes` gives dtype and shape of every tensor; `tensor_of(name)` returns each once, when its turn comes, so that they need not all be in
    memory. `progress` counts bytes; a cancelled file is left unfinished. The bytes are those of the safetensors library, except for the
    order of the metadata.
    """
    return _written(path, *_header(sizes, metadata), _pieces(map(tensor_of, _order(sizes))), progress)


def copy_tensors(source: Path, entries: Mapping[str, Entry], path: Path, metadata: Mapping[str, str], progress: Progress = silent) -> None:
    """Write the tensors that `entries` find in a safetensors file, of any number format, byte by byte into a new one.

    The widest formats come first, as readers want multiples of a number's size. `progress` and cancelling are as in `write_stream`. Raises
    StudentFileError for a source that cannot be read, that changes meanwhile, or whose header is not valid.
    """
    with reading(source), safetensors.safe_open(str(source), framework="pt"):
        pass  # refuses offsets that do not match formats and shapes
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    ordered = sorted(entries.items(), key=lambda item: (-item[1].size / max(1, item[1].numbers), item[1].begin))
    end = 0
    for name, entry in ordered:
        start, end = end, end + entry.size
        table[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
    _written(path, _with_length(table), end, _ranges(source, [entry for _, entry in ordered]), progress)


def _ranges(source: Path, entries: Iterable[Entry]) -> Iterator[bytes]:
    with reading(source), source.open("rb") as file:
        for entry in entries:
            file.seek(entry.begin)
            for start in range(0, entry.size, PIECE_BYTES):
                size = min(PIECE_BYTES, entry.size - start)
                if len(piece := file.read(size)) < size:
                    raise changed(source)
                yield piece


def _written(path: Path, header: bytes, total: int, pieces: Iterable[bytes | memoryview], progress: Progress) -> str:
    digest, done = hashlib.sha256(), 0
    progress(0, total)
    with path.open("wb") as file:
        file.write(header)
        for piece in pieces:
            digest.update(piece)
            file.write(piece)
            done += len(piece)
            if done // PIECE_BYTES > (done - len(piece)) // PIECE_BYTES:
                file.flush()
                os.fsync(file.fileno())
            progress(done, total)
        file.flush()
        os.fsync(file.fileno())
    assert done == total, "a tensor does not have the size in `sizes`"
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
    return _with_length(entries), end


def _with_length(entries: Mapping[str, object]) -> bytes:
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(tensors: Iterable[Tensor]) -> Iterator[memoryview]:
    for tensor in tensors:
        # Through bytes, because NumPy knows no bf16; little-endian, like every machine that torch runs on.
        numbers = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(numbers), PIECE_BYTES):
            yield numbers[start : start + PIECE_BYTES]
