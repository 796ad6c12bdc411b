"""Suites: what they promise, what is refused and with which words, and that no option is without a shipped suite."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from distilled_t5.config.files import ConfigError, options
from distilled_t5.evaluate.__main__ import command_line
from distilled_t5.evaluate.metrics import METRICS, PROBES, RECORDS
from distilled_t5.evaluate.suite import SHIPPED, Suite, Task, load_suite
from distilled_t5.prompts.corpora import COMPBENCH_CATEGORIES
from distilled_t5.world.scenes import NEW_IN_TASK

MINIATURE = (SHIPPED / "miniature.toml").read_text(encoding="utf-8")
METRICS_PAGE = SHIPPED.parent / "METRICS.md"
NAMES = ("miniature", "miniature-sd3", "paper", "paper-pixart", "quick", "quick-sd35")
OPTIONS = {
    "": ["name", "seed", "students"],
    "teacher.": ["t5", "clip_l", "clip_g"],
    "diffusion_model.": ["family", "file", "dtype", "vae"],
    "sampling.": ["resolution_px", "steps", "guidance", "batch", "cfg", "negative"],
    "ocr.": ["reader", "weights", "languages"],
    "clip_score.": ["weights"],
    "fid.": ["weights"],
    "lpips.": ["weights"],
    "compbench.": ["vqa", "detector", "depth"],
    "embedding.": ["prompts", "map"],
    "velocity_gap.": ["prompts", "sigma_bands"],
    "latent_distance.": ["prompts"],
    "cost.": ["repeats"],
    "page.": ["prompts", "side_px"],
    "task.": ["name", "metrics"],
    "task.prompts.": ["kind", "path", "column", "target", "category", "photographs", "limit", "mix"],
}


def suite_of(folder: Path, text: str, *overrides: str) -> Suite:
    path = folder / "suite.toml"
    path.write_text(text, encoding="utf-8")
    return load_suite(str(path), overrides)


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the error about a suite's text."""
    with pytest.raises(ConfigError) as caught:
        suite_of(folder, text, *overrides)
    return caught.value.problems


def keys_used(value: Any, prefix: str = "") -> set[str]:
    if isinstance(value, list):
        return set().union(*(keys_used(item, prefix) for item in value))
    if not isinstance(value, dict):
        return set()
    return {prefix + key for key in value}.union(*(keys_used(item, f"{prefix}{key}.") for key, item in value.items()))


def test_the_list_of_options_is_frozen_and_each_is_described():
    found = options(Suite)
    tables = {key.rpartition(".")[0] for key in found}
    assert sorted(set(found) - tables) == sorted(part + key for part, keys in OPTIONS.items() for key in keys)
    assert all(field.description for field in found.values())


def test_the_commands_help_names_every_shipped_suite():
    said = " ".join(command_line().format_help().split())
    assert f"the name of a shipped one: {', '.join(sorted(path.stem for path in SHIPPED.glob('*.toml')))}" in said
    assert "else the one that dev.py set up" in said


def test_a_suite_without_a_family_is_for_flux(tmp_path):
    suite = suite_of(tmp_path, MINIATURE.replace('family = "flux"', ""))
    assert suite.diffusion_model.family == "flux"


def test_every_option_is_used_by_a_shipped_suite_or_by_the_example_for_files_of_ones_own():
    [example] = re.findall(r"```toml\n(.+?)```", METRICS_PAGE.read_text(encoding="utf-8"), re.DOTALL)
    texts = [example, *(path.read_text(encoding="utf-8") for path in SHIPPED.glob("*.toml"))]
    assert set().union(*(keys_used(tomllib.loads(text)) for text in texts)) == set(options(Suite))


def test_the_example_for_prompts_with_target_texts_is_a_valid_task():
    [example] = re.findall(r"```toml\n(.+?)```", METRICS_PAGE.read_text(encoding="utf-8"), re.DOTALL)
    [task] = tomllib.loads(example)["task"]
    prompts = Task.model_validate(task).prompts
    assert (prompts.kind, prompts.path, prompts.column, prompts.target) == ("json", "CommonText_Test.json", "prompt", "text")


def test_the_shipped_suites_are_those_promised():
    assert tuple(sorted(path.stem for path in SHIPPED.glob("*.toml"))) == NAMES
    miniature, sd3, paper, _, quick, _ = (load_suite(name) for name in NAMES)
    assert (sd3.tasks, sd3.diffusion_model.family) == (miniature.tasks, "sd3")
    assert [task.prompts.category for task in miniature.tasks] == list(NEW_IN_TASK)
    assert {task.metrics for task in miniature.tasks} == {("readback",)}
    assert sum(task.prompts.limit for task in quick.tasks) == 200
    for suite in (quick, paper):
        assert [task.prompts.category for task in suite.tasks if task.prompts.kind == "compbench"] == list(COMPBENCH_CATEGORIES)
    assert [task.prompts.mix for task in paper.tasks if task.prompts.kind == "common_text"] == ["paper"]
    assert {metric for task in paper.tasks for metric in task.metrics} == {"ocr", "compbench", "fid", "clip_score", "lpips"}


def test_the_suite_for_pixart_is_the_papers_without_written_words():
    paper, pixart = load_suite("paper"), load_suite("paper-pixart")
    assert pixart.tasks == tuple(task for task in paper.tasks if task.metrics != ("ocr",))
    assert (pixart.diffusion_model.family, pixart.sampling.cfg, pixart.sampling.guidance) == ("pixart_alpha", 4.5, None)
    assert (pixart.sampling.resolution_px, pixart.sampling.steps) == (paper.sampling.resolution_px, paper.sampling.steps)


@pytest.mark.parametrize("name", NAMES)
def test_a_suite_round_trips_exactly(name, tmp_path):
    suite = load_suite(name)
    again = suite_of(tmp_path, suite.to_toml())
    assert again == suite
    assert again.sha256 == suite.sha256
    assert load_suite(name, ["seed=7"]).sha256 != suite.sha256


def test_a_limit_cuts_every_task_and_lengthens_none():
    suite = load_suite("miniature", ["task.1.prompts.limit=3"], 5)
    assert [task.prompts.limit for task in suite.tasks] == [5, 3, 5, 5, 5, 5, 5]
    assert load_suite("miniature") != suite
    with pytest.raises(ConfigError, match=r"--limit is 0: expected at least 1\.(.|\n)*What to do: "):
        load_suite("miniature", [], 0)


def test_every_record_with_settings_has_its_table_in_the_suite():
    fields = set(Suite.model_fields)
    assert {record.table_name for record in RECORDS if record.part} < fields
    assert load_suite("miniature").table_of(METRICS["readback"]) is None
    assert load_suite("miniature").table_of(PROBES["collapse"]).prompts == 210


def test_an_unknown_key_is_refused_with_the_nearest_one(tmp_path):
    text = MINIATURE.replace("batch = 50", "bach = 50")
    assert problems(tmp_path, text) == [
        "sampling.batch is missing (images in one forward pass of the diffusion model on one GPU: decides the memory needed)",
        "sampling.bach is not a key of a suite; the nearest is sampling.batch",
    ]


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("task.0.prompts.category=shape", "a category, one of single_object, colour_shape_binding"),
        ("task.0.prompts.path=x.txt", "prompts of kind miniature are generated: expected no path"),
        ("task.0.prompts.photographs=x", "prompts of kind miniature: expected no photographs, which coco has"),
        ("task.0.prompts.mix=paper", "prompts of kind miniature: expected no mix"),
        ("task.0.prompts.kind=lines", "prompts of kind lines need a path"),
        ("task.0.prompts.target=text", "prompts of kind miniature have no columns: expected no column and no target"),
        ('task.0.prompts={kind="csv", path="a.csv", limit=1}', "prompts of kind csv need the column that holds the prompt"),
        ('task.0.prompts={kind="json", path="a.json", limit=1, target="text"}', "prompts of kind json with a target need the column"),
        ('task.4.prompts={kind="json", path="a.json", limit=1}', "metric readback does not apply to prompts of kind json"),
        ('task.0.metrics=["compbench"]', "task single_object: metric compbench does not apply to prompts of kind miniature"),
        ('task.0.metrics=["ocr"]', "task single_object: metric ocr does not apply to prompts of kind miniature single_object"),
        ('task.4.metrics=["ocr"]', "task word: metric ocr needs the table [ocr]"),
        ('task.0.metrics=["readback", "readback"]', "task single_object: expected different metrics, got readback, readback"),
        ('task.0.metrics=["taste"]', "expected metrics out of ocr, readback"),
        ("diffusion_model.family=sd9", "diffusion_model.family: expected one of flux"),
        ("teacher.clip_g=clip_g.safetensors", 'teacher.clip_g: expected "none", as Flux.1 takes none'),
        ("task.1.name=single_object", "expected a different name for every task, got single_object, single_object"),
        ("sampling.resolution_px=100", "multiple of 16"),
        ("sampling.guidance=true", "expected a valid number"),
        ("students=x", "expected a list"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(setting, expected, tmp_path):
    [problem] = problems(tmp_path, MINIATURE, setting)
    assert expected in problem


def test_photographs_are_asked_for_where_fid_is(tmp_path):
    paper = (SHIPPED / "paper.toml").read_text(encoding="utf-8")
    [problem] = problems(tmp_path, paper.replace(', photographs = "corpora/coco/val2014"', ""))
    assert "task coco: metric fid does not apply to prompts of kind coco" in problem


def test_a_suite_that_is_not_there_is_refused_with_the_shipped_names():
    with pytest.raises(ConfigError, match=r"quik is neither a suite file \(it does not exist\) nor the name of a shipped suite") as caught:
        load_suite("quik")
    assert "shipped: miniature, miniature-sd3, paper, paper-pixart, quick, quick-sd35" in str(caught.value)
    assert "did you mean quick?" in str(caught.value)
