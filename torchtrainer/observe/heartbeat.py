"""What a process that carries ranks tells of itself, every so often: a worker the driver, a launcher's process its own trainer."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from torchtrainer.control.messages import Heartbeat
from torchtrainer.observe.devices import read_process_use

if TYPE_CHECKING:
    from torchtrainer.train.progress import Progress


def heartbeat(at: Progress, *, group: str, worker: int, call: int, ranks: list[int]) -> Heartbeat:
    """The state of this process as it is now; also from a thread beside the one that trains.

    Args:
        at: where the training thread is.
        group, worker: who tells it.
        call: number of the running call; 0: none.
        ranks: that this process carries.
    """
    use = read_process_use(os.getpid())
    return Heartbeat(
        group=group,
        worker=worker,
        call=call,
        phase=at.phase,
        phase_age_s=time.monotonic() - at.phase_since,
        epoch=at.epoch,
        step=int(at.step),
        batch=at.batch,
        batches=at.batches,
        samples=at.samples,
        loss=at.loss(ranks),
        rss_bytes=(use and use.rss_bytes) or 0,
        cpu_s=use.cpu_s if use else 0.0,
        longest_s=at.longest_s,
        spent_s=dict(at.spent_s),
        ranks=ranks,
    )
