"""What tests of several files stand in."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from failing import workers
from recovery_programs import GONE_S, wait_for

# Hundreds of processes of the tests import the package: like an installed one it is compiled once.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_collection_finish() -> None:
    """What programs are forked from is there before any test counts processes or descriptors."""
    if "forked" in sys.modules:
        sys.modules["forked"].zygote()


@pytest.fixture
def no_worker_left() -> Iterator[None]:
    """Every worker process of a test is gone when it ends."""
    before = workers()
    yield
    wait_for(lambda: workers() <= before, GONE_S)
