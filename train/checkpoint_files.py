"""The files of a checkpoint and its manifest, found and checked without torch."""

from __future__ import annotations

import errno
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..runtime.disk import read_file, sha256

FORMAT = 1
CHECKPOINT = re.compile(r"step-(\d{6,})$")
# An older checkpoint of the same step, while the newer one replaces it.
REPLACED = ".replaced"
BROKEN = ".broken"
# An intact checkpoint of a step that other students of the run lack.
AHEAD = ".ahead"
STUDENT, TENSORS, VALUES, MANIFEST = "student.safetensors", "state.safetensors", "state.json", "manifest.json"
# Errors of a file that is lost or can no longer be read from the disk.
LOST = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)


class DamagedCheckpoint(ValueError):
    """A checkpoint differs from what was written; the message names the file and the difference."""


def checkpoint_paths(folder: Path) -> list[Path]:
    """Folders of all checkpoints in a run's checkpoints folder, the oldest first."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if CHECKPOINT.match(path.name)), key=step_of)


def step_of(path: Path) -> int:
    """The optimizer step of a checkpoint's folder."""
    match = CHECKPOINT.match(path.name)
    assert match, f"{path} is not a checkpoint"
    return int(match[1])


def best_of(paths: Sequence[Path]) -> Path | None:
    """The oldest of the checkpoints with the lowest held-out loss so far: the one that reached it.

    The lowest so far rises only where the loss is measured differently from there on: then earlier ones do not count.
    """
    rated: list[tuple[float, Path]] = []
    for path in paths:
        best = peek(path).get("best")
        if best is not None:
            rated = [*(rated if not rated or best <= rated[-1][0] else []), (best, path)]
    return min(rated, default=(0.0, None), key=lambda each: each[0])[1]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises DamagedCheckpoint, ValueError for another format version, OSError."""
    try:
        manifest = json.loads(read_file(folder / MANIFEST))
        content, intact = manifest["content"], manifest["sha256"] == digest_of(manifest["content"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DamagedCheckpoint(f"{MANIFEST} is not a valid manifest") from error
    if not intact:
        raise DamagedCheckpoint(f"{MANIFEST} does not have its own SHA-256")
    if content["format"] != FORMAT:
        raise ValueError(
            f"{folder} was written in format {content['format']}; this version of the trainer reads format {FORMAT}.\n"
            "What to do: resume with the version that wrote it."
        )
    return content


def check_files(folder: Path, manifest: Mapping[str, Any], names: Iterable[str] = (STUDENT, TENSORS, VALUES)) -> None:
    """Raise DamagedCheckpoint if a file does not have the size and SHA-256 of the manifest."""
    for name in names:
        expected, size = manifest["files"][name], (folder / name).stat().st_size
        if size != expected["size"]:
            raise DamagedCheckpoint(f"{name}: expected {expected['size']:,} bytes, got {size:,}")
        if sha256(folder / name) != expected["sha256"]:
            raise DamagedCheckpoint(f"{name} does not have the SHA-256 of {MANIFEST}")


def peek(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files have the right sizes, else an empty one; the files are not read."""
    try:
        manifest = read_manifest(folder)
        complete = all((folder / name).stat().st_size == expected["size"] for name, expected in manifest["files"].items())
    except (OSError, ValueError):
        return {}
    return manifest if complete else {}


def digest_of(content: Any) -> str:
    """SHA-256 of a manifest's content in hexadecimal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
