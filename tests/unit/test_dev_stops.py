"""When dev.py is stopped or killed, what it runs cleans up and ends, and nothing more is started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent.parent


# Processes inherit that nohup ignores a closed terminal: the test's own start as in a terminal.
RUNS_TWO = """
import signal, sys
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
import dev
dev.run = lambda _: [dev.run_in_foreground([sys.executable, sys.argv[1]]) for _ in range(2)]
sys.exit(dev.main([]))
"""
CLEANS_UP = """
import pathlib, time
folder = pathlib.Path(__file__).parent
try:
    print("x", end="", file=(folder / "started").open("a"), flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.5)
    (folder / "cleaned up").touch()
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to forward")
@pytest.mark.parametrize("to", ["dev.py alone", "all of its terminal"])
@pytest.mark.parametrize("sent", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_stopping_dev_py_lets_what_it_runs_clean_up_undisturbed_and_starts_nothing_more(tmp_path: Path, sent: str, to: str) -> None:
    child = tmp_path / "child.py"
    child.write_text(CLEANS_UP)
    running = subprocess.Popen([sys.executable, "-c", RUNS_TWO, str(child)], cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + 30
    while not ((tmp_path / "started").exists() and (tmp_path / "started").read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    number = getattr(signal, sent)
    running.send_signal(number) if to == "dev.py alone" else os.killpg(running.pid, number)
    assert running.wait(30) == 130
    assert (tmp_path / "cleaned up").exists()
    assert (tmp_path / "started").read_text() == "x"


TESTS = """
import pathlib, time
import pytest

folder = pathlib.Path(__file__).parent

@pytest.fixture
def server():
    yield
    (folder / "cleaning up").touch()
    time.sleep({cleaning_s})
    (folder / "cleaned up").touch()

def test_long(server):
    (folder / "started").touch()
    time.sleep(60)
"""
RUNS_TESTS = """
import sys, dev
dev.run_in_foreground([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *sys.argv[1:]])
"""
HOOKS = """
import runpy
from xdist.workermanage import NodeManager

NodeManager.EXIT_TIMEOUT = {exit_s}
ours = runpy.run_path({path!r})
globals().update({{name: hook for name, hook in ours.items() if name.startswith("pytest_")}})
"""


def appears(path: Path) -> bool:
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return path.exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows tells no process that its parent ended")
@pytest.mark.parametrize(
    ("workers", "first", "cleaning_s", "exit_s"),
    [
        ((), None, 1, 10),
        ((), "SIGTERM", 1, 10),
        # Longer than pytest-xdist gives the workers of a run that ends, which is ten seconds.
        (("-n", "2"), None, 2, 1),
        pytest.param(("-n", "2"), "SIGTERM", 11, 10, marks=pytest.mark.full),
    ],
)
def test_tests_clean_up_undisturbed_when_dev_py_is_killed(
    tmp_path: Path, workers: tuple[str, ...], first: str | None, cleaning_s: int, exit_s: int
) -> None:
    (tmp_path / "test_long.py").write_text(TESTS.format(cleaning_s=cleaning_s))
    (tmp_path / "conftest.py").write_text(HOOKS.format(path=str(ROOT / "tests" / "conftest.py"), exit_s=exit_s))
    running = subprocess.Popen([sys.executable, "-c", RUNS_TESTS, str(tmp_path), *workers], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        assert appears(tmp_path / "started")
        if first:
            running.send_signal(getattr(signal, first))
            assert appears(tmp_path / "cleaning up")
    finally:
        running.kill()
        running.wait()
    assert appears(tmp_path / "cleaned up")
