"""`train export RUN`: a checkpoint's student as an encoder file, also while the run goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..runtime.disk import remove_abandoned, sync_file, sync_folder, unfinished
from ..runtime.errors import UserError
from .checkpoint_files import STUDENT, DamagedCheckpoint, best_of, check_files, checkpoint_paths, peek, read_manifest, step_of
from .run_directory import RunDirectory


def chosen_checkpoint(run: RunDirectory, step: int | None) -> Path:
    """The folder of a run's checkpoint of this step, or of its newest one. Raises UserError that lists those that exist."""
    paths = [path for path in checkpoint_paths(run.checkpoints) if peek(path)]
    if not paths:
        raise UserError(f"The run in {run.path} has no complete checkpoint yet.", "wait for the first one (checkpoints.every_steps).")
    found = paths[-1:] if step is None else [path for path in paths if step_of(path) == step]
    if not found:
        best = best_of(paths)
        listed = ", ".join(f"{step_of(path)}{' (lowest held-out loss)' if path == best else ''}" for path in paths)
        raise UserError(f"The run has no checkpoint of step {step}; it has those of {listed}.", "give one of these with --step.")
    return found[0]


def export(run: RunDirectory, step: int | None, out: Path) -> Path:
    """Write the student of a checkpoint to a file that does not exist yet; returns it.

    The bytes are those that the run wrote for that step. Raises UserError if there is no such checkpoint, if it is damaged, or if the run
    removes it meanwhile; OSError if the file exists or cannot be written.
    """
    checkpoint = chosen_checkpoint(run, step)
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
            aside.replace(out)
        sync_folder(out.parent)
    except DamagedCheckpoint as damage:
        raise UserError(f"{checkpoint.name} is damaged: {damage}.", "export another step with --step.") from damage
    except FileNotFoundError as error:
        raise UserError(f"The run removed {checkpoint.name} meanwhile.", "export again, or raise checkpoints.keep_last.") from error
    return out


def default_name(run: RunDirectory, output_name: str, step: int | None) -> str:
    """The name of the exported file: that of the run's encoder, and the step."""
    return f"{output_name}-{chosen_checkpoint(run, step).name}.safetensors"
