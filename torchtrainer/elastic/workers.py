"""The workers of one attempt on this machine, as torch's agent sees them: a `PContext` whose processes our spawner starts."""

from __future__ import annotations

import inspect
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.api import PContext, RunProcsResult
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from torchtrainer.launcher.failure import WorkerEnd, read_error
from torchtrainer.launcher.fork_safety import Program
from torchtrainer.launcher.script import ProgramSpec
from torchtrainer.launcher.watch import ProcessWatch
from torchtrainer.process.error_file import NS_PER_S
from torchtrainer.process.guard import kill_session, signal_process
from torchtrainer.process.paths import LaunchPaths

FIRST_ARGUMENT = {"script": 3, "module": 4, "run_path": 4}
"""Index of the program's first argument in the command that would exec it."""
STOP_CHECK_S = 1.0
"""Polling interval while waiting for workers to end."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """Everything needed to start the workers of an attempt.

    Attributes:
        generation: counts the starts of this launch.
        program: what they run.
        commands: what each would be if exec'd, by local rank.
        default_signals: signals that the launcher handles.
        forked: go on in the spawner's interpreter.
        stop_timeout_s: from asking workers to end to killing them.
    """

    generation: int
    program: Program
    commands: Mapping[int, Sequence[str]]
    default_signals: Sequence[signal.Signals]
    forked: bool
    stop_timeout_s: float


class Workers(PContext):
    """Starts the workers, learns of their ends, and stops them. Used by the launcher's thread.

    Args:
        attempt: what to start.
        watch: starts processes and hears of their ends.
        paths: the launcher's private files.
        context: arguments of torch's ``PContext``; those that the installed torch does not know are left out.
    """

    def __init__(self, attempt: Attempt, watch: ProcessWatch, paths: LaunchPaths, **context: Any) -> None:
        known = inspect.signature(PContext.__init__).parameters
        super().__init__(**{name: value for name, value in context.items() if name in known})
        self._attempt = attempt
        self._watch = watch
        self._paths = paths
        self._pids: dict[int, int] = {}
        self._told_to_end: set[int] = set()
        self._stopped = False
        self.started_at_s = 0.0

    def start(self) -> None:
        """Starts all workers; torch's own version would install its signal handlers first."""
        self._start()
        for tail in _tails(self):
            tail.start()

    def _start(self) -> None:
        specs = [self._spec(local_rank) for local_rank in range(self.nprocs)]
        started = self._watch.start(specs)
        self._pids = {local_rank: started[spec["key"]] for local_rank, spec in enumerate(specs)}
        self.started_at_s = time.monotonic()

    def _spec(self, local_rank: int) -> ProgramSpec:
        attempt = self._attempt
        environ = {**os.environ, **self.envs[local_rank]}
        return ProgramSpec(
            key=f"{attempt.generation}/{local_rank}",
            kind=attempt.program.kind if attempt.forked else "command",
            command=list(attempt.commands[local_rank]),
            path=attempt.program.path,
            arguments=list(attempt.commands[local_rank][FIRST_ARGUMENT.get(attempt.program.kind, 0) :]),
            environ=environ,
            stdout=self.stdouts[local_rank] or "",
            stderr=self.stderrs[local_rank] or "",
            default_signals=[int(signum) for signum in attempt.default_signals],
            error_path=str(self._paths.error(attempt.generation, local_rank)),
            stacks_path=str(self._paths.stacks(attempt.generation, local_rank)),
            multiprocessing_dir=str(self._paths.multiprocessing),
        )

    def pids(self) -> dict[int, int]:
        """Process ids by local rank."""
        return dict(self._pids)

    def living(self) -> dict[int, int]:
        """Those of workers that have not ended, or are about to because the spawner is gone."""
        if self._watch.lost:
            return {}
        return {rank: pid for rank, pid in self._pids.items() if pid not in self._watch.ended}

    def ends(self) -> list[WorkerEnd]:
        """The ends of the workers so far, with the first failure first."""
        ends = []
        for local_rank, pid in self._pids.items():
            ended = self._watch.ended.get(pid)
            if ended is None:
                continue
            ends.append(
                WorkerEnd(
                    local_rank=local_rank,
                    pid=pid,
                    exit_code=ended.exit_code,
                    order=ended.order,
                    after_s=ended.at_s - self.started_at_s,
                    told_to_end=local_rank in self._told_to_end,
                    max_rss_bytes=ended.max_rss_bytes,
                    ended_ns=ended.at_ns,
                    error=read_error(
                        self._paths.error(self._attempt.generation, local_rank), Path(self.error_files[local_rank])
                    ),
                    log=self.stderrs[local_rank] or None,
                )
            )
        return sorted(ends, key=WorkerEnd.sort_key)

    def _poll(self) -> RunProcsResult | None:
        """The result when all have ended or one has failed, None before: torch's all-or-nothing policy."""
        ends = self.ends() if len(self.living()) < self.nprocs else []
        if self.living() and not any(end.failed for end in ends):
            return None
        self.close(timeout=int(self._attempt.stop_timeout_s))
        failures = {end.local_rank: self._failure(end) for end in self.ends() if end.failed}
        values = {} if failures else dict.fromkeys(range(self.nprocs))
        return RunProcsResult(return_values=values, failures=failures, stdouts=self.stdouts, stderrs=self.stderrs)

    def _failure(self, end: WorkerEnd) -> ProcessFailure:
        failure = ProcessFailure(
            local_rank=end.local_rank, pid=end.pid, exitcode=end.exit_code, error_file=self.error_files[end.local_rank]
        )
        if end.error is not None and not Path(self.error_files[end.local_rank]).is_file():
            failure.message = end.error.message  # the traceback is known, whether the program records its errors or not
            failure.timestamp = end.error.when_ns // NS_PER_S
        return failure

    def _close(self, death_sig: signal.Signals, timeout: int = 30) -> None:
        """Asks workers to end, waits, and kills what is left; a second signal to the launcher kills at once.

        Python programs get the signal themselves, not the processes that they started: those of a data loader would die
        under a program that is about to save its state. Other programs get it with their whole process group.
        """
        if self._watch.lost:  # the kernel kills workers with the spawner, but not what they started
            for pid in self._pids.values():
                kill_session(pid)
        for local_rank, pid in self.living().items():
            self._told_to_end.add(local_rank)
            if self._attempt.program.kind == "command":
                _signal_group(pid, death_sig)
            else:
                signal_process(pid, death_sig)
        deadline = time.monotonic() + timeout
        while self.living() and time.monotonic() < deadline:
            if self._watch.wait_quietly(min(STOP_CHECK_S, max(0.0, deadline - time.monotonic()))):
                break
        self.kill()
        deadline = time.monotonic() + timeout
        while self.living() and time.monotonic() < deadline:  # one in an uninterruptible system call may stay
            self._watch.wait_quietly(STOP_CHECK_S)

    def kill(self) -> None:
        """Kills all workers at once."""
        for local_rank, pid in self.living().items():
            self._told_to_end.add(local_rank)
            kill_session(pid)

    def close(self, death_sig: signal.Signals | None = None, timeout: int = 30) -> None:
        """Stops the workers and ends the copying of their output. Idempotent."""
        if self._stopped:
            return
        super().close(death_sig, timeout)
        self._stopped = not self.living()


def _tails(context: PContext) -> list[Any]:
    """What copies output of workers to the console: a list in newer torch, two attributes in older."""
    names = ("_tail_logs", "_stdout_tail", "_stderr_tail")
    found = [getattr(context, name) for name in names if hasattr(context, name)]
    return [tail for entry in found for tail in (entry if isinstance(entry, list) else [entry])]


def _signal_group(leader: int, signum: int) -> None:
    try:
        os.killpg(leader, signum)
    except ProcessLookupError:  # gone, or not yet the leader of its group
        signal_process(leader, signum)
