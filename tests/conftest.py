"""What tests of several files stand in."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from failing import workers
from recovery_programs import GONE_S, Plan, Strike, wait_for

from torchtrainer import TorchTrainer

# Hundreds of processes of the tests import the package: like an installed one it is compiled once.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What programs are forked from is there before any test counts processes or descriptors."""
    if "forked" in sys.modules and not all(item.get_closest_marker("pure") for item in session.items):
        sys.modules["forked"].zygote()


@pytest.fixture
def no_worker_left() -> Iterator[None]:
    """Every worker process of a test is gone when it ends."""
    before = workers()
    yield
    wait_for(lambda: workers() <= before, GONE_S)


@pytest.fixture
def trainers(tmp_path: Path) -> Iterator[Callable[..., TorchTrainer]]:
    """Makes trainers, each with a run directory of its own, that are shut down at the end of the test."""
    made: list[TorchTrainer] = []

    def make(**arguments: Any) -> TorchTrainer:
        made.append(TorchTrainer(**{"run_dir": tmp_path / f"run{len(made)}", **arguments}))
        return made[-1]

    yield make
    for trainer in made:
        trainer._close("finished", force=True)


@pytest.fixture
def plan_of(tmp_path: Path) -> Iterator[Callable[..., Plan]]:
    """Plans strikes; at the end they all must have come to pass."""
    directory = tmp_path / "strikes"
    directory.mkdir()
    plans: list[Plan] = []

    def plan(*strikes: Strike) -> Plan:
        plans.append(Plan(directory=str(directory), strikes=strikes))
        return plans[-1]

    yield plan
    for one in plans:
        assert one.missing() == []
