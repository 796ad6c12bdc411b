"""Training inside a running ComfyUI: in the thread that executes the graph, with its progress bar and its Cancel."""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.utils
import torch
from comfy.cli_args import args

from ..diffusion.gradients import replaced
from ..runtime.comfyui import check_output_folder, refuse_without_gradient
from ..runtime.disk import read_file
from ..runtime.errors import StudentFileError, UserError
from ..runtime.randomness import undisturbed
from ..runtime.ranks import Ranks
from .checkpoint_files import checkpoint_paths, peek, step_of
from .curves import row_of
from .lengths import differences_besides_lengths
from .page import samples_of
from .preflight import preflight
from .recipe import Recipe, load_recipe
from .run import train, written_before
from .run_directory import ANOTHER, RunDirectory

if TYPE_CHECKING:
    from PIL import Image

FEWEST_PROMPTS = 2


class GraphBoard:
    """Shows a run on its node, and passes on Cancel."""

    def __init__(self, total_steps: int) -> None:
        self._total = total_steps
        self._bar = comfy.utils.ProgressBar(total_steps)

    @property
    def requested(self) -> bool:
        """Whether the run should be saved and stop."""
        return comfy.model_management.processing_interrupted()

    def numbers(self, step: int, kind: str, values: Mapping[str, Any]) -> None:  # noqa: ARG002 (as in Board)
        """Move the bar."""
        self._bar.update_absolute(step, self._total)

    def image(self, step: int, name: str, picture: Image.Image) -> None:  # noqa: ARG002 (as in Board)
        """Show an image on the node."""
        self._bar.update_absolute(step, self._total, ("JPEG", picture, max(picture.size)))

    def close(self) -> None:
        """Nothing is open."""


def distil(recipe: Recipe, run: RunDirectory, prompts: str = "") -> Path:
    """The encoder of a run, which is started, continued, or finished already. A new run keeps these prompts in its folder.

    Raises ComfyUI's own exception after Cancel, when the run is saved; UserError for a run with other inputs; and what `train` raises.
    """
    resume = run.has_checkpoints
    if resume:
        run.refuse_other_recipe(differences_besides_lengths(load_recipe(str(run.recipe)), recipe))
        if finished := _finished(run, recipe):
            return finished
    refuse_without_gradient(args)
    preflight(recipe, written_later=None if resume else run.prompts)
    check_output_folder()
    board = GraphBoard(sum(stage.steps for stage in recipe.stages))
    if not resume:
        run.start(recipe.to_toml(), prompts).close()
    try:
        with training():
            paths = train(recipe, run.path, resume, Ranks(), stop=board, boards=[board])
    except BaseException as error:
        # They hold the models for as long as the error is known.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        gc.collect()
        comfy.model_management.soft_empty_cache()
    if paths is None:
        comfy.model_management.interrupt_current_processing(False)
        raise comfy.model_management.InterruptProcessingException
    return paths[0]


@contextlib.contextmanager
def training() -> Iterator[None]:
    """Autograd in the thread that executes the graph, in which ComfyUI switches it off; what was set before is set again."""
    threads = torch.get_num_threads()
    with torch.inference_mode(False), torch.enable_grad(), undisturbed(), contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        # ComfyUI looks for Cancel in every layer, and would end a step in the middle: nothing could be saved. It has no switch.
        stack.enter_context(replaced(comfy.model_management, "throw_exception_if_processing_interrupted", lambda: None))
        yield


def _finished(run: RunDirectory, recipe: Recipe) -> Path | None:
    """The encoder of a run that has reached its last step, unless its file is gone."""
    last = run.checkpoints / f"step-{sum(stage.steps for stage in recipe.stages):06d}"
    with contextlib.suppress(StudentFileError):  # the trainer sets a damaged checkpoint aside
        return written_before(recipe, last) if last.is_dir() else None
    return None


def begun(run: RunDirectory) -> tuple[Recipe | None, int]:
    """The recipe of a run that continues, None for a new run, and the steps that it has taken."""
    if not run.has_checkpoints:
        return None, 0
    saved = [step_of(path) for path in checkpoint_paths(run.checkpoints) if peek(path)]
    return load_recipe(str(run.recipe)), max(saved, default=0)


def checked_prompts(run: RunDirectory, text: str) -> tuple[str, int]:
    """These prompts as the content of a file, one on each line, and how many different ones there are.

    Raises UserError for fewer than two, and if the run was started with others.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    content = "".join(f"{line}\n" for line in lines)
    if len(set(lines)) < FEWEST_PROMPTS:
        raise UserError(
            "There is only one prompt; training needs more.", "give some hundred, one on each line, or none: the preset has its own."
        )
    if run.has_checkpoints and not (run.prompts.is_file() and read_file(run.prompts).decode(errors="replace") == content):
        raise UserError(f"The run in {run.path} was started with other prompts.", f"set them back, or, for a new run, {ANOTHER}.")
    return content, len(set(lines))


def newest_image(run: RunDirectory) -> Image.Image | None:
    """The last contact sheet of a run, if it has made one."""
    from PIL import Image

    sheets = samples_of(run.samples)
    return Image.open(run.samples / sheets[-1]["file"]).convert("RGB") if sheets else None


def outcome(run: RunDirectory) -> list[str]:
    """How well a run's student follows its teacher, in a line, if that was measured."""
    lines = run.metrics.read_bytes().splitlines(keepends=True) if run.metrics.is_file() else []
    rows = [row for line in lines if (row := row_of(line)) is not None and row.get("held_out_loss") is not None]
    measured = [f"{row['held_out_loss']:.4g} (step {row['step']:,})" for row in rows]
    return [f"held-out loss {measured[0]} -> {measured[-1]}"] if measured else []
