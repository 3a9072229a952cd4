"""What tests of several files stand in."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from failing import workers
from recovery_programs import GONE_S, wait_for

# Hundreds of processes of the tests import the package: like an installed one it is compiled once.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.fixture
def no_worker_left() -> Iterator[None]:
    """Every worker process of a test is gone when it ends."""
    before = workers()
    yield
    wait_for(lambda: workers() <= before, GONE_S)
