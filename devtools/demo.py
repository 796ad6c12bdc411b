"""The pack at work in a real ComfyUI: `python -m distilled_t5.devtools.demo --comfyui FOLDER --out FOLDER [--train]`.

Starts ComfyUI with the pack installed as a user would install it and draws a dozen captions of the miniature with the teacher and with a
student through example_workflows/miniature.json, from the same seeds. With --train a small student is trained first, from nothing.
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

from ..world.pictures import TASKS, Scene
from ..world.questions import questions
from ..world.reader import verdict
from .comfyui.ending import interrupt_when_asked
from .comfyui.server import ComfyServer
from .comfyui.workflow import set_inputs, to_api_prompt
from .demo_sheet import pixels, verdict_sheet

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = ROOT / "example_workflows" / "miniature.json"
TEACHER, STUDENT = "miniature_teacher.safetensors", "miniature_student_quarter.safetensors"
OF_EACH_TASK = 2
TRAINED, TRAIN_STEPS = "demo_student", 1_600
SHEET, NUMBERS = "contact-sheet.png", "demo.json"
Question = tuple[Scene, str]


def asked() -> list[Question]:
    """A dozen captions whose combinations neither the teacher's Flux nor a student saw in training."""
    return [question for task in TASKS for question in questions(task, OF_EACH_TASK)]


def train_student(comfyui: Path, base: Path, steps: int) -> list[str]:
    """Train a small student by the product's own command; the names of its files after the first steps and at the end."""
    followed = max(steps // 10, 1)
    settings = [
        f"output.name={TRAINED}",
        f"stage.0.steps={steps - followed}",
        f"stage.1.steps={followed}",
        f"optimizer.warmup_steps={min(steps, 100)}",
    ]
    settings += [f"checkpoints.every_steps={steps // 8}", "checkpoints.keep_last=8"]
    settings += [f"validation.every_steps={steps}", f"preview.every_steps={steps}", "validation.prompts=32"]
    sets = [part for setting in settings for part in ("--set", setting)]
    run = base / "runs" / TRAINED
    command = [sys.executable, str(ROOT / "train"), "miniature-tenth", "--run", str(run), "--comfyui", str(comfyui), *sets]
    code = subprocess.run([*command, "--", "--base-directory", str(base)], check=False).returncode
    if code:
        raise RuntimeError(f"The trainer ended with status {code}.\nWhat to do: see what it printed.")
    early = min((run / "checkpoints").glob("step-*"))
    before = f"{TRAINED}_{early.name}.safetensors"
    shutil.copyfile(early / "student.safetensors", base / "models" / "text_encoders" / before)
    return [before, f"{TRAINED}.safetensors"]


def draw(server: ComfyServer, prompt: dict[str, Any], encoder: str, asked_for: Sequence[Question]) -> list[Image.Image]:
    """A picture for every question, from seeds 0, 1, 2 ..."""
    set_inputs(prompt, "DistilledT5Loader", clip_name2=encoder)
    pictures = []
    for seed, (_, caption) in enumerate(asked_for):
        set_inputs(prompt, "DistilledT5TextEncode", text=caption)
        set_inputs(prompt, "KSampler", seed=seed)
        [picture] = server.images(server.run(prompt))
        pictures.append(picture)
    return pictures


def run_demo(comfyui: Path, out: Path, train_steps: int) -> dict[str, Any]:
    """Draw, judge and write everything; returns what demo.json says."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="distilled-t5-demo-") as folder:
        base = Path(folder)
        encoders = [TEACHER, *(train_student(comfyui, base, train_steps) if train_steps else [STUDENT])]
        print("Starting ComfyUI with the pack in custom_nodes ...", flush=True)
        started = time.monotonic()
        server = ComfyServer(comfyui, base, ROOT)
        with log_kept(server, out), server:
            told = describe(server) | {"server_start_s": round(time.monotonic() - started, 1)}
            prompt = to_api_prompt(json.loads(WORKFLOW.read_text(encoding="utf-8")), server.object_info())
            print(f"Drawing {len(asked())} captions with each of {', '.join(encoders)} ...", flush=True)
            started = time.monotonic()
            columns = {encoder: draw(server, prompt, encoder, asked()) for encoder in encoders}
            told["drawing_s"] = round(time.monotonic() - started, 1)
    verdict_sheet(asked(), {Path(name).stem: pictures for name, pictures in columns.items()}).save(out / SHEET)
    told["right"] = {encoder: judged(pictures) for encoder, pictures in columns.items()}
    (out / NUMBERS).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return told


@contextlib.contextmanager
def log_kept(server: ComfyServer, out: Path) -> Iterator[None]:
    """Leaves the server's log in the output folder, above all when something fails."""
    try:
        yield
    finally:
        if server.log_path.exists():
            shutil.copyfile(server.log_path, out / "server.log")


def judged(pictures: Sequence[Image.Image]) -> dict[str, str]:
    """Right pictures of each task, as `right of asked`."""
    verdicts = [(scene.task, verdict(scene, pixels(picture))) for (scene, _), picture in zip(asked(), pictures, strict=True)]
    return {task: f"{sum(right for name, right in verdicts if name == task)} of {OF_EACH_TASK}" for task in TASKS}


def describe(server: ComfyServer) -> dict[str, Any]:
    """The machine and the versions that the numbers belong to."""
    stats = server.get_json("/system_stats")
    return {
        "comfyui": stats["system"]["comfyui_version"],
        "torch": stats["system"]["pytorch_version"],
        "device": stats["devices"][0]["name"],
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "workflow": WORKFLOW.relative_to(ROOT).as_posix(),
    }


def report(told: dict[str, Any], out: Path) -> str:
    """What happened, for a person."""
    lines = [f"\nComfyUI {told['comfyui']} on {told['device']} drew with {told['workflow']} (20 steps); read back by code, right are:"]
    for encoder, right in told["right"].items():
        each = ", ".join(f"{task.replace('_', ' ')} {count}" for task, count in right.items())
        lines.append(f"  {sum(int(count.split()[0]) for count in right.values()):2} of {len(asked())}  {encoder}: {each}")
    return "\n".join(
        [
            *lines,
            f"  ComfyUI's start {told['server_start_s']} s, pictures {told['drawing_s']} s",
            f"The pictures with their verdicts: {out / SHEET}",
            "A dozen pictures are no measurement: miniature/README.md has 200 of each task.",
            "To use it in a browser: python dev.py serve, then Templates, Distilled T5, miniature.",
        ]
    )


def main() -> None:
    """Read the command line, run the demo and print the report."""
    parser = argparse.ArgumentParser(description="Draw the miniature in a real ComfyUI.")
    parser.add_argument("--comfyui", type=Path, required=True, help="folder of ComfyUI's main.py")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for the contact sheet, demo.json and server.log")
    parser.add_argument("--train", action="store_true", help="first train a small student from nothing, for a few minutes")
    parser.add_argument("--train-steps", type=int, default=TRAIN_STEPS, help=f"optimizer steps of --train (default: {TRAIN_STEPS})")
    arguments = parser.parse_args()
    interrupt_when_asked()
    try:
        told = run_demo(arguments.comfyui, arguments.out, arguments.train_steps if arguments.train else 0)
    except KeyboardInterrupt:
        sys.exit(130)
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"The demo failed: {error}")
    print(report(told, arguments.out))


if __name__ == "__main__":
    main()
