"""Why an attempt failed: how each worker ended, which one was first, and the text that tells a person."""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtrainer.process.error_file import NS_PER_S
from torchtrainer.process.signals import EXIT_PREEMPTED, MAY_BE_OUT_OF_MEMORY, describe_exit

EXIT_SIGNALLED = 128
"""Shells add the number of the signal to this."""
MAX_ERROR_FILE_BYTES = 1 << 20
MAX_OTHERS = 8
"""Number of other failures that the report names; the rest are counted."""
MAX_TRACEBACK_LINES = 200
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class CapturedError:
    """The exception that ended a worker.

    Attributes:
        message: as torch's error files hold it: a dict with ``message`` and ``extraInfo``, or a text.
        when_ns: wall clock, nanoseconds since 1970.
    """

    message: Any
    when_ns: int

    @property
    def headline(self) -> str:
        """Type and text of the exception."""
        text = self.message.get("message", "") if isinstance(self.message, dict) else str(self.message)
        line = str(text).strip().partition("\n")[0]
        return line[:-1] if line.endswith(":") and " " not in line else line  # a type without a text

    @property
    def traceback(self) -> str:
        """The traceback, as far as it was recorded."""
        if not isinstance(self.message, dict):
            return str(self.message).strip()
        extra = self.message.get("extraInfo")
        return str(extra.get("py_callstack", "")).strip() if isinstance(extra, dict) else ""


@dataclass(frozen=True, kw_only=True)
class WorkerEnd:
    """How one worker ended.

    Attributes:
        local_rank, pid: which one.
        exit_code: as `subprocess.Popen.returncode` gives it.
        order: counts the ends of this launch.
        after_s: seconds since the attempt started.
        told_to_end: the launcher had asked it to end by then.
        max_rss_bytes: its peak of resident memory; 0: unknown.
        ended_ns: when that was, wall clock, nanoseconds since 1970.
        error: the exception, if it was recorded.
        log: file that holds its stderr; None: it went to the console.
    """

    local_rank: int
    pid: int
    exit_code: int
    order: int
    after_s: float
    told_to_end: bool
    max_rss_bytes: int
    ended_ns: int
    error: CapturedError | None
    log: str | None

    @property
    def failed(self) -> bool:
        """Whether it ended other than by running to its end."""
        return self.exit_code != 0

    @property
    def stopped(self) -> bool:
        """Whether the launcher ended it, so that it explains nothing."""
        return self.told_to_end and self.error is None

    def sort_key(self) -> tuple[bool, bool, int, int]:
        """Sorts root causes first.

        An exception counts from when it was raised: a rank that lost its peer may be gone before the peer, which still
        ends its threads, is. One that was stopped by the launcher explains nothing.
        """
        return (not self.failed, self.stopped, self.error.when_ns if self.error else self.ended_ns, self.order)


def read_error(*paths: Path) -> CapturedError | None:
    """Reads the first error file of these that is there and makes sense."""
    for path in paths:
        try:
            with path.open("rb") as file:
                record = json.loads(file.read(MAX_ERROR_FILE_BYTES))
            message = record["message"]
            extra = message["extraInfo"] if isinstance(message, dict) else record
            when_ns = int(extra.get("timestamp_ns", int(extra.get("timestamp", 0)) * NS_PER_S))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
        return CapturedError(message=message, when_ns=when_ns)
    return None


def preempted(ends: Sequence[WorkerEnd]) -> bool:
    """Whether workers stopped for a preemption with their state saved: one said so, and nobody failed otherwise."""
    failed = [end for end in ends if end.failed and not end.stopped]
    said = any(end.exit_code == EXIT_PREEMPTED for end in ends)
    return said and all(end.exit_code == EXIT_PREEMPTED for end in failed)


def exit_code_of(end: WorkerEnd) -> int:
    """A worker's exit code as a shell gives it."""
    return end.exit_code if end.exit_code >= 0 else EXIT_SIGNALLED - end.exit_code


def describe(ends: Sequence[WorkerEnd], ranks: dict[int, int], attempt: int, oom_killed: bool) -> str:
    """The report of a failed attempt: its root cause with the traceback, then what else failed.

    Args:
        ends: of all workers here, root cause first.
        ranks: global rank by local rank.
        attempt: restarts before it.
        oom_killed: the system says that it killed a process of this machine for memory meanwhile.
    """
    root = ends[0]
    alike = sorted((end for end in ends if end.failed and _same(end, root)), key=lambda end: end.local_rank)
    others = [end for end in ends if end.failed and end not in alike and not end.stopped]
    stopped = [end for end in ends if end.stopped and end not in alike]
    who = ", ".join(str(ranks[end.local_rank]) for end in alike)
    plural = "s" if len(alike) > 1 else ""
    if root.stopped:
        return f"rank{plural} {who} had to be killed: no rank failed by itself"
    place = f"{socket.gethostname()}, pid {', '.join(str(end.pid) for end in alike)}"
    lines = [f"rank{plural} {who} failed: {_what(root)}"]
    lines += [f"  ({place}; after {root.after_s:.1f} s of attempt {attempt})"]
    lines += _memory(root, oom_killed)
    if root.error is not None and root.error.traceback:
        lines += ["", *_shortened(root.error.traceback), ""]
    if root.log is not None:
        lines.append(f"  stderr: {root.log}")
    for end in others[:MAX_OTHERS]:
        log = f" (stderr: {end.log})" if end.log else ""
        lines.append(f"  then rank {ranks[end.local_rank]}: {_what(end)}{log}")
    if len(others) > MAX_OTHERS:
        lines.append(f"  and {len(others) - MAX_OTHERS} more")
    if stopped:
        lines.append(f"  stopped because of it: rank {', '.join(str(ranks[end.local_rank]) for end in stopped)}")
    return "\n".join(lines)


def _same(end: WorkerEnd, root: WorkerEnd) -> bool:
    if end is root:
        return True
    if end.error is None or root.error is None:
        return end.stopped and root.stopped
    return end.error.headline == root.error.headline


def _what(end: WorkerEnd) -> str:
    ending = describe_exit(end.exit_code)
    return f"{end.error.headline} ({ending})" if end.error is not None else ending


def _memory(root: WorkerEnd, oom_killed: bool) -> list[str]:
    if root.exit_code != MAY_BE_OUT_OF_MEMORY:
        return []
    peak = f"; its peak was {root.max_rss_bytes / MIB:.0f} MiB" if root.max_rss_bytes else ""
    if oom_killed:
        return [f"  the system was out of memory and killed it{peak}: use a smaller batch or fewer workers"]
    return [f"  if nobody killed it by hand, it was likely out of memory{peak}: try a smaller batch or fewer workers"]


def _shortened(text: str) -> list[str]:
    lines = text.splitlines()
    if len(lines) <= MAX_TRACEBACK_LINES:
        return lines
    half = MAX_TRACEBACK_LINES // 2
    return [*lines[:half], f"... {len(lines) - 2 * half} lines left out ...", *lines[-half:]]
