"""`dev.py test`: its steps, their marks, programs and results."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from distilled_t5.tests.support.dev_tree import comfyui_folder, pretend_in


def test_counts_and_seconds_come_from_the_report(dev: ModuleType, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    inside = ("", "", "<failure/>", "<error/>", "<skipped/>")
    cases = "".join(f'<testcase classname="t" name="n{number}" time="{number}.5">{each}</testcase>' for number, each in enumerate(inside))
    report.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    outcome = dev.read_report("unit", report)
    assert (outcome.passed, outcome.failed, outcome.skipped) == (2, 2, 1)
    assert outcome.tests[1] == (1.5, "unit: t::n1")


def test_the_summary_lists_the_ten_slowest_tests_and_its_last_line_contains_the_sums_alone(
    dev: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    slow = tuple((float(seconds), f"test {seconds}") for seconds in range(20))
    dev.print_summary([dev.Outcome("unit", 120, tests=slow[::2]), dev.Outcome("comfyui", 3, 1, 2, tests=slow[1::2]), dev.Outcome("ruff")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(maxsplit=2)[2] for line in lines if "test " in line] == [f"test {seconds}" for seconds in range(19, 9, -1)]
    assert lines[-1] == "123 passed, 1 failed, 2 skipped"
    dev.print_summary([dev.Outcome("unit", 5)])
    assert capsys.readouterr().out.splitlines()[-1] == "5 passed, 0 failed"


def planned(dev: ModuleType, comfyui: Path, *arguments: str) -> dict[str, list[str]]:
    """The steps that `dev.py test` would take, with their commands."""
    steps = dev.steps_of_test(dev.command_line().parse_args(["test", *arguments]), comfyui)
    return {step: command for step, (command, _) in steps.items()}


def test_each_extent_of_test_runs_its_tiers(dev: ModuleType, tmp_path: Path) -> None:
    comfyui = comfyui_folder(tmp_path / "ComfyUI")
    fast = ["ruff check", "ruff format", "unit"]
    assert list(planned(dev, comfyui, "--fast")) == fast
    pages = ["browser 0.30.0", f"frontend {dev.FRONTEND[0]}"]
    assert list(planned(dev, comfyui)) == [*fast, "pyright", "comfyui 0.30.0", "comfyui 0.16.3", *pages]
    everywhere = planned(dev, comfyui, "--full")
    assert {step for step in everywhere if step.startswith("comfyui")} == {f"comfyui {version}" for version in dev.VERSIONS}


def marks_of(dev: ModuleType, comfyui: Path, *options: str) -> dict[str, str]:
    commands = {step: command for step, command in planned(dev, comfyui, *options).items() if command[0] == "pytest"}
    return {step: command[command.index("-m") + 1] if "-m" in command else "" for step, command in commands.items()}


def test_only_full_runs_long_tests_and_every_version(dev: ModuleType, tmp_path: Path) -> None:
    comfyui = comfyui_folder(tmp_path / "ComfyUI")
    newest, repeated = ("unit", "comfyui 0.30.0", "browser 0.30.0"), ("comfyui 0.16.3", f"frontend {dev.FRONTEND[0]}")
    quick = dict.fromkeys(newest, "not full") | dict.fromkeys(repeated, "every_version and not full")
    assert marks_of(dev, comfyui) == quick
    others = (f"comfyui {version}" for version in dev.VERSIONS if version != "0.30.0")
    everything = dict.fromkeys(newest, "") | dict.fromkeys(others, "every_version and not full") | dict.fromkeys(repeated, "every_version")
    assert marks_of(dev, comfyui, "--full") == everything


def test_a_step_gets_the_comfyui_and_the_frontend_that_it_names(dev: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comfyui = comfyui_folder(tmp_path / "ComfyUI")
    monkeypatch.setattr(dev, "fetched_comfyui", Path)
    monkeypatch.setattr(dev, "fetched_frontend", lambda: Path("newest"))
    steps = dev.steps_of_test(dev.command_line().parse_args(["test"]), comfyui)
    places = {step: {name: str(place()) for name, place in places.items()} for step, (_, places) in steps.items()}
    assert places["comfyui 0.16.3"] == {"COMFYUI_PATH": "0.16.3"}
    assert places["comfyui 0.30.0"] == places["browser 0.30.0"] == {"COMFYUI_PATH": str(comfyui)}
    assert places[f"frontend {dev.FRONTEND[0]}"] == {"COMFYUI_PATH": str(comfyui), "FRONTEND_PATH": "newest"}


def test_a_step_that_fails_does_not_stop_the_next_one_and_each_prints_its_time(
    dev: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pretend_to_run(step: str, command: list[str], places: object) -> object:
        if step == "first":
            raise dev.Trouble("There is no network.")
        return dev.Outcome(step, 7)

    monkeypatch.setattr(dev, "set_up", lambda: tmp_path)
    monkeypatch.setattr(dev, "ensure_environment", lambda *_: None)
    monkeypatch.setattr(dev, "steps_of_test", lambda *_: {"first": ([], {}), "second": ([], {})})
    monkeypatch.setattr(dev, "run_step", pretend_to_run)
    assert dev.main(["test"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert {"first: 0 s", "second: 0 s"} <= set(lines)
    assert lines[-1] == "7 passed, 1 failed"


def test_a_tier_that_ends_badly_without_a_report_counts_as_a_failure(
    dev: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend_in(dev, tmp_path, monkeypatch)
    monkeypatch.setattr(dev, "run_in_foreground", lambda *_, **__: 3)
    assert dev.run_step("unit", ["pytest", "tests/unit"], {}).failed == 1


@pytest.mark.parametrize(("name", "packages"), [("chromium", {"chromium", "fonts-noto-cjk"}), ("tesseract", {"tesseract-ocr"})])
def test_a_root_with_apt_get_gets_a_program_installed(
    dev: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, packages: set[str]
) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(dev.os, "geteuid", lambda: 0, raising=False)
    monkeypatch.setattr(dev.shutil, "which", lambda name: "/usr/bin/apt-get" if name == "apt-get" else None)
    monkeypatch.setattr(dev, "run_quietly", lambda command, doing: commands.append(command))
    monkeypatch.setattr(dev, "find_program", lambda name: f"/usr/bin/{name}" if commands else None)
    assert dev.ensure_program(name) == f"/usr/bin/{name}"
    assert [command[:2] for command in commands] == [["apt-get", "update"], ["apt-get", "install"]]
    assert packages <= set(commands[1])


def test_a_program_is_first_looked_for_where_the_environment_says(dev: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHROMIUM_PATH", "/opt/chrome")
    monkeypatch.setattr(dev.shutil, "which", lambda name: name or None)
    monkeypatch.setattr(dev, "works", lambda path: path in ("/opt/chrome", "tesseract"))
    assert dev.find_program("chromium") == "/opt/chrome"
    assert dev.find_program("tesseract") == "tesseract"


def test_every_tier_gets_the_programs_that_it_needs(dev: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_in(dev, tmp_path, monkeypatch)
    given: list[dict[str, str]] = []
    monkeypatch.setattr(dev, "ensure_program", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(dev, "run_in_foreground", lambda _, **extra: bool(given.append(extra)))
    for folder in ("tests/unit", "tests/comfyui", "tests/browser"):
        dev.run_step("a tier", ["pytest", folder, "-k", "word"], {"PLACE": lambda: Path("here")})
    dev.run_step("ruff", ["ruff", "check"], {})
    tesseract, chromium = {"TESSERACT_PATH": "/usr/bin/tesseract"}, {"CHROMIUM_PATH": "/usr/bin/chromium"}
    always = {"OMP_NUM_THREADS": "1"}
    tier = always | {"PLACE": "here"}
    assert given == [tier | tesseract, tier | tesseract, tier | chromium, always]
