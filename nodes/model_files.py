"""Names in the file lists and the files behind them."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import folder_paths

from ..encoder.files import not_written, open_student
from ..encoder.trim import read_trimmed
from ..runtime.comfyui import NO_FILE
from ..runtime.disk import remove_abandoned, unused_path
from ..runtime.errors import StudentFileError, escaped, printable
from ..runtime.weights import SAFETENSORS

Choice = TypeVar("Choice")
FOLDER = "text_encoders"


def remove_abandoned_files() -> None:
    """Remove what processes that were killed left unfinished in `models/text_encoders`."""
    for folder in folder_paths.get_folder_paths(FOLDER):
        remove_abandoned(Path(folder), and_below=True)


def text_encoder_names() -> list[str]:
    """All files of `models/text_encoders`, distilled T5 first."""
    names = folder_paths.get_filename_list(FOLDER)
    return sorted(names, key=lambda name: (not _is_student(name), names.index(name)))


def clip_l_names() -> list[str]:
    """The same files, those that are called CLIP-L first, then `none`, then the others."""
    names = folder_paths.get_filename_list(FOLDER)
    likely = [name for name in names if re.search(r"clip[-_ ]?l(?![a-z])", name.lower())]
    return [*likely, NO_FILE, *(name for name in names if name not in likely)]


def _is_student(name: str) -> bool:
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None or not path.lower().endswith(SAFETENSORS):
        return False
    try:
        return _is_student_file(path, os.path.getmtime(path), os.path.getsize(path))
    except (OSError, MemoryError):
        return False


@lru_cache(maxsize=4096)
def _is_student_file(path: str, _changed_s: float, _size: int) -> bool:
    try:
        open_student(path)
    except StudentFileError:
        return read_trimmed(Path(path)) is not None
    return True


def path_of(name: str) -> str:
    """The file behind a name of the list. Raises StudentFileError if it does not exist."""
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None:
        folders = ", ".join(folder_paths.get_folder_paths(FOLDER))
        raise StudentFileError(
            f"{printable(name)} is not in the text encoder folders.",
            "refresh the file list (key R) and pick a file that is listed.",
            f"Looked in: {folders}",
        )
    return path


def choice_of(name: str, choices: Mapping[str, Choice], what: str = "dtype") -> Choice:
    """The choice of that name. A linked input can give any name: raises ValueError that lists the valid ones."""
    if name not in choices:
        raise ValueError(f"There is no {what} {name[:80]!r}.\nWhat to do: set {what} to one of {', '.join(choices)}.")
    return choices[name]


def fingerprint(name: str | None) -> str:
    """Changes when the file behind a name changes: size and modification time. The name of a linked input is None."""
    path = None if name is None or name == NO_FILE else folder_paths.get_full_path(FOLDER, name)
    if path is None or not os.path.isfile(path):
        return str(name)
    stat = os.stat(path)
    return f"{name}:{stat.st_size}:{stat.st_mtime_ns}"


# Windows forbids these, and its device names; a file saved here has to open everywhere.
_FORBIDDEN = re.compile(r'[<>:"|?*\\\x00-\x1f\x7f\ud800-\udfff]')
_DEVICE = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|(com|lpt)[0-9\u00b9\u00b2\u00b3]) *(\..*)?", re.IGNORECASE)
_ENDING = re.compile(r"\.safetensors$", re.IGNORECASE)
# File systems allow 255 bytes; ending, number and the ending of an unfinished file need the rest.
_MOST_BYTES = 200
# Of a name with its folders: systems allow paths of 1,024 (macOS) to 4,096 bytes.
_MOST_LETTERS = 600


def new_file(name: str) -> Path:
    """A path in `models/text_encoders` for a new file: `name.safetensors`, or `name_00002.safetensors` and so on if that exists.

    Raises ValueError for a name that is empty, absolute, or leads out of the folder.
    """
    folder = Path(folder_paths.get_folder_paths(FOLDER)[0]).resolve()
    parts = [part.strip() for part in _ENDING.sub("", name.strip()).split("/")]
    if _FORBIDDEN.search(name) or len(name) > _MOST_LETTERS or not all(map(_can_be_saved, parts)):
        raise ValueError(
            f"{name[:250]!r} cannot be the name of a new encoder file.\n"
            f'What to do: give a name such as "my_t5_base" or "mine/t5_base" (letters, digits, - and _; at most {_MOST_BYTES}, with '
            f'folders {_MOST_LETTERS}; no "..").'
        )
    stem = folder.joinpath(*parts)
    # A link inside the folder may point out of it.
    if not stem.parent.resolve().is_relative_to(folder):
        raise ValueError(f"{name!r} leads out of {escaped(str(folder))}.\nWhat to do: give a name inside the folder.")
    for parent in stem.relative_to(folder).parents:
        if (folder / parent).exists() and not (folder / parent).is_dir():
            raise ValueError(f"{name!r} cannot be saved: {parent} is a file, not a folder.\nWhat to do: give another name.")
    return unused_path(stem.with_name(stem.name + ".safetensors"))


def _can_be_saved(part: str) -> bool:
    return part not in ("", ".", "..") and not part.endswith(".") and not _DEVICE.fullmatch(part) and len(part.encode()) <= _MOST_BYTES


@contextlib.contextmanager
def folder_for(path: Path) -> Iterator[None]:
    """Make the folder of a new file; if the file is not written, the folders that were made are removed.

    Raises OSError if it cannot be made.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        _make_folder(path)
        yield
    except BaseException:
        for folder in made:
            # It was not made, or holds another file by now.
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _make_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(path, error) from error


def listed_name(path: Path) -> str:
    """The name under which the file lists show a path that `new_file` gave."""
    return str(path.relative_to(Path(folder_paths.get_folder_paths(FOLDER)[0]).resolve()))
