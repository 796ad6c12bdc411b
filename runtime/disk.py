"""Files that are whole or not there: written aside, brought to the disk, renamed."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

# The ending of what is being written; whoever holds the run's lock may remove what carries it.
UNFINISHED = ".part"
CHUNK_BYTES = 1 << 22


def replace_file(path: Path, content: bytes) -> None:
    """Put `content` in the place of the file: after a kill or a power cut either the old file is there or the new one."""
    aside = path.with_name(f".{path.name}{UNFINISHED}")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
    sync_folder(path.parent)


def sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    """Bring a file that is closed already to the disk."""
    with path.open("r+b") as file:  # Windows syncs only what is open for writing
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in a folder last through a power cut, where the system can (POSIX)."""
    if os.name != "posix":
        return
    # Some network file systems take no fsync of a folder, or do not open one; the files are on the disk already.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
