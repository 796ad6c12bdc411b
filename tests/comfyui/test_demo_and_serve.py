"""The two commands that a newcomer runs, as dev.py starts them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from distilled_t5.devtools.comfyui.server import free_port
from distilled_t5.devtools.demo import RECIPE, expected_time, settings_of, steps_of_each_stage
from distilled_t5.encoder.files import open_student
from distilled_t5.tests.support.tiny_students import published_file
from distilled_t5.train.recipe import load_recipe
from distilled_t5.world.pictures import TASKS
from PIL import Image

PACK_AS_MODULE = (
    "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); import conftest; runpy.run_module(sys.argv.pop(1), run_name='__main__')"
)


ROOT = Path(__file__).resolve().parent.parent.parent
DEV_PY = """
import pathlib, signal, sys
root, comfyui, folder = map(pathlib.Path, sys.argv[1:4])
sys.path.insert(0, str(root))
if hasattr(signal, "SIGHUP"):  # under nohup it is ignored, which processes inherit
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
import dev

dev.set_up, dev.program, dev.DEV = lambda: comfyui, lambda *_: sys.executable, folder
dev.link(folder / "python" / "distilled_t5", root)
sys.exit(dev.main(sys.argv[4:]))
"""


def command(module: str, comfyui: Path, *arguments: str) -> list[str]:
    tests = str(Path(__file__).resolve().parent.parent)
    return [sys.executable, "-c", PACK_AS_MODULE, tests, f"distilled_t5.devtools.{module}", "--comfyui", str(comfyui), *arguments]


def demo(comfyui: Path, out: Path, *options: str) -> tuple[str, dict[str, Any]]:
    """What the demo prints and what demo.json says."""
    command_line = command("demo", comfyui, "--out", str(out), "--base", str(out / "kept"), *options)
    done = subprocess.run(command_line, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr, json.loads((out / "demo.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("steps", [len(steps_of_each_stage()), 5, 20, 1_600, sum(steps_of_each_stage())])
def test_the_demos_recipe_is_valid_for_any_number_of_steps(steps: int) -> None:
    recipe = load_recipe(RECIPE, settings_of(steps))
    assert sum(stage.steps for stage in recipe.stages) == steps
    assert recipe.preview.every_steps == max(1, steps // 10) >= recipe.checkpoints.every_steps


def test_the_demos_expected_time_grows_with_its_steps() -> None:
    own = sum(steps_of_each_stage())
    assert [expected_time(steps) for steps in (0, own // 10, own, 10 * own)] == [
        "about a minute",
        "about a minute",
        "about 4 minutes",
        "about 31 minutes",
    ]


def test_demo_draws_with_teacher_and_student_and_judges_every_picture(comfyui_path: Path, tmp_path: Path) -> None:
    said, told = demo(comfyui_path, tmp_path / "out")
    assert list(told["right"]) == ["miniature_teacher.safetensors", "miniature_student_quarter.safetensors"]
    for encoder, right in told["right"].items():
        assert list(right) == list(TASKS)
        total = sum(int(count.split(" of ")[0]) for count in right.values())
        assert f"{total:2} of 12  {encoder}" in said
        assert total >= 10
    assert "python dev.py serve" in said
    assert said.startswith("Expected time: about a minute")
    assert "Image 7 of 24, " in said and not (tmp_path / "out" / "kept").exists()
    assert "WARNING" not in said
    with Image.open(tmp_path / "out" / "contact-sheet.png") as sheet:
        assert sheet.height > 6 * 168
        assert len(sheet.convert("RGB").getcolors(1 << 24) or []) > 10


@pytest.mark.parametrize("steps", [sum(steps_of_each_stage()), 40, 3])
def test_every_stage_of_the_demo_has_a_checkpoint_that_is_kept_to_the_end(steps: int) -> None:
    recipe, end = load_recipe(RECIPE, settings_of(steps)), 0
    every, saved = recipe.checkpoints.every_steps, range(sum(stage.steps for stage in recipe.stages) + 1)
    kept = [step for step in saved if step and step % every == 0][-recipe.checkpoints.keep_last :]
    for stage in recipe.stages[:-1]:
        assert [step for step in kept if end < step <= end + stage.steps]
        end += stage.steps


@pytest.mark.full
def test_demo_with_train_shows_a_new_student_after_each_stage(comfyui_path: Path, tmp_path: Path) -> None:
    kept, stages = tmp_path / "out" / "kept", [stage.name for stage in load_recipe(RECIPE).stages]
    demo(comfyui_path, tmp_path / "out", "--train", "--train-steps", str(len(stages)))  # the second student replaces this one
    said, told = demo(comfyui_path, tmp_path / "out", "--train", "--train-steps", "16")
    teacher, *students, after = told["right"]
    assert (teacher, after) == ("miniature_teacher.safetensors", "demo_student.safetensors")
    assert students == [f"demo_student_{name}.safetensors" for name in stages[:-1]]
    assert "WARNING" not in said
    named = [
        Path(path) for path in re.findall(r"(?:Done|Model card|How the student was trained|its model card|The student): ([^\s;]+)", said)
    ]
    named += [Path(re.findall(r"^Folder +(.+)$", said, re.MULTILINE)[0])]
    assert len(named) == 6
    assert [str(path) for path in named if not path.exists()] == [], "every path that is named exists afterwards"
    assert "demo_student" in (tmp_path / "out" / "run" / "page.html").read_text(encoding="utf-8")
    assert sum(int(count[0]) for count in told["right"][students[0]].values()) <= 2, "it knows nothing yet"
    open_student(kept / "models" / "text_encoders" / after)
    workflow = (kept / "user" / "default" / "workflows" / "demo_student.json").read_text(encoding="utf-8")
    assert after in workflow and "miniature_student_quarter" not in workflow
    assert not [path for path in kept.rglob(".*") if path.is_file()], "nothing unfinished is left"


def failed_demo(comfyui: Path, out: Path) -> str:
    """What a demo says that has to fail."""
    done = subprocess.run(command("demo", comfyui, "--out", str(out)), capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    return done.stderr


def test_a_demo_whose_comfyui_does_not_start_says_so_and_leaves_the_log(tmp_path: Path) -> None:
    (tmp_path / "main.py").write_text("raise SystemExit('no graphics driver')\n")
    assert failed_demo(tmp_path, tmp_path / "out").startswith("The demo failed: ComfyUI ended with code 1 while it started.")
    assert "no graphics driver" in (tmp_path / "out" / "server.log").read_text(encoding="utf-8")


def test_a_demo_that_cannot_write_says_so(comfyui_path: Path, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    assert failed_demo(comfyui_path, tmp_path / "out").startswith("The demo failed: [Errno 17] File exists")


@pytest.mark.full
def test_serve_shows_the_students_of_demo_and_of_train(comfyui_path: Path, tmp_path: Path) -> None:
    """In a ComfyUI whose models folder is a new one, since `train` writes to that of the real one."""
    comfyui, workflows = tmp_path / "ComfyUI", tmp_path / "base" / "user" / "default" / "workflows"
    comfyui.mkdir()
    for path in comfyui_path.iterdir():
        if path.name != "models":
            (comfyui / path.name).symlink_to(path)
    for folder, name in ((comfyui, "my_student"), (tmp_path / "base", "demo_student")):
        (folder / "models" / "text_encoders").mkdir(parents=True)
        published_file(folder / "models" / "text_encoders" / f"{name}.safetensors")
    workflows.mkdir(parents=True)
    (workflows / "demo_student.json").touch()
    with serving(comfyui, tmp_path, port := free_port()) as process:
        assert "demo_student" in line_of(process, tmp_path, "The student of demo --train")
        assert str(comfyui / "models" / "text_encoders") in line_of(process, tmp_path, "Students of train")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/object_info/DistilledT5Loader", timeout=60) as reply:
            shown = reply.read().decode()
    assert "my_student.safetensors" in shown and "demo_student.safetensors" in shown


@contextmanager
def serving(comfyui: Path, folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """`dev.py serve` with its set-up done; everything below `folder`."""
    arguments = [str(ROOT), str(comfyui), str(folder / "dev"), "serve", "--port", str(port), "--base", str(folder / "base")]
    command = [sys.executable, "-c", DEV_PY, *arguments]
    with (folder / "said.txt").open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


def said_by(folder: Path) -> list[str]:
    """The lines that it has printed so far."""
    return (folder / "said.txt").read_text(encoding="utf-8").splitlines()


def line_of(process: subprocess.Popen[bytes], folder: Path, start: str) -> str:
    """A line of what it says that starts so, as soon as it is said."""
    while True:
        ended = process.poll() is not None
        lines = said_by(folder)
        found = [line for line in lines if line.startswith(start)]
        if found:
            return found[0]
        assert not ended, "\n".join(["it ended and had said:", *lines])
        time.sleep(0.05)


def still_working_in(folder: Path, awaited: bool) -> list[list[str]]:
    """Command lines of the ComfyUI processes that name a folder. Wait until there are some, or until all have ended."""
    deadline = time.monotonic() + 60
    while True:
        lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
        found = [line for line in lines if str(folder) in line and "main.py" in line]
        if bool(found) == awaited or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def test_serve_prints_its_address_answers_there_and_ends_when_asked(comfyui_path: Path, tmp_path: Path) -> None:
    port = free_port()
    with serving(comfyui_path, tmp_path, port) as process:
        assert line_of(process, tmp_path, f"http://127.0.0.1:{port} ")
        links = [line.split()[0] for line in said_by(tmp_path) if "?template=" in line]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/workflow_templates", timeout=60) as reply:
            offered = {f"template={name}&source={pack}" for pack, names in json.load(reply).items() for name in names}
        assert links and {link.removeprefix(f"http://127.0.0.1:{port}/?") for link in links} <= offered
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/object_info/DistilledT5Loader", timeout=60) as reply:
            assert "distilled_t5_base.safetensors" in reply.read().decode()
        assert len(still_working_in(tmp_path / "base", awaited=True)) == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 130
        assert line_of(process, tmp_path, "Stopped.")
        assert still_working_in(tmp_path / "base", awaited=False) == []
    assert (tmp_path / "base" / "models" / "vae" / "ae.safetensors").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has none of these signals")
@pytest.mark.parametrize(
    "sent", [pytest.param("SIGINT", marks=pytest.mark.full), pytest.param("SIGHUP", marks=pytest.mark.full), "SIGKILL"]
)
def test_serve_leaves_no_comfyui_behind_however_it_is_stopped(comfyui_path: Path, tmp_path: Path, sent: str) -> None:
    with serving(comfyui_path, tmp_path, free_port()) as process:
        line_of(process, tmp_path, "Starting")
        assert still_working_in(tmp_path / "base", awaited=True)
        process.send_signal(getattr(signal, sent))
        process.wait(timeout=60)
        assert still_working_in(tmp_path / "base", awaited=False) == []


def test_serve_reports_a_port_in_use(comfyui_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        done = subprocess.run(command("serve", comfyui_path, "--port", port), capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert f"port {port} is in use" in done.stderr
    assert "--port" in done.stderr
