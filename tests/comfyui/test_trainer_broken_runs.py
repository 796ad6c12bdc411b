"""Runs that were killed, damaged, locked or asked for wrongly, through the real command: no work is lost, and it says what to do."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from distilled_t5.encoder.files import open_student
from distilled_t5.tests.support.trainer import PACK, QUICK, TWO_PROCESSES, command, finish, has_step, metrics, start, wait_for_step
from distilled_t5.train.run_directory import RunDirectory
from distilled_t5.train.state import read_checkpoint

pytestmark = pytest.mark.skipif(os.name != "posix", reason="kill -9 and limits on the size of a file are POSIX")
# Long enough to be killed in the middle, with a checkpoint every other step.
LONGER = [
    *QUICK,
    "stage.0.steps=4",
    "stage.1.steps=24",
    "checkpoints.every_steps=2",
    "checkpoints.keep_last=3",
    "validation.every_steps=20",
]
TOTAL_STEPS = 28


# One start of ComfyUI for several commands that fail after it.
IN_TURN = """
import contextlib, io, json, runpy, sys
main = runpy.run_path(sys.argv[1])
main["register_pack"]()
for arguments in json.loads(sys.argv[2]):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main["main"](arguments)
    print("\\nANSWER " + json.dumps([code, said.getvalue()]), flush=True)
"""


def in_turn(commands: list[list[str]], folder: Path) -> list[tuple[int, str]]:
    """Exit status and output of several commands, given one after another in one process."""
    arguments = json.dumps([words[1:] for words in commands])
    script = [sys.executable, "-c", IN_TURN, str(PACK / "train" / "__main__.py"), arguments]
    done = subprocess.run(script, cwd=folder, capture_output=True, text=True, timeout=400, check=False)
    answers = [json.loads(line.removeprefix("ANSWER ")) for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    assert len(answers) == len(commands), done.stdout + done.stderr
    return [(code, said) for code, said in answers]


@pytest.fixture(scope="module")
def killed(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that kill -9 ended at a random moment, with at least two checkpoints."""
    folder = tmp_path_factory.mktemp("killed")
    process = start(command(comfyui_path, folder / "base", folder / "run", settings=LONGER), folder)
    wait_for_step(process, folder / "run", 5)
    time.sleep(random.uniform(0, 0.3))
    process.kill()
    process.communicate()
    assert not has_step(folder / "run", TOTAL_STEPS), "it was over before it was killed"
    return folder / "run"


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("step-??????"))


def damage(checkpoint: Path) -> None:
    state = checkpoint / "state.safetensors"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)


@pytest.mark.full
def test_commands_that_fail_after_comfyui_has_started_say_why(comfyui_path, tmp_path, stand_ins, killed):
    (tmp_path / "file").write_text("")
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    ruined = Path(shutil.copytree(killed, tmp_path / "ruined"))
    for checkpoint in checkpoints(ruined):
        damage(checkpoint)

    def asked(where: str, *words: str, settings: list[str] = QUICK) -> list[str]:
        return command(comfyui_path, tmp_path / "base", tmp_path / where, *words, settings=settings)

    huge = [*QUICK, "student.layout={d_model=16384, d_ff=65536, num_layers=24, num_heads=64, d_kv=64, gated=true}"]
    text_encoders = stand_ins / "models" / "text_encoders"
    exchanged = [f"teacher.t5={text_encoders}/distilled_t5_base.safetensors", f"student.start={text_encoders}/t5xxl_fp16.safetensors"]
    expected = {
        "is a T5 of width 4096; the recipe's student": asked("a", settings=[*QUICK, *exchanged]),
        "ae.safetensors is a VAE; expected a diffusion model.": asked(
            "b", settings=[*QUICK, f"diffusion_model.file={stand_ins}/models/vae/ae.safetensors"]
        ),
        "Not enough memory on cpu: stage": asked("c", settings=huge),
        "student's gradients": asked("d", "--estimate", settings=huge),
        f"{tmp_path / 'file' / 'run'} cannot be written to": asked("file/run"),
        "checkpoints.every_steps: 2 -> 4": asked("ruined", "--resume"),
        f"Another process writes to the run in {run}: process {os.getpid()} on": asked("run", "--resume", settings=LONGER),
        "There is no intact checkpoint in": asked("ruined", "--resume", settings=LONGER),
    }
    with RunDirectory(run).resume():
        answers = in_turn(list(expected.values()), tmp_path)
    for part, (code, said) in zip(expected, answers, strict=True):
        assert code == 1
        assert part in said
        assert "\nWhat to do: " in said
        assert "Traceback" not in said
    assert not list(tmp_path.glob("?/checkpoints/step-*"))


def test_a_run_killed_at_any_moment_goes_on_and_ends_with_its_file(comfyui_path, tmp_path, killed):
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    newest = int(checkpoints(run)[-1].name.removeprefix("step-"))
    said = finish(command(comfyui_path, tmp_path / "base", run, "--resume", settings=LONGER), tmp_path)
    assert "Done: " in said
    file = open_student(tmp_path / "base" / "models" / "text_encoders" / "distilled_t5_smoke.safetensors")
    assert file.metadata.facts["distilled_t5.steps"] == str(TOTAL_STEPS)
    steps = [line["step"] for line in metrics(run) if "loss" in line]
    assert steps == list(range(1, TOTAL_STEPS + 1))
    assert 4 <= newest < TOTAL_STEPS


def limit_size_of_files(most_bytes: int) -> Callable[[], None]:
    """Makes every longer file fail in the process that calls what is returned, as a disk does that is full."""

    def limit() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

    return limit


@pytest.mark.full
def test_a_damaged_newest_checkpoint_is_set_aside_and_a_full_disk_leaves_the_previous_one_intact(comfyui_path, tmp_path, killed):
    run = Path(shutil.copytree(killed, tmp_path / "run"))
    *_, before, newest = checkpoints(run)
    damage(newest)
    # The student's file passes, the optimizer's state, twice as large, does not.
    room = (before / "student.safetensors").stat().st_size * 3 // 2
    arguments = command(comfyui_path, tmp_path / "base", run, "--resume", settings=LONGER)
    said = finish(arguments, tmp_path, code=1, before=limit_size_of_files(room))
    assert f"{newest.name} is damaged (state.safetensors does not have the SHA-256" in said
    assert f"The run continues from {before.name}." in said
    assert f"The checkpoint of step {int(before.name[5:]) + 2} could not be saved" in said
    assert said.strip().splitlines()[-1].startswith("What to do: check the disk's free space")
    assert "Traceback" not in said
    assert "CheckpointNotSaved" in (run / "train.log").read_text(encoding="utf-8")
    assert checkpoints(run)[-1] == before
    assert read_checkpoint(before).step == int(before.name[5:])


@pytest.mark.full
def test_killing_a_rank_ends_the_run_with_a_message_and_leaves_complete_checkpoints(comfyui_path, tmp_path):
    run = tmp_path / "run"
    endless = [*LONGER, "stage.1.steps=36000"]
    process = start(command(comfyui_path, tmp_path / "base", run, settings=endless), tmp_path, TWO_PROCESSES)
    wait_for_step(process, run, 5)
    [second] = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1"]
    second.kill()
    said = process.communicate(timeout=120)[0]
    assert process.returncode != 0
    assert "Rank 0 of 2 stops because another process of the run died or does not respond" in said
    assert "then run the same command with --resume" in said
    newest = checkpoints(run)[-1]
    assert read_checkpoint(newest).step == int(newest.name[5:]) >= 4


@pytest.mark.full
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux limits the memory of a process that runs")
def test_running_out_of_memory_during_training_ends_the_run_with_advice_and_leaves_complete_checkpoints(comfyui_path, tmp_path):
    run = tmp_path / "run"
    # ComfyUI's attention takes smaller parts when memory runs out, so it is the linear layers that must not fit.
    large = ["stage.1.resolution_px=512", "stage.1.batch=80", "stage.1.accumulate=1", "validation.prompts=80"]
    process = start(command(comfyui_path, tmp_path / "base", run, settings=[*LONGER, "stage.0.steps=40", *large]), tmp_path)
    wait_for_step(process, run, 5)
    room = psutil.Process(process.pid).memory_info().vms + 100_000_000
    psutil.Process(process.pid).rlimit(psutil.RLIMIT_AS, (room, room))
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 1
    assert "Out of memory: " in said
    assert "\nWhat to do: continue with --resume" in said
    assert "Traceback" not in said
    # The held-out loss is taken with the last stage's batches, for the first time after step 20.
    assert read_checkpoint(checkpoints(run)[-1]).step == 18
