"""Files read and written: a pipe is not a file, and a write is atomic: beside its place, synced to the disk, renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from pathlib import Path

# The extension of what is being written. After a kill, its owner may remove what has it.
UNFINISHED = ".distilled-t5-part"
CHUNK_BYTES = 1 << 22


def replace_file(path: Path, content: bytes) -> None:
    """Replace the file atomically: after a kill or a power failure it has either the old content or the new one."""
    aside = path.with_name(f".{path.name}{UNFINISHED}")
    check_regular(aside)
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


def check_regular(path: Path) -> None:
    """Raise OSError (EISDIR) if the path is a folder, a pipe or a device: opening a pipe would wait for ever. A missing file passes."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError(errno.EISDIR, "not a regular file", str(path))


def read_file(path: Path) -> bytes:
    """The content of a regular file. Raises OSError."""
    check_regular(path)
    return path.read_bytes()


def sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits."""
    check_regular(path)
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
