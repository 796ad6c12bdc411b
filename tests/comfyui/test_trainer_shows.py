"""What a run shows of itself while it trains, and that none of it changes a bit of the run; stages whose length changes at a resume."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import folder_paths
import pytest
from distilled_t5.encoder.files import open_student
from distilled_t5.runtime.lock import RunError
from distilled_t5.runtime.randomness import random_states
from distilled_t5.runtime.ranks import Ranks
from distilled_t5.tests.support.exact import same
from distilled_t5.tests.support.trainer import PACK, finish, metrics
from distilled_t5.train import run as run_module
from distilled_t5.train.export import chosen_checkpoint, export
from distilled_t5.train.recipe import Recipe, load_recipe
from distilled_t5.train.run import train
from distilled_t5.train.run_directory import RunDirectory
from distilled_t5.train.state import NoCheckpoint, read_checkpoint
from distilled_t5.train.trial import trials
from distilled_t5.train.workshop import Workshop, open_workshop
from PIL import Image

SETTINGS = [
    "sampling.steps=4",
    "sampling.token_lengths=[16]",
    "validation.prompts=2",
    "validation.every_steps=4",
    "checkpoints.every_steps=2",
    "checkpoints.keep_last=9",
    "optimizer.warmup_steps=2",
    "student.dropout=0.1",
]
PARTS = ("student", "optimizer", "rng", "position", "best")


def recipe(first: int, second: int, *more: str) -> Recipe:
    """The smoke recipe with so many steps of its two stages."""
    return load_recipe("smoke", [*SETTINGS, f"stage.0.steps={first}", f"stage.1.steps={second}", *more])


def assert_same_end(run: Path, other: Path, step: int) -> None:
    ours, theirs = (read_checkpoint(folder / "checkpoints" / f"step-{step:06d}") for folder in (run, other))
    for part in PARTS:
        assert same(getattr(ours, part), getattr(theirs, part)), part


def cut_after(run: Path, step: int, copy: Path) -> Path:
    """A copy of a run as it was when it had saved this step."""
    shutil.copytree(run, copy)
    for path in (copy / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    return copy


def data_of(run: Path) -> dict[str, Any]:
    html = (run / "page.html").read_text(encoding="utf-8")
    return json.loads(html.split('<script type="application/json" id="data">', 1)[1].split("</script", 1)[0])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four and six steps, whose learning rate starts again at each stage."""
    run = tmp_path_factory.mktemp("done") / "run"
    assert train(recipe(4, 6, "optimizer.restart_per_stage=true"), run, False, Ranks()) is not None
    return run


def test_the_log_and_the_page_say_what_is_trained_and_how_to_watch_it(done):
    said = (done / "train.log").read_text(encoding="utf-8")
    for line in (
        "Recipe           smoke, 10 steps",
        "Teacher          stand-in, without CLIP-L",
        "Student          T5 of width 64, 2 layers, 2.7 million parameters, from random",
        "Diffusion model  stand-in (Flux.1) on cpu",
        "Stage 2          follow-the-steps: 6 steps of 4 prompts, velocity objective, 64 px",
        f"Folder           {done}",
        f'watch "{done}"',
    ):
        assert line in said
    data = data_of(done)
    assert (data["state"], data["step"]) == ("finished", 10)
    assert data["facts"]["Recipe"] == "smoke, 10 steps"


def test_the_finished_run_has_a_card_and_its_export_is_the_encoder_but_for_the_date(done, tmp_path):
    assert "# distilled_t5_smoke\n" in (done / "README.md").read_text(encoding="utf-8")
    exported = export(chosen_checkpoint(RunDirectory(done), None), tmp_path / "out.safetensors")
    written = sorted(
        Path(folder_paths.get_folder_paths("text_encoders")[0]).glob("distilled_t5_smoke*"), key=lambda path: path.stat().st_mtime
    )
    ours, theirs = open_student(exported), open_student(written[-1])
    assert same(ours.load(), theirs.load())
    dates = ("modelspec.date",)
    assert {key: value for key, value in ours.metadata.facts.items() if key not in dates} == {
        key: value for key, value in theirs.metadata.facts.items() if key not in dates
    }
    assert ours.metadata.sha256 == theirs.metadata.sha256


def test_without_a_file_name_the_export_goes_where_comfyui_lists_it(done, comfyui_path, tmp_path):
    ours = [str(PACK / "train"), "export", str(done), "--step", "4", "--comfyui", str(comfyui_path)]
    said = finish([*ours, "--", "--base-directory", str(tmp_path), "--cpu"], tmp_path)
    path = tmp_path / "models" / "text_encoders" / "distilled_t5_smoke-step-000004.safetensors"
    assert f"Done: {path}" in said
    assert open_student(path).metadata.facts["distilled_t5.steps"] == "4"


def test_measuring_a_step_of_the_later_stages_changes_nothing_of_the_run():
    workshop = open_workshop(recipe(4, 6), Ranks())
    with workshop.model.differentiable(False):
        before, weights = random_states({}), {name: tensor.clone() for name, tensor in workshop.student.tensors().items()}
        measured = trials(workshop)
    assert set(measured) == {1} and measured[1] > 0
    assert same(random_states({}), before)
    assert same(workshop.student.tensors(), weights)
    assert all(weight.grad is None for weight in workshop.student.parameters())
    assert workshop.learner.step == 0 and not workshop.learner.optimizer.state
    workshop.learner.step = 4
    assert trials(workshop) == {}


class Notes:
    """A board that keeps what it receives, and asks for a stop after some steps."""

    def __init__(self, stop_after: int) -> None:
        self.stop_after, self.steps, self.images, self.closed = stop_after, [], [], False
        self.held_out: list[Mapping[str, Any]] = []

    @property
    def requested(self) -> bool:
        return self.steps[-1:] == [self.stop_after]

    def numbers(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        if kind == "train":
            self.steps.append(step)
        else:
            self.held_out.append(values)

    def image(self, step: int, name: str, picture: Image.Image) -> None:
        self.images.append((step, name, picture.size))

    def close(self) -> None:
        self.closed = True


def test_a_thread_trains_with_its_own_stop_and_board_and_goes_on_bit_for_bit(done, tmp_path):
    asked, run, ends = recipe(4, 6, "optimizer.restart_per_stage=true"), tmp_path / "run", []

    def in_thread(notes: Notes, resume: bool) -> None:
        thread = threading.Thread(target=lambda: ends.append(train(asked, run, resume, Ranks(), notes, [notes])))
        thread.start()
        thread.join()

    first, second = Notes(5), Notes(0)
    in_thread(first, resume=False)
    assert ends == [None]
    assert (first.steps, first.closed, len(first.held_out)) == ([1, 2, 3, 4, 5], True, 1)
    assert data_of(run)["state"] == "stopped"
    in_thread(second, resume=True)
    assert ends[1] is not None and second.steps == [6, 7, 8, 9, 10]
    assert_same_end(run, done, 10)


# --- lengths ---


def test_a_stage_that_is_lengthened_before_it_begins_gives_the_run_that_had_that_length_from_the_start(done, tmp_path):
    longer = recipe(4, 10, "optimizer.restart_per_stage=true")
    assert train(longer, tmp_path / "straight", False, Ranks()) is not None
    run = cut_after(done, 4, tmp_path / "cut")
    assert train(longer, run, True, Ranks()) is not None
    assert_same_end(run, tmp_path / "straight", 14)
    [change] = RunDirectory(run).recipe_changes()
    assert (change["step"], change["changes"]) == (4, ["follow-the-steps: 6 -> 10 steps"])
    assert load_recipe(str(run / "recipe.toml")) == longer
    assert "At step 4 the recipe was changed: follow-the-steps: 6 -> 10 steps." in (run / "train.log").read_text(encoding="utf-8")
    assert data_of(run)["history"] == [change]
    # Its checkpoints are of two recipes; both are its own.
    shutil.rmtree(run / "checkpoints" / "step-000014")
    assert train(longer, run, True, Ranks()) is not None
    assert_same_end(run, tmp_path / "straight", 14)


def test_a_finished_run_is_lengthened_in_the_middle_of_a_trajectory_and_its_learning_rate_follows(done, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(done, run)
    assert train(recipe(4, 9, "optimizer.restart_per_stage=true"), run, True, Ranks()) is not None
    rates = {line["step"]: line["learning_rate"] for line in metrics(run) if "loss" in line}
    assert sorted(rates) == list(range(1, 14))
    assert rates[11] == pytest.approx(1e-3 * (9 - 6) / (9 - 2)), "as the sixth step of nine, two of them warm-up"
    sigmas = [line["sigma"] for line in metrics(run) if "loss" in line]
    # Trajectories of four steps begin at the steps 1, 5, 9 and 13: the one that the earlier end cut short is continued.
    assert [sigma == 1 for sigma in sigmas] == [step % 4 == 0 for step in range(13)]


def test_a_stage_is_shortened_to_the_steps_that_it_has_taken_and_the_run_ends_there(done, tmp_path):
    run = cut_after(done, 8, tmp_path / "cut")
    assert train(recipe(4, 4, "optimizer.restart_per_stage=true"), run, True, Ranks()) is not None
    assert read_checkpoint(run / "checkpoints" / "step-000008").step == 8
    assert [line["step"] for line in metrics(run) if "loss" in line] == list(range(1, 9))
    assert data_of(run)["state"] == "finished"


@pytest.mark.parametrize(
    ("first", "second", "setting", "message"),
    [
        (8, 6, "seed=0", r"Stage embedding-first is over: its length can no longer change \(expected 4 steps, got 8\)"),
        (4, 3, "seed=0", r"4 steps of stage follow-the-steps have been taken: expected at least as many, got 3"),
        (4, 8, "seed=1", r"started with another recipe:\n  seed: 0 -> 1\n  stage.1.steps: 6 -> 8"),
    ],
)
def test_what_has_been_trained_and_everything_else_of_a_recipe_stay(done, tmp_path, first, second, setting, message):
    run = cut_after(done, 8, tmp_path / "cut")
    before = (run / "recipe.toml").read_bytes()
    with pytest.raises(RunError, match=message) as refused:
        train(recipe(first, second, "optimizer.restart_per_stage=true", setting), run, True, Ranks())
    RunDirectory(run).resume().close()
    assert refused.value.__traceback__ is not None, "whose frames would keep a lock that was not released"
    assert (run / "recipe.toml").read_bytes() == before
    assert not (run / "recipe-history.jsonl").exists()


def test_a_run_that_cannot_be_resumed_keeps_its_recipe_and_its_page_says_why(done, tmp_path):
    run = cut_after(done, 2, tmp_path / "cut")
    student = run / "checkpoints" / "step-000002" / "student.safetensors"
    student.write_bytes(student.read_bytes()[:-1] + b"x")
    before = (run / "recipe.toml").read_bytes()
    with pytest.raises(NoCheckpoint):
        train(recipe(4, 10, "optimizer.restart_per_stage=true"), run, True, Ranks())
    assert (run / "recipe.toml").read_bytes() == before
    assert not (run / "recipe-history.jsonl").exists()
    data = data_of(run)
    assert data["state"] == "failed" and data["failure"].startswith("There is no intact checkpoint")


def test_the_page_says_that_a_run_is_starting_before_its_models_are_loaded(tmp_path, monkeypatch):
    seen = []

    def spied(*arguments: Any) -> Workshop:
        seen.append(data_of(tmp_path / "run")["state"])
        return open_workshop(*arguments)

    monkeypatch.setattr(run_module, "open_workshop", spied)
    assert train(recipe(1, 1, "optimizer.warmup_steps=0"), tmp_path / "run", False, Ranks()) is not None
    assert seen == ["starting"]
    assert data_of(tmp_path / "run")["state"] == "finished"


def test_a_card_that_cannot_be_written_is_a_warning_and_the_encoder_is_written(tmp_path):
    class MadeByHand(Notes):
        def numbers(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
            (tmp_path / "run" / "README.md").write_text("# Mine", encoding="utf-8")

    paths = train(recipe(1, 1, "optimizer.warmup_steps=0"), tmp_path / "run", False, Ranks(), boards=[MadeByHand(0)])
    assert paths is not None and paths[0].is_file()
    assert (tmp_path / "run" / "README.md").read_text(encoding="utf-8") == "# Mine"
    assert "model card could not be written" in (tmp_path / "run" / "train.log").read_text(encoding="utf-8")
