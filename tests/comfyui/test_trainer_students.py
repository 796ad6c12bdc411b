"""Several students along one trajectory: each is what it would be alone, and the teacher's part is computed once."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distilled_t5.encoder.files import open_student
from distilled_t5.encoder.teacher import Teacher
from distilled_t5.runtime.errors import UserError
from distilled_t5.runtime.lock import RunError
from distilled_t5.runtime.ranks import Ranks
from distilled_t5.tests.support.exact import same
from distilled_t5.tests.support.flops import flop_counter
from distilled_t5.tests.support.trainer import TWO_PROCESSES, command, finish, metrics, start, wait_for_step
from distilled_t5.train.contact_sheet import GAP_PX
from distilled_t5.train.distill import NotFinite, train_step
from distilled_t5.train.export import chosen_checkpoint
from distilled_t5.train.objectives import OBJECTIVES, Objective, velocity_gap
from distilled_t5.train.page import samples_of
from distilled_t5.train.preview import Previewer
from distilled_t5.train.recipe import Recipe, load_recipe
from distilled_t5.train.rehearsal import Target, rehearse
from distilled_t5.train.run import train
from distilled_t5.train.run_directory import RunDirectory
from distilled_t5.train.state import NoCheckpoint, TrainerState, read_checkpoint
from distilled_t5.train.workshop import open_workshop
from PIL import Image

NAMES = ("wide", "narrow")
# Seven steps, of two trajectories; the second stage is cut short in the middle of one.
SETTINGS = [
    "stage.0.steps=4",
    "stage.0.objective=early",
    "stage.0.blocks=1",
    "stage.1.steps=3",
    "sampling.steps=4",
    "sampling.token_lengths=[16]",
    "validation.prompts=2",
    "validation.every_steps=3",
    "checkpoints.every_steps=3",
    "student.0.dropout=0.1",
]
STEPS, SIDE_PX = 7, 64


def recipe(*more: str) -> Recipe:
    return load_recipe("smoke-two-students", [*SETTINGS, *more])


def state_of(run: Path, step: int = STEPS) -> TrainerState:
    return read_checkpoint(run / "checkpoints" / f"step-{step:06d}")


def own(run: Path) -> list[Path]:
    return [run / "students" / name for name in NAMES]


def numbers(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run without those that depend on the machine."""
    return [{name: value for name, value in row.items() if name not in ("samples_per_s", "ram_mb")} for row in metrics(run)]


def assert_alike(run: Path, other: Path) -> None:
    """Two runs of a student have the same end and numbers, to the bit."""
    ours, theirs = state_of(run), state_of(other)
    for part in ("step", "student", "optimizer", "schedule", "recipe_sha256", "best", "position", "inputs"):
        assert same(getattr(ours, part), getattr(theirs, part)), part
    assert same(ours.rng["0"]["torch"], theirs.rng["0"]["torch"])
    assert numbers(run) == numbers(other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run to its end."""
    run = tmp_path_factory.mktemp("whole") / "run"
    paths = train(recipe(), run, False, Ranks())
    assert paths is not None
    assert [open_student(path).metadata.title for path in paths] == ["distilled_t5_smoke-wide", "distilled_t5_smoke-narrow"]
    return run


def test_each_student_is_the_one_that_its_own_recipe_trains_alone(whole, tmp_path):
    for name, together, alone in zip(NAMES, own(whole), recipe().each, strict=True):
        assert (together / "recipe.toml").read_text(encoding="utf-8") == alone.to_toml()
        assert train(load_recipe(str(together / "recipe.toml")), tmp_path / name, False, Ranks()) is not None
        assert_alike(together, tmp_path / name)


def test_the_run_compares_its_students_and_each_has_a_card_and_a_page(whole):
    rows, students = metrics(whole), [metrics(run) for run in own(whole)]
    for row, *each in zip(rows, *students, strict=True):
        if "loss" in row:
            assert row["skipped_steps"] == sum(one["skipped_steps"] for one in each)
            assert [row[f"loss_{name}"] for name in NAMES] == [one["loss"] for one in each]
            assert row["loss"] == pytest.approx(sum(one["loss"] for one in each) / 2)
        else:
            assert row["held_out_by_band"] == {f"student {name}": one["held_out_loss"] for name, one in zip(NAMES, each, strict=True)}
    said = (whole / "train.log").read_text(encoding="utf-8")
    assert "Student wide     T5 of width 64" in said and "Student narrow   T5 of width 32" in said
    assert "Step 3, student narrow: held-out loss" in said and said.count("Step 3: saved step-000003.") == 1
    page = (whole / "page.html").read_text(encoding="utf-8")
    assert '"student wide"' in page and "early (1), mean of the students" in page
    for name, run in zip(NAMES, own(whole), strict=True):
        assert f"# distilled_t5_smoke-{name}" in (run / "README.md").read_text(encoding="utf-8")
        assert "mean of the students" not in (run / "page.html").read_text(encoding="utf-8")


def copied(whole: Path, run: Path, kept: Sequence[Sequence[int]]) -> Path:
    """A copy of a run in which each student has the checkpoints of these steps alone."""
    shutil.copytree(whole, run)
    for student, steps in zip(own(run), kept, strict=True):
        for path in (student / "checkpoints").iterdir():
            if int(path.name.removeprefix("step-")) not in steps:
                shutil.rmtree(path)
    return run


@pytest.mark.parametrize("kept", [((3,), (3,)), ((3, 6), (3,))], ids=["saved together", "killed while the second was saved"])
def test_a_run_goes_on_to_the_bit_from_the_newest_step_that_all_students_have(whole, tmp_path, kept, caplog):
    run = copied(whole, tmp_path / "run", kept)
    assert train(recipe(), run, True, Ranks()) is not None
    for resumed, uninterrupted in zip(own(run), own(whole), strict=True):
        assert_alike(resumed, uninterrupted)
    assert numbers(run) == numbers(whole)
    renamed = run / "students" / "wide" / "checkpoints" / "step-000006.ahead"
    assert ("step-000006 was renamed to step-000006.ahead: other students" in caplog.text) == (kept[0] != kept[1])
    assert (renamed / "state.safetensors").is_file() == (kept[0] != kept[1])


def test_after_damage_to_one_student_all_go_on_from_the_step_before(whole, tmp_path):
    run = copied(whole, tmp_path / "run", ((3, 6), (3, 6)))
    weights = run / "students" / "narrow" / "checkpoints" / "step-000006" / "state.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    assert train(recipe(), run, True, Ranks()) is not None
    for resumed, uninterrupted in zip(own(run), own(whole), strict=True):
        assert_alike(resumed, uninterrupted)
    assert (weights.parents[1] / "step-000006.broken").is_dir()


def test_students_without_a_common_step_and_another_list_of_students_are_refused(whole, tmp_path):
    run = copied(whole, tmp_path / "run", ((6,), (3,)))
    with pytest.raises(NoCheckpoint, match=r"no step of which every student has an intact checkpoint.*\n.*wide.*: 6\n.*narrow.*: 3\nWhat"):
        train(recipe(), run, True, Ranks())
    fewer = recipe().model_copy(update={"students": recipe().students[:1]})
    with pytest.raises(RunError, match=r'student: \["wide", "narrow"\] -> \["wide"\]'):
        train(fewer, run, True, Ranks())
    with pytest.raises(RunError, match="holds a run with checkpoints"):
        train(recipe(), run, False, Ranks())


def test_another_student_at_a_resume_is_named_although_it_has_no_folder_yet(whole, tmp_path):
    run = copied(whole, tmp_path / "run", ((3,), (3,)))
    third = recipe().students[1].model_copy(update={"name": "third"})
    with pytest.raises(RunError, match=r'student: \["wide", "narrow"\] -> \["wide", "narrow", "third"\]'):
        train(recipe().model_copy(update={"students": (*recipe().students, third)}), run, True, Ranks())
    assert not (run / "students" / "third").exists()


def test_stages_of_all_students_can_be_lengthened_at_a_resume(whole, tmp_path):
    run = copied(whole, tmp_path / "run", ((3, 6), (3, 6)))
    assert train(recipe("stage.1.steps=5"), run, True, Ranks()) is not None
    for each in (run, *own(run)):
        assert [change["step"] for change in RunDirectory(each).recipe_changes()] == [6]
        assert load_recipe(str(each / "recipe.toml")).stages[1].steps == 5
    assert [state_of(student, 9).step for student in own(run)] == [9, 9]


def test_commands_for_one_student_name_the_folders_of_all(whole):
    with pytest.raises(UserError, match=r"has several students\.\n.*narrow\n.*wide\nWhat to do: give the folder of one of them") as refused:
        chosen_checkpoint(RunDirectory(whole), None)
    assert str(own(whole)[0]) in str(refused.value)
    assert chosen_checkpoint(RunDirectory(own(whole)[0]), None).name == f"step-{STEPS:06d}"


@pytest.mark.parametrize("objective", ["velocity", "early"])
def test_the_teacher_works_once_and_the_rehearsal_counts_it_once(objective, monkeypatch):
    encoded: list[Any] = []
    encode = Teacher.encode
    monkeypatch.setattr(Teacher, "encode", lambda *given, **named: encoded.append(given) or encode(*given, **named))
    blocks = f"stage.0.blocks={int(objective == 'early')}"
    alone, together = [], 0
    for one in (*recipe(f"stage.0.objective={objective}", blocks).each, recipe(f"stage.0.objective={objective}", blocks)):
        workshop = open_workshop(one, Ranks())
        encoded.clear()
        positions = workshop.starts_at(workshop.schedule.place(0))
        assert len(encoded) == len(positions)
        with workshop.model.differentiable(one.diffusion_model.checkpoint_blocks), flop_counter() as counted:
            train_step(positions, workshop.model, workshop.learners, workshop.objective(0))
        assert workshop.rehearsal is not None
        if objective == "velocity":
            assert sum(workshop.rehearsal.stages[0].flops.values()) == counted.get_total_flops()
        alone, together = [*alone, together], counted.get_total_flops()
    with torch.no_grad(), flop_counter() as of_teacher:
        for position in positions:
            position.velocity(workshop.model, position.text_BLD)
    assert together == sum(alone) - of_teacher.get_total_flops()


def test_one_students_graph_exists_at_a_time():
    """So two students need the memory of their weights more than one, not that of their passes through the diffusion model."""
    wide = recipe().each[0]
    twins = recipe("student.1.layout=" + "{ d_model = 64, d_ff = 128, num_layers = 2, num_heads = 2, d_kv = 32, gated = true }")
    twins = twins.model_copy(update={"students": tuple(part.model_copy(update={"projection_width": 128}) for part in twins.students)})
    one, two = (rehearse(each, Target(torch.device("cpu"), as_gpu=True)) for each in (wide, twins))
    assert (two.student, two.moments, two.parameters) == (2 * one.student, 2 * one.moments, 2 * one.parameters)
    needs = [found.stages[1].need.all_here for found in (one, two)]
    for part in ("diffusion model's activations", "diffusion model, frozen", "teacher's embeddings"):
        assert needs[1][part] == pytest.approx(needs[0][part], rel=0.01), part


def test_a_student_whose_steps_are_dropped_stops_the_run_by_name(tmp_path, monkeypatch):
    calls = iter(range(10**6))
    second = Objective(lambda gap: velocity_gap(gap) * (float("nan") if next(calls) % 2 else 1.0))
    monkeypatch.setitem(OBJECTIVES, "velocity", second)
    settings = ["stage.0.objective=velocity", "stage.0.blocks=0", "stage.0.steps=12", "sampling.steps=12", "checkpoints.every_steps=20"]
    with pytest.raises(NotFinite, match="Student narrow: 10 steps in a row were not finite"):
        train(recipe(*settings, "validation.every_steps=50"), tmp_path / "run", False, Ranks())
    assert [state_of(student, 10).skipped_steps for student in own(tmp_path / "run")] == [0, 10]


def test_previews_show_the_teacher_and_every_student(tmp_path, stand_ins):
    vae = stand_ins / "models" / "vae" / "ae.safetensors"
    run, settings = tmp_path / "run", [f"preview.vae={vae}", "preview.every_steps=4", "stage.1.steps=1"]
    assert train(recipe(*settings), run, False, Ranks()) is not None
    assert [len(samples_of(each / "samples")) for each in (run, *own(run))] == [2, 2, 2]

    previewer = Previewer(open_workshop(recipe(*settings), Ranks()))
    together = columns(previewer.sheet())
    for number, images in enumerate(previewer._students, start=1):
        teacher, student, difference = columns(previewer._beside_teacher(images))
        assert np.array_equal(teacher, together[0]) and np.array_equal(student, together[number])
        assert np.array_equal(difference, np.abs(teacher - student))
    assert together[0].std() > 5 and not np.array_equal(together[1], together[2])


def columns(sheet: Image.Image) -> list[np.ndarray]:
    """The three images of the last row."""
    lefts, top = [GAP_PX + column * (sheet.width - GAP_PX) // 3 for column in range(3)], sheet.height - GAP_PX - SIDE_PX
    return [np.asarray(sheet.crop((left, top, left + SIDE_PX, top + SIDE_PX))).astype(int) for left in lefts]


@pytest.mark.full
def test_a_run_of_two_students_that_is_killed_goes_on_to_the_bit(comfyui_path, tmp_path):
    settings = [*SETTINGS, "stage.1.steps=60", "checkpoints.every_steps=2", "validation.every_steps=40"]
    arguments = [comfyui_path, tmp_path / "base"]
    finish(command(*arguments, tmp_path / "whole", settings=settings, recipe="smoke-two-students"), tmp_path)
    killed = command(*arguments, tmp_path / "killed", settings=settings, recipe="smoke-two-students")
    process = start(killed, tmp_path)
    for step in (9, 30):
        wait_for_step(process, tmp_path / "killed", step)
        process.kill()
        process.wait()
        resumed = command(*arguments, tmp_path / "killed", "--resume", settings=settings, recipe="smoke-two-students")
        process = start(resumed, tmp_path)
    said = process.communicate()[0]
    assert process.returncode == 0 and said.count("Done: ") == 2, said
    for ours, theirs in zip(own(tmp_path / "killed"), own(tmp_path / "whole"), strict=True):
        for part in ("student", "optimizer", "position", "best"):
            assert same(getattr(state_of(ours, 64), part), getattr(state_of(theirs, 64), part)), part
        assert numbers(ours) == numbers(theirs)


@pytest.mark.full
def test_in_two_processes_each_student_is_the_one_that_they_train_alone(comfyui_path, tmp_path):
    settings = [*SETTINGS, "stage.1.steps=3"]
    arguments = [comfyui_path, tmp_path / "base"]
    run = tmp_path / "run"
    finish(command(*arguments, run, settings=settings, recipe="smoke-two-students"), tmp_path, launcher=TWO_PROCESSES)
    for student in own(run):
        alone = tmp_path / student.name
        finish(command(*arguments, alone, settings=[], recipe=str(student / "recipe.toml")), tmp_path, launcher=TWO_PROCESSES)
        for part in ("student", "optimizer", "position", "best"):
            assert same(getattr(state_of(student), part), getattr(state_of(alone), part)), part
        assert numbers(student) == numbers(alone)
