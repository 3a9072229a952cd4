"""What tests of several files stand in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from failing import workers
from recovery_programs import GONE_S, wait_for


@pytest.fixture
def no_worker_left() -> Iterator[None]:
    """Every worker process of a test is gone when it ends."""
    before = workers()
    yield
    wait_for(lambda: workers() <= before, GONE_S)
