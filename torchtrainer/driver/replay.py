"""Replays a journal of the driver's machine and compares the orders. Pure, except for `read_lines`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchtrainer.driver.event_journal import FORM, ordered
from torchtrainer.driver.events import Event
from torchtrainer.driver.journal_values import from_json, new_fields
from torchtrainer.driver.machine import handle
from torchtrainer.driver.states import Machine
from torchtrainer.driver.views import WorkerView
from torchtrainer.process.own_files import RECORD_BYTES, parse_json, read_own
from torchtrainer.version import __version__

MAX_RANKS = 1 << 16
"""Largest group that is replayed; a file that claims more would keep the machine counting for hours."""


class UnreadableJournalError(ValueError):
    """A file is no journal, or only a part of one; the text says in which line."""


@dataclass(frozen=True, kw_only=True)
class Replayed:
    """The outcome of replaying a journal.

    Attributes:
        events, groups: how many there were, up to the first difference.
        difference: where the machine ordered something else; None: nowhere.
    """

    events: int
    groups: int
    difference: Difference | None = None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """An event that led to other orders than in the journal.

    Attributes:
        line: of the file, from 1.
        at_s: monotonic seconds.
        event, recorded, replayed: the event, and ``orders`` or ``error`` then and now, as they are written down.
    """

    line: int
    at_s: float
    event: Any
    recorded: dict[str, Any]
    replayed: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Told:
    """A line about an event."""

    at_s: float
    meanwhile: dict[str, Any]
    workers: dict[int, dict[str, Any]]
    event: Event
    written: Any
    outcome: dict[str, Any]


def replay(path: Path) -> Replayed:
    """Replays a journal.

    Raises:
        UnreadableJournalError: something in it is not what a run writes.
        OSError: the file cannot be read.
    """
    events = groups = 0
    machine: Machine | None = None
    for number, line in enumerate(read_lines(path), 1):
        try:
            content = _parsed(line)
            if "journal" in content:
                machine, groups = _machine(content), groups + 1
                continue
            if machine is None:
                raise ValueError("there is no line before it that says how the machine was")
            told = _told(content)
            machine = _as_it_was(machine, told)
        except ValueError as error:
            raise UnreadableJournalError(f"{path}, line {number}: {error}") from None
        events += 1
        machine, outcome = _outcome(machine, told)
        if outcome != told.outcome:
            found = Difference(line=number, at_s=told.at_s, event=told.written, recorded=told.outcome, replayed=outcome)
            return Replayed(events=events, groups=groups, difference=found)
    return Replayed(events=events, groups=groups)


def read_lines(path: Path) -> list[bytes]:
    """The lines of a journal.

    Raises:
        UnreadableJournalError: it is empty, or its end is cut off.
        OSError: the file cannot be read, is no regular file of the user's, or is larger than any journal.
    """
    content = read_own(path, RECORD_BYTES)
    lines = content.split(b"\n")
    if not content:
        raise UnreadableJournalError(f"{path} is empty")
    if lines.pop():
        raise UnreadableJournalError(
            f"{path}, line {len(lines) + 1}: it is cut off after {len(content)} bytes; without it, the lines before can be replayed"
        )
    return lines


def _parsed(line: bytes) -> dict[str, Any]:
    content = parse_json(line)
    if not isinstance(content, dict):
        raise ValueError(f"expected an object, got {str(content)[:80]!r}")
    return content


def _machine(content: dict[str, Any]) -> Machine:
    if content["journal"] != FORM:
        version = str(content.get("version"))[:40]
        raise ValueError(
            f"journals of form {content['journal']!r}, from torchtrainer {version!r}, are not read by version {__version__}, which "
            f"reads form {FORM}"
        )
    machine: Machine = from_json(Machine, content.get("machine", {}))
    if not 1 <= machine.world_size <= MAX_RANKS or not 1 <= machine.processes <= machine.world_size:
        raise ValueError(f"a group of {machine.world_size} ranks in {machine.processes} processes cannot be")
    return machine


def _told(content: dict[str, Any]) -> Told:
    outcome: dict[str, Any] = {name: content[name] for name in ("orders", "error") if name in content}
    if len(outcome) != 1:
        raise ValueError("expected either orders or an error")
    meanwhile = content.get("meanwhile", {})
    if not isinstance(meanwhile, dict):
        raise ValueError(f"expected an object under 'meanwhile', got {str(meanwhile)[:80]!r}")
    return Told(
        at_s=from_json(float, content.get("at_s")),
        meanwhile=new_fields(Machine, {name: one for name, one in meanwhile.items() if name != "workers"}),
        workers={
            worker: new_fields(WorkerView, changes)
            for worker, changes in from_json(dict[int, dict[str, Any]], meanwhile.get("workers", [])).items()
        },
        event=from_json(Event, content.get("event")),
        written=content["event"],
        outcome=outcome,
    )


def _as_it_was(machine: Machine, told: Told) -> Machine:
    """The machine when the event came: after the heartbeats and ticks before it."""
    machine = replace(machine, **told.meanwhile)
    for worker, changes in told.workers.items():
        if machine.views.find(worker) is None:
            raise ValueError(f"worker {worker} is not one of the machine's")
        machine = replace(machine, views=machine.views.see(worker, changes))
    return machine


def _outcome(machine: Machine, told: Told) -> tuple[Machine, dict[str, Any]]:
    """The machine after an event, and what it ordered; a broken invariant is an outcome too."""
    try:
        after, actions = handle(machine, told.event, told.at_s)
        return after, {"orders": ordered(actions)}
    except Exception as error:
        return machine, {"error": type(error).__name__}
