"""The pack on an accelerator: each file of checks runs in a process with the practice accelerator, and each check is a test here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from distilled_t5.devtools.comfyui import server as comfyui_server
from distilled_t5.devtools.comfyui.server import ComfyServer, server_command
from distilled_t5.devtools.comfyui.workflow import set_inputs, to_api_prompt
from distilled_t5.tests.support import evaluation_world
from distilled_t5.tests.support.prepared import run_prepared
from distilled_t5.tests.support.trainer import ACCELERATOR, TWO_PROCESSES, command, finish, metrics, on_accelerator
from distilled_t5.tests.support.workflows import example
from PIL import Image

HERE = Path(__file__).parent
PYTEST = HERE.parent / "support" / "practice_pytest.py"
BOUND_S = 1800
# Run in one process: each would import torch and ComfyUI.
FILES = tuple(f"practice_{name}.py" for name in ("device", "encoder", "nodes", "trainer", "rehearsal"))
# The miniature's templates, with the steps of some nodes.
TEMPLATES: dict[str, dict[str, int]] = {
    "08-Miniature-draw-on-a-CPU": {},
    "11-Where-Flux-looks-at-a-word": {},
    "10-Miniature-distil-an-encoder": {"DistilledT5Distil": 4},
}
Verdicts = dict[str, str]


def checks(file: str) -> list[str]:
    """The checks of a file, by name."""
    return re.findall(r"^def (test_\w+)", (HERE / file).read_text(encoding="utf-8"), re.MULTILINE)


def run_checks(comfyui: Path, report: Path, *files: str, mark: str = "not full") -> Verdicts:
    """Run files of checks; by name, what went wrong in a check, nothing if it passed."""
    arguments = [str(PYTEST), *(str(HERE / file) for file in files), "-m", mark, "-q", "--tb=short", f"--junitxml={report}"]
    _, said = run_prepared(arguments, HERE.parents[1], BOUND_S, COMFYUI_PATH=str(comfyui), OMP_NUM_THREADS="1")
    assert report.is_file(), said
    verdicts: Verdicts = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("name", "").partition("[")[0]
        verdicts[name] = verdicts.get(name, "") + "".join(each.text or "" for kind in ("failure", "error") for each in case.iter(kind))
    return verdicts


@pytest.fixture(scope="module")
def verdicts(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Verdicts:
    """Of all files of checks, in one process."""
    return run_checks(comfyui_path, tmp_path_factory.mktemp("report") / "report.xml", *FILES)


@pytest.mark.parametrize("check", checks("practice_device.py"))
def test_the_practice_accelerator_keeps_the_rules_of_a_device(check, verdicts):
    assert verdicts[check] == ""


@pytest.mark.parametrize("check", checks("practice_encoder.py"))
def test_encoders_on_an_accelerator(check, verdicts):
    assert verdicts[check] == ""


@pytest.mark.parametrize("check", checks("practice_nodes.py"))
def test_nodes_on_an_accelerator(check, verdicts):
    assert verdicts[check] == ""


@pytest.mark.parametrize("check", checks("practice_trainer.py"))
def test_the_trainer_on_an_accelerator(check, verdicts):
    assert verdicts[check] == ""


@pytest.mark.parametrize("check", checks("practice_rehearsal.py"))
def test_a_rehearsal_is_right_about_the_real_step(check, verdicts):
    assert verdicts[check] == ""


def test_every_node_is_executed_on_the_accelerator():
    executed = {name for file in FILES for name in re.findall(r"(\w+)\.execute\(", (HERE / file).read_text(encoding="utf-8"))}
    # One only writes a file from another.
    assert set(json.loads((HERE / "schemas.json").read_text(encoding="utf-8"))) - {"DistilledT5Trim"} <= executed


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics(run) if "loss" in row]


@pytest.mark.full
@pytest.mark.parametrize("launcher", [(), TWO_PROCESSES], ids=["one process", "two processes"])
def test_a_run_on_an_accelerator_has_the_losses_of_a_run_on_the_cpu(launcher, comfyui_path, tmp_path):
    for name, of in (("cpu", list), ("npu", on_accelerator)):
        finish(of(command(comfyui_path, tmp_path / name, tmp_path / name / "run")), tmp_path, launcher=launcher)
    assert losses(tmp_path / "npu" / "run") == pytest.approx(losses(tmp_path / "cpu" / "run"), rel=1e-4)


def measured(results: dict[str, Any]) -> dict[str, float]:
    """The numbers of an evaluation that are not times, by their place in its results."""
    found: dict[str, float] = {}

    def walk(value: Any, place: str) -> None:
        if isinstance(value, dict):
            for key, part in value.items():
                walk(part, f"{place}/{key}")
        elif isinstance(value, int | float):
            found[place] = value

    walk({part: results[part] for part in ("tasks", "probes")}, "")
    return {place: value for place, value in found.items() if not re.search(r"/cost/[\w ]+ s/", place)}


@pytest.mark.full
def test_the_evaluation_on_an_accelerator_finds_what_it_finds_on_the_cpu(comfyui_path, tmp_path):
    evaluation_world.write_world(tmp_path)
    for name, of in (("cpu", list), ("npu", on_accelerator)):
        evaluation_world.finish(of(evaluation_world.command(comfyui_path, tmp_path, tmp_path / name)), tmp_path)
    ours, theirs = (json.loads((tmp_path / name / "results.json").read_text(encoding="utf-8")) for name in ("npu", "cpu"))
    assert ours["made"]["machine"]["gpu"] == "practice accelerator"
    assert list(ours["encoders"]) == list(theirs["encoders"])
    assert measured(ours) == pytest.approx(measured(theirs), rel=1e-3, abs=1e-6)
    assert len(measured(ours)) > 50
    paths = sorted(path.relative_to(tmp_path / "npu") for path in (tmp_path / "npu" / "images").rglob("*.png"))
    assert len(paths) >= 2 * 16
    for path in paths:
        ours, theirs = (np.asarray(Image.open(tmp_path / name / path), dtype=int) for name in ("npu", "cpu"))
        assert abs(ours - theirs).max() <= 2, path


def set_steps(prompt: dict[str, Any], **steps: int) -> dict[str, Any]:
    for node_type, count in steps.items():
        set_inputs(prompt, node_type, steps=count)
    return prompt


@pytest.mark.full
def test_a_server_on_an_accelerator_trains_in_its_queue_and_draws_what_a_server_on_the_cpu_draws(
    comfyui_path, pack_root, server, tmp_path, monkeypatch
):
    def accelerated(*arguments: Any) -> list[str]:
        python, *command = server_command(*arguments)
        return [python, str(ACCELERATOR), *(part for part in command if part != "--cpu")]

    monkeypatch.setattr(comfyui_server, "server_command", accelerated)
    with ComfyServer(comfyui_path, tmp_path, pack_root) as on_npu:
        assert on_npu.get_json("/system_stats")["devices"][0]["type"] == "npu"
        for name, steps in TEMPLATES.items():
            prompt = set_steps(to_api_prompt(example(name), on_npu.object_info()), **steps)
            ours, theirs = (each.images(each.run(prompt)) for each in (on_npu, server))
            assert [image.size for image in ours] == [image.size for image in theirs] and ours
            gaps = [abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).mean() for one, other in zip(ours, theirs, strict=True)]
            assert max(gaps) < 2, (name, gaps)
        assert "on npu:0" in next((tmp_path / "output").rglob("train.log")).read_text(encoding="utf-8")


@pytest.mark.full
@pytest.mark.parametrize(("mark", "files"), [("full", FILES), ("not full", ("test_nodes.py",))], ids=["long checks", "nodes"])
def test_long_checks_and_the_tests_of_the_nodes_pass_on_an_accelerator(mark, files, comfyui_path, tmp_path):
    found = run_checks(comfyui_path, tmp_path / "report.xml", *files, mark=mark)
    assert found and not {name: why for name, why in found.items() if why}
