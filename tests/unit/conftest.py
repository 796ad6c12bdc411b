"""What the unit tests share."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from distilled_t5.tests.support.load_worker import LoadWorker

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="session")
def worker() -> Iterator[LoadWorker]:
    """A process that opens files under a limit of memory."""
    with LoadWorker() as running:
        yield running


@pytest.fixture
def dev(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """dev.py as a module of its own for each test; it imports from its folder."""
    monkeypatch.syspath_prepend(str(ROOT))
    spec = importlib.util.spec_from_file_location("dev_under_test", ROOT / "dev.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "dev_under_test", module)
    spec.loader.exec_module(module)
    return module
