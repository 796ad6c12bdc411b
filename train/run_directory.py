"""The folder of one run, which explains itself: what it holds, who may write to it, which recipe it belongs to."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from ..runtime.disk import replace_file
from ..runtime.lock import RunError, lock
from .state import CHECKPOINT, REPLACED

if sys.platform == "win32":
    pass
else:
    pass


class RunDirectory:
    """`runs/<name>/`: recipe.toml, metrics.jsonl, train.log, checkpoints/, samples/. One process at a time writes to it.

    `start` or `resume` opens it and takes its lock; `close`, leaving the context, or the end of the process gives the lock back.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser().absolute()
        self.recipe = self.path / "recipe.toml"
        self.metrics = self.path / "metrics.jsonl"
        self.log = self.path / "train.log"
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self._lock: BinaryIO | None = None

    @property
    def is_run(self) -> bool:
        """Whether there is a run in the folder."""
        return self.recipe.is_file()

    @property
    def has_checkpoints(self) -> bool:
        """Whether there is a checkpoint to go on from (unless it is damaged)."""
        folders = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        return any(CHECKPOINT.match(path.name.removesuffix(REPLACED)) for path in folders)

    def start(self, recipe_toml: str) -> RunDirectory:
        """Make the folder, or take one that is empty or whose run has not saved anything yet.

        Raises RunError if it holds a run with checkpoints or something else, or if another process writes to it; OSError if it cannot
        be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file; a run needs a folder.", "name another folder with --run.")
        if self.path.is_dir() and not self.is_run and any(not path.name.startswith(".") for path in self.path.iterdir()):
            raise RunError(f"{self.path} holds files and is no run (it has no recipe.toml).", "name a new folder with --run.")
        self._open(recipe_toml)
        return self

    def resume(self) -> RunDirectory:
        """Open the folder of a run that is there.

        Raises RunError if there is none, or if another process writes to it; OSError if it cannot be written.
        """
        if not self.is_run:
            raise RunError(
                f"There is no run in {self.path} (no recipe.toml).", "start it without --resume, or name the right folder with --run."
            )
        self._open(None)
        return self

    def refuse_other_recipe(self, differences: Sequence[str]) -> None:
        """Raise RunError that lists the differences between this run's recipe and the one asked for, if there are any."""
        if differences:
            listed = "\n".join(f"  {difference}" for difference in differences)
            raise RunError(
                f"The run in {self.path} was started with another recipe:\n{listed}",
                "resume it with its own recipe.toml, or start a new run in another folder with --run.",
            )

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _open(self, recipe_toml: str | None) -> None:
        assert self._lock is None, "a run is opened once"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.path)
            self._lay_out(recipe_toml)
        except OSError as error:
            self.close()
            raise OSError(
                f"{self.path} cannot be written to: {error.strerror or error}.\n"
                "What to do: see that the folder may be written to and that its disk has room and knows file locks, "
                "or name another folder with --run."
            ) from error
        except RunError:
            self.close()
            raise

    def _lay_out(self, recipe_toml: str | None) -> None:
        """What a run consists of, made where it is not there; looked at under the lock, so that nobody else can be at it."""
        if recipe_toml is not None:
            if self.has_checkpoints:
                raise RunError(
                    f"{self.path} holds a run that has saved checkpoints.", "go on with --resume, or name another folder with --run."
                )
            self.metrics.unlink(missing_ok=True)
            replace_file(self.recipe, recipe_toml.encode())
        self.checkpoints.mkdir(exist_ok=True)
        self.samples.mkdir(exist_ok=True)
