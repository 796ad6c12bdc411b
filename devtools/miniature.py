"""Makes and measures the miniature: `python dev.py miniature`. Models where they are missing, students, baselines, tables.

Every part that is there already is kept, so a stopped command goes on where it was; the context-free baseline alone starts over.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil

from ..miniature.files import KINDS, place
from ..runtime.model_folders import SHIPPED
from .comfyui.children import call, stop_children
from .comfyui.ending import interrupt_when_asked

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".dev" / "miniature"
SIZES = ("half", "quarter", "tenth", "fortieth")
CORPORA = ("objects", "semantics", "text")
# What a process that trains or paints holds, bytes.
OF_ONE_PROCESS = 2e9


@dataclass(frozen=True)
class Run:
    """A student: its name, the shipped recipe, what is set otherwise."""

    name: str
    recipe: str
    settings: tuple[str, ...] = ()

    @property
    def all_settings(self) -> tuple[str, ...]:
        """Everything that is set otherwise than in the recipe, its name included."""
        return (f"output.name={self.name}", *self.settings)


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
CURVE = ("checkpoints.every_steps=500", "checkpoints.keep_last=100")
NAIVE = both("objective=embedding")
# What the short runs share: 2,000 steps in all, of one objective, four along each trajectory.
SHORT = ("stage.0.steps=1000", "stage.1.steps=1000", "sampling.steps=4")
MIDDLE_RUN = Run(MIDDLE, "miniature-quarter", CURVE)
RUNS = (
    *(MIDDLE_RUN if size == "quarter" else Run(f"miniature_student_{size}", f"miniature-{size}") for size in SIZES),
    Run("quarter_naive", "miniature-quarter", NAIVE),
    # The same two from other random values, on other prompts and noise: how much a seed decides.
    Run("quarter_seed_1", "miniature-quarter", ("seed=1",)),
    Run("quarter_naive_seed_1", "miniature-quarter", ("seed=1", *NAIVE)),
    Run("short_velocity", "miniature-quarter", (*SHORT, *both("objective=velocity"))),
    Run("short_naive", "miniature-quarter", (*SHORT, *NAIVE)),
    *(Run(f"short_naive_{corpus}", "miniature-quarter", (*SHORT, *NAIVE, *only(corpus))) for corpus in CORPORA),
)
CONTEXT_FREE = "context_free"
# By seed, the student that follows and its twin that only imitates, for as many steps.
PAIRS = {0: (MIDDLE, "quarter_naive"), 1: ("quarter_seed_1", "quarter_naive_seed_1")}


def student_file(work: Path, name: str) -> Path:
    """Where the trainer leaves a student."""
    return work / "models" / "text_encoders" / f"{name}.safetensors"


def processes() -> int:
    """How many processes may train or paint at the same time: one per core as far as the memory goes, one where they would share a GPU."""
    import torch

    if torch.cuda.is_available():
        return 1
    return max(1, min(os.cpu_count() or 1, int(psutil.virtual_memory().available / OF_ONE_PROCESS)))


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


def train_student(run: Run, comfyui: Path, work: Path) -> None:
    """Train a student by the product's own command, unless it is there; on one thread, as two students train at the same time."""
    from ..train.run_directory import RunDirectory

    if student_file(work, run.name).is_file():
        check_recipe(run, student_file(work, run.name))
        return
    folder = work / "runs" / run.name
    sets = [part for setting in run.all_settings for part in ("--set", setting)]
    resume = ["--resume"] if RunDirectory(folder).has_checkpoints else []
    host = ["--", "--base-directory", work]
    call(ROOT / "train", run.recipe, "--run", folder, "--comfyui", comfyui, *sets, *resume, *host, OMP_NUM_THREADS="1")


def check_recipe(run: Run, path: Path) -> None:
    """Raise RuntimeError if a student's file was not made by its run as it is described today."""
    from ..encoder.files import open_student
    from ..train.recipe import load_recipe

    made_by = open_student(path).metadata.facts.get("distilled_t5.recipe_sha256")
    if made_by != load_recipe(run.recipe, run.all_settings).sha256:
        raise RuntimeError(
            f"{path} was made by another recipe than {run.recipe} is with the settings of {run.name} now.\n"
            f"What to do: delete it and its run, {path.parents[2] / 'runs' / run.name}; it is trained again."
        )


def in_bfloat16(name: str, work: Path) -> Path:
    """A trained student in bfloat16, as the other models of the miniature are: what is measured. Made where it is missing or of another."""
    from ..encoder.files import open_student, write_student

    file, path = open_student(student_file(work, name)), work / "bfloat16" / f"{name}.safetensors"
    if not same_weights(path, student_file(work, name)):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_student(path, {key: tensor.bfloat16() for key, tensor in file.load().items()}, file.metadata, overwrite=True)
    return path


def same_weights(in_bfloat16: Path, trained: Path) -> bool:
    """Whether a file is there and holds a trained student's weights in bfloat16. Dates in headers differ, so bytes say nothing."""
    from ..encoder.files import open_student

    if not in_bfloat16.is_file():
        return False
    ours, theirs = open_student(in_bfloat16).load(), open_student(trained).load()
    return ours.keys() == theirs.keys() and all(tensor.equal(theirs[name].bfloat16()) for name, tensor in ours.items())


def ship(name: str, work: Path) -> Path:
    """Put a student that was trained here into the pack, unless it lies there already."""
    path = SHIPPED / "text_encoders" / f"{name}.safetensors"
    if student_file(work, name).is_file() and not same_weights(path, student_file(work, name)):
        shutil.copyfile(in_bfloat16(name, work), path)
    return path


def train_baseline(comfyui: Path, work: Path, steps: int | None) -> None:
    """Train the encoder without context, unless it is there."""
    path = work / f"{CONTEXT_FREE}.safetensors"
    if not path.is_file():
        given = [] if steps is None else ["--steps", str(steps)]
        call("-m", "distilled_t5.devtools.miniature_results", "--comfyui", comfyui, "--baseline", path, *given, OMP_NUM_THREADS="1")


def trial_settings(steps: int) -> tuple[str, ...]:
    """The settings of a trial with this many steps per stage; its warm-up is at most the 100 steps of the shipped recipes."""
    return (*both(f"steps={steps}"), f"optimizer.warmup_steps={min(steps, 100)}")


def train_all(comfyui: Path, work: Path, steps: int | None, names: list[str] | None) -> None:
    """Train every student and the baseline, or those named, several at a time; the first trouble stops all and is raised."""
    few = () if steps is None else trial_settings(steps)
    runs = [Run(run.name, run.recipe, (*run.settings, *few)) for run in RUNS if names is None or run.name in names]
    tasks = [partial(train_student, run, comfyui, work) for run in runs]
    if names is None or CONTEXT_FREE in names:
        tasks.append(partial(train_baseline, comfyui, work, steps))
    pool = ThreadPoolExecutor(processes())
    try:
        done, _ = wait([pool.submit(task) for task in tasks], return_when=FIRST_EXCEPTION)
        for one in done:
            one.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        stop_children()


def command_line() -> argparse.ArgumentParser:
    """What the command takes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of ComfyUI's main.py")
    parser.add_argument("--work", type=Path, help="folder for runs and students (default: .dev/miniature, of a trial .dev/miniature/trial)")
    parser.add_argument("--count", type=int, default=200, help="pictures of each task that an encoder is asked for")
    parser.add_argument("--steps", type=int, help="optimizer steps of each stage: a trial; nothing is shipped, no page renewed")
    names = [*(run.name for run in RUNS), CONTEXT_FREE]
    parser.add_argument("--only", nargs="*", choices=names, metavar="NAME", help="train only these students: " + ", ".join(names))
    return parser


def main() -> None:
    """Read the command line, then make and measure all there is."""
    options = command_line().parse_args()
    interrupt_when_asked()
    trial = options.steps is not None or options.work is not None
    work = (options.work or (WORK if options.steps is None else WORK / "trial")).resolve()
    try:
        make_models(options.comfyui, work)
        train_all(options.comfyui, work, options.steps, options.only)
        if not trial:
            for name in SHIPPED_STUDENTS:
                ship(name, work)
        out = ["--out", work / "results.json"] if trial else []
        measuring = ("-m", "distilled_t5.devtools.miniature_results", "--comfyui", options.comfyui, "--work", work)
        call(*measuring, "--count", str(options.count), *out)
    except (RuntimeError, OSError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        stop_children()
        print("\nStopped; the same command goes on.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
