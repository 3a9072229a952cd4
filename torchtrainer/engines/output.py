"""What workers wrote, as messages to the driver: lines of rank 0, stacks, and the last words of one that is gone."""

from __future__ import annotations

from torchtrainer.control.messages import Output, Stacks, WorkerExited
from torchtrainer.engines.groups import Group
from torchtrainer.process.logs import last_text
from torchtrainer.process.oom import OomWatch
from torchtrainer.process.paths import RankPaths
from torchtrainer.process.signals import MAY_BE_OUT_OF_MEMORY
from torchtrainer.process.starters import ChildExited


def new_output(group: Group, flush: bool) -> list[Output]:
    """Lines that rank 0 has written since this was asked last.

    Args:
        group: its workers.
        flush: also a last line that has not ended yet.
    """
    found = [(stream, tail.new_text(flush)) for stream, tail in group.tails.items()]
    return [Output(group=group.spec.group, worker=0, stream=stream, text=text) for stream, text in found if text]


def written_stacks(group: Group) -> list[Stacks]:
    """The stacks that the workers wrote last."""
    paths = {worker: RankPaths.of(group.spec.log_dir, group.like[worker]).stacks for worker in group.pids}
    texts = {worker: last_text(path, group.logged[worker][1]) for worker, path in paths.items()}
    return [Stacks(group=group.spec.group, worker=worker, text=text) for worker, text in texts.items()]


def last_words(group: Group, worker: int, event: ChildExited, oom: OomWatch) -> WorkerExited:
    """How a worker ended, and what it wrote last."""
    log = RankPaths.of(group.spec.log_dir, group.like[worker]).stream("stderr")
    return WorkerExited(
        group=group.spec.group,
        worker=worker,
        pid=event.pid,
        exit_code=event.exit_code,
        step=group.memory.step_of(worker),
        max_rss_bytes=event.max_rss_bytes,
        stderr_tail=last_text(log, group.logged[worker][0]),
        oom=event.exit_code == MAY_BE_OUT_OF_MEMORY and oom.killed(),
    )
