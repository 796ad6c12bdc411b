"""Files read and written: a pipe is not a file, and a write is atomic: beside its place, synced to the disk, renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

if sys.platform != "win32":
    import fcntl

# The extension of what is being written. After a kill, its owner may remove what has it.
UNFINISHED = ".distilled-t5-part"
CHUNK_BYTES = 1 << 22
# An unfinished file that has not changed for this long has no living owner: its process number was given to another process.
ABANDONED_S = 3600.0
OF_PROCESS = re.compile(rf"\..*\.([0-9]+){re.escape(UNFINISHED)}")


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A new file beside `path`, to be written and renamed. It is removed at the end, and by `remove_abandoned` if this process is killed.

    The process is known by its number, which is part of the name, and by a lock on the file where the system has locks. Processes of
    several machines may have one number, so the name is also random.
    """
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}.{os.getpid()}{UNFINISHED}")
    with contextlib.ExitStack() as stack:
        if sys.platform != "win32":  # Windows renames no open file
            _lock(stack.enter_context(aside.open("ab")).fileno())
        try:
            yield aside
        finally:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)


def remove_abandoned(folder: Path, and_below: bool = False) -> None:
    """Remove unfinished files whose process is gone from a folder, or also from those inside it."""
    for left in list(folder.glob(f"{'**/' if and_below else ''}.*{UNFINISHED}")):
        with contextlib.suppress(OSError):
            if (found := OF_PROCESS.fullmatch(left.name)) and left.is_file() and _is_abandoned(left, int(found[1])):
                left.unlink()


def _is_abandoned(path: Path, process: int) -> bool:
    if time.time() - path.stat().st_mtime > ABANDONED_S:
        return True
    if sys.platform == "win32" or _lives(process):
        return False
    # The process may live on another machine or in another container.
    with path.open("ab") as file:
        return _lock(file.fileno())


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def _lock(handle: int) -> bool:
    """Lock a file; False if another process has done so. Some file systems have no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def remove_unfinished(folder: Path) -> None:
    """Remove every unfinished file and folder inside a folder that no other process writes to."""
    for left in list(folder.rglob(f".*{UNFINISHED}")):
        with contextlib.suppress(OSError):
            shutil.rmtree(left) if left.is_dir() else left.unlink()


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


def publish(aside: Path, path: Path, overwrite: bool) -> Path:
    """Give the finished file its name; returns it. Without `overwrite`, processes that publish at the same time get different names."""
    free = path
    while not overwrite:
        try:
            os.link(aside, free)
        except FileExistsError:  # noqa: PERF203 (repeated until a name is free)
            free = unused_path(path)
        except OSError:  # no hard links here (exFAT, some network shares): an empty file of that name reserves it
            with contextlib.suppress(FileExistsError):
                free.touch(exist_ok=False)
                break
            free = unused_path(path)
        else:
            return free
    os.replace(aside, free)
    return free


def unused_path(path: Path) -> Path:
    """The path itself, or `name_00002.safetensors` and so on if that file exists."""
    free, number = path, 2
    while free.exists():
        free, number = path.with_name(f"{path.stem}_{number:05}{path.suffix}"), number + 1
    return free


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
