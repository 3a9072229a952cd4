"""The drawing of the protocol, in the code and in the documentation, is what the driver does."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from textwrap import indent

import pytest
from test_machine import REPLACING, Drive, carried, exited, ready, reply, sent

from torchtrainer.control import messages
from torchtrainer.control.messages import Boundary, GroupGone, Paused, StartWorker, StateSent, WorkerStarted
from torchtrainer.control.wire import ForWorker, Message
from torchtrainer.driver.events import Action, CallRequested, EndRequested
from torchtrainer.driver.states import Closed

pytestmark = pytest.mark.pure

PAGE = Path(__file__).parent.parent / "docs" / "architecture.md"
ARROW = re.compile(r"(driver|host|worker \d) +──(\w+)─*> (driver|host|workers|worker \d)(?: +(worker \d))?$")
Told = tuple[str, str, str, str]
"""A line: sender, message, receiver, and the worker that the host tells of or is told of."""


def drawing() -> str:
    """As the page has it."""
    (found,) = (
        block for block in re.findall(r"```text\n(.*?)```", PAGE.read_text(), re.DOTALL) if "──AdoptRanks" in block
    )
    return found


def drawn() -> list[Told]:
    found = []
    for line in drawing().splitlines():
        arrow = ARROW.search(line)
        assert arrow, f"no arrow in {line!r}"
        sender, name, receiver, about = arrow.groups()
        found.append((sender, name, receiver, about or ""))
    return found


def said_by(told: Told) -> Message:
    """What a worker or the host says to the driver."""
    sender, name, _, about = told
    worker = int((about or sender).removeprefix("worker ")) if name != "GroupGone" else 0
    return {
        "WorkerStarted": WorkerStarted(group="g", worker=worker, pid=100 + worker),
        "WorkerReady": replace(ready(worker), facts={"bound": "", "recovers": True}),
        "WorkerExited": exited(worker, -9 if worker == 1 else 0),
        "RanksAdopted": carried(worker, 1),
        "Boundary": Boundary(group="g", worker=worker, call=1, round=1, boundary=8),
        "Paused": Paused(group="g", worker=worker, call=1, boundary=8),
        "StateSent": StateSent(group="g", worker=worker, number=1, call=1, at={"exchange": 5}),
        "Reply": replace(reply(worker), rank=min(worker, 1)),
        "GroupGone": GroupGone(group="g"),
    }[name]


def ordered(actions: list[Action]) -> list[Told]:
    """What the driver says, as lines."""
    found = []
    for message in sent(actions):
        worker = f"worker {getattr(message, 'worker', None)}"
        if isinstance(message, StartWorker):
            found.append(("driver", "StartWorker", "host", worker))
        else:
            assert isinstance(message, ForWorker)
            found.append(("driver", type(message).__name__, "workers" if message.worker is None else worker, ""))
    return found


def test_the_driver_does_what_is_drawn() -> None:
    drive = Drive(2, failure=REPLACING)
    by_the_user = {"Call": CallRequested(method="train", blob=b""), "EndWorker": EndRequested()}
    waiting: list[Told] = []  # what the driver has said and the drawing has not shown yet
    for told in drawn():
        if told[2] == "driver":
            assert waiting == [], f"the driver also says {waiting}"
            waiting = ordered(drive.on(said_by(told), after_s=0.1))
            continue
        if not waiting:
            assert told[1] in by_the_user, f"the driver does not say {told}"
            waiting = ordered(drive.on(by_the_user[told[1]], after_s=0.1))
        assert waiting.pop(0) == told
    assert isinstance(drive.machine.state, Closed)


def test_the_code_has_the_same_drawing() -> None:
    assert indent(drawing(), "    ").rstrip() in (messages.__doc__ or "")
