"""The other ranks of a launch, seen without asking them: one rank alone may call `status()` at any time."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from typing import TYPE_CHECKING

from torchtrainer.driver.views import WorkerView
from torchtrainer.engines.memory_files import STEP_BYTES

if TYPE_CHECKING:
    from torchtrainer.comm.group import Collective


class Peers:
    """Where the processes of a launch are, and how far. Making one is a collective call.

    Args:
        collective: the ranks, one in each process.
        device: of this process.
        steps: file in which each rank marks the steps that it has completed; None: the ranks share no memory.
    """

    def __init__(self, collective: Collective, device: str, steps: str | None) -> None:
        self._told: list[tuple[int, str, str]] = [
            (pid, machine, used)
            for pid, machine, used in collective.all_gather([os.getpid(), socket.gethostname(), device])
        ]
        self._steps = None if steps is None else os.open(steps, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def views(self, own: WorkerView) -> tuple[WorkerView, ...]:
        """All ranks; what is not known of another one is as it is here, since ranks are in step, and its phase is empty.

        Args:
            own: the rank of this process.
        """
        return tuple(
            own
            if rank == own.rank
            else replace(
                own,
                worker=rank,
                ranks=(rank,),
                pid=pid,
                machine=machine,
                device=device,
                phase="",
                heartbeat=None,
                step=self._step(rank, own.step),
            )
            for rank, (pid, machine, device) in enumerate(self._told)
        )

    def close(self) -> None:
        """Lets go of the memory. Idempotent."""
        if self._steps is not None:
            os.close(self._steps)
            self._steps = None

    def _step(self, rank: int, assumed: int) -> int:
        if self._steps is None:
            return assumed
        return int.from_bytes(os.pread(self._steps, STEP_BYTES, rank * STEP_BYTES), "little")
