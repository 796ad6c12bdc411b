"""Where pictures lie until they are judged: whole or not there, never made twice."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from ..runtime.disk import UNFINISHED, replace_file, sync_folder

# What decides the pictures of a folder; one of other models or prompts is not mixed in.
MADE_OF = "made_of.json"
# A batch that is complete and about to be moved to its place, picture by picture.
COMPLETE = ".complete"
Item = TypeVar("Item")
PICTURE = re.compile(r"\d{5,}\.png$")


class PictureFolder:
    """The pictures of one encoder for one task: 00000.png and so on.

    A batch is written aside, gets its name at once and then hands its pictures on: a kill at any moment loses a batch that is not
    complete, and nothing else. So the pictures of a batch were always painted together.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def claim(self, made_of: Mapping[str, str]) -> None:
        """Make the folder, or go on with it after a kill. Raises ValueError if it holds pictures that were made of something else."""
        self.path.mkdir(parents=True, exist_ok=True)
        record = self.path / MADE_OF
        if record.is_file():
            _refuse_others(self.path, json.loads(record.read_text(encoding="utf-8")), made_of)
        else:
            replace_file(record, json.dumps(dict(made_of), indent=1).encode())
        for batch in self.path.glob(f"*{COMPLETE}"):
            self._hand_on(batch)
        for aside in self.path.glob(f".*{UNFINISHED}"):
            shutil.rmtree(aside, ignore_errors=True)

    def file(self, index: int) -> Path:
        """Where a picture lies or will lie."""
        return self.path / f"{index:05d}.png"

    def there(self) -> set[int]:
        """The pictures that are there."""
        return {int(path.stem) for path in self.path.iterdir() if PICTURE.match(path.name)}

    def add(self, pictures: Mapping[int, bytes]) -> None:
        """Put the PNG files of a batch in their places: all of them or, after a kill or on a full disk, none."""
        name = f".batch-{min(pictures):05d}"
        aside, batch = self.path / f"{name}{UNFINISHED}", self.path / f"{name}{COMPLETE}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for index, content in pictures.items():
            with (aside / self.file(index).name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        sync_folder(aside)
        aside.rename(batch)
        self._hand_on(batch)

    def _hand_on(self, batch: Path) -> None:
        for picture in sorted(batch.iterdir()):
            picture.replace(self.path / picture.name)
        batch.rmdir()
        sync_folder(self.path)


def _refuse_others(path: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    differences = [f"  {key}: {before.get(key)} -> {now.get(key)}" for key in {**before, **now} if before.get(key) != now.get(key)]
    if differences:
        raise ValueError(
            f"The pictures in {path} were made of something else:\n"
            + "\n".join(differences)
            + "\nWhat to do: name another folder with --out, or delete that one."
        )


def batches(count: int, there: set[int], size: int) -> list[list[int]]:
    """What is still to be painted of `count` pictures, in batches that do not depend on what is there already."""
    whole = [range(start, min(start + size, count)) for start in range(0, count, size)]
    return [missing for batch in whole if (missing := [index for index in batch if index not in there])]


def share_of_rank(batches_left: Sequence[Item], rank: int, ranks: int) -> list[Item]:
    """Every `ranks`-th batch, from this process's own number on."""
    return list(batches_left[rank::ranks])
