"""The header of a safetensors file, read without torch: the tensors' formats, shapes and places."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .errors import StudentFileError

# Published headers are below 1 MB; training notes in the metadata can add some.
MOST_BYTES = 25_000_000
DOWNLOAD = "download it again; it may have been cut off or renamed."
MALFORMED = (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError)


@dataclass(frozen=True)
class Entry:
    """A tensor: the safetensors name of its number format, its shape, and the bytes of the file that hold it."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return self.end - self.begin


def read_entries(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file by name. Raises StudentFileError for a file that is not one, or is cut off."""
    return read_header(path)[0]


def read_strings(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file. Raises StudentFileError as `read_entries` does."""
    return read_header(path)[1]


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors and the metadata of a safetensors file. Raises StudentFileError as `read_entries` does."""
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not a file" if path.exists() else "does not exist"
        raise StudentFileError(f"{path.name} {what}; expected a .safetensors file.", "name a .safetensors file.")
    size = 0
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            entries, strings = _parsed(file, size)
    except OSError as error:
        raise StudentFileError(
            f"{path.name} could not be read: {error.strerror or error}.", "check the permissions of the file."
        ) from error
    except MALFORMED as error:
        raise StudentFileError(f"{path.name} is not a complete safetensors file ({size:,} bytes).", DOWNLOAD) from error
    expected = max((entry.end for entry in entries.values()), default=0)
    if size < expected:
        raise StudentFileError(f"{path.name} is not a complete safetensors file: expected {expected:,} bytes, got {size:,}.", DOWNLOAD)
    return entries, strings


def _parsed(file: BinaryIO, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= min(size - 8, MOST_BYTES):
        raise ValueError(f"a header of {length:,} bytes")
    table = json.loads(file.read(length))
    strings = {key: str(value) for key, value in (table.pop("__metadata__", None) or {}).items()}
    start = 8 + length
    return {
        name: Entry(str(about["dtype"]), tuple(map(int, about["shape"])), *(start + int(offset) for offset in about["data_offsets"]))
        for name, about in table.items()
    }, strings
