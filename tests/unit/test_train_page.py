"""A run's page: its numbers, thinned curves, images, warnings and state, from the files of the run alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from distilled_t5.runtime.disk import replace_file
from distilled_t5.runtime.pages import HEAD
from distilled_t5.tests.support.runs import BANDS, STAGES, made_up_run
from distilled_t5.train import page as page_module
from distilled_t5.train.curves import MOST_POINTS, Curve, Curves
from distilled_t5.train.page import RunPage, starting, warnings_of
from distilled_t5.train.recipe import load_recipe
from distilled_t5.train.report import Reporter
from distilled_t5.train.run_directory import RunDirectory
from PIL import Image


def data_of(run: RunDirectory) -> dict[str, Any]:
    """The data of the page that the run has written."""
    html = run.page.read_text(encoding="utf-8")
    return json.loads(html.split('<script type="application/json" id="data">', 1)[1].split("</script", 1)[0])


def test_the_page_takes_the_mean_of_losses_over_the_trajectories_of_each_stage(tmp_path):
    data = data_of(made_up_run(tmp_path / "run", settings=[*STAGES, "stage.0.trajectory_steps=1"]))
    assert [stage["trajectory"] for stage in data["stages"]] == [1, 4]


def test_the_page_of_a_finished_run_has_everything_of_it(tmp_path):
    data = data_of(made_up_run(tmp_path / "run"))
    assert (data["state"], data["step"], data["left"]) == ("finished", 100, 0)
    assert [(stage["name"], stage["begin"], stage["end"]) for stage in data["stages"]] == [
        ("embedding-first", 0, 40),
        ("follow-the-steps", 40, 100),
    ]
    assert [stage["objective"] for stage in data["stages"]] == ["embedding", "velocity"]
    assert [len(stage["loss"]) for stage in data["stages"]] == [40, 60]
    assert set(data["heldOut"]) == {f"\u03c3 {band}" for band in BANDS}
    assert [step for step, _ in data["heldOut"]["\u03c3 0.75-1.00"]] == [25, 50, 75, 100]
    assert data["learningRate"][0] == [1, 0.00099]
    assert len(data["throughput"]) == 100
    assert [(one["step"], one["file"]) for one in data["samples"]] == [(step, f"step-{step:06d}-preview.jpg") for step in (25, 50, 75, 100)]
    assert load_recipe("smoke", STAGES).to_toml() == data["recipe"]
    assert (data["name"], data["recipeName"]) == ("distilled_t5_smoke", "smoke")
    assert data["numbers"]["lowest held-out loss"].endswith("at step 100")
    assert data["facts"] == {"Recipe": "smoke", "Student": "T5 of width 64"}


def test_it_is_written_while_the_run_trains_and_says_how_long_it_still_takes(tmp_path):
    recipe = load_recipe("smoke")
    with RunDirectory(tmp_path / "run").start(recipe.to_toml()) as run, Reporter(run, recipe) as reporter:
        reporter.begin({}, {1: 100.0})
        assert data_of(run)["state"] == "training"
        assert data_of(run)["left"] is None
        reporter.step(1, 0.5, 4, stage=0)
        reporter.image("preview", lambda: Image.new("RGB", (8, 8)))
        data = data_of(run)
        assert data["step"] == 1
        assert 4000 < data["left"] < 5000
        assert [one["file"] for one in data["samples"]] == ["step-000001-preview.jpg"]


def test_a_run_that_fails_or_is_stopped_says_so(tmp_path):
    recipe = load_recipe("smoke")
    with RunDirectory(tmp_path / "run").start(recipe.to_toml()) as run:
        with pytest.raises(ValueError, match="no memory"), Reporter(run, recipe):
            raise ValueError("no memory.\nWhat to do: buy some.")
        assert (data_of(run)["state"], data_of(run)["failure"]) == ("failed", "no memory.\nWhat to do: buy some.")
        with Reporter(run, recipe) as reporter:
            reporter.step(1, 0.5, 4)
        assert (data_of(run)["state"], data_of(run)["failure"]) == ("stopped", "")


def test_a_run_whose_models_are_being_loaded_is_starting_and_says_why_it_could_not(tmp_path):
    run = made_up_run(tmp_path / "run", steps=50)

    def load() -> None:
        assert (data_of(run)["state"], data_of(run)["step"]) == ("starting", 50)
        assert len(data_of(run)["stages"][0]["loss"]) == 40
        raise ValueError("no VAE.")

    with pytest.raises(ValueError, match="no VAE"), starting(run):
        load()
    assert (data_of(run)["state"], data_of(run)["failure"]) == ("failed", "no VAE.")


def test_a_resumed_run_shows_the_curves_from_its_first_step(tmp_path):
    run = made_up_run(tmp_path / "run", steps=50)
    assert data_of(run)["state"] == "stopped"
    with Reporter(run, load_recipe("smoke", STAGES), start_step=50) as reporter:
        reporter.step(51, 0.004, 4, stage=1)
    assert [len(stage["loss"]) for stage in data_of(run)["stages"]] == [40, 11]


def test_hundreds_of_thousands_of_steps_make_as_small_a_page_as_hundreds(tmp_path):
    curve, all_steps = Curve(), 300_000
    for step in range(1, all_steps + 1):
        curve.add(step, float(step))
    points = curve.points()
    assert MOST_POINTS / 2 <= len(points) <= MOST_POINTS
    assert points[-1][0] == all_steps
    assert all(step - curve.width <= mean <= step for step, mean in points)
    assert [step for step, _ in points] == sorted(step for step, _ in points)


def test_numbers_that_are_not_finite_leave_a_gap_and_never_count_as_the_lowest():
    curves = Curves()
    curves.add({"step": 1, "loss": None, "stage": 0, "learning_rate": 1e-3, "samples_per_s": 4.0})
    curves.add({"step": 1, "held_out_loss": None, "held_out_by_band": {"low": None, "high": 1.0}})
    assert curves.loss[0].points() == []
    assert curves.held_out["high"].points() == [(1, 1.0)]
    assert curves.best is None


def test_one_slow_step_is_not_the_throughput_and_a_stage_has_its_own():
    curves = Curves()
    for step in range(1, 99):
        curves.add({"step": step, "loss": 1.0, "stage": 0, "samples_per_s": 40.0})
    curves.add({"step": 99, "loss": 1.0, "stage": 0, "samples_per_s": 0.8})
    assert curves.prompts_per_s == pytest.approx(50 / (49 / 40 + 1 / 0.8))
    curves.add({"step": 100, "loss": 1.0, "stage": 1, "samples_per_s": 2.0})
    assert curves.prompts_per_s == 2.0


def test_lines_of_metrics_that_are_not_complete_are_left_out():
    curves = Curves()
    curves.add_lines([b"\x00\x00\n", b"[1]\n", b'{"loss": 2}\n', b'{"step": 1, "loss": 0.5, "stage": 0}\n', b'{"step": 2, "lo'])
    assert curves.loss[0].points() == [(1, 0.5)]


def test_nothing_of_a_run_ends_the_script_or_becomes_markup(tmp_path):
    recipe = load_recipe("smoke", ['preview.prompts=["</script><script>alert(1)</script>"]'])
    with RunDirectory(tmp_path / "run").start(recipe.to_toml()) as run:
        html = RunPage(run, recipe).html(0, None)
    assert "alert(1)</script>" not in html
    assert html.count("<script") == html.count("</script") == 3
    for address in ("http://", "https://"):
        assert address not in html.replace("http://www.w3.org/2000/svg", "")


def test_warnings_are_the_newest_of_the_log_each_once(tmp_path):
    path = tmp_path / "train.log"
    lines = [
        f"2026-01-0{day} 10:00:00,123 {level} {text}" for day, level, text in ((1, "WARNING", "a"), (2, "INFO", "b"), (3, "WARNING", "a"))
    ]
    path.write_text("\n".join([*lines, "Traceback (most recent call last):", "2026-01-04 10:00:00,000 ERROR c"]), encoding="utf-8")
    assert warnings_of(path) == ["2026-01-03 10:00:00 a", "2026-01-04 10:00:00 c"]
    assert warnings_of(tmp_path / "none") == []


def test_a_page_that_cannot_be_written_is_one_warning_and_ends_nothing(tmp_path, capsys, monkeypatch):
    def full(*_arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    recipe = load_recipe("smoke")
    with RunDirectory(tmp_path / "run").start(recipe.to_toml()) as run, Reporter(run, recipe) as reporter:
        monkeypatch.setattr(page_module, "replace_file", full)
        monkeypatch.setattr(page_module, "INTERVAL_S", 0)
        monkeypatch.setattr(page_module, "SHARE", math.inf)
        for step in range(1, 5):
            reporter.step(step, 0.5, 4)
        monkeypatch.setattr(page_module, "replace_file", replace_file)
        reporter.step(5, 0.5, 4)
        assert capsys.readouterr().err.count("page.html cannot be written") == 1
        monkeypatch.setattr(page_module, "replace_file", full)
    assert capsys.readouterr().err.count("page.html cannot be written") == 1, "a second time that the disk is full"
    assert len(run.metrics.read_text(encoding="utf-8").splitlines()) == 5


def test_the_template_is_packed():
    text = (Path(page_module.__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert page_module.TEMPLATE.is_file() and HEAD.is_file()
    assert '"train/*.html"' in text and '"runtime/*.html"' in text
