"""The journal of the driver's machine: its events and orders, with times, as lines of JSON that can be replayed.

    {"journal": 1, "version", "wall_s", "machine": the whole machine}      begins each group, and each file
    {"at_s", "meanwhile": what heartbeats and ticks changed since the line before, "event", "orders" or "error"}

Heartbeats and ticks that lead to no order have no lines of their own, so that a run writes as much as happens to it, however long it
trains. Times are monotonic, except for ``wall_s``. What is kept of a value says `torchtrainer.driver.journal_values`.
"""

from __future__ import annotations

import json
import time
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchtrainer.config import DRIVER_JOURNAL_BYTES
from torchtrainer.control.messages import Heartbeat
from torchtrainer.driver.events import Action, Event, Tick
from torchtrainer.driver.journal_values import changed_fields, to_json
from torchtrainer.driver.machine import TOLD, handle
from torchtrainer.driver.states import Machine, Result
from torchtrainer.driver.stragglers import Straggler
from torchtrainer.errors import EngineError
from torchtrainer.process.whole_file import append_line
from torchtrainer.version import __version__

FORM = 1
"""Version of the format of the lines."""
FILE_NAME = "driver.jsonl"
OLDER_NAME = "driver.1.jsonl"
"""What was written before the last `DRIVER_JOURNAL_BYTES`."""
MAX_RECENT = 20
"""Number of events that an error about a broken invariant shows."""
_QUIET = (Heartbeat, Tick)


class EventJournal:
    """Feeds a machine, and writes down what it was told and what it ordered.

    Args:
        directory: where the files are; None: nothing is written, and errors show the latest events all the same.
        limit_bytes: size after which a new file is begun.
    """

    def __init__(self, directory: Path | None, *, limit_bytes: int = DRIVER_JOURNAL_BYTES) -> None:
        self._path = None if directory is None else directory / FILE_NAME
        self._limit_bytes = limit_bytes
        self._written: Machine | None = None
        self._lines: list[dict[str, Any]] = []
        self._recent: deque[tuple[float, Event]] = deque(maxlen=MAX_RECENT)

    def handle(self, machine: Machine, event: Event, now: float) -> Result:
        """As `torchtrainer.driver.machine.handle`.

        Raises:
            EngineError: an invariant of the machine is broken; with the events that led to it.
        """
        try:
            after, actions = handle(machine, event, now)
        except Exception as error:
            self._add(machine, event, now, {"error": type(error).__name__})
            self._written = machine
            problem = self.flush()
            raise EngineError(self._tell_broken(error, problem)) from error
        orders = ordered(actions)
        if orders or (type(event) in TOLD and not isinstance(event, _QUIET)):
            self._add(machine, event, now, {"orders": orders})
            self._written = after
        return after, actions

    def flush(self) -> str:
        """Appends what was written down since the last time; returns what went wrong, after which nothing is written any more."""
        lines, self._lines = self._lines, []
        if self._path is None or not lines:
            return ""
        try:
            append_line(self._path, b"".join(json.dumps(line).encode() + b"\n" for line in lines))
            if self._path.stat().st_size > self._limit_bytes:
                self._path.replace(self._path.with_name(OLDER_NAME))
                self._written = None
        except OSError as error:
            path, self._path = self._path, None
            return (
                f"the journal of the driver's decisions, {path}, cannot be written: {error}. The run continues without "
                "it"
            )
        return ""

    def _add(self, machine: Machine, event: Event, now: float, outcome: dict[str, Any]) -> None:
        self._recent.append((now, event))
        if self._path is None:
            return
        if self._written is None:
            head = {"journal": FORM, "version": __version__, "wall_s": time.time(), "machine": to_json(machine)}
            self._lines.append(head)
            self._written = machine
        meanwhile = changes(self._written, machine)
        self._lines.append({"at_s": now, "meanwhile": meanwhile, "event": to_json(event), **outcome})

    def _tell_broken(self, error: Exception, problem: str) -> str:
        where = (
            f"It is written to {self._path}: please send that file with your report. " if self._path is not None else ""
        )
        told = "\n".join(f"  {at_s:.3f} s  {json.dumps(to_json(event))}" for at_s, event in self._recent)
        return (
            f"an invariant of the driver is broken ({type(error).__name__}: {error}), which is a bug in torchtrainer. "
            f"{where}"
            f"{problem}{'. ' if problem else ''}The events that led to it, the latest last:\n{told}"
        )


def ordered(actions: tuple[Action, ...]) -> list[Any]:
    """The machine's orders, as they are written down."""
    return [to_json(action) for action in actions if not isinstance(action, Straggler)]


def changes(before: Machine, after: Machine) -> dict[str, Any]:
    """What is different about a machine, as it is written down; of a worker, by its number, only what is."""
    if before is after:
        return {}
    views = after.views.changed_since(before.views)
    if views is None:
        return changed_fields(after, before)
    found = changed_fields(after, replace(before, views=after.views))
    workers = [[now.worker, changed_fields(now, was)] for was, now in views]
    return {**found, "workers": workers} if workers else found
