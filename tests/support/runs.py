"""Folders of runs without training: the files that a run leaves, made by the trainer's own writers from made-up numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from distilled_t5.encoder.files import write_student
from distilled_t5.encoder.metadata import StudentMetadata
from distilled_t5.tests.support.tiny_students import tiny_tensors
from distilled_t5.train.recipe import Recipe, load_recipe
from distilled_t5.train.report import Reporter
from distilled_t5.train.run_directory import RunDirectory
from distilled_t5.train.state import Checkpoints, TrainerState
from PIL import Image

STAGES = ["stage.0.steps=40", "stage.1.steps=60", "preview.vae=none.safetensors"]
BANDS = ("0.75-1.00", "0.50-0.75", "0.25-0.50", "0.00-0.25")
COLOURS = ("crimson", "seagreen", "royalblue", "goldenrod")


def made_up_run(folder: Path, steps: int = 100, settings: Sequence[str] = STAGES, saved: Sequence[int] = ()) -> RunDirectory:
    """A run of the smoke recipe after `steps` steps, with an image every 25 steps and checkpoints of the steps `saved`."""
    recipe = load_recipe("smoke", settings)
    with RunDirectory(folder).start(recipe.to_toml()) as run:
        with Reporter(run, recipe) as reporter:
            reporter.begin({"Recipe": recipe.name, "Student": "T5 of width 64"}, {1: 0.5})
            for step in range(1, steps + 1):
                stage = int(step > recipe.stages[0].steps)
                loss = math.exp(-step / 40) * (0.01 if stage else 1)
                reporter.step(step, loss, 4, stage=stage, learning_rate=1e-3 * (1 - step / 100), sigma=0.5)
                if step % 25 == 0:
                    reporter.held_out({band: loss * number for number, band in enumerate(BANDS, start=1)}, 8)
                    colour = COLOURS[step // 25 % len(COLOURS)]
                    reporter.image("preview", lambda colour=colour: Image.new("RGB", (384, 256), colour))
        for step in saved:
            save(run, recipe, step)
    return run


def save(run: RunDirectory, recipe: Recipe, step: int) -> Path:
    """A checkpoint of a tiny student whose weights tell the step."""
    tensors = {name: tensor + step for name, tensor in tiny_tensors().items()}
    metadata = StudentMetadata(title=recipe.output.name, facts={"distilled_t5.steps": str(step)})
    store = Checkpoints(run.checkpoints, lambda path, student: write_student(path, student, metadata), keep_last=9)
    return store.save(TrainerState(step, 0, tensors, {}, {}, {}, recipe.sha256, best=1 / step))
