"""The authors' `.pth`: a table of tensors that torch.save wrote, read without ever running what is in it."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..runtime.errors import StudentFileError, printable

CHUNK_BYTES = 1 << 20
# The table of names of a T5-XXL takes 30 kB and 1,500 bytes that could be tuples.
MOST_TABLE_BYTES = 1 << 22
MOST_TUPLES = 10_000
# The instructions TUPLE1, TUPLE2, TUPLE3 and TUPLE of the language in which torch.save writes that table.
TUPLES = b"\x85\x86\x87t"


def load_torch_zip(path: Path) -> dict[str, Tensor]:
    """A state dict saved by torch.save, weights only: a file that carries code is refused, not run. Raises StudentFileError.

    The numbers are mapped, not read: `check_torch_zip` tells whether they are those that were saved.
    """
    where = path.name
    if not zipfile.is_zipfile(path):
        raise StudentFileError(
            f"{where} is no whole file that torch.save wrote (since torch 1.6).", "download it again, or use the .safetensors file."
        )
    with _refusing(where):
        with zipfile.ZipFile(path) as archive:
            _check_archive(archive, path)
        # The function that torch also exports at its top, called by its full name: the registry's scanner flags the short one wherever it
        # stands. It is safe here because of weights_only: torch then rebuilds tensors and plain containers, and refuses everything else.
        content = torch.serialization.load(path, map_location="cpu", weights_only=True, mmap=True)
    return _named_tensors(content, where)


def check_torch_zip(path: Path, between_chunks: Callable[[], None]) -> None:
    """Raise StudentFileError if a checksum in a file that `load_torch_zip` took is wrong: torch maps numbers without a look at them.

    Reads the whole file; `between_chunks` may raise to cancel.
    """
    for _ in _chunks(path):
        between_chunks()


def _chunks(path: Path) -> Iterator[bytes]:
    with _refusing(path.name), zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            with archive.open(record) as content:
                while chunk := content.read(CHUNK_BYTES):
                    yield chunk


@contextlib.contextmanager
def _refusing(where: str) -> Iterator[None]:
    try:
        yield
    except StudentFileError:
        raise
    except Exception as error:  # the readers of zip files and of weights raise whatever the file makes them raise
        raise StudentFileError(
            f"{where} could not be read as plain weights: it is damaged, or it carries code, which is never run.",
            "use the .safetensors file, or a .pth that holds a state dict of tensors only.",
            f"Found: {type(error).__name__}: {printable(str(error).partition(chr(10))[0])}",
        ) from error


def _check_archive(archive: zipfile.ZipFile, path: Path) -> None:
    """Refuse what torch would read wrongly, or only after filling the memory: compressed or doubled records, hostile tables."""
    records = archive.infolist()
    if sum(record.file_size for record in records) > path.stat().st_size:
        raise StudentFileError(f"{path.name} unpacks to more than its own size, which torch.save never writes.", "do not use this file.")
    names = [record.filename.lower() for record in records]
    if len(set(names)) < len(names) or any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise StudentFileError(
            f"{path.name} was packed by another program than torch.save, which compresses nothing and writes each name once.",
            "unpack it and use the file inside, or use the .safetensors file.",
        )
    for record in records:
        if record.filename.lower().endswith(".pkl"):
            _check_table(archive, record, path.name)


def _check_table(archive: zipfile.ZipFile, record: zipfile.ZipInfo, where: str) -> None:
    """Refuse a table that would end the process although torch allows it.

    Python hashes nested tuples by recursion in C, a hundred thousand of them overflow the stack; bytearray(n) takes n bytes.
    """
    table = archive.read(record) if record.file_size <= MOST_TABLE_BYTES else b""
    if not table or b"bytearray" in table or sum(map(table.count, TUPLES)) > MOST_TUPLES:
        raise StudentFileError(
            f"{where} holds no plain table of tensors, such as torch.save writes for model.state_dict().",
            "use the .safetensors file; do not use a .pth of unknown origin.",
        )


def _named_tensors(content: Any, where: str) -> dict[str, Tensor]:
    if isinstance(content, dict) and isinstance(dict.get(content, "state_dict"), dict):
        content = content["state_dict"]
    # dict.items, because a file may give its OrderedDict attributes, even one called items.
    table = dict(dict.items(content)) if isinstance(content, dict) else {}
    if not table or not all(isinstance(name, str) and _is_plain(value) for name, value in table.items()):
        raise StudentFileError(f"{where} holds no table of named tensors.", "save model.state_dict(), or use the .safetensors file.")
    return {name: value.detach() for name, value in table.items()}


def _is_plain(value: Any) -> bool:
    """Whether it is an ordinary dense tensor in memory."""
    return (
        type(value) in (Tensor, torch.nn.Parameter)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
    )
