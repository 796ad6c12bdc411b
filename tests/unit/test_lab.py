"""The lab: its arms are recipes with the arithmetic that they are given, runs are kept apart, and the pages show the results."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from distilled_t5.devtools import lab
from distilled_t5.devtools.commands import run_all
from distilled_t5.devtools.docs.lab_tables import PLOT, TABLES, plot, renewed, tables
from distilled_t5.devtools.docs.miniature_tables import PAGE
from distilled_t5.devtools.lab_arms import FAMILIES, Arm, Counted, Lab
from distilled_t5.devtools.lab_results import RESULTS, over_runs, results
from distilled_t5.devtools.lab_run import Run, perform
from distilled_t5.devtools.miniature_results import TEACHER
from distilled_t5.train.recipe import Recipe, load_recipe
from distilled_t5.world.pictures import TASKS
from PIL import Image

SMALL = """
settings = ['preview.vae=""']
[family.flux]
recipe = "miniature-quarter"
suite = "miniature"
[[arm]]
name = "base"
title = "embedding, velocity"
stages = [{ objective = "embedding", steps = 5000 }, { objective = "velocity", steps = 2000 }]
[[arm]]
name = "short"
title = "velocity"
settings = ["student.start={pretrained}", "teacher.cache={texts}"]
stages = [{ objective = "velocity", steps = 150, batch = 8 }]
[[arm]]
name = "follow"
title = "velocity"
settings = ["student.start={pretrained}"]
stages = [{ objective = "velocity", steps = 2400, batch = 8, trajectory_steps = 4 }]
[[claim]]
question = "Is it worth it?"
arm = "base"
against = "follow"
[[claim]]
question = "And for words?"
arm = "base"
against = "follow"
task = "word"
"""


def small(folder: Path) -> Lab:
    """A lab of three arms whose steps that follow cost ten times as much as those that imitate."""
    (folder / "lab.toml").write_text(SMALL, encoding="utf-8")
    read = Lab.read("flux", folder / "lab.toml")
    return read.planned(tflop, lambda: 1.0)


def tflop(recipe: Recipe) -> float:
    """The operations of a run whose steps that follow cost ten times as much as those that imitate."""
    return sum(stage.steps * (0.01 if stage.objective == "velocity" else 0.001) for stage in recipe.stages)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_arm_is_a_recipe_of_its_family_and_every_question_is_about_arms(family: str, tmp_path: Path) -> None:
    read = Lab.read(family).planned(tflop, lambda: 0.1)
    assert len({arm.name for arm in read.arms}) == len(read.arms)
    assert {arm.name for arm in read.arms} >= {name for claim in read.claims for name in (claim["arm"], claim["against"])}
    assert {claim.get("task", "word") for claim in read.claims} <= set(TASKS)
    files = {name: tmp_path / f"{name}.safetensors" for name in ("pretrained", "texts")}
    for arm in read.arms:
        recipe = read.load(arm, 2, files)
        assert (recipe.seed, recipe.output.name, recipe.family.name) == (2, arm.name, family)
        assert [stage.objective for stage in recipe.stages] == [stage["objective"] for stage in arm.stages]
        assert recipe.stages[-1].corpora == load_recipe(read.recipe).stages[0].corpora


def test_all_questions_are_asked_of_the_flux() -> None:
    assert Lab.read("flux").arms[0].steps() == "5,000 embedding, 2,000 velocity"
    assert len(Lab.read("flux").claims) >= 10


def test_an_arm_has_the_arithmetic_and_the_captions_of_its_recipe(tmp_path: Path) -> None:
    base, short, follow = small(tmp_path).arms
    # The student that two of them start from took 1.
    assert [arm.tflop for arm in (base, short, follow)] == pytest.approx([25.0, 2.5, 25.0])
    assert [arm.captions for arm in (base, short, follow)] == [3500 * 32, 75 * 8, 600 * 8]


def test_the_first_run_of_the_base_is_the_shipped_student(tmp_path: Path) -> None:
    planned, work = replace(small(tmp_path), shipped="miniature_student_quarter"), lab.Work(tmp_path, tmp_path)
    runs = lab.runs_of(planned, work, 2)
    assert [run.shipped is not None for run, _ in runs] == [True, *[False] * 5]
    run, overrides = runs[0]
    run.prepare(planned.recipe, overrides, work.suite, work.teacher, tmp_path)
    assert run.shipped is not None and run.trained.read_bytes() == run.shipped.read_bytes()
    assert run.folder != lab.runs_of(small(tmp_path), work, 2)[0][0].folder, "its file is part of what decides the run"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shipped_student_was_trained_by_the_bases_recipe(family: str) -> None:
    read = Lab.read(family)
    base = read.load(read.arms[0], 0, {})
    same = load_recipe(read.recipe)
    keys = {line.split(":")[0] for line in same.differences(base)}
    assert keys <= {"output.name", "preview.vae", "validation.every_steps", "checkpoints.every_steps"} | {"stage.0.name", "stage.1.name"}
    assert same.output.name == read.shipped


def test_operations_are_counted_once_for_equal_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[str] = []
    monkeypatch.setattr(Counted, "_rehearsed", lambda _, recipe: float(not counted.append(recipe.output.name)))
    read = small(tmp_path)
    for _ in range(2):
        assert read.planned(Counted(tmp_path / "flops.json", list).tflop, lambda: 2.0).arms[1].tflop == 3
    changed = replace(read, arms=(*read.arms, replace(read.arms[0].shortened(100), name="more")))
    assert changed.planned(Counted(tmp_path / "flops.json", list).tflop, lambda: 2.0).arms[-1].tflop == 1
    assert counted == ["base", "short", "follow", "more"]


def test_one_seed_of_all_arms_comes_before_the_second_and_a_changed_arm_is_another_run(tmp_path: Path) -> None:
    planned, work = small(tmp_path), lab.Work(tmp_path, tmp_path)
    runs = [run for run, _ in lab.runs_of(planned, work, 2)]
    assert [(run.arm, run.seed) for run in runs] == [(arm.name, seed) for seed in (0, 1) for arm in planned.arms]
    changed = replace(planned, arms=(planned.arms[0].shortened(200), *planned.arms[1:]))
    again = [run for run, _ in lab.runs_of(changed, work, 2)]
    assert [one.folder == other.folder for one, other in zip(runs, again, strict=True)] == 2 * [False, True, True]
    with_other_sources = [run for run, _ in lab.runs_of(planned, replace(work, shared="other"), 2)]
    assert not {run.folder for run in runs} & {run.folder for run in with_other_sources}


def test_what_decides_every_run_is_the_suite_the_models_and_the_versions(tmp_path: Path) -> None:
    planned, work = small(tmp_path), lab.Work(tmp_path, tmp_path)
    work.suite.write_text("miniature_vae.safetensors", encoding="utf-8")
    before = lab.decisive(planned, work)
    assert lab.decisive(planned, work) == before
    (tmp_path / "comfyui_version.py").write_text('__version__ = "1.0"', encoding="utf-8")
    with_version = lab.decisive(planned, work)
    work.suite.write_text("no VAE", encoding="utf-8")
    assert len({before, with_version, lab.decisive(planned, work)}) == 3


def test_results_with_fewer_runs_than_the_kept_ones_do_not_replace_them(tmp_path: Path) -> None:
    found = found_in(tmp_path)
    assert lab.missing({}, found) == lab.missing(found, found) == []
    fewer = {**found, "arms": [found["arms"][0] | {"seeds": found["arms"][0]["seeds"][:1]}]}
    assert lab.missing(found, fewer) == ["base", "follow"]


def write_done(run: Run, right: int, teacher: int = 8, n: int = 10) -> None:
    """A finished run whose student got so many images of each task right."""
    for name, count in ((run.arm, right), (TEACHER, teacher)):
        folder = run.evaluation / "scores" / name
        folder.mkdir(parents=True)
        for task in TASKS:
            kept = {"found": {"readback": [1.0] * count + [0.0] * (n - count)}}
            (folder / f"{task}.readback.json").write_text(json.dumps(kept), encoding="utf-8")
    made = {"date": f"2026-12-0{run.seed + 1}", "machine": {"cores": 2}, "versions": {}, "commit": "abc", "seconds": 1.0}
    (run.evaluation / "results.json").write_text(json.dumps({"made": made}), encoding="utf-8")


def found_in(folder: Path) -> dict[str, Any]:
    """The results of a lab whose base has two seeds, one arm one seed, and one arm a failure."""
    planned = small(folder)
    runs = [run for run, _ in lab.runs_of(planned, lab.Work(folder, folder), 2)]
    for run, right in ((runs[0], 8), (runs[3], 6), (runs[2], 4)):
        write_done(run, right)
    runs[1].folder.mkdir(parents=True)
    runs[1].failure.write_text("The loss is not finite.", encoding="utf-8")
    return results(planned, runs, "dev.py lab")


def test_results_have_the_mean_over_seeds_and_differences_on_the_seeds_that_both_arms_have(tmp_path: Path) -> None:
    found = found_in(tmp_path)
    base, failed, one = found["arms"]
    assert [seed["share"] for seed in base["seeds"]] == [1.0, 0.75]
    assert (base["share"]["value"], base["share"]["n"], base["tasks"]["word"]["value"]) == (0.875, 10, 0.7)
    assert base["share"]["low"] < 0.875 < base["share"]["high"]
    assert (failed["seeds"], failed["failed"]) == ([], ["seed 0: The loss is not finite."])
    assert (one["of_base"], one["seeds"][0]["share"]) == (1.0, 0.5)
    assert [claim["seeds"] for claim in found["claims"]] == [[0.5], [0.5]], "only seed 0 has both arms"
    assert found["claims"][0]["difference"]["low"] < 0.5 < found["claims"][0]["difference"]["high"]
    assert (found["commits"], found["made"]["date"]) == (["abc"], "2026-12-02")


def test_questions_about_arms_that_are_left_out_are_left_out(tmp_path: Path) -> None:
    planned = small(tmp_path)
    [run] = [run for run, _ in lab.runs_of(planned, lab.Work(tmp_path, tmp_path), 1) if run.arm == "base"]
    write_done(run, 8)
    assert results(replace(planned, arms=planned.arms[:2]), [run], "dev.py lab --quick")["claims"] == []


def test_results_before_the_first_finished_run_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"No run of the lab for flux is finished(.|\n)*What to do"):
        results(small(tmp_path), [], "dev.py lab")


def test_tables_have_every_arm_by_its_arithmetic_and_failures_too(tmp_path: Path) -> None:
    made = tables(found_in(tmp_path))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in made["arms"].splitlines()]
    assert [row[0] for row in rows[2:]] == ["the teacher", "velocity", "embedding, velocity", "velocity"]
    assert rows[3][1:8] == ["150 velocity (batches of 8)", "2.5", "0.10", "600", "-", "failed", "-"]
    assert rows[4][1:5] == ["5,000 embedding, 2,000 velocity", "25", "1.00", "112,000"]
    assert (rows[4][6], rows[4][7]) == ("100.0, 75.0", "10")
    answers = [[cell.strip() for cell in line.strip("|").split("|")] for line in made["claims"].splitlines()]
    assert answers[3][:2] == ["And for words?", "embedding, velocity (1.00) against velocity (1.00), word"]
    assert answers[3][2].startswith("50.0 (")
    assert answers[3][3:] == ["50.0", "-", "no"]


def test_a_difference_is_clear_only_if_it_is_so_over_captions_and_over_runs(tmp_path: Path) -> None:
    assert over_runs([0.01]) is None
    assert over_runs([0.01, 0.02, 0.03]) == pytest.approx([-0.0048, 0.0448], abs=1e-4)
    planned = small(tmp_path)
    runs = [run for run, _ in lab.runs_of(planned, lab.Work(tmp_path, tmp_path), 2)]
    for run, right in ((runs[0], 8), (runs[3], 8), (runs[2], 2), (runs[5], 2)):
        write_done(run, right)
    claim = results(planned, runs, "dev.py lab")["claims"][0]
    assert (claim["seeds"], claim["over_runs"], claim["clear"]) == ([0.75, 0.75], [0.75, 0.75], True)


def test_the_page_has_the_plot_of_each_family(tmp_path: Path) -> None:
    page = renewed(PAGE.read_text(encoding="utf-8"), {"flux": found_in(tmp_path)}, TABLES[PAGE])
    assert "(../assets/lab-flux.png)" in page and "lab-sd3.png" not in page


def test_the_plot_is_an_image(tmp_path: Path) -> None:
    plot(found_in(tmp_path), tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        assert image.width > image.height > 400


def test_the_pages_have_the_tables_of_the_kept_results() -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    for path, names in TABLES.items():
        page = path.read_text(encoding="utf-8")
        assert renewed(page, found, names) == page
    for family in found:
        assert Path(str(PLOT).format(family)).is_file()
        assert f"lab-{family}.png" in PAGE.read_text(encoding="utf-8")


def test_runs_that_are_done_are_left_alone_and_none_starts_after_the_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned, work = small(tmp_path), lab.Work(tmp_path, tmp_path)
    runs = lab.runs_of(planned, work, 1)
    write_done(runs[0][0], 8)
    commands = lab.due(planned, work, runs, time.monotonic() + 60)
    assert next(commands)[-1] == runs[1][0].folder
    job = json.loads((runs[1][0].folder / "job.json").read_text(encoding="utf-8"))
    assert f"student.start={work.pretrained.as_posix()}" in job["train"]
    assert f"teacher.cache={(tmp_path / 'texts').as_posix()}" in job["train"]
    assert list(lab.due(planned, work, runs, time.monotonic())) == []
    assert "--hours is over" in capsys.readouterr().out


def test_the_next_command_is_asked_for_when_it_can_start(tmp_path: Path) -> None:
    seen: list[bool] = []

    def commands() -> Any:
        for number in range(2):
            seen.append((tmp_path / "0").exists())
            yield ["-c", f"import pathlib; pathlib.Path({str(tmp_path / str(number))!r}).touch()"]

    run_all(commands())
    assert seen == [False, True]


def test_a_run_that_fails_is_written_down_and_the_lab_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path / "run", "arm", 1)
    run.folder.mkdir()
    perform(run, {"train": ["-c", "raise SystemExit(3)"], "evaluate": [], "teacher": str(tmp_path)})
    assert "ended with status 3" in run.failure.read_text(encoding="utf-8")
    assert "arm, seed 1" in capsys.readouterr().err
    assert not run.done


def test_a_wrong_arm_is_answered_with_the_known_ones(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["lab", "--comfyui", "somewhere", "--only", "projekted"])
    with pytest.raises(SystemExit):
        lab.main()
    assert "embedding-velocity" in capsys.readouterr().err


def test_a_stage_takes_what_it_leaves_out_from_the_recipe() -> None:
    arm = Arm("one", "one", ({"objective": "velocity", "steps": 200, "batch": 8},))
    recipe = load_recipe("miniature-quarter", arm.overrides("miniature-quarter", (), 0, {}))
    assert (recipe.stages[0].batch, recipe.stages[0].resolution_px, recipe.stages[0].steps) == (8, 96, 200)
