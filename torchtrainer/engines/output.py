"""Output of workers as messages to the driver: lines of rank 0, stacks, and last words of a lost worker or driver."""

from __future__ import annotations

import contextlib
import time

from torchtrainer.control.messages import Output, Stacks, WorkerExited
from torchtrainer.engines.groups import HostGroup
from torchtrainer.observe.notices import warn
from torchtrainer.process.crashes import last_crash
from torchtrainer.process.guard import signal_process
from torchtrainer.process.logs import last_text
from torchtrainer.process.oom import OomWatch
from torchtrainer.process.paths import RankPaths
from torchtrainer.process.signals import MAY_BE_OUT_OF_MEMORY, STACK_DUMP_SIGNAL
from torchtrainer.process.starters import ChildExited

STACK_DUMP_WAIT_S = 0.3
"""How long a worker gets to write its stacks before they are read."""


def new_output(group: HostGroup, flush: bool) -> list[Output]:
    """Lines that rank 0 has written since this was asked last.

    Args:
        group: its workers.
        flush: also a last line that has not ended yet.
    """
    found = [(stream, tail.new_text(flush)) for stream, tail in group.tails.items()]
    return [Output(group=group.spec.group, worker=0, stream=stream, text=text) for stream, text in found if text]


def ask_for_stacks(group: HostGroup) -> None:
    """Has the workers write their stacks."""
    if STACK_DUMP_SIGNAL is None:
        return
    for pid in group.pids.values():
        signal_process(pid, STACK_DUMP_SIGNAL)
    group.stacks_due = time.monotonic() + STACK_DUMP_WAIT_S


def written_stacks(group: HostGroup) -> list[Stacks]:
    """The stacks that the workers wrote last."""
    paths = {worker: RankPaths.of(group.spec.log_dir, group.like[worker]).stacks for worker in group.pids}
    texts = {worker: last_text(path, group.logged[worker][1]) for worker, path in paths.items()}
    return [Stacks(group=group.spec.group, worker=worker, text=text) for worker, text in texts.items()]


def last_words(group: HostGroup, worker: int, event: ChildExited, oom: OomWatch) -> WorkerExited:
    """How a worker ended, and what it wrote last."""
    paths = RankPaths.of(group.spec.log_dir, group.like[worker])
    return WorkerExited(
        group=group.spec.group,
        worker=worker,
        pid=event.pid,
        exit_code=event.exit_code,
        step=group.memory.step_of(worker),
        max_rss_bytes=event.max_rss_bytes,
        stderr_tail=last_text(paths.stream("stderr"), group.logged[worker][0]),
        crash=last_crash(paths.crash, group.logged[worker][2]) if event.exit_code < 0 else "",
        oom=event.exit_code == MAY_BE_OUT_OF_MEMORY and oom.killed(),
    )


def last_words_of_driver(pid: int, oom: OomWatch) -> None:
    """Says what the user's process had no time to say, where the system has just killed for memory."""
    if oom.killed():
        with contextlib.suppress(OSError):  # the terminal is gone as well
            warn(
                f"the process of the script (pid {pid}) is gone without a word: the system was out of memory and "
                "killed the process that used most of it. Use a smaller batch or fewer workers, or give the machine "
                "or container more memory"
            )
