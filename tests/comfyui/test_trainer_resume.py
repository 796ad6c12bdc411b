"""What a run goes on from: after too many dropped steps, after its end, with another recipe, in several processes."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.sd
import folder_paths
import pytest
import torch
from distilled_t5.encoder.files import write_student
from distilled_t5.runtime.disk import sha256
from distilled_t5.runtime.random_weights import drawn
from distilled_t5.runtime.ranks import Ranks
from distilled_t5.tests.support.exact import same
from distilled_t5.tests.support.small_flux import TEACHER, teacher_file
from distilled_t5.tests.support.trainer import TWO_PROCESSES, command, finish, metrics
from distilled_t5.train.distill import NotFinite
from distilled_t5.train.objectives import OBJECTIVES, Objective, velocity_gap
from distilled_t5.train.recipe import load_recipe
from distilled_t5.train.resume import gather_state, restore
from distilled_t5.train.run import train
from distilled_t5.train.state import MANIFEST, VALUES, Checkpoints, read_checkpoint, write_checkpoint
from distilled_t5.train.workshop import open_workshop

# One trajectory of twelve steps, saved after ten.
SETTINGS = [
    "stage.0.steps=12",
    "stage.0.objective=velocity",
    "stage.1.steps=1",
    "sampling.steps=12",
    "sampling.token_lengths=[16]",
    "validation.prompts=2",
    "validation.every_steps=50",
    "checkpoints.every_steps=10",
    "student.dropout=0.1",
]


def recipe(*more: str) -> Any:
    return load_recipe("smoke", [*SETTINGS, *more])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run to its end."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert train(recipe(), run, False, Ranks()) is not None
    return run


def test_a_run_that_too_many_dropped_steps_end_is_saved_where_it_goes_on(whole, tmp_path, monkeypatch):
    never = Objective(lambda gap: velocity_gap(gap) * float("nan"))
    with monkeypatch.context() as patch:
        patch.setitem(OBJECTIVES, "velocity", never)
        with pytest.raises(NotFinite, match="in a row were not finite"):
            train(recipe(), tmp_path / "run", False, Ranks())
    ours, theirs = (read_checkpoint(run / "checkpoints" / "step-000010") for run in (tmp_path / "run", whole))
    assert (ours.step, ours.skipped_steps) == (10, 10)
    assert same(ours.position, theirs.position), "the teacher's trajectory ignores the student"
    assert train(recipe(), tmp_path / "run", True, Ranks()) is not None
    again = read_checkpoint(tmp_path / "run" / "checkpoints" / "step-000013")
    assert (again.step, again.skipped_steps) == (13, 10)


def encoders() -> list[str]:
    return sorted(path.name for path in Path(folder_paths.get_folder_paths("text_encoders")[0]).glob("distilled_t5_smoke*"))


def test_a_finished_run_that_is_resumed_says_so_and_writes_its_encoder_only_if_it_is_gone(tmp_path):
    run = tmp_path / "run"
    paths = train(recipe("seed=5"), run, False, Ranks())
    assert paths is not None
    [path] = paths
    before, content = encoders(), path.read_bytes()
    assert train(recipe("seed=5"), run, True, Ranks()) == [path]
    assert (encoders(), path.read_bytes()) == (before, content)
    assert "The run is finished" in (run / "train.log").read_text(encoding="utf-8")
    path.unlink()
    again = train(recipe("seed=5"), run, True, Ranks())
    assert again is not None and encoders() == before


def test_a_checkpoint_of_another_recipe_is_refused_though_recipe_toml_was_changed_as_well(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    changed = recipe("optimizer.learning_rate=0.5")
    (tmp_path / "run" / "recipe.toml").write_text(changed.to_toml(), encoding="utf-8")
    with pytest.raises(ValueError, match=r"saved with another recipe .*\nWhat to do: restore recipe.toml"):
        train(changed, tmp_path / "run", True, Ranks())


@pytest.mark.full
def test_two_processes_go_on_bit_for_bit_from_what_both_had(comfyui_path, tmp_path):
    run, cut = tmp_path / "run", tmp_path / "cut"
    settings = [*SETTINGS[:1], *SETTINGS[2:], "stage.0.steps=2", "stage.1.steps=3", "sampling.steps=4", "checkpoints.every_steps=3"]
    finish(command(comfyui_path, tmp_path / "base", run, settings=settings), tmp_path, launcher=TWO_PROCESSES)
    shutil.copytree(run, cut)
    shutil.rmtree(cut / "checkpoints" / "step-000005")
    finish(command(comfyui_path, tmp_path / "base", cut, "--resume", settings=settings), tmp_path, launcher=TWO_PROCESSES)
    ours, theirs = (read_checkpoint(folder / "checkpoints" / "step-000005") for folder in (cut, run))
    for part in ("student", "optimizer", "rng", "position"):
        assert same(getattr(ours, part), getattr(theirs, part)), part
    assert set(ours.position) == {"0", "1"}


def test_a_run_that_restarts_at_each_stage_goes_on_bit_for_bit_from_the_border_of_two_stages_and_from_within_one(tmp_path):
    again = ["optimizer.restart_per_stage=true", "optimizer.warmup_steps=2", "checkpoints.every_steps=2", "checkpoints.keep_last=9"]
    restarting = recipe("stage.0.steps=4", "stage.1.steps=6", "sampling.steps=4", *again)
    run = tmp_path / "run"
    assert train(restarting, run, False, Ranks()) is not None
    rates = [line["learning_rate"] for line in metrics(run) if "loss" in line]
    assert rates[:2] == rates[4:6] and rates[3] > rates[9]
    whole = read_checkpoint(run / "checkpoints" / "step-000010")
    assert {int(state["step"]) for state in whole.optimizer["state"].values()} == {6}
    for newest in (4, 6):
        cut = tmp_path / f"cut-{newest}"
        shutil.copytree(run, cut)
        for path in (cut / "checkpoints").iterdir():
            if int(path.name.removeprefix("step-")) > newest:
                shutil.rmtree(path)
        assert train(restarting, cut, True, Ranks()) is not None
        resumed = read_checkpoint(cut / "checkpoints" / "step-000010")
        for part in ("student", "optimizer", "rng", "position"):
            assert same(getattr(resumed, part), getattr(whole, part)), part


def test_the_scale_of_the_loss_is_part_of_the_state(whole, tmp_path):
    workshop = open_workshop(recipe(), Ranks())
    workshop.learner.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    # As it stands between two of its doublings.
    workshop.learner.scaler.load_state_dict(workshop.learner.scaler.state_dict() | {"_growth_tracker": 7})
    workshop.learner.scaler.scale(torch.ones(()))
    state = gather_state(workshop, None, [])
    assert state is not None
    checkpoints = Checkpoints(tmp_path, write_student, 1)
    checkpoints.save(state)
    fresh = open_workshop(recipe(), Ranks())
    fresh.learner.scaler = torch.amp.GradScaler("cpu")
    restore(fresh, [checkpoints])
    assert fresh.learner.scaler.state_dict() == workshop.learner.scaler.state_dict()
    # A run of bf16 has none; it keeps the start of the scale where it goes on in fp16.
    shutil.copytree(whole / "checkpoints", tmp_path / "bf16")
    other = open_workshop(recipe(), Ranks())
    other.learner.scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    restore(other, [Checkpoints(tmp_path / "bf16", write_student, 1)])
    assert other.learner.scaler.get_scale() == 4096.0


def with_inputs(folder: Path, *more: str) -> Any:
    """A recipe whose prompts and teacher are files in the folder."""
    corpora = f'[{{ kind = "lines", path = "{folder / "prompts.txt"}" }}]'
    files = [f"stage.0.corpora={corpora}", f"stage.1.corpora={corpora}", f"teacher.t5={folder / 'teacher.safetensors'}"]
    return load_recipe("smoke", ["stage.0.steps=1", "optimizer.warmup_steps=0", *SETTINGS[2:], *files, *more])


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts, a teacher and a finished run."""
    folder = tmp_path_factory.mktemp("begun")
    (folder / "prompts.txt").write_text("".join(f"prompt {number}\n" for number in range(12)), encoding="utf-8")
    teacher_file(folder)
    assert train(with_inputs(folder), folder / "run", False, Ranks()) is not None
    return folder


def copied(begun: Path, folder: Path) -> Path:
    """A copy of the folder, in the place of which its recipe is resumed."""
    shutil.copytree(begun, folder, dirs_exist_ok=True)
    (folder / "run" / "recipe.toml").write_text(with_inputs(folder).to_toml(), encoding="utf-8")
    for path in (folder / "run" / "checkpoints").glob("step-*"):
        write_checkpoint(path, replace(read_checkpoint(path), recipe_sha256=with_inputs(folder).sha256), write_student)
    return folder


def test_a_run_whose_prompts_and_teacher_were_moved_goes_on(begun, tmp_path):
    folder = copied(begun, tmp_path)
    assert train(with_inputs(folder), folder / "run", True, Ranks()) is not None


def test_added_prompts_and_a_replaced_teacher_are_refused_before_anything_is_loaded(begun, tmp_path, monkeypatch):
    folder = copied(begun, tmp_path)
    with (folder / "prompts.txt").open("a", encoding="utf-8") as file:
        file.write("one more prompt\n")
    write_student(folder / "teacher.safetensors", drawn(TEACHER.tensors(), seed=7))
    monkeypatch.setattr(comfy.sd, "load_diffusion_model", None)
    with pytest.raises(ValueError, match="started with other inputs") as refused:
        train(with_inputs(folder), folder / "run", True, Ranks())
    said = str(refused.value)
    assert "  prompts of stage follow-the-steps: expected 12 prompts, SHA-256 " in said and ", got 13 prompts, SHA-256 " in said
    assert "\n  teacher.t5: expected " in said
    assert said.splitlines()[-1].startswith("What to do: put the earlier files and prompts back")


def test_a_checkpoint_from_before_inputs_were_recorded_goes_on_with_a_line_in_the_log(begun, tmp_path):
    folder = copied(begun, tmp_path)
    for path in (folder / "run" / "checkpoints").glob("step-*"):
        values = json.loads((path / VALUES).read_text(encoding="utf-8"))
        del values["inputs"]
        (path / VALUES).write_text(json.dumps(values), encoding="utf-8")
        content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["content"]
        content["files"][VALUES] = {"size": (path / VALUES).stat().st_size, "sha256": sha256(path / VALUES)}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        (path / MANIFEST).write_text(json.dumps({"sha256": digest, "content": content}), encoding="utf-8")
    assert train(with_inputs(folder), folder / "run", True, Ranks()) is not None
    assert "saved by an older version" in (folder / "run" / "train.log").read_text(encoding="utf-8")
