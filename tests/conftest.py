"""Shared by all tests: the root of the repository as package `distilled_t5`, whatever its folder is called, and how a run ends."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parent.parent
CLEAN_UP_S = 120


def register_pack() -> None:
    """Import the root as `distilled_t5`; the root itself is never on sys.path, where its `nodes` would hide ComfyUI's."""
    if "distilled_t5" in sys.modules:
        return
    spec = importlib.util.spec_from_file_location("distilled_t5", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules["distilled_t5"] = module
    spec.loader.exec_module(module)


register_pack()


def pytest_configure() -> None:
    """A killed dev.py cannot pass on a signal: its tests notice its end, clean up and end, too."""
    from distilled_t5.devtools.comfyui.ending import interrupt_at_the_end_of

    parent_pid = os.getppid()
    if os.environ.get("STARTED_BY_DEV_PY") == str(parent_pid):
        interrupt_at_the_end_of(parent_pid)


def pytest_keyboard_interrupt() -> None:
    """From here on fixtures are taken down."""
    from distilled_t5.devtools.comfyui.ending import end_begins

    end_begins()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with few tests first: they start processes and take longest, so that all workers end at about the same time."""
    counts = Counter(item.path for item in items)
    items.sort(key=lambda item: (counts[item.path], item.path))


class WorkersCleanUp:
    """Gives interrupted workers the time to take down their fixtures: pytest-xdist kills them after ten seconds."""

    @pytest.hookimpl(trylast=True)
    def pytest_keyboard_interrupt(self) -> None:
        """Interrupt the workers and wait for them, after `end_begins`: the end of dev.py must not interrupt the wait."""
        workers = psutil.Process().children()
        for worker in workers:
            worker.send_signal(signal.SIGINT)
        psutil.wait_procs(workers, CLEAN_UP_S)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config) -> None:
    """This process starts workers."""
    config.pluginmanager.register(WorkersCleanUp())


@pytest.fixture(scope="session")
def pack_root() -> Path:
    """The root of the repository, which is the pack as a user installs it."""
    return ROOT
