"""pytest with the practice accelerator: `python practice_pytest.py ARGUMENTS OF PYTEST`."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    conftest = Path(__file__).resolve().parents[1] / "conftest.py"
    runpy.run_path(str(conftest))
    from distilled_t5.tests.support import practice_accelerator

    practice_accelerator.install()
    sys.exit(pytest.main(sys.argv[1:]))
