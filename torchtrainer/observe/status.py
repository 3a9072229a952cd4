"""What a trainer's ``status()`` returns: who carries the ranks, what they are doing, and what went wrong so far."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from html import escape

from torchtrainer.observe.devices import DeviceUse
from torchtrainer.observe.table import html_table, text_table

PROCESS_COLUMNS = ("ranks", "pid", "machine", "device", "step", "phase", "use")
FAILURE_COLUMNS = ("time", "rank", "cause", "steps redone", "seconds")


@dataclass(frozen=True, kw_only=True)
class ProcessStatus:
    """One worker process, as its last heartbeat showed it.

    Attributes:
        pid: process id on its machine.
        ranks: the ranks that it carries.
        machine: host name.
        device: ``cpu`` or ``cuda:N``.
        step: optimizer steps done.
        phase: what its training thread is doing.
        use: use of its device; None: not known yet.
    """

    pid: int
    ranks: tuple[int, ...]
    machine: str
    device: str
    step: int
    phase: str
    use: DeviceUse | None = None

    def cells(self) -> tuple[str, ...]:
        """This process as a row under ``PROCESS_COLUMNS``."""
        use = "" if self.use is None else str(self.use).removeprefix(self.use.device).strip()
        ranks = ", ".join(map(str, self.ranks))
        return ranks, str(self.pid), self.machine, self.device, str(self.step), self.phase, use


@dataclass(frozen=True, kw_only=True)
class FailureRecord:
    """One failure that the run went through.

    Attributes:
        time: wall clock, seconds since 1970.
        rank: which one failed; None: not one rank alone.
        cause: in a word or two.
        steps_redone: optimizer steps that had to be repeated.
        seconds: from the failure to the next step done; None: not recovered.
    """

    time: float
    rank: int | None
    cause: str
    steps_redone: int = 0
    seconds: float | None = None

    def cells(self) -> tuple[str, ...]:
        """This failure as a row under ``FAILURE_COLUMNS``, with the time in local time."""
        when = datetime.fromtimestamp(self.time).isoformat(sep=" ", timespec="seconds")
        rank = "" if self.rank is None else str(self.rank)
        seconds = "not recovered" if self.seconds is None else f"{self.seconds:.2f}"
        return when, rank, self.cause, str(self.steps_redone), seconds


@dataclass(frozen=True, kw_only=True, repr=False)
class Status:
    """Where a run stands. Printing it shows tables; the fields hold the values.

    Attributes:
        processes: the worker processes, by their lowest rank.
        failures: oldest first.
        step: optimizer steps done.
        epoch: passes over the training data that were started.
        run_dir: where run state lives; None: nothing durable.
    """

    processes: tuple[ProcessStatus, ...]
    failures: tuple[FailureRecord, ...]
    step: int
    epoch: int
    run_dir: str | None

    def _headline(self) -> str:
        where = "no run directory" if self.run_dir is None else f"run directory {self.run_dir}"
        return f"step {self.step}, epoch {self.epoch}, {where}"

    def __repr__(self) -> str:
        parts = [self._headline()]
        if self.processes:
            parts.append(text_table(PROCESS_COLUMNS, [process.cells() for process in self.processes]))
        else:
            parts.append("no worker processes")
        if self.failures:
            parts.append("failures:\n" + text_table(FAILURE_COLUMNS, [failure.cells() for failure in self.failures]))
        else:
            parts.append("no failures")
        return "\n".join(parts)

    def _repr_html_(self) -> str:
        parts = [f"<p>{escape(self._headline())}</p>"]
        if self.processes:
            parts.append(html_table(PROCESS_COLUMNS, [process.cells() for process in self.processes]))
        if self.failures:
            parts.append("<p>failures</p>" + html_table(FAILURE_COLUMNS, [f.cells() for f in self.failures]))
        return "".join(parts)
