"""Encoder files: opened and checked before a tensor is loaded, written aside and renamed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..runtime.disk import publish, remove_abandoned, sync_folder, unfinished
from ..runtime.errors import StudentFileError, escaped
from ..runtime.progress import Progress, silent, waiting
from ..runtime.weights import FLOAT_NAMES, changed, check_finite, data_sha256, dtype_name, load_tensors, read_header, reading, widest_float
from ..students import KINDS, kind_of
from ..students.kind import Layout
from .metadata import HASH_KEY, HEADER_HASH_KEY, KEY, NO_HASH, StudentMetadata, described
from .needed_tensors import student_header
from .stream import write_stream

REMOVE_THE_CHANGE = (
    "remove the LoRA or merge that broke them, or lower its strength; or load the encoder as bf16 or fp32. "
    "In training, go back to an earlier checkpoint."
)


@dataclass(frozen=True)
class StudentFile:
    """A checked encoder file: every tensor is known by name and shape, none is loaded yet.

    dtype: holds the numbers of all tensors. names: published name -> name in the file. twin: the file's name of a duplicate of the token
    table, if it has one.
    """

    path: Path
    layout: Layout
    metadata: StudentMetadata
    dtype: torch.dtype
    names: Mapping[str, str]
    twin: str | None = None

    def read(self, progress: Progress = silent) -> dict[str, Tensor]:
        """The encoder's tensors on the CPU by their names in the file. Raises StudentFileError."""
        twin = [] if self.twin is None else [self.twin]
        return load_tensors(self.path, [*self.names.values(), *twin], waiting(progress, len(self.names)))

    def load(self, progress: Progress = silent) -> dict[str, Tensor]:
        """All tensors on the CPU by published name. Raises StudentFileError as `checked` does."""
        return self.checked(self.read(progress), progress)

    def checked(self, loaded: Mapping[str, Tensor], progress: Progress = silent) -> dict[str, Tensor]:
        """The file's loaded tensors by published name.

        Raises StudentFileError for a wrong hash, a token table that differs from its duplicate, and numbers that are not finite.
        """
        check_hash(self, waiting(progress, len(self.names)))
        shapes, table = self.layout.tensors(), KINDS[self.layout.kind].table
        if any(source not in loaded or tuple(loaded[source].shape) != shapes[name] for name, source in self.names.items()):
            raise changed(self.path)
        tensors = {name: loaded[source] for name, source in self.names.items()}
        if self.twin is not None and not _same(tensors[table], loaded.get(self.twin)):
            raise StudentFileError(
                f"{self.path.name} holds two token tables that differ ({self.names[table]} and {self.twin}).", "export the file again."
            )
        check_finite(tensors, self.path.name, progress)
        return tensors


def open_student(path: str | os.PathLike[str]) -> StudentFile:
    """Check everything about a file that can be checked without loading its tensors.

    Raises StudentFileError: not a file, not readable, of another kind, tensors missing, unexpected or misshapen, wrong metadata.
    """
    path = Path(path)
    where = path.name
    shapes, dtypes, strings = read_header(path)
    header = student_header(shapes, strings, where)
    table, twin = header.names[KINDS[header.layout.kind].table], header.twin
    if twin is not None and (shapes[twin], dtypes[twin]) != (shapes[table], dtypes[table]):
        raise StudentFileError(f"{where} holds two token tables of different shapes or number formats.", "export the file again.")
    dtype = widest_float({name: dtypes[source] for name, source in header.names.items()}, where)
    return StudentFile(path, header.layout, header.metadata, dtype, header.names, twin)


def _same(tensor: Tensor, other: Tensor | None) -> bool:
    return other is not None and other.dtype == tensor.dtype and torch.equal(tensor, other)


def check_hash(file: StudentFile, progress: Progress = silent) -> None:
    """Raise StudentFileError if the metadata gives a SHA-256 of the data or of the header, and the file has another one."""
    parts = {
        "data": (file.metadata.sha256, lambda path: data_sha256(path, progress)),
        "header": (file.metadata.header_sha256, header_sha256),
    }
    for part, (expected, sha256) in parts.items():
        if expected is None:
            continue
        with reading(file.path):
            found = sha256(file.path)
        if found != expected:
            raise StudentFileError(
                f"{file.path.name} was changed or damaged: the SHA-256 of its {part} is not the one in its metadata.",
                "download or export the file again.",
                f"Expected {expected}\nGot      {found}",
            )


def header_sha256(path: Path) -> str:
    """SHA-256 of what the header of a safetensors file says about the tensors, and of our own strings in it, in hexadecimal digits.

    Titles, authors and the like are not part of it: other tools may change them.
    """
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    # Pairs keep a name that stands there twice; numbers stay text, because Python does not parse a number of 5,000 digits.
    lines: list[str] = []
    for name, fields in json.loads(header, object_pairs_hook=list, parse_int=str):
        ours = [field for field in fields if name != "__metadata__" or (field[0].startswith(KEY) and field[0] != HEADER_HASH_KEY)]
        lines.append(json.dumps([name, sorted(ours, key=lambda field: field[0])]))
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def write_student(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: StudentMetadata | None = None,
    progress: Progress = silent,
    overwrite: bool = True,
) -> Path:
    """Write an encoder file with published names and metadata, completely or not at all; returns its path.

    With `overwrite` off, a file that has appeared there meanwhile stays, and the new one gets a number.

    The tensors (published names) are checked as on loading. `progress` counts bytes. Raises StudentFileError for tensors that are not a
    student's, OSError when the disk does not take the file; then nothing is left behind and an existing file stays as it was.
    """
    path = Path(path)
    metadata = metadata or StudentMetadata()
    layout = kind_of(list(tensors)).read_layout({name: tuple(tensor.shape) for name, tensor in tensors.items()}, path.name)
    dtype = widest_float({name: dtype_name(tensor) for name, tensor in tensors.items()}, path.name)
    check_finite(tensors, path.name, lambda _done, total: progress(0, total), REMOVE_THE_CHANGE)
    header = described(metadata, layout, FLOAT_NAMES[dtype])
    sizes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    remove_abandoned(path.parent)
    try:
        with unfinished(path) as aside:
            sha256 = write_stream(aside, sizes, tensors.__getitem__, header, progress)
            _fill_in_hashes(aside, sha256)
            path = publish(aside, path, overwrite)
            sync_folder(path.parent)
    except OSError as error:
        raise not_written(path, error) from error
    return path


def not_written(path: Path, error: OSError) -> OSError:
    """The error about a file that could not be written."""
    return OSError(
        f"{path.name} could not be written to {escaped(str(path.parent))}: {error}.\n"
        "What to do: check that the folder exists and is writable, and that the disk has room."
    )


def _fill_in_hashes(path: Path, data_sha256: str) -> None:
    """Write the hashes into the header, over the placeholders of the same length, and flush the file to the disk."""
    digests = {HASH_KEY: data_sha256, HEADER_HASH_KEY: header_sha256(path)}
    with path.open("r+b") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
        for key, digest in digests.items():
            place = f'"{key}":"{NO_HASH}"'.encode()
            file.seek(8 + header.index(place) + len(place) - len(digest) - 1)
            file.write(digest.encode())
        file.flush()
        os.fsync(file.fileno())
