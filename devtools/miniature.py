"""Makes and measures the miniature: `python dev.py miniature`. Models where they are missing, students, baselines, tables.

Every part that is there already is kept, so a stopped command goes on where it was.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..miniature.folders import KINDS, SHIPPED, place

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".dev" / "miniature"
SIZES = ("half", "quarter", "tenth", "fortieth")
CORPORA = ("objects", "semantics", "text")


@dataclass(frozen=True)
class Run:
    """A student: its name, the shipped recipe, what is set otherwise."""

    name: str
    recipe: str
    settings: tuple[str, ...] = ()


def both(setting: str) -> tuple[str, ...]:
    """A setting of both stages: the first imitates embeddings, the second follows steps."""
    return tuple(f"stage.{stage}.{setting}" for stage in range(2))


def only(corpus: str) -> tuple[str, ...]:
    """The settings that leave one corpus of the three, at equal steps."""
    return both(f'corpora=[{{kind="lines", path="miniature/prompts/{corpus}.txt"}}]')


MIDDLE = "miniature_student_quarter"
# All files of the miniature together stay below 30 MB; the half would be the last straw.
SHIPPED_STUDENTS = (MIDDLE, "miniature_student_tenth", "miniature_student_fortieth")
# The checkpoints of the middle student are the points of the cost curve.
CURVE = ("checkpoints.every_steps=1000", "checkpoints.keep_last=100")
NAIVE = both("objective=embedding")
# What the short runs share: 2,000 steps in all, of one objective, four along each trajectory.
SHORT = ("stage.0.steps=1000", "stage.1.steps=1000", "sampling.steps=4")
MIDDLE_RUN = Run(MIDDLE, "miniature-quarter", CURVE)
RUNS = (
    *(MIDDLE_RUN if size == "quarter" else Run(f"miniature_student_{size}", f"miniature-{size}") for size in SIZES),
    Run("quarter_naive", "miniature-quarter", NAIVE),
    Run("short_velocity", "miniature-quarter", (*SHORT, *both("objective=velocity"))),
    Run("short_naive", "miniature-quarter", (*SHORT, *NAIVE)),
    *(Run(f"short_naive_{corpus}", "miniature-quarter", (*SHORT, *NAIVE, *only(corpus))) for corpus in CORPORA),
)
CONTEXT_FREE = "context_free"


def student_file(work: Path, name: str) -> Path:
    """Where the trainer leaves a student."""
    return work / "models" / "text_encoders" / f"{name}.safetensors"


def call(*arguments: str | Path, **extra: str) -> None:
    """Run one of the pack's commands; what it prints is seen. Raises RuntimeError if it does not end well."""
    command = [sys.executable, *map(str, arguments)]
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, **extra}, check=False).returncode
    if code:
        raise RuntimeError(
            f"{' '.join(command[1:3])} ended with status {code}.\nWhat to do: see what it printed; the same command goes on."
        )


def make_models(comfyui: Path, work: Path) -> None:
    """Train teacher and Flux, unless all three files are shipped, and put them where the pack ships them."""
    if all(place(SHIPPED, name).is_file() for name in KINDS):
        return
    out = work / "made"
    resume = ["--resume"] if out.is_dir() else []
    faster = ["--compile"] if shutil.which("g++") else []
    call(ROOT / "miniature", "all", *faster, "--out", out, "--comfyui", comfyui, *resume)
    for name in KINDS:
        place(SHIPPED, name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(place(out, name), place(SHIPPED, name))


def train_student(run: Run, comfyui: Path, work: Path, steps: int | None) -> None:
    """Train a student by the product's own command, unless it is there; on one thread, as two students train at the same time."""
    if student_file(work, run.name).is_file():
        return
    folder = work / "runs" / run.name
    settings = [f"output.name={run.name}", *run.settings, *([] if steps is None else [f"stage.0.steps={steps}"])]
    sets = [part for setting in settings for part in ("--set", setting)]
    resume = ["--resume"] if (folder / "checkpoints").is_dir() else []
    host = ["--", "--base-directory", work]
    call(ROOT / "train", run.recipe, "--run", folder, "--comfyui", comfyui, *sets, *resume, *host, OMP_NUM_THREADS="1")


def ship(name: str, work: Path) -> Path:
    """Put a student that was trained here into the pack, in bfloat16 as the other models of the miniature; what is shipped is measured."""
    from ..encoder.files import open_student, write_student

    path = SHIPPED / "text_encoders" / f"{name}.safetensors"
    if student_file(work, name).is_file():
        file = open_student(student_file(work, name))
        write_student(path, {key: tensor.bfloat16() for key, tensor in file.load().items()}, file.metadata, overwrite=True)
    return path


def train_baseline(comfyui: Path, work: Path, steps: int | None) -> Path:
    """Train the encoder without context, unless it is there."""
    path = work / f"{CONTEXT_FREE}.safetensors"
    if not path.is_file():
        call("-m", "distilled_t5.devtools.miniature_results", "--comfyui", comfyui, "--baseline", path, *_steps(steps), OMP_NUM_THREADS="1")
    return path


def _steps(steps: int | None) -> list[str]:
    return [] if steps is None else ["--steps", str(steps)]


def train_all(comfyui: Path, work: Path, steps: int | None, only: list[str] | None) -> None:
    """Train every student and the baseline, or those named, as many at a time as there are processor cores; the first trouble is raised."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running: list[Future[Any]] = [
            pool.submit(train_student, run, comfyui, work, steps) for run in RUNS if only is None or run.name in only
        ]
        if only is None or CONTEXT_FREE in only:
            running.append(pool.submit(train_baseline, comfyui, work, steps))
        for one in running:
            one.result()


def main() -> None:
    """Read the command line, then make and measure all there is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of ComfyUI's main.py")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for runs and students (default: .dev/miniature)")
    parser.add_argument("--count", type=int, default=200, help="pictures of each task that an encoder is asked for")
    parser.add_argument("--steps", type=int, help="optimizer steps of each student (default: as in the recipes)")
    parser.add_argument("--only", nargs="*", metavar="NAME", help="train only these students: " + ", ".join(run.name for run in RUNS))
    options = parser.parse_args()
    try:
        make_models(options.comfyui, options.work)
        train_all(options.comfyui, options.work, options.steps, options.only)
        for name in SHIPPED_STUDENTS:
            ship(name, options.work)
        call(
            "-m",
            "distilled_t5.devtools.miniature_results",
            "--comfyui",
            options.comfyui,
            "--work",
            options.work,
            "--count",
            str(options.count),
        )
    except (RuntimeError, OSError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
