"""Why a worker group failed: values that the machine decides on and that `report` turns into text for a person."""

from __future__ import annotations

from dataclasses import dataclass

from torchtrainer.control.messages import Failure


@dataclass(frozen=True, kw_only=True)
class UserCodeFailed:
    """User code raised, on one rank or on several. ``failures``: in order of arrival; the first is the root cause."""

    failures: tuple[Failure, ...]


@dataclass(frozen=True, kw_only=True)
class WorkerDied:
    """A worker process ended without being asked to.

    Attributes:
        ranks, pid, exit_code: which one, by the ranks that it carried or was built like, and how it ended.
        machine: the host name of where it was; empty: not known.
        phase, step: where it was by its last heartbeat.
        stderr_tail: its last words.
        crash: the stack that it crashed in; empty if it did not.
        failure: what it said before, if it left by ``sys.exit``.
        oom: the system killed it for memory.
    """

    ranks: tuple[int, ...]
    pid: int
    exit_code: int
    phase: str
    step: int
    stderr_tail: str = ""
    crash: str = ""
    max_rss_bytes: int = 0
    failure: Failure | None = None
    oom: bool = False
    machine: str = ""

    @property
    def rank(self) -> int:
        """The lowest of its ranks."""
        return self.ranks[0]


@dataclass(frozen=True, kw_only=True)
class WorkerHung:
    """A worker made no progress for longer than allowed.

    Attributes:
        ranks, pid: the suspect: of those that do not wait for others, the worker that is furthest behind.
        machine: the host name of where it is; empty: not known.
        phase, step: where it is.
        silent_s: seconds without progress.
        limit_s: how long it might have taken.
        stacks: Python stacks of the suspect.
    """

    ranks: tuple[int, ...]
    pid: int
    phase: str
    step: int
    silent_s: float
    limit_s: float
    stacks: str = ""
    machine: str = ""

    @property
    def rank(self) -> int:
        """The lowest of its ranks."""
        return self.ranks[0]


@dataclass(frozen=True, kw_only=True)
class StartTimedOut:
    """A worker process did not come to be, or did not report. ``setting``: the deadline's name and value in ``limit_s``."""

    ranks: tuple[int, ...]
    setting: str
    limit_s: float


@dataclass(frozen=True, kw_only=True)
class EngineLost:
    """The host or the spawner is gone, or never worked."""

    text: str


@dataclass(frozen=True, kw_only=True)
class CrashLoop:
    """Workers were lost again and again, and nothing was achieved between.

    Attributes:
        failures: how many in a row.
        building: they were replacements, which could not be built.
        last: the latest of them.
    """

    failures: int
    last: UserCodeFailed | WorkerDied | WorkerHung | StartTimedOut
    building: bool = False


@dataclass(frozen=True, kw_only=True)
class LoaderDied:
    """A process of a rank's loader ended by itself; not the end of anything else. Attributes as in `LoaderLost`."""

    rank: int
    loader: str
    pid: int
    exit_code: int
    oom: bool
    stack: str = ""


WorkerLost = WorkerDied | WorkerHung
"""Why a worker that carried ranks was lost."""
Cause = UserCodeFailed | WorkerDied | WorkerHung | StartTimedOut | EngineLost | CrashLoop
