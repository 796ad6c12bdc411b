"""Training inside a running ComfyUI: in the thread that executes the graph, with its progress bar and its Cancel."""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.utils
import torch
from comfy.cli_args import args

from ..diffusion.gradients import replaced
from ..runtime.comfyui import check_output_folder, refuse_fast_products
from ..runtime.disk import read_file, replace_file
from ..runtime.errors import StudentFileError, UserError
from ..runtime.randomness import undisturbed
from ..runtime.ranks import Ranks
from .preflight import preflight
from .recipe import Recipe, load_recipe
from .run import train, written_before
from .run_directory import RunDirectory

if TYPE_CHECKING:
    from PIL import Image

FEWEST_PROMPTS = 2
OTHER_NAME = "set the inputs back to what they were, or set another name, which starts a new run."


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


def distil(recipe: Recipe, run: RunDirectory) -> Path:
    """The encoder of a run, which is started, continued, or finished already.

    Raises ComfyUI's own exception after Cancel, when the run is saved; UserError for a run with other inputs; and what `train` raises.
    """
    if run.has_checkpoints:
        _refuse_other_inputs(run, recipe)
        if finished := _finished(run, recipe):
            return finished
    refuse_fast_products(args)
    preflight(recipe)
    check_output_folder()
    board = GraphBoard(sum(stage.steps for stage in recipe.stages))
    with training():
        path = train(recipe, run.path, run.has_checkpoints, Ranks(), stop=board, boards=[board])
    gc.collect()
    comfy.model_management.soft_empty_cache()
    if path is None:
        comfy.model_management.interrupt_current_processing(False)
        raise comfy.model_management.InterruptProcessingException
    return path


@contextlib.contextmanager
def training() -> Iterator[None]:
    """Autograd in the thread that executes the graph, in which ComfyUI switches it off; what was set before is set again."""
    threads = torch.get_num_threads()
    with torch.inference_mode(False), torch.enable_grad(), undisturbed(), contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        # ComfyUI looks for Cancel in every layer, and would end a step in the middle: nothing could be saved.
        stack.enter_context(replaced(comfy.model_management, "throw_exception_if_processing_interrupted", lambda: None))
        yield


def _refuse_other_inputs(run: RunDirectory, recipe: Recipe) -> None:
    """Raise UserError with what differs between a run and the recipe, if anything does."""
    if differences := load_recipe(str(run.recipe)).differences(recipe):
        listed = "\n".join(f"  {difference}" for difference in differences)
        raise UserError(f"The run in {run.path} was started with other inputs:", OTHER_NAME, listed)


def _finished(run: RunDirectory, recipe: Recipe) -> Path | None:
    """The encoder of a run that has reached its last step, unless its file is gone."""
    last = run.checkpoints / f"step-{sum(stage.steps for stage in recipe.stages):06d}"
    with contextlib.suppress(StudentFileError):  # the trainer sets a damaged checkpoint aside
        return written_before(recipe, last) if last.is_dir() else None
    return None


def keep_prompts(run: RunDirectory, text: str) -> tuple[Path, int]:
    """The file of the run that holds these prompts, one on each line, and how many different ones there are.

    Raises UserError for fewer than two, and if the run was started with others.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    path, content = run.prompts, "".join(f"{line}\n" for line in lines)
    if len(set(lines)) < FEWEST_PROMPTS:
        raise UserError(
            "There is only one prompt; training needs more.", "give some hundred, one on each line, or none: the preset has its own."
        )
    if run.has_checkpoints:
        if not path.is_file() or read_file(path).decode() != content:
            raise UserError(f"The run in {run.path} was started with other prompts.", OTHER_NAME)
    else:
        run.path.mkdir(parents=True, exist_ok=True)
        replace_file(path, content.encode())
    return path, len(set(lines))


def newest_image(run: RunDirectory) -> Image.Image | None:
    """The last contact sheet of a run, if it has made one."""
    from PIL import Image

    sheets = sorted(run.samples.glob("*.jpg"))
    return Image.open(sheets[-1]).convert("RGB") if sheets else None


def outcome(run: RunDirectory) -> list[str]:
    """How well a run's student follows its teacher, in a line, if that was measured."""
    lines = [json.loads(line) for line in run.metrics.read_text(encoding="utf-8").splitlines()]
    measured = [(line["step"], line["held_out_loss"]) for line in lines if line.get("held_out_loss") is not None]
    return ["held-out loss " + " -> ".join(f"{loss:.4g} (step {step:,})" for step, loss in (measured[0], measured[-1]))] if measured else []
