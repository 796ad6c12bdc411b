"""One process at a time writes to a folder: a lock that ends with the process."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import BinaryIO

from .disk import check_regular, remove_unfinished
from .errors import UserError

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl


# Windows locks bytes: these are beyond the text that names the holder of the lock.
LOCKED_BYTE = 1 << 30


class RunError(UserError):
    """A run directory that cannot be used."""


def lock(folder: Path, option: str = "--run") -> BinaryIO:
    """The open lock file of the folder that the option `option` names; closing it, or the end of the process, unlocks.

    What a killed process left unfinished in the folder is removed.
    Raises RunError if another process has the lock, OSError if the file system has no locks.
    """
    check_regular(folder / ".lock")
    file = open(folder / ".lock", "a+b")  # noqa: SIM115 (the caller closes it)
    try:
        if sys.platform == "win32":
            file.seek(LOCKED_BYTE)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        holder = file.read(200).decode(errors="replace").strip()
        file.close()
        raise RunError(
            f"Another process writes to the run in {folder}: {holder or 'unknown'}.",
            f"wait for it or end it, or give another folder with {option}.",
        ) from error
    except OSError:
        file.close()
        raise
    remove_unfinished(folder)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}".encode())
    file.flush()
    return file
