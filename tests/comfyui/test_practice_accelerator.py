"""The pack on an accelerator: each file of checks runs in a process with the practice accelerator, and each check is a test here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.etree import ElementTree

import pytest
from distilled_t5.tests.support import evaluation_world
from distilled_t5.tests.support.prepared import run_prepared
from distilled_t5.tests.support.trainer import TWO_PROCESSES, command, finish, metrics

HERE = Path(__file__).parent
PYTEST, SCRIPT = (HERE.parent / "support" / name for name in ("practice_pytest.py", "practice_accelerator_command.py"))
BOUND_S = 900
Verdicts = dict[str, str]


def checks(file: str) -> list[str]:
    """The checks of a file, by name."""
    return re.findall(r"^def (test_\w+)", (HERE / file).read_text(encoding="utf-8"), re.MULTILINE)


@pytest.fixture(scope="module")
def run_checks(comfyui_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Verdicts]:
    """Runs files of checks, once each; by name, what went wrong in a check, nothing if it passed."""
    found: dict[tuple[str, ...], Verdicts] = {}

    def run(*files: str) -> Verdicts:
        if files not in found:
            found[files] = _run(comfyui_path, tmp_path_factory.mktemp("report") / "report.xml", files)
        return found[files]

    return run


def _run(comfyui: Path, report: Path, files: tuple[str, ...]) -> Verdicts:
    arguments = [str(PYTEST), *(str(HERE / file) for file in files), "-q", "--tb=short", f"--junitxml={report}"]
    _, said = run_prepared(arguments, HERE.parents[1], BOUND_S, COMFYUI_PATH=str(comfyui), OMP_NUM_THREADS="1")
    assert report.is_file(), said
    verdicts: Verdicts = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("name", "").partition("[")[0]
        verdicts[name] = verdicts.get(name, "") + "".join(each.text or "" for kind in ("failure", "error") for each in case.iter(kind))
    return verdicts


@pytest.mark.parametrize("check", checks("practice_device.py"))
def test_the_practice_accelerator_keeps_the_rules_of_a_device(check, run_checks):
    assert run_checks("practice_device.py", "practice_encoder.py")[check] == ""


@pytest.mark.parametrize("check", checks("practice_encoder.py"))
def test_encoders_on_an_accelerator(check, run_checks):
    assert run_checks("practice_device.py", "practice_encoder.py")[check] == ""


@pytest.mark.parametrize("check", checks("practice_rehearsal.py"))
def test_a_rehearsal_is_right_about_the_real_step(check, run_checks):
    assert run_checks("practice_rehearsal.py")[check] == ""


@pytest.mark.parametrize("check", checks("practice_trainer.py"))
def test_the_trainer_on_an_accelerator(check, run_checks):
    assert run_checks("practice_trainer.py")[check] == ""


def on_accelerator(arguments: Sequence[str]) -> list[str]:
    """A command with the practice accelerator in the place of the CPU."""
    return [str(SCRIPT), *(part for part in arguments if part != "--cpu")]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics(run) if "loss" in row]


@pytest.mark.full
@pytest.mark.parametrize("launcher", [(), TWO_PROCESSES], ids=["one process", "two processes"])
def test_a_run_on_an_accelerator_has_the_losses_of_a_run_on_the_cpu(launcher, comfyui_path, tmp_path):
    for name, of in (("cpu", list), ("npu", on_accelerator)):
        finish(of(command(comfyui_path, tmp_path / name, tmp_path / name / "run")), tmp_path, launcher=launcher)
    assert losses(tmp_path / "npu" / "run") == pytest.approx(losses(tmp_path / "cpu" / "run"), rel=1e-4)


@pytest.mark.full
def test_the_evaluation_on_an_accelerator_finds_what_it_finds_on_the_cpu(comfyui_path, tmp_path):
    evaluation_world.write_world(tmp_path)
    for name, of in (("cpu", list), ("npu", on_accelerator)):
        evaluation_world.finish(of(evaluation_world.command(comfyui_path, tmp_path, tmp_path / name)), tmp_path)
    ours, theirs = (json.loads((tmp_path / name / "results.json").read_text(encoding="utf-8")) for name in ("npu", "cpu"))
    assert ours["made"]["machine"]["gpu"] == "practice accelerator"
    assert ours["probes"].keys() == theirs["probes"].keys()
    assert list(ours["encoders"]) == list(theirs["encoders"])


@pytest.mark.full
def test_the_tests_of_the_nodes_pass_on_an_accelerator(run_checks):
    assert not {name: why for name, why in run_checks("test_nodes.py").items() if why}
