"""`train export RUN`: a checkpoint's student as an encoder file, also while the run goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..runtime.disk import publish, remove_abandoned, sync_file, sync_folder, unfinished
from ..runtime.errors import UserError
from .checkpoint_files import STUDENT, DamagedCheckpoint, best_of, check_files, checkpoint_paths, peek, read_manifest, step_of
from .run_directory import STUDENTS, RunDirectory


def chosen_checkpoint(run: RunDirectory, step: int | None) -> Path:
    """The folder of a run's checkpoint of this step, or of its newest one. Raises UserError that lists those that exist."""
    paths = [path for path in checkpoint_paths(run.checkpoints) if peek(path)]
    if students := sorted(path.parent for path in run.path.glob(f"{STUDENTS}/*/recipe.toml")):
        listed = "\n".join(f"  {path}" for path in students)
        raise UserError(f"The run in {run.path} has several students.", "give the folder of one of them.", listed)
    if not paths:
        raise UserError(f"The run in {run.path} has no complete checkpoint yet.", "wait for the first one (checkpoints.every_steps).")
    found = paths[-1:] if step is None else [path for path in paths if step_of(path) == step]
    if not found:
        best = best_of(paths)
        listed = ", ".join(f"{step_of(path)}{' (lowest held-out loss)' if path == best else ''}" for path in paths)
        raise UserError(f"The run has no checkpoint of step {step}; it has those of {listed}.", "give one of these with --step.")
    return found[0]


def export(checkpoint: Path, out: Path) -> Path:
    """Write the student of a checkpoint to a file that does not exist yet; returns it, with a number if another one appears meanwhile.

    The bytes are those that the run wrote for that step. Raises UserError if the file exists, if the checkpoint is damaged, or if the run
    removes it meanwhile; OSError if the file cannot be written.
    """
    if out.exists():
        raise UserError(f"{out} exists.", "give another file with --out, or remove this one.")
    try:
        manifest = read_manifest(checkpoint)
        check_files(checkpoint, manifest, [STUDENT])
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(out.parent)
        with unfinished(out) as aside:
            shutil.copyfile(checkpoint / STUDENT, aside)
            sync_file(aside)
            out = publish(aside, out, overwrite=False)
        sync_folder(out.parent)
    except DamagedCheckpoint as damage:
        remedy = f"export another step with --step, or delete {checkpoint}: then the one before it is the newest."
        raise UserError(f"{checkpoint.name} is damaged: {damage}.", remedy) from damage
    except FileNotFoundError as error:
        remedy = "give the command again, or raise checkpoints.keep_last."
        raise UserError(f"The run removed {checkpoint.name} meanwhile.", remedy) from error
    return out
