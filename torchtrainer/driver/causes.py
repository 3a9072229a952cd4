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
        rank, pid, exit_code: which one, and how it ended.
        phase, step: where it was by its last heartbeat.
        stderr_tail: its last words.
        failure: what it said before, if it left by ``sys.exit``.
    """

    rank: int
    pid: int
    exit_code: int
    phase: str
    step: int
    stderr_tail: str = ""
    max_rss_bytes: int = 0
    failure: Failure | None = None


@dataclass(frozen=True, kw_only=True)
class WorkerHung:
    """A rank made no progress for longer than allowed.

    Attributes:
        rank, pid: the suspect: the rank that is furthest behind.
        phase, step: where it is.
        silent_s: seconds without progress.
        limit_s: how long it might have taken.
        stacks: Python stacks of the suspect.
    """

    rank: int
    pid: int
    phase: str
    step: int
    silent_s: float
    limit_s: float
    stacks: str = ""


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


Cause = UserCodeFailed | WorkerDied | WorkerHung | StartTimedOut | EngineLost
