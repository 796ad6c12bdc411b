"""The folder of one run: its files, its lock, and the recipe that it belongs to."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ..runtime.disk import check_regular, replace_file
from ..runtime.lock import RunError, lock
from .checkpoint_files import CHECKPOINT, REPLACED

# What to do, with the command or with the node that trains in ComfyUI.
CONTINUE = "continue with --resume (in ComfyUI: press Run again)"
ANOTHER = "give another folder with --run (in ComfyUI: another name)"


# Where each of several students has a run of its own.
STUDENTS = "students"


def student_folder(run: Path, name: str) -> Path:
    """The folder of a student's own run; without a name, that of the run, whose only student it is."""
    return run / STUDENTS / name if name else run


class RunDirectory:
    """`runs/<name>/`: recipe.toml, metrics.jsonl, train.log, page.html, checkpoints/, samples/. One process at a time writes to it.

    `start` or `resume` opens it and takes its lock; `close`, leaving the context, or the end of the process releases the lock.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser().absolute()
        self.recipe = self.path / "recipe.toml"
        self.metrics = self.path / "metrics.jsonl"
        self.log = self.path / "train.log"
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.page = self.path / "page.html"
        self.history = self.path / "recipe-history.jsonl"
        self.prompts = self.path / "prompts.txt"
        self._lock: BinaryIO | None = None

    @property
    def is_run(self) -> bool:
        """Whether the folder holds a run."""
        return self.recipe.is_file()

    @property
    def has_checkpoints(self) -> bool:
        """Whether there is a checkpoint to resume from, intact or not."""
        folders = self.path.glob("checkpoints/*"), self.path.glob(f"{STUDENTS}/*/checkpoints/*")
        return any(CHECKPOINT.match(path.name.removesuffix(REPLACED)) for path in itertools.chain(*folders))

    def start(self, recipe_toml: str, prompts: str = "") -> RunDirectory:
        """Make the folder, or take one that is empty or whose run has no checkpoint yet. `prompts`: content of prompts.txt; "" for no file.

        Raises RunError if it holds a run with checkpoints or other files, or if another process writes to it; OSError if it cannot be
        written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file, not a folder.", f"{ANOTHER}.")
        if self.path.is_dir() and not self.is_run and any(not path.name.startswith(".") for path in self.path.iterdir()):
            raise RunError(f"{self.path} holds files but no run (it has no recipe.toml).", f"{ANOTHER}.")
        self._open(recipe_toml, prompts)
        return self

    def resume(self) -> RunDirectory:
        """Open the folder of an existing run.

        Raises RunError if there is none, or if another process writes to it; OSError if it cannot be written.
        """
        self.existing("start it without --resume, or name the right folder with --run.")
        self._open(None, "")
        return self

    def existing(self, remedy: str = "name the folder of a run.") -> RunDirectory:
        """This folder, to be read without its lock. Raises RunError with the remedy if it does not hold a run."""
        if not self.is_run:
            raise RunError(f"There is no run in {self.path} (no recipe.toml).", remedy)
        return self

    def refuse_other_recipe(self, differences: Sequence[str]) -> None:
        """Raise RunError with the differences between this run's recipe and the requested one, if there are any."""
        if differences:
            listed = "\n".join(f"  {difference}" for difference in differences)
            raise RunError(
                f"The run in {self.path} was started with another recipe:\n{listed}",
                f"set back what differs, or, for a new run, {ANOTHER}.",
            )

    def change_recipe(self, recipe_toml: str, changes: Sequence[Mapping[str, Any]]) -> None:
        """Replace the recipe of a run, and the notes of all its changes."""
        notes = b"".join(json.dumps(one).encode() + b"\n" for one in changes)
        # First the note: a kill between the two leaves a change that the next resume repeats.
        replace_file(self.history, notes)
        replace_file(self.recipe, recipe_toml.encode())

    def recipe_changes(self) -> list[dict[str, Any]]:
        """The changes of the run's recipe, the oldest first."""
        if not self.history.is_file():
            return []
        return [json.loads(line) for line in self.history.read_text(encoding="utf-8").splitlines()]

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _open(self, recipe_toml: str | None, prompts: str) -> None:
        assert self._lock is None, "a run is opened once"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.path, "--run (in ComfyUI: give another name)")
            self._lay_out(recipe_toml, prompts)
        except OSError as error:
            self.close()
            raise OSError(
                f"{self.path} cannot be written to: {error}.\n"
                "What to do: check the folder's permissions and the disk's free space and support of file locks, "
                f"or {ANOTHER}."
            ) from error
        except RunError:
            self.close()
            raise

    def _lay_out(self, recipe_toml: str | None, prompts: str) -> None:
        """Make what is missing of a run, under its lock, so that no other process does the same."""
        if recipe_toml is not None:
            if self.has_checkpoints:
                raise RunError(f"{self.path} holds a run with checkpoints.", f"{CONTINUE}, or {ANOTHER}.")
            self.metrics.unlink(missing_ok=True)
            self.history.unlink(missing_ok=True)
            # First the recipe: in a folder without one, prompts.txt is the user's own.
            replace_file(self.recipe, recipe_toml.encode())
            if prompts:
                replace_file(self.prompts, prompts.encode())
        self.checkpoints.mkdir(exist_ok=True)
        self.samples.mkdir(exist_ok=True)
        check_regular(self.metrics)
        check_regular(self.log)
        check_regular(self.page)
