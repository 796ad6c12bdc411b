"""Two processes under torchrun are one run: stopped and resumed to the bit, equal to one process, written by rank 0 alone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch
from distilled_t5.runtime.disk import UNFINISHED
from distilled_t5.runtime.ranks import Ranks
from distilled_t5.tests.support.exact import same
from distilled_t5.tests.support.small_flux import diffusion_model_file, teacher_file
from distilled_t5.tests.support.trainer import QUICK, TWO_PROCESSES, command, finish, metrics, start, wait_for_step
from distilled_t5.train.recipe import load_recipe
from distilled_t5.train.run import train
from distilled_t5.train.state import REPLACED, TrainerState, read_checkpoint
from safetensors.torch import load_file

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(os.name != "posix", reason="torchrun hands on signals, and files have limits, on POSIX"),
]

TOTAL_STEPS = 30
# Long enough to be stopped twice in the middle; trajectories so long that a stop hardly ever falls between two of them.
LONGER = [
    *QUICK,
    f"stage.1.steps={TOTAL_STEPS - 2}",
    "stage.1.accumulate=4",
    "sampling.steps=12",
    "validation.every_steps=15",
    "checkpoints.every_steps=15",
    "preview.every_steps=30",
]
# Two processes add up in another order than one, which changes the last bit of float32, 1e-7 of a gradient: 1e-10 here. AdamW divides a
# gradient by its own size plus 1e-8, so that one that is all rounding moves a weight by a hundredth of the learning rate, 1e-5, per step.
RELATIVE_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-4

# Starts the command with rank 1 unable to write a byte to any file, whatever language it writes in, and tells which files below the folder
# that is named first each rank makes, opens for writing, moves or removes.
GUARDED = """
import os, resource, runpy, sys, tempfile
watched, *sys.argv = sys.argv[1:]
touched = set()
def watch(event, arguments):
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    names = arguments[:1] if writes else arguments[:2] if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") else ()
    touched.update(os.fspath(name) for name in names if isinstance(name, (str, os.PathLike)))
sys.addaudithook(watch)
tempfile.gettempdir()  # is found by writing to it
if os.environ["RANK"] == "1":
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    for name in sorted(touched):
        if os.path.abspath(name).startswith(watched):
            print(f"TOUCHED {os.environ['RANK']} {name}", flush=True)
"""


class Run(NamedTuple):
    """A run of two processes to its end."""

    folder: Path
    base: Path
    settings: list[str]
    said: str

    @property
    def file(self) -> Path:
        """The finished encoder."""
        return self.base / "models" / "text_encoders" / "distilled_t5_smoke.safetensors"


@pytest.fixture(scope="module")
def whole(comfyui_path: Path, stand_ins: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nobody interrupts, in which rank 1 cannot write to files. Its models are files, since stand-ins are made by each rank."""
    folder = tmp_path_factory.mktemp("whole")
    guard = folder / "guard.py"
    guard.write_text(GUARDED, encoding="utf-8")
    models = [f"teacher.t5={teacher_file(folder)}", f"diffusion_model.file={diffusion_model_file(folder)}"]
    settings = [*LONGER, *models, f"preview.vae={stand_ins / 'models' / 'vae' / 'ae.safetensors'}"]
    watched = folder / "watched"
    arguments = command(comfyui_path, watched / "base", watched / "run", settings=settings)
    said = finish(arguments, folder, launcher=[*TWO_PROCESSES, str(guard), str(watched)])
    return Run(watched / "run", watched / "base", settings, said)


def state_at(run: Path, step: int) -> TrainerState:
    return read_checkpoint(run / "checkpoints" / f"step-{step:06d}")


def measured(run: Path) -> list[dict[str, float]]:
    """The metrics of a run without those that depend on the machine; each band of a held-out loss is a separate metric."""
    left_out = ("samples_per_s", "ram_mb", "held_out_by_band")
    lines = [line | line.get("held_out_by_band", {}) for line in metrics(run)]
    return [{name: value for name, value in line.items() if name not in left_out} for line in lines]


def stop(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """Signal torchrun; what all printed. No process of the run may be left."""
    family = psutil.Process(process.pid).children(recursive=True)
    assert len([child for child in family if "smoke" in child.cmdline()]) == 2
    process.send_signal(number)
    said = process.communicate(timeout=120)[0]
    assert process.returncode != 0, said
    assert not psutil.wait_procs(family, timeout=0)[1]
    return said


def saved_by_stopping(run: Path, base: Path) -> int:
    """The last step of a stopped run, after a check that everything it left is complete."""
    step = metrics(run)[-1]["step"]
    assert 0 < step < TOTAL_STEPS
    folders = sorted((run / "checkpoints").iterdir())
    assert folders[-1].name == f"step-{step:06d}"
    assert [read_checkpoint(folder).step for folder in folders] == [int(folder.name.removeprefix("step-")) for folder in folders]
    assert not [path for path in run.rglob("*") if path.name.endswith((UNFINISHED, REPLACED))]
    assert not list(base.rglob("distilled_t5_smoke*"))
    return step


def test_two_processes_stopped_by_either_signal_go_on_bit_for_bit(whole, comfyui_path, tmp_path):
    run, base, last = tmp_path / "run", tmp_path / "base", 2
    for number, words in ((signal.SIGINT, ()), (signal.SIGTERM, ("--resume",))):
        process = start(command(comfyui_path, base, run, *words, settings=whole.settings), tmp_path, TWO_PROCESSES)
        wait_for_step(process, run, last + 1)
        said = stop(process, number)
        assert said.count("Stopped; continue with --resume.") == 1
        stopped_at = saved_by_stopping(run, base)
        assert stopped_at > last
        last = stopped_at
    finish(command(comfyui_path, base, run, "--resume", settings=whole.settings), tmp_path, launcher=TWO_PROCESSES)
    ours, theirs = state_at(run, TOTAL_STEPS), state_at(whole.folder, TOTAL_STEPS)
    for part in ("student", "optimizer", "position", "best"):
        assert same(getattr(ours, part), getattr(theirs, part)), part
    # Dropout draws from torch's generator; nothing draws from the others.
    generators = [[state.rng[rank]["torch"] for rank in ("0", "1")] for state in (ours, theirs)]
    assert same(*generators) and not same(*generators[0])
    assert measured(run) == measured(whole.folder)
    finished = base / whole.file.relative_to(whole.base)
    assert same(load_file(finished), load_file(whole.file))


def test_only_rank_0_writes_in_a_whole_run(whole):
    lines = [line.split(" ", 2)[1:] for line in whole.said.splitlines() if line.startswith("TOUCHED ")]
    mine, others = ("\n".join(name for rank, name in lines if rank == number) for number in ("0", "1"))
    assert all(part in mine for part in ("recipe.toml", "metrics.jsonl", "train.log", "step-000030", "-preview.jpg", whole.file.name))
    assert not any(str(folder) in others for folder in (whole.folder, whole.file.parent))


def test_nothing_stands_twice_after_a_run_of_two_processes(whole):
    lines = metrics(whole.folder)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, TOTAL_STEPS + 1))
    assert [line["step"] for line in lines if "held_out_loss" in line] == [15, 30]
    log = (whole.folder / "train.log").read_text(encoding="utf-8")
    assert [log.count(f"Step {step}: saved step-0000{step}.") for step in (15, 30)] == [1, 1]
    assert [log.count(f"Step {step}: held-out loss") for step in (15, 30)] == [1, 1]
    assert [path.name for path in sorted((whole.folder / "samples").iterdir())] == ["step-000030-preview.jpg"]
    assert [path.name for path in whole.file.parent.iterdir()] == [whole.file.name]
    assert whole.said.count("Done: ") == 1


@pytest.mark.parametrize(
    "objectives",
    [[], ["stage.0.objective=whitened", "stage.1.objective=early", "stage.1.blocks=1"]],
    ids=["velocity", "early"],
)
def test_two_processes_do_what_one_does_with_one_batch_each_and_with_several(objectives, comfyui_path, tmp_path, stand_ins):
    """Stage 0 has one batch per process, stage 1 three: two that only add up their gradients, and one that shares them.

    The three batches of held-out prompts cannot be shared out evenly, and the last is not full.
    """
    # Each process draws its own dropout.
    quiet = [*QUICK, *objectives, "student.dropout=0.0", "stage.1.accumulate=6", "validation.prompts=5", "preview.every_steps=5"]
    quiet.append(f"preview.vae={stand_ins / 'models' / 'vae' / 'ae.safetensors'}")
    runs = []
    for name, how in (("one", ()), ("two", TWO_PROCESSES)):
        finish(command(comfyui_path, tmp_path / name, tmp_path / f"run-{name}", settings=quiet), tmp_path, launcher=how)
        runs.append(tmp_path / f"run-{name}")
    for ours, theirs in zip(*map(measured, runs), strict=True):
        assert ours == pytest.approx(theirs, rel=RELATIVE_TOLERANCE)
    sheets = [sorted(path.name for path in (run / "samples").iterdir()) for run in runs]
    assert sheets == [["step-000005-preview.jpg", "step-000008-preview.jpg"]] * 2
    ours, theirs = (state_at(run, 8).student for run in runs)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], atol=WEIGHT_TOLERANCE, rtol=0)


def test_a_run_of_two_processes_is_not_resumed_by_one(whole, tmp_path):
    run = Path(shutil.copytree(whole.folder, tmp_path / "run"))
    with pytest.raises(ValueError, match=r"saved by 2 processes and is resumed with 1\.\nWhat to do: resume it with --nproc-per-node 2"):
        train(load_recipe("smoke", whole.settings), run, True, Ranks())
