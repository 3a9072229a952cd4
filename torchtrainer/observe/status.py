"""What a trainer's ``status()`` returns: who carries the ranks, what they are doing, and what went wrong so far."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from torchtrainer.driver.views import WorkerView
from torchtrainer.observe.devices import DeviceUse
from torchtrainer.observe.failures import FAILURE_COLUMNS, FailureRecord
from torchtrainer.observe.table import html_table, text_table

PROCESS_COLUMNS = ("ranks", "pid", "machine", "device", "step", "phase", "use")
NO_RANKS = "none yet"
"""Shown for a process that is being built, or held ready, to take over ranks."""


@dataclass(frozen=True, kw_only=True)
class ProcessStatus:
    """One worker process, as its last heartbeat showed it.

    Attributes:
        pid: process id on its machine.
        ranks: the ranks that it carries; none: it is about to take some over.
        machine: host name.
        device: ``cpu`` or ``cuda:N``.
        step: optimizer steps done.
        phase: what its training thread is doing; empty under a launcher for the processes of other ranks, which this one does not
            ask.
        use: use of its device; None: not known yet.
    """

    pid: int
    ranks: tuple[int, ...]
    machine: str
    device: str
    step: int
    phase: str
    use: DeviceUse | None = None

    @classmethod
    def of(cls, view: WorkerView, use: DeviceUse | None) -> ProcessStatus:
        """What is known of a worker; its latest heartbeat, if any came, is ``view.heartbeat``."""
        return cls(
            pid=view.pid,
            ranks=view.ranks,
            machine=view.machine,
            device=view.device,
            step=view.step,
            phase=view.phase,
            use=use,
        )

    def cells(self) -> tuple[str, ...]:
        """This process as a row under ``PROCESS_COLUMNS``."""
        use = "" if self.use is None else str(self.use).removeprefix(self.use.device).strip()
        ranks = ", ".join(map(str, self.ranks)) or NO_RANKS
        return ranks, str(self.pid), self.machine, self.device, str(self.step), self.phase, use


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
