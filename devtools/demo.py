"""`python dev.py demo`: a dozen captions of the miniature drawn with teacher and student in ComfyUI, from the same seeds.

The pack is installed as a user would install it; the workflow is example_workflows/08-Miniature-draw-on-a-CPU.json.
--train trains a small student first.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ..runtime.disk import replace_file
from ..train.checkpoint_files import STUDENT as STUDENT_FILE
from ..train.checkpoint_files import checkpoint_paths, step_of
from ..train.presets import length_settings
from ..train.recipe import load_recipe
from ..train.run_directory import RunDirectory
from ..world.pictures import TASKS, Scene
from ..world.questions import questions
from ..world.reader import verdict
from .comfyui.ending import interrupt_when_asked
from .comfyui.server import ComfyServer
from .comfyui.workflow import set_inputs, to_api_prompt
from .demo_sheet import pixels, verdict_sheet
from .serve import BASE, TRAINED, WORKFLOWS

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = ROOT / "example_workflows" / "08-Miniature-draw-on-a-CPU.json"
TEACHER, STUDENT = "miniature_teacher.safetensors", "miniature_student_quarter.safetensors"
OF_EACH_TASK = 2
RECIPE = "miniature-quick"
# Minutes of its steps; drawing takes one more.
TRAIN_MINUTES = 3
CHECKPOINTS = 10
SHEET, NUMBERS, RUN = "contact-sheet.png", "demo.json", "run"
Question = tuple[Scene, str]


def asked() -> list[Question]:
    """A dozen captions of combinations that are held out from training."""
    return [question for task in TASKS for question in questions(task, OF_EACH_TASK)]


def steps_of_each_stage() -> list[int]:
    """The steps of the stages of the recipe."""
    return [stage.steps for stage in load_recipe(RECIPE).stages]


def expected_time(train_steps: int) -> str:
    """How long the demo takes on two CPU cores."""
    minutes = 1 + round(TRAIN_MINUTES * train_steps / sum(steps_of_each_stage()))
    return "about a minute" if minutes == 1 else f"about {minutes} minutes"


def settings_of(steps: int) -> list[str]:
    """The recipe's settings for so many steps, at least one in each stage."""
    lengths = [*length_settings(load_recipe(RECIPE), steps)]
    # Each stage before the last has a checkpoint to draw with.
    shortest = min(stage.steps for stage in load_recipe(RECIPE, lengths).stages[:-1])
    every_steps = max(steps // CHECKPOINTS, 1)
    return [
        f"output.name={TRAINED}",
        *lengths,
        *(f"{part}.every_steps={every_steps}" for part in ("validation", "preview")),
        f"checkpoints.every_steps={min(every_steps, shortest)}",
        f"checkpoints.keep_last={CHECKPOINTS + 1}",
        "validation.prompts=32",
    ]


def students_of(run: Path, trained: Path) -> dict[str, Path]:
    """The files of a run's students by the names to draw with: the last one saved in each stage, and the finished one."""
    saved, found, begin = checkpoint_paths(run / "checkpoints"), {}, 0
    for stage in load_recipe(str(RunDirectory(run).recipe)).stages[:-1]:
        in_stage = [path for path in saved if begin < step_of(path) <= begin + stage.steps]
        found |= {f"{TRAINED}_{stage.name}.safetensors": path / STUDENT_FILE for path in in_stage[-1:]}
        begin += stage.steps
    return found | {trained.name: trained}


def train_student(comfyui: Path, base: Path, run: Path, steps: int) -> dict[str, Path]:
    """Train a small student with the trainer's command, into the folder that `serve` shows, with a workflow that draws with it.

    Returns its files at the end of each stage, by the names to draw with. Replaces what an earlier demo has left.
    """
    trained, workflow = base / "models" / "text_encoders" / f"{TRAINED}.safetensors", base / WORKFLOWS / f"{TRAINED}.json"
    if RunDirectory(run).is_run:
        if load_recipe(str(RunDirectory(run).recipe)).output.name != TRAINED:
            raise RuntimeError(f"{run} is a run of yours, not of the demo.\nWhat to do: name another folder with --out.")
        shutil.rmtree(run)
    # The trainer never overwrites: the new student would have a number beside it.
    trained.unlink(missing_ok=True)
    sets = [part for setting in settings_of(steps) for part in ("--set", setting)]
    command = [sys.executable, str(ROOT / "train"), RECIPE, "--run", str(run), "--comfyui", str(comfyui), *sets]
    code = subprocess.run([*command, "--", "--base-directory", str(base)], check=False).returncode
    if code:
        raise RuntimeError(f"The trainer ended with status {code}.\nWhat to do: see its output above.")
    workflow.parent.mkdir(parents=True, exist_ok=True)
    replace_file(workflow, WORKFLOW.read_text(encoding="utf-8").replace(STUDENT, trained.name).encode())
    return students_of(run, trained)


def draw(server: ComfyServer, prompt: dict[str, Any], encoders: Sequence[str]) -> dict[str, list[Image.Image]]:
    """An image of each encoder for every question, with seeds 0, 1, 2 ..."""
    columns: dict[str, list[Image.Image]] = {encoder: [] for encoder in encoders}
    with tqdm(total=len(encoders) * len(asked()), bar_format="Image {n_fmt} of {total_fmt}, {remaining} left", miniters=1) as bar:
        for encoder, images in columns.items():
            set_inputs(prompt, "DistilledT5Loader", clip_name2=encoder)
            for seed, (_, caption) in enumerate(asked()):
                set_inputs(prompt, "DistilledT5TextEncode", text=caption)
                set_inputs(prompt, "KSampler", seed=seed)
                images += server.images(server.run(prompt))
                bar.update()
    return columns


def run_demo(comfyui: Path, out: Path, train_steps: int, served: Path) -> dict[str, Any]:
    """Draw, check and write everything; returns the content of demo.json."""
    print(f"Expected time: {expected_time(train_steps)} on two CPU cores.", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    trained = train_student(comfyui, served, out / RUN, train_steps) if train_steps else {}
    encoders = [TEACHER, *(trained or [STUDENT])]
    with tempfile.TemporaryDirectory(prefix="distilled-t5-demo-") as folder:
        base = Path(folder)
        (base / "models" / "text_encoders").mkdir(parents=True)
        for name, path in trained.items():
            shutil.copyfile(path, base / "models" / "text_encoders" / name)
        print("Starting ComfyUI with the pack in custom_nodes ...", flush=True)
        started = time.monotonic()
        server = ComfyServer(comfyui, base, ROOT)
        with log_kept(server, out), server:
            facts = describe(server) | {"server_start_s": round(time.monotonic() - started, 1)}
            prompt = to_api_prompt(json.loads(WORKFLOW.read_text(encoding="utf-8")), server.object_info())
            print(f"Drawing {len(asked())} captions with each of {', '.join(encoders)} ...", flush=True)
            started = time.monotonic()
            columns = draw(server, prompt, encoders)
            facts["drawing_s"] = round(time.monotonic() - started, 1)
    verdict_sheet(asked(), {Path(name).stem: images for name, images in columns.items()}).save(out / SHEET)
    facts["right"] = {encoder: judged(images) for encoder, images in columns.items()}
    (out / NUMBERS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return facts


@contextlib.contextmanager
def log_kept(server: ComfyServer, out: Path) -> Iterator[None]:
    """Copy the server's log to the output folder, also after a failure."""
    try:
        yield
    finally:
        if server.log_path.exists():
            shutil.copyfile(server.log_path, out / "server.log")


def judged(images: Sequence[Image.Image]) -> dict[str, str]:
    """The right images of each task, such as "2 of 2"."""
    verdicts = [(scene.task, verdict(scene, pixels(image))) for (scene, _), image in zip(asked(), images, strict=True)]
    return {task: f"{sum(right for name, right in verdicts if name == task)} of {OF_EACH_TASK}" for task in TASKS}


def describe(server: ComfyServer) -> dict[str, Any]:
    """Machine and versions."""
    stats = server.get_json("/system_stats")
    return {
        "comfyui": stats["system"]["comfyui_version"],
        "torch": stats["system"]["pytorch_version"],
        "device": stats["devices"][0]["name"],
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "workflow": WORKFLOW.relative_to(ROOT).as_posix(),
    }


def shown(path: Path) -> str:
    """A path as it is typed in the root of the repository, where the commands start."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def report(facts: dict[str, Any], out: Path) -> str:
    """The report on the terminal."""
    lines = [f"\nComfyUI {facts['comfyui']} on {facts['device']} drew with {facts['workflow']} (20 steps). Right images:"]
    for encoder, right in facts["right"].items():
        each = ", ".join(f"{task.replace('_', ' ')} {count}" for task, count in right.items())
        lines.append(f"  {sum(int(count.split()[0]) for count in right.values()):2} of {len(asked())}  {encoder}: {each}")
    return "\n".join(
        [
            *lines,
            f"  ComfyUI's start {facts['server_start_s']} s, images {facts['drawing_s']} s",
            f"The images with their verdicts: {shown(out / SHEET)}",
            "A dozen images are not a measurement: miniature/README.md has 200 of each task.",
        ]
    )


def report_of_training(out: Path, base: Path) -> str:
    """Where the student and the run are, and what to do with them."""
    file = shown(base / "models" / "text_encoders" / f"{TRAINED}.safetensors")
    return "\n".join(
        [
            f"How the student was trained: {shown(out / RUN / 'page.html')}; its model card: {shown(out / RUN / 'README.md')}",
            f"The student: {file}",
            f"To measure it, in 5 minutes: {shown(Path(sys.executable))} evaluate miniature --student {file} --limit 20",
        ]
    )


def main() -> None:
    """Read the command line, which dev.py describes, run the demo and print the report."""
    # Models this small run faster on one thread on a busy machine.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(description="Draw the miniature in a real ComfyUI.")
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "demo-output")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--train-steps", type=int, default=sum(steps_of_each_stage()))
    parser.add_argument("--base", type=Path, default=BASE)
    arguments = parser.parse_args()
    if arguments.train_steps < (least := len(steps_of_each_stage())):
        parser.error(
            f"--train-steps is {arguments.train_steps}: expected at least {least}.\nWhat to do: leave it out for those of {RECIPE}."
        )
    interrupt_when_asked()
    try:
        facts = run_demo(arguments.comfyui, arguments.out, arguments.train_steps if arguments.train else 0, arguments.base)
    except KeyboardInterrupt:
        sys.exit(130)
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"The demo failed: {error}")
    print(report(facts, arguments.out))
    if arguments.train:
        print(report_of_training(arguments.out, arguments.base))
    print("To draw in a browser: python dev.py serve")


if __name__ == "__main__":
    main()
