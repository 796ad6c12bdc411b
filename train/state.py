"""Checkpoints: all that a run needs to continue with the same bits, saved so that a kill at any moment leaves an intact one."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ..runtime.disk import UNFINISHED, read_file, replace_file, sha256, sync_file, sync_folder
from ..runtime.failure import is_out_of_memory
from ..runtime.packing import pack, unpack
from .checkpoint_files import (
    AHEAD,
    BROKEN,
    FORMAT,
    LOST,
    MANIFEST,
    REPLACED,
    STUDENT,
    TENSORS,
    VALUES,
    DamagedCheckpoint,
    best_of,
    check_files,
    checkpoint_paths,
    digest_of,
    peek,
    read_manifest,
    step_of,
)
from .run_directory import CONTINUE

# What older checkpoints also have, and nothing reads.
FORMER_VALUES = ("stage", "prompt_index")

StudentWriter = Callable[[Path, Mapping[str, Tensor]], object]
log = logging.getLogger(__name__)


@dataclass
class TrainerState:
    """The state of a run after `step` optimizer steps.

    student: tensors by published name. optimizer: its state_dict(). schedule: counters and loss scale. rng, position: random states and
    latents by rank. best: the lowest held-out loss so far. inputs: digests of prompts and model files; empty in older checkpoints.
    """

    step: int
    skipped_steps: int
    student: dict[str, Tensor]
    optimizer: dict[str, Any]
    schedule: dict[str, Any]
    rng: dict[str, Any]
    recipe_sha256: str
    best: float | None = None
    position: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)


class NoCheckpoint(ValueError):
    """There is no checkpoint to resume from."""


class CheckpointNotSaved(OSError):
    """A checkpoint could not be written; earlier ones are unchanged."""


class Checkpoints:
    """The checkpoints folder of a run: step-000100/ and so on, each complete or absent. Only the holder of the run's lock writes here.

    write_student(path, tensors) writes the student as a file that the node loads. The last `keep_last` checkpoints and the best are kept.
    """

    def __init__(self, folder: Path, write_student: StudentWriter, keep_last: int) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {keep_last}.")
        self.folder = folder
        self.write_student = write_student
        self.keep_last = keep_last

    def save(self, state: TrainerState) -> Path:
        """Write a checkpoint, then remove those that are not kept; returns its folder.

        Raises CheckpointNotSaved if it cannot be written: nothing of it is left behind, and the others are unchanged. The same holds for
        other exceptions of `write_student`, which pass through.
        """
        name = f"step-{state.step:06d}"
        aside = self.folder / f".{name}{UNFINISHED}"
        try:
            self.tidy()
            aside.mkdir(parents=True)
            write_checkpoint(aside, state, self.write_student)
            self._publish(aside, name)
        except (OSError, SafetensorError) as error:
            raise CheckpointNotSaved(
                f"The checkpoint of step {state.step} could not be saved in {self.folder}: {str(error).splitlines()[0]}\n"
                "What to do: check the disk's free space and permissions, then "
                f"{CONTINUE}; earlier checkpoints are unchanged."
            ) from error
        finally:
            with contextlib.suppress(OSError):
                self.tidy()
        self._drop_old()
        return self.folder / name

    def load_latest(self) -> tuple[TrainerState, list[str]]:
        """The newest intact checkpoint, and messages about damaged ones, which are renamed to end in .broken.

        Raises NoCheckpoint if none is intact, OSError if one cannot be read for lack of permission.
        """
        self.tidy()
        notes: list[str] = []
        for path in reversed(self.paths()):
            try:
                state = read_checkpoint(path)
            except DamagedCheckpoint as damage:
                notes.append(f"{path.name} is damaged ({damage}) and was renamed to {_set_aside(path).name}.")
                continue
            if notes:
                notes.append(f"The run continues from {path.name}.")
            return state, notes
        found = "\n".join(notes) if notes else "None has been saved yet."
        raise NoCheckpoint(
            f"There is no intact checkpoint in {self.folder}.\n{found}\n"
            "What to do: start the run again, without --resume (in ComfyUI: press Run again)."
        )

    def paths(self) -> list[Path]:
        """Folders of all checkpoints, the oldest first."""
        return checkpoint_paths(self.folder)

    def best(self) -> Path | None:
        """The oldest of the checkpoints with the lowest held-out loss so far: the one that reached it."""
        return best_of(self.paths())

    def tidy(self) -> None:
        """Complete or remove what a killed process left unfinished."""
        for path in self.folder.glob("step-*" + REPLACED):
            target = path.with_name(path.name.removesuffix(REPLACED))
            if target.exists():
                _remove(path)
            else:
                path.rename(target)
        for path in self.folder.glob(f".step-*{UNFINISHED}"):
            shutil.rmtree(path, ignore_errors=True)

    def _publish(self, aside: Path, name: str) -> None:
        """Rename a complete checkpoint to its name. An older one of that name can be found until then."""
        target = self.folder / name
        if target.exists():
            target.rename(target.with_name(name + REPLACED))
        aside.rename(target)
        sync_folder(self.folder)

    def _drop_old(self) -> None:
        intact = [path for path in self.paths() if peek(path)]
        for path in set(intact) - {*intact[-self.keep_last :], self.best()}:
            _remove_if_possible(path)


def align(stores: Sequence[Checkpoints]) -> list[str]:
    """Bring several students to the newest step of which all have an intact checkpoint: newer ones of some are renamed; messages.

    A kill while they are saved leaves some ahead of the others. Raises NoCheckpoint if there is no such step.
    """
    notes: list[str] = []
    while len(stores) > 1:
        saved = [{step_of(path) for path in store.paths() if peek(path)} for store in stores]
        common = max(set.intersection(*saved), default=None)
        if common is None:
            listed = "\n".join(
                f"  {store.folder}: {', '.join(map(str, sorted(steps))) or 'none'}" for store, steps in zip(stores, saved, strict=True)
            )
            raise NoCheckpoint(
                f"There is no step of which every student has an intact checkpoint; the steps of those that are intact:\n{listed}\n"
                "What to do: start the run again in another folder (--run), or continue the students one by one, each with the recipe.toml "
                "of its folder and --resume."
            )
        notes += [
            f"{path} was renamed to {_set_aside(path, AHEAD).name}: other students have no intact checkpoint of that step. "
            f"The run continues from step {common}."
            for store in stores
            for path in store.paths()
            if step_of(path) > common and peek(path)
        ]
        # One after another: states are large.
        loaded = [(state.step, damaged) for state, damaged in (store.load_latest() for store in stores)]
        notes += [note for _, damaged in loaded for note in damaged]
        if {step for step, _ in loaded} == {common}:
            break
    return notes


def recorded_inputs(folder: Path) -> dict[str, str]:
    """The digests of a run's inputs in its newest checkpoint, without reading its tensors; empty if no checkpoint has them."""
    for path in reversed(checkpoint_paths(folder)):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            if (path / VALUES).is_file():
                return dict(unpack(json.loads((path / VALUES).read_bytes())["inputs"], {}))
    return {}


def resumed_step(folders: Sequence[Path]) -> int:
    """The step from which a run goes on: the newest of which every student's folder has an intact checkpoint; 0 without one.

    Every byte of these checkpoints is read.
    """
    saved = [{step_of(path): path for path in checkpoint_paths(folder)} for folder in folders]
    for step in sorted(set.intersection(*map(set, saved)), reverse=True):
        with contextlib.suppress(OSError, ValueError):
            for paths in saved:
                check_files(paths[step], read_manifest(paths[step]))
            return step
    return 0


def write_checkpoint(folder: Path, state: TrainerState, write_student: StudentWriter) -> None:
    """Write all files of a checkpoint and sync them to the disk, the manifest last."""
    tensors: dict[str, Tensor] = {}
    values = {name: pack(value, tensors, name) for name, value in vars(state).items() if name != "student"}
    write_student(folder / STUDENT, state.student)
    safetensors.torch.save_file(tensors, folder / TENSORS)
    (folder / VALUES).write_text(_json(values), encoding="utf-8")
    files = {}
    for name in (STUDENT, TENSORS, VALUES):
        sync_file(folder / name)
        files[name] = {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    best = state.best if state.best is not None and math.isfinite(state.best) else None
    content = {"format": FORMAT, "step": state.step, "best": best, "files": files}
    replace_file(folder / MANIFEST, _json({"sha256": digest_of(content), "content": content}).encode())


def read_checkpoint(folder: Path) -> TrainerState:
    """Load a checkpoint after checking every byte against its manifest; tensors are on the CPU and independent of the files.

    Raises DamagedCheckpoint, ValueError for another format version, OSError if it cannot be read for lack of permission.
    """
    try:
        check_files(folder, read_manifest(folder))
        values = {name: value for name, value in json.loads(read_file(folder / VALUES)).items() if name not in FORMER_VALUES}
        student, tensors = (_load(folder / name) for name in (STUDENT, TENSORS))
    except OSError as error:
        if error.errno not in LOST:
            raise
        raise DamagedCheckpoint(f"{Path(error.filename or folder).name}: {error.strerror}") from error
    except SafetensorError as error:
        if is_out_of_memory(error):
            raise
        raise DamagedCheckpoint(f"tensors cannot be read: {error}") from error
    return TrainerState(student=student, **{name: unpack(value, tensors) for name, value in values.items()})


def _load(path: Path) -> dict[str, Tensor]:
    # Clones, because loaded tensors are views of the file, which will be deleted.
    return {name: tensor.clone() for name, tensor in safetensors.torch.load_file(path).items()}


def _set_aside(folder: Path, suffix: str = BROKEN) -> Path:
    taken = 1
    while (target := folder.with_name(f"{folder.name}{suffix}{'' if taken == 1 else taken}")).exists():
        taken += 1
    folder.rename(target)
    return target


def _remove(folder: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a kill does not leave an incomplete one under a valid name."""
    aside = folder.with_name(f".{folder.name}.old{UNFINISHED}")
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _remove_if_possible(folder: Path) -> None:
    try:
        _remove(folder)
    except OSError as error:
        # Windows cannot rename a folder while ComfyUI has a file of it open; the next save tries again.
        log.warning("%s could not be removed (%s); the next save tries again.", folder, error)


def _json(values: Any) -> str:
    # JSON has no NaN; `pack` writes it as text.
    return json.dumps(values, indent=1, allow_nan=False)
