"""Turns the cause of a failure into the exception that the user sees."""

from __future__ import annotations

import pickle
import socket
from dataclasses import dataclass
from pathlib import Path

from torchtrainer.control.messages import Failure
from torchtrainer.driver.causes import Cause, EngineLost, StartTimedOut, UserCodeFailed, WorkerDied, WorkerHung
from torchtrainer.errors import (
    EngineError,
    RemoteTraceback,
    WorkerDiedError,
    WorkerError,
    WorkerHungError,
    WorkerStartError,
)
from torchtrainer.process.paths import RankPaths
from torchtrainer.process.signals import MAY_BE_OUT_OF_MEMORY, describe_exit

TAIL_LINES = 12
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Where a group runs, for messages.

    Attributes:
        log_dir: logs of the ranks.
        logs_stay: the logs outlive the run.
        pids: process id by rank.
        doing: what the user had asked for.
    """

    log_dir: str
    logs_stay: bool
    pids: dict[int, int]
    doing: str

    def log(self, rank: int) -> Path:
        """The log that explains most about a rank."""
        return RankPaths.of(self.log_dir, rank).stream("stderr")

    def who(self, rank: int, pid: int | None = None) -> str:
        """A rank, its process and its machine."""
        return f"rank {rank} (pid {pid or self.pids.get(rank, '?')}, {socket.gethostname()})"

    def where_log(self, rank: int) -> str:
        """A sentence that says where the log is."""
        if self.logs_stay:
            return f"Log: {self.log(rank)}"
        return "Logs are not kept with run_dir=None; give a run_dir to keep them."


def error_of(cause: Cause, scene: Scene) -> BaseException:
    """Makes the exception for a cause: the user's own where there is one, with the remote traceback as its cause."""
    if isinstance(cause, UserCodeFailed):
        return _user_error(cause.failures, scene)
    if isinstance(cause, WorkerDied):
        return _died(cause, scene)
    if isinstance(cause, WorkerHung):
        return _hung(cause, scene)
    if isinstance(cause, StartTimedOut):
        return _start_timed_out(cause, scene)
    return _engine_lost(cause, scene)


def short_cause(cause: Cause) -> str:
    """A cause in a few words, for tables."""
    if isinstance(cause, UserCodeFailed):
        return f"{cause.failures[0].type_name} in user code"
    if isinstance(cause, WorkerDied):
        return "called sys.exit" if cause.failure is not None else describe_exit(cause.exit_code)
    if isinstance(cause, WorkerHung):
        return f"no progress for {cause.silent_s:.0f} s"
    return "did not start" if isinstance(cause, StartTimedOut) else "engine lost"


def rank_of(cause: Cause) -> int | None:
    """The rank that a cause points at, None if it is not one alone."""
    if isinstance(cause, UserCodeFailed):
        return cause.failures[0].rank
    return cause.rank if isinstance(cause, WorkerDied | WorkerHung) else None


def _user_error(failures: tuple[Failure, ...], scene: Scene) -> BaseException:
    first = failures[0]
    alike = sorted({f.rank for f in failures if (f.type_name, f.text) == (first.type_name, first.text)})
    others = [f for f in failures if f.rank not in alike]
    ranks = f"ranks {', '.join(map(str, alike))} (equal errors)" if len(alike) > 1 else scene.who(first.rank)
    lines = [
        f"raised on {ranks} in {scene.doing}, phase {first.phase}, at step {first.step}:",
        "",
        first.traceback.rstrip(),
        "",
        *(f"{scene.who(f.rank)} raised {f.type_name}: {f.text.splitlines()[0] if f.text else ''}" for f in others),
        scene.where_log(first.rank),
    ]
    remote = RemoteTraceback("\n".join(lines))
    error = _unpickled(first)
    if error is None:
        error = WorkerError(f"{first.type_name} in user code: {first.text}")
    error.__cause__ = remote
    return error


def _unpickled(failure: Failure) -> BaseException | None:
    if not failure.blob:
        return None
    try:
        error = pickle.loads(failure.blob)
    except Exception:  # its class cannot be made again here: the text and traceback tell the story instead
        return None
    return error if isinstance(error, BaseException) else None


def _died(cause: WorkerDied, scene: Scene) -> WorkerDiedError:
    who = scene.who(cause.rank, cause.pid)
    if cause.failure is not None:
        story = [
            f"{who} ended itself by sys.exit({cause.exit_code}) in {scene.doing}, at step {cause.step}.",
            "User code in a worker must return or raise; sys.exit there ends the rank, not the run.",
            "",
            cause.failure.traceback.rstrip(),
        ]
    else:
        story = [f"{who} {describe_exit(cause.exit_code)} in {scene.doing}, phase {cause.phase}, at step {cause.step}."]
        if cause.exit_code == MAY_BE_OUT_OF_MEMORY:
            peak = f"; its peak was {cause.max_rss_bytes / MIB:.0f} MiB" if cause.max_rss_bytes else ""
            story.append(f"If nobody killed it by hand, this is often the out-of-memory killer{peak}.")
        if cause.stderr_tail:
            story += ["Its last words:", *(f"  {line}" for line in cause.stderr_tail.splitlines()[-TAIL_LINES:])]
    story.append("This version cannot recover a lost worker: start again with a new TorchTrainer.")
    story.append(scene.where_log(cause.rank))
    return WorkerDiedError("\n".join(story), cause.rank, cause.exit_code)


def _hung(cause: WorkerHung, scene: Scene) -> WorkerHungError:
    story = [
        f"{scene.who(cause.rank, cause.pid)} made no progress for {cause.silent_s:.1f} s in {scene.doing}, "
        f"phase {cause.phase}, at step {cause.step}; it and its peers were stopped.",
        f"Allowed were {cause.limit_s:g} s: set FailureConfig(hang_timeout_s=...) if it needs more.",
    ]
    if cause.stacks:
        story += ["Its stacks (most recent call first):", *(f"  {line}" for line in cause.stacks.splitlines())]
    story.append(scene.where_log(cause.rank))
    return WorkerHungError("\n".join(story), cause.rank, None)


def _start_timed_out(cause: StartTimedOut, scene: Scene) -> WorkerStartError:
    ranks = ", ".join(map(str, cause.ranks))
    return WorkerStartError(
        f"rank {ranks}: no worker process within {cause.limit_s:g} s (Timeouts.{cause.setting}). The machine may be short of "
        f"memory or processes: free some, or use fewer workers. {scene.where_log(cause.ranks[0])}"
    )


def _engine_lost(cause: EngineLost, scene: Scene) -> EngineError:
    return EngineError(
        f"the processes that carry the training were lost in {scene.doing}: {cause.text.rstrip()}\n"
        "Create a new TorchTrainer to start them again."
    )
