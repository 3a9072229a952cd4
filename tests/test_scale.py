"""What the driver does per message does not grow with the number of ranks; counted, not timed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType

import pytest
from programs import DEADLINE_S

import torchtrainer
from torchtrainer.config import Timeouts
from torchtrainer.control.messages import (
    Boundary,
    Heartbeat,
    Paused,
    Reply,
    WorkerExited,
    WorkerReady,
    WorkerStarted,
)
from torchtrainer.driver.events import CallRequested, Event, SaveRequested, Send
from torchtrainer.driver.machine import handle
from torchtrainer.driver.states import Idle, Machine
from torchtrainer.driver.views import WorkerTable, WorkerView

CONTROL_PLANE = Path(torchtrainer.__file__).parents[1] / "benchmarks" / "control_plane.py"
FEW, MANY = 16, 1024
SEARCH = 8
"""Calls per halving of the table, at most, that it takes to find a worker, however often a message looks for one."""


class Driver:
    """A machine of so many ranks, and how many functions it calls."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.machine = Machine.start(group="g", world_size=ranks, timeouts=Timeouts(), hang_timeout_s=60.0, now=0.0)

    def on(self, event: Event) -> list[Send]:
        self.machine, actions = handle(self.machine, event, 1.0)
        return [action for action in actions if isinstance(action, Send)]

    def calls(self, event: Event) -> int:
        """Python functions and generators that are entered for an event."""
        count = 0

        def profile(frame: FrameType, what: str, argument: object) -> None:
            nonlocal count
            count += what == "call"

        sys.setprofile(profile)
        try:
            self.on(event)
        finally:
            sys.setprofile(None)
        return count

    def starting(self) -> Driver:
        for rank in range(self.ranks):
            self.on(WorkerStarted(group="g", worker=rank, pid=1 + rank))
        return self

    def training(self) -> Driver:
        self.starting()
        for rank in range(self.ranks):
            self.on(ready(rank))
        assert isinstance(self.machine.state, Idle)
        assert len(self.on(CallRequested(method="train", blob=b""))) == self.ranks
        return self

    def stopping(self) -> Driver:
        """Workers are asked where they are."""
        assert len(self.training().on(SaveRequested())) == 1
        return self

    def holding(self) -> Driver:
        """A worker was lost, another one is built, and the others come to hold so that it can join."""
        lost = self.ranks - 1
        self.training().on(WorkerExited(group="g", worker=lost, pid=1 + lost, exit_code=-9))
        self.machine = replace(self.machine, losses=())  # carried
        self.on(WorkerStarted(group="g", worker=self.ranks, pid=1 + self.ranks))
        self.on(ready(self.ranks))
        for rank in range(lost):
            self.on(boundary(rank))
        assert self.machine.move is not None and self.machine.move.boundary == 5
        return self


def ready(worker: int) -> WorkerReady:
    return WorkerReady(group="g", worker=worker, device="cpu", facts={"recovers": True}, modules=[])


def beat(worker: int) -> Heartbeat:
    return Heartbeat(
        group="g",
        worker=worker,
        call=1,
        phase="data",
        phase_age_s=0.0,
        epoch=1,
        step=5,
        batch=5,
        batches=None,
        samples=0,
        loss=None,
        rss_bytes=1,
        cpu_s=1.0,
        spent_s={"data": 1.0},
    )


def boundary(worker: int) -> Boundary:
    return Boundary(group="g", worker=worker, call=1, round=1, boundary=5)


def reply(worker: int) -> Reply:
    return Reply(group="g", worker=worker, rank=worker, call=1, form="json", step=5, blob=b"1")


def held(worker: int) -> Paused:
    return Paused(group="g", worker=worker, call=1, boundary=5)


CASES = [
    pytest.param(Driver.starting, ready, id="a worker is built"),
    pytest.param(Driver.training, beat, id="a heartbeat"),
    pytest.param(Driver.training, reply, id="a result"),
    pytest.param(Driver.stopping, boundary, id="a worker says where it is"),
    pytest.param(Driver.holding, held, id="a worker holds"),
]


@pytest.mark.parametrize(("brought", "message"), CASES)
def test_a_message_costs_as_much_with_many_ranks_as_with_few(
    brought: Callable[[Driver], Driver], message: Callable[[int], Event]
) -> None:
    calls = {}
    for ranks in (FEW, MANY):
        driver = brought(Driver(ranks))
        driver.on(message(2))  # after a change of carriers, such as a call, the first message looks at all once
        calls[ranks] = driver.calls(message(3))
    few, many = calls[FEW], calls[MANY]
    assert many <= few + SEARCH * math.log2(MANY / FEW)


def test_a_thousand_ranks_start_and_a_failure_is_made_up_for(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    command = [sys.executable, str(CONTROL_PLANE), "--ranks", str(FEW), str(MANY), "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    few, many = json.loads(file.read_text())
    for cost in (few, many):
        assert cost["start_messages"] == 2 * cost["ranks"] + 1  # one order; each is there, and is built
    # What a failure takes beside the call itself, and a round in which all say where they are, hold, and are let go.
    assert few["failure_messages"] - 5 * FEW == many["failure_messages"] - 5 * MANY


# The table


def table() -> WorkerTable:
    return WorkerTable(WorkerView(worker=number, ranks=(number,), like=number) for number in (0, 1, 4, 7))


@pytest.mark.parametrize(("worker", "there"), [(0, True), (4, True), (7, True), (-1, False), (3, False), (8, False)])
def test_a_worker_is_found_by_its_number(worker: int, there: bool) -> None:
    found = table().find(worker)
    assert (found is not None and found.worker == worker) == there


@pytest.mark.parametrize(
    ("changes", "carriers", "newcomers", "uncarried"),
    [
        ({"step": 5, "phase": "data"}, 4, (), ()),
        ({"lost": True}, 3, (), (4,)),
        ({"ranks": ()}, 3, (2,), ()),
        ({"ranks": (), "leaving_by": 9.0}, 3, (), ()),
    ],
)
def test_the_standing_is_that_of_the_workers_after_each_change(
    changes: dict[str, object], carriers: int, newcomers: tuple[int, ...], uncarried: tuple[int, ...]
) -> None:
    before = table()
    assert (before.standing.carriers, before.standing.newcomers) == (4, ())
    standing = before.see(4, changes).standing
    assert (standing.carriers, standing.newcomers, standing.uncarried) == (carriers, newcomers, uncarried)
    assert before.standing.carriers == 4
