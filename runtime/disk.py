"""Atomic writes: a file is written beside its place, synced to the disk, renamed."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

# The extension of what is being written. After a kill, its owner may remove what has it.
UNFINISHED = ".distilled-t5-part"
CHUNK_BYTES = 1 << 22


def replace_file(path: Path, content: bytes) -> None:
    """Replace the file atomically: after a kill or a power failure it has either the old content or the new one."""
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
    """Sync a closed file to the disk."""
    with path.open("r+b") as file:  # Windows syncs only files open for writing
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power failure (POSIX)."""
    if os.name != "posix":
        return
    # Some network file systems refuse fsync of a folder; the files are on the disk already.
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
