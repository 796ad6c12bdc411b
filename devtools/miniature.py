"""`python dev.py miniature`: train what is missing of the miniature, evaluate it, write miniature/results.json, the tables and the plot.

Training and evaluation are the commands of the pack. What exists is kept, so a stopped command continues where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from ..miniature.files import FOLDERS, place
from ..runtime.disk import replace_file
from ..runtime.model_folders import SHIPPED
from .comfyui.ending import run_to_its_end
from .commands import ROOT, run_all
from .docs.miniature_tables import tables, write
from .miniature_results import MIDDLE, RESULTS, SD3_STUDENT, SIZES, UNTRAINED, measured, results

WORK = ROOT / ".dev" / "miniature"
CORPORA = ("objects", "semantics", "text")
# Memory of a process that trains or generates images.
PROCESS_BYTES = 2e9


@dataclass(frozen=True)
class Run:
    """A student: its name, the shipped recipe, changed settings."""

    name: str
    recipe: str
    settings: tuple[str, ...] = ()

    @property
    def all_settings(self) -> tuple[str, ...]:
        """The changed settings, including the name of the output."""
        return (f"output.name={self.name}", *self.settings)


def both(setting: str) -> tuple[str, ...]:
    """A setting of both stages: the first imitates embeddings, the second follows denoising steps."""
    return tuple(f"stage.{stage}.{setting}" for stage in range(2))


def only(corpus: str) -> tuple[str, ...]:
    """Settings for training on one of the three corpora, for the same number of steps."""
    return both(f'corpora=[{{kind="lines", path="miniature/prompts/{corpus}.txt"}}]')


# The half is not shipped, so that the files of the miniature stay below 40 MB.
SHIPPED_STUDENTS = (MIDDLE, "miniature_student_tenth", "miniature_student_fortieth", SD3_STUDENT)
# The checkpoints of the middle student are the points of the cost curve.
CURVE = ("checkpoints.every_steps=1000", "checkpoints.keep_last=100")
NAIVE = both("objective=embedding")
# 2,000 steps with one objective, four per trajectory.
SHORT = ("stage.0.steps=1000", "stage.1.steps=1000", "sampling.steps=4")
RUNS = (
    *(Run(f"miniature_student_{size}", f"miniature-{size}", CURVE if size == "quarter" else ()) for size in SIZES),
    Run("quarter_naive", "miniature-quarter", NAIVE),
    # The same two with another seed: weights, order of prompts and noise.
    Run("quarter_seed_1", "miniature-quarter", ("seed=1",)),
    Run("quarter_naive_seed_1", "miniature-quarter", ("seed=1", *NAIVE)),
    Run("short_velocity", "miniature-quarter", (*SHORT, *both("objective=velocity"))),
    Run("short_naive", "miniature-quarter", (*SHORT, *NAIVE)),
    *(Run(f"short_naive_{corpus}", "miniature-quarter", (*SHORT, *NAIVE, *only(corpus))) for corpus in CORPORA),
    Run(SD3_STUDENT, "miniature-sd3-quarter"),
)
# Other families that a student of one serves; only where it was measured.
ALSO = {MIDDLE: ("sd3",)}


def student_file(work: Path, name: str) -> Path:
    """The file that the trainer writes for a student."""
    return work / "models" / "text_encoders" / f"{name}.safetensors"


def processes() -> int:
    """The number of processes that train or generate images at the same time: one per core as far as memory allows; one on a GPU."""
    from ..runtime.accelerator import accelerator_type

    if accelerator_type():
        return 1
    return max(1, min(os.cpu_count() or 1, int(psutil.virtual_memory().available / PROCESS_BYTES)))


def make_models(comfyui: Path, work: Path) -> None:
    """Train the models that students need and copy them into the pack, unless it has them all."""
    if all(place(SHIPPED, name).is_file() for name in FOLDERS):
        return
    out = work / "made"
    run_all([[ROOT / "miniature", "all", "--out", out, "--comfyui", comfyui, *(["--resume"] if out.is_dir() else [])]])
    for name in FOLDERS:
        place(SHIPPED, name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(place(out, name), place(SHIPPED, name))


def train_students(runs: list[Run], comfyui: Path, work: Path) -> None:
    """Train with the trainer's command those students of which there is no file."""
    commands = []
    for run in runs:
        if student_file(work, run.name).is_file():
            check_recipe(run, student_file(work, run.name))
            continue
        folder = work / "runs" / run.name
        sets = [part for setting in run.all_settings for part in ("--set", setting)]
        resume = ["--resume"] if any(folder.glob("checkpoints/step-*")) else []
        ours = [ROOT / "train", run.recipe, "--run", folder, "--comfyui", comfyui, *sets, *resume]
        commands.append([*ours, "--", "--base-directory", work])
    run_all(commands, processes())


def check_recipe(run: Run, path: Path) -> None:
    """Raise RuntimeError if the recipe in a student's file is not the current one of its run."""
    from ..encoder.files import open_student
    from ..train.recipe import load_recipe

    made_by = open_student(path).metadata.facts.get("distilled_t5.recipe_sha256")
    if made_by != load_recipe(run.recipe, run.all_settings).sha256:
        raise RuntimeError(
            f"{path} was trained with another recipe than {run.recipe} with the current settings of {run.name}.\n"
            f"What to do: delete it and {path.parents[2] / 'runs' / run.name}; it is then trained again."
        )


def objectives(run: Run) -> str:
    """The objectives of a run's stages, such as "embedding, then velocity"."""
    from ..train.recipe import load_recipe

    return ", then ".join(dict.fromkeys(stage.objective for stage in load_recipe(run.recipe, run.settings).stages))


def in_bfloat16(trained: Path, path: Path) -> Path:
    """Write a trained student to `path` in bfloat16, the format of the shipped models, unless `path` is newer."""
    from ..encoder.files import open_student, write_student

    if not path.is_file() or path.stat().st_mtime < trained.stat().st_mtime:
        file = open_student(trained)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = replace(file.metadata, also_serves=ALSO.get(path.stem, ()))
        write_student(path, {name: tensor.bfloat16() for name, tensor in file.load().items()}, metadata, overwrite=True)
    return path


def untrained_file(work: Path) -> Path:
    """The middle student before its first step."""
    from ..encoder.files import write_student
    from ..encoder.metadata import StudentMetadata
    from ..miniature.teacher import LAYOUT
    from ..train.recipe import RANDOM, load_recipe
    from ..train.student_start import make_student
    from ..world.captions import TOKEN_LENGTH

    path = student_file(work, UNTRAINED)
    if not path.is_file():
        layout = load_recipe("miniature-quarter").student_layout(LAYOUT.d_model)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_student(path, make_student(layout, RANDOM, 0.0, seed=0).tensors(), StudentMetadata(token_length=TOKEN_LENGTH, pooled="zero"))
    return path


def students(work: Path) -> dict[str, Path]:
    """The bfloat16 files of the students: trained in `work` or shipped, checkpoints of the middle one, an untrained one."""
    trained = {run.name: student_file(work, run.name) for run in RUNS} | {UNTRAINED: untrained_file(work)}
    checkpoints = sorted((work / "runs" / MIDDLE).glob("checkpoints/step-*/student.safetensors"))[:-1]
    trained |= {f"{MIDDLE}_{file.parent.name}": file for file in checkpoints}
    measured = {name: in_bfloat16(file, work / "bfloat16" / f"{name}.safetensors") for name, file in trained.items() if file.is_file()}
    shipped = {name: SHIPPED / "text_encoders" / f"{name}.safetensors" for name in SHIPPED_STUDENTS}
    return {**shipped, **measured}


def evaluate(suite: str, comfyui: Path, files: Iterable[Path], count: int, out: Path) -> str:
    """Run the evaluation's command, a process per core; returns it without students. A finished evaluation in `out` is done again."""
    if (out / "results.json").is_file():
        shutil.rmtree(out)
    given = [part for path in files for part in ("--student", path)]
    ours = [suite, "--limit", str(count), *given, "--out", out, "--comfyui", comfyui]
    command = [ROOT / "evaluate" / "__main__.py", *ours, "--", "--cpu"]
    run_all([["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes()), *command]])
    return f"evaluate {suite} --limit {count}"


def ship(files: Iterable[Path]) -> None:
    """Copy new weights of shipped students into the pack."""
    from ..encoder.files import data_sha256

    for path in files:
        shipped = SHIPPED / "text_encoders" / path.name
        if path.stem in SHIPPED_STUDENTS and (not shipped.is_file() or data_sha256(shipped) != data_sha256(path)):
            shutil.copyfile(path, shipped)


def trial_settings(steps: int) -> tuple[str, ...]:
    """The settings of a trial with this many steps per stage; its warm-up is at most the 100 steps of the shipped recipes."""
    return (*both(f"steps={steps}"), f"optimizer.warmup_steps={min(steps, 100)}")


def command_line() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of ComfyUI's main.py")
    parser.add_argument(
        "--work", type=Path, help="folder of runs and students (default: .dev/miniature; with --steps, .dev/miniature/trial)"
    )
    parser.add_argument("--count", type=int, default=200, help="images of each task and encoder (default: 200)")
    parser.add_argument("--steps", type=int, help="optimizer steps of each stage: a trial, which changes nothing in the pack")
    names = [run.name for run in RUNS]
    parser.add_argument("--only", nargs="*", default=names, choices=names, metavar="NAME", help="train only these: " + ", ".join(names))
    return parser


def make(options: argparse.Namespace) -> None:
    """Train, evaluate, and write the results; what the pack holds is changed only if neither --steps nor --work is given."""
    trial = options.steps is not None or options.work is not None
    work = (options.work or (WORK / "trial" if trial else WORK)).resolve()
    followed = {run.name: objectives(run) for run in RUNS}
    few = () if options.steps is None else trial_settings(options.steps)
    make_models(options.comfyui, work)
    train_students([Run(run.name, run.recipe, (*run.settings, *few)) for run in RUNS if run.name in options.only], options.comfyui, work)
    files = students(work)
    if not trial:
        ship(files.values())
    on_sd3 = {SD3_STUDENT: files.pop(SD3_STUDENT), MIDDLE: files[MIDDLE]}
    command = evaluate("miniature", options.comfyui, files.values(), options.count, work / "evaluation")
    found = results(work, command, files, followed)
    command = evaluate("miniature-sd3", options.comfyui, on_sd3.values(), options.count, work / "evaluation-sd3")
    found["sd3"] = measured(work / "evaluation-sd3", command, on_sd3, followed)
    replace_file(work / "results.json" if trial else RESULTS, (json.dumps(found, indent=2) + "\n").encode())
    if not trial:
        write(found)
    print("\n\n".join(tables(found).values()))


def main() -> None:
    """Read the command line and run."""
    options = command_line().parse_args()
    run_to_its_end(lambda: make(options), "Stopped. The same command continues.")


if __name__ == "__main__":
    main()
