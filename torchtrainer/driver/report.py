"""Turns the cause of a failure into the exception that the user sees."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torchtrainer.control.messages import Failure
from torchtrainer.driver.causes import (
    Cause,
    CrashLoop,
    EngineLost,
    LoaderDied,
    StartTimedOut,
    UserCodeFailed,
    WorkerDied,
    WorkerHung,
)
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
STACK_LINES = 40
LINE_CHARS = 2000
TRACEBACK_LINES = 200
MIB = 1 << 20

CALLED_AS = {
    "apply_worker()": "apply_all_workers()",
    "apply_operator()": "apply_all_operators()",
    "facts()": "fit()",
    "start": "the start of the workers",
}
"""The user's name for a method that a worker knows by another one."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Where a group runs, for messages.

    Attributes:
        log_dir: logs of the ranks.
        logs_stay: the logs outlive the run.
        pids, machines: process id and host name by rank.
        doing: what the user had asked for, by the name that workers know.
        why: a lost worker could not be replaced; empty: nobody tried.
    """

    log_dir: str
    logs_stay: bool
    pids: dict[int, int]
    doing: str
    why: str = ""
    machines: dict[int, str] = field(default_factory=dict)

    def log(self, rank: int) -> Path:
        """The log that explains most about a rank."""
        return RankPaths.of(self.log_dir, rank).stream("stderr")

    def who(self, ranks: int | tuple[int, ...], pid: int | None = None, machine: str = "") -> str:
        """A rank, or all that a process carries, the process and its machine."""
        ranks = (ranks,) if isinstance(ranks, int) else ranks
        named = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
        where = machine or self._where(ranks[:1])
        return f"{named} (pid {pid or self.pids.get(ranks[0], '?')}{where and f', {where}'})"

    def all_of(self, ranks: list[int]) -> str:
        """Several ranks to which the same happened."""
        pids = ", ".join(str(self.pids.get(rank, "?")) for rank in ranks)
        where = self._where(ranks)
        return f"ranks {', '.join(map(str, ranks))} (equal errors; pids {pids}{where and f', {where}'})"

    def _where(self, ranks: Sequence[int]) -> str:
        """The machines of some ranks; empty if they are not known."""
        return ", ".join(dict.fromkeys(name for rank in ranks if (name := self.machines.get(rank))))

    def at(self, phase: str, step: int, known: str = "") -> str:
        """What a rank was doing, and how far the training was.

        Args:
            phase: of the rank.
            step: optimizer steps that were completed.
            known: how sure that is, such as ``or later``.
        """
        call = CALLED_AS.get(self.doing, self.doing)
        if self.doing == "start":
            return f"during {call}, phase {phase}"
        place = "" if f"{phase}()" in CALLED_AS else f", phase {phase}"
        steps = "1 optimizer step was" if step == 1 else f"{step} optimizer steps were"
        return f"in {call}{place}, at step {step}{known} ({steps} completed)"

    def what_now(self) -> list[str]:
        """Why the loss of a worker was the end, and what to do."""
        tried = [f"The training could not continue in place: {self.why}."] if self.why else []
        saved = (
            "the same run_dir it resumes from the latest checkpoint" if self.logs_stay else "a run_dir it can resume"
        )
        return [*tried, f"What to do: start again with a new TorchTrainer; with {saved}."]

    def where_log(self, rank: int) -> str:
        """A sentence that says where the log is."""
        if self.logs_stay:
            return f"Log: {self.log(rank)} (stdout.log and error.json are beside it)"
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
    if isinstance(cause, CrashLoop):
        return _crash_loop(cause, scene)
    return _engine_lost(cause, scene)


def short_cause(cause: Cause | LoaderDied) -> str:
    """A cause in a few words, for tables."""
    if isinstance(cause, LoaderDied):
        return f"loader process {'was killed for memory' if cause.oom else describe_exit(cause.exit_code)}"
    if isinstance(cause, UserCodeFailed):
        return f"{cause.failures[0].type_name} in user code"
    if isinstance(cause, WorkerDied):
        if cause.oom:
            return "was killed for memory"
        return "called sys.exit" if cause.failure is not None else describe_exit(cause.exit_code)
    if isinstance(cause, WorkerHung):
        return f"no progress for {cause.silent_s:.0f} s"
    if isinstance(cause, CrashLoop):
        return f"crash loop: {short_cause(cause.last)}"
    return "did not start" if isinstance(cause, StartTimedOut) else "engine lost"


def rank_of(cause: Cause) -> int | None:
    """The rank that a cause points at, None if it is not one alone."""
    if isinstance(cause, UserCodeFailed):
        return cause.failures[0].rank
    if isinstance(cause, CrashLoop):
        return rank_of(cause.last)
    return cause.rank if isinstance(cause, WorkerDied | WorkerHung) else None


def _user_error(failures: tuple[Failure, ...], scene: Scene) -> BaseException:
    first = failures[0]
    alike = sorted({f.rank for f in failures if (f.type_name, f.text) == (first.type_name, first.text)})
    others = [f for f in failures if f.rank not in alike]
    ranks = scene.all_of(alike) if len(alike) > 1 else scene.who(first.rank)
    lines = [
        f"raised on {ranks} {scene.at(first.phase, first.step)}:",
        "",
        shortened(first.traceback.rstrip()),
        "",
        *(f"{scene.who(f.rank)} raised {f.type_name}: {shortened(f.text.partition(chr(10))[0])}" for f in others),
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
    who = scene.who(cause.ranks, cause.pid, cause.machine)
    if cause.failure is not None:
        said = cause.failure.text
        argument = said if said in ("", str(cause.exit_code)) else repr(said)
        story = [
            f"{who} called sys.exit({argument}) {scene.at(cause.phase, cause.step)}.",
            "A rank that leaves takes the whole run with it: return from the hook or function, or raise an exception.",
            "",
            shortened(cause.failure.traceback.rstrip()),
        ]
    else:
        # Its own last report may be a heartbeat old.
        story = [f"{who} {describe_exit(cause.exit_code)} {scene.at(cause.phase, cause.step, ' or later')}."]
        story += _memory(cause)
        story += told_last(cause)
    story += scene.what_now()
    story.append(scene.where_log(cause.rank))
    return WorkerDiedError("\n".join(story), cause.rank, cause.exit_code)


def _memory(cause: WorkerDied) -> list[str]:
    """What is known, or can be guessed, about a lack of memory."""
    if cause.exit_code != MAY_BE_OUT_OF_MEMORY:
        return []
    peak = f"; its peak was {cause.max_rss_bytes / MIB:.0f} MiB" if cause.max_rss_bytes else ""
    if cause.oom:
        return [
            f"The system's out-of-memory killer did it{peak}. Use smaller batches, or give the machine or container more memory."
        ]
    return [f"If nobody killed it by hand, this is often the out-of-memory killer{peak}."]


def _hung(cause: WorkerHung, scene: Scene) -> WorkerHungError:
    where = scene.at(cause.phase, cause.step)
    story = [
        f"{scene.who(cause.ranks, cause.pid, cause.machine)} made no progress for {cause.silent_s:.1f} s {where}; all workers were stopped.",
        f"The limit was {cause.limit_s:g} s: pass failure=FailureConfig(hang_timeout_s=...) if it needs more.",
    ]
    if cause.stacks:
        story += ["Its stacks (most recent call first):", *(f"  {line}" for line in main_thread_first(cause.stacks))]
    story += scene.what_now()
    story.append(scene.where_log(cause.rank))
    return WorkerHungError("\n".join(story), cause.rank, None)


def _start_timed_out(cause: StartTimedOut, scene: Scene) -> WorkerStartError:
    ranks = ", ".join(map(str, cause.ranks))
    return WorkerStartError(
        f"rank {ranks}: no worker process within {cause.limit_s:g} s (Timeouts.{cause.setting}). The machine may be short of "
        f"memory or processes: free some, or use fewer workers. {scene.where_log(cause.ranks[0])}"
    )


def _crash_loop(cause: CrashLoop, scene: Scene) -> BaseException:
    """The error of the last failure, under a line that says that it was not the first."""
    last = error_of(cause.last, scene)
    if cause.building:
        story = f"crash loop: {cause.failures} replacements of a lost worker in a row could not be built."
    else:
        story = (
            f"crash loop: workers were lost {cause.failures} times in a row without a step in between; "
            f"FailureConfig.max_failures allows {cause.failures - 1}."
        )
    text = f"{story} The latest one:\n{last}"
    if isinstance(last, WorkerDiedError):
        return type(last)(text, last.rank, last.exit_code)
    return WorkerStartError(text)


def _engine_lost(cause: EngineLost, scene: Scene) -> EngineError:
    return EngineError(
        f"the processes that carry the training were lost in {CALLED_AS.get(scene.doing, scene.doing)}: {cause.text.rstrip()}\n"
        "Create a new TorchTrainer to start them again."
    )


def shortened(text: str) -> str:
    """A text that a terminal can show: very long lines and very many lines lose their middle, and it says so."""
    lines = text.splitlines()
    if len(lines) > TRACEBACK_LINES:
        half = TRACEBACK_LINES // 2
        left_out = f"... {len(lines) - 2 * half} lines left out; error.json has them ..."
        lines = [*lines[:half], left_out, *lines[-half:]]
    return "\n".join(
        line if len(line) <= LINE_CHARS else f"{line[:LINE_CHARS]}... ({len(line) - LINE_CHARS} more characters)"
        for line in lines
    )


def told_last(cause: WorkerDied) -> list[str]:
    """The stack that a process crashed in, and the last lines of its stderr; often nothing."""
    crash = cause.crash.splitlines()[:STACK_LINES]
    words = [line for line in cause.stderr_tail.splitlines() if line.strip()][-TAIL_LINES:]
    parts = (("It crashed here (most recent call first):", crash), ("The last lines of its stderr:", words))
    return [line for title, lines in parts if lines for line in (title, *(f"  {line}" for line in lines))]


def main_thread_first(stacks: str) -> list[str]:
    """The lines of a stack dump, the thread that runs user code first, our own threads after it."""
    threads = [part for part in stacks.strip().split("\n\n") if part.strip()]
    threads.sort(key=lambda part: not part.lstrip().startswith("Current thread"))
    return [line for part in threads for line in part.splitlines()]
