"""Images on the disk until they are judged: complete or not there, never generated twice."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from ..runtime.disk import UNFINISHED, check_regular, replace_file, sync_folder
from ..runtime.errors import listed, printable

# What decides the images of a folder; images of other models or prompts are not mixed in.
MADE_OF = "made_of.json"
# The SHA-256 of every image, in the form of sha256sum: an image that was damaged or exchanged is generated again.
SUMS = "sha256sums.txt"
# A complete batch whose images are about to be moved to their places, one by one.
COMPLETE = ".complete"
IMAGE = re.compile(r"\d{5,}\.png$")
OTHER_FOLDER = "What to do: name another folder with --out, or delete that one."
log = logging.getLogger(__name__)


class ImageFolder:
    """The images of one encoder for one task: 00000.png and so on.

    A batch is written aside, renamed at once, and then its images are moved to their places: a kill at any moment loses a batch that is
    not complete, and nothing else. So the images of a batch were always sampled together.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def claim(self, made_of: Mapping[str, str]) -> None:
        """Make the folder, or continue with it after a kill. Raises ValueError if its images were made of something else."""
        self.path.mkdir(parents=True, exist_ok=True)
        record = self.path / MADE_OF
        if record.is_file():
            _check_same(record, made_of)
        elif any(IMAGE.match(path.name) for path in self.path.iterdir()):
            raise ValueError(f"{self.path} holds images, but not {MADE_OF}, which says what they were made of.\n{OTHER_FOLDER}")
        else:
            replace_file(record, json.dumps(dict(made_of), indent=1).encode())
        for batch in self.path.glob(f"*{COMPLETE}"):
            self._publish(batch)
        for aside in self.path.glob(f".*{UNFINISHED}"):
            shutil.rmtree(aside, ignore_errors=True)

    def file(self, index: int) -> Path:
        """Where an image is or will be."""
        return self.path / f"{index:05d}.png"

    def present(self) -> set[int]:
        """The images that are there as they were generated; others are logged."""
        if not (self.path / SUMS).exists():
            self._add_sums()
        sums, intact = self._sums(), set[int]()
        for path in self._images():
            if hashlib.sha256(path.read_bytes()).hexdigest() == sums.get(path.name):
                intact.add(int(path.stem))
            else:
                log.warning("%s is not the image that was generated: it is generated again", path)
        return intact

    def _images(self) -> list[Path]:
        return [path for path in self.path.iterdir() if IMAGE.match(path.name) and path.is_file()]

    def _add_sums(self) -> None:
        """Write the hashes of the complete images of an evaluation that had none."""
        complete = [path for path in self._images() if _is_complete(path)]
        if complete:
            log.warning("%s has no %s: the %d complete images are kept", self.path, SUMS, len(complete))
            lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in complete]
            replace_file(self.path / SUMS, "".join(lines).encode())

    def _sums(self) -> dict[str, str]:
        """The hash of every image by its name; of several the last, which is that of its last batch."""
        file = self.path / SUMS
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
        return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}

    def add(self, images: Mapping[int, bytes]) -> None:
        """Put the PNG files of a batch in their places: all of them or, after a kill or on a full disk, none."""
        name = f".batch-{min(images):05d}"
        aside, batch = self.path / f"{name}{UNFINISHED}", self.path / f"{name}{COMPLETE}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        for index, content in images.items():
            with (aside / self.file(index).name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        sync_folder(aside)
        # Every process appends its batches; the hashes come first, so that no image is without one.
        check_regular(self.path / SUMS)
        with (self.path / SUMS).open("ab") as file:
            file.write("".join(f"{hashlib.sha256(png).hexdigest()}  {self.file(index).name}\n" for index, png in images.items()).encode())
            file.flush()
            os.fsync(file.fileno())
        aside.rename(batch)
        self._publish(batch)

    def _publish(self, batch: Path) -> None:
        for image in sorted(batch.iterdir()):
            image.replace(self.path / image.name)
        batch.rmdir()
        sync_folder(self.path)


def _is_complete(png: Path) -> bool:
    """Whether the checksums of a PNG file are right."""
    from PIL import Image

    try:
        with Image.open(png) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def _check_same(record: Path, now: Mapping[str, str]) -> None:
    try:
        before = dict(json.loads(record.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{record} is not valid JSON: {printable(str(error))}\n{OTHER_FOLDER}") from error
    differences = [f"{key}: {before.get(key)} -> {now.get(key)}" for key in {**before, **now} if before.get(key) != now.get(key)]
    if differences:
        raise ValueError(f"The images in {record.parent} were made of something else:\n{listed(differences, 20)}\n{OTHER_FOLDER}")


def missing_batches(count: int, present: set[int], size: int) -> list[list[int]]:
    """What is missing of `count` images, in batches that do not depend on what is there already."""
    batches = ([index for index in range(start, min(start + size, count)) if index not in present] for start in range(0, count, size))
    return [batch for batch in batches if batch]
