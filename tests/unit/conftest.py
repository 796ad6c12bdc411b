"""What the unit tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from distilled_t5.tests.support.load_worker import LoadWorker


@pytest.fixture(scope="session")
def worker() -> Iterator[LoadWorker]:
    """A process that opens files under a limit of memory."""
    with LoadWorker() as running:
        yield running
