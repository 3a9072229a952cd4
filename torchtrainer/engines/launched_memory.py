"""Memory that the processes of a launch share, where all of them are on one machine: held by rank 0."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtrainer.engines.memory_files import SharedMemory
from torchtrainer.errors import EngineError
from torchtrainer.process.guard import is_alive

if TYPE_CHECKING:
    from torchtrainer.comm.group import Collective

LOOK_EVERY_S = 1.0
"""Time between two checks of a waiting rank that the others are alive."""


class LaunchedMemory:
    """Memory that the ranks of a launch share. Making one is a collective call.

    Args:
        collective: the ranks, all on this machine.

    Attributes:
        paths: fields of `torchtrainer.worker.assembly.MemoryPaths`; None: some rank cannot open what rank 0 holds, for instance
            because it is in a container of its own.
    """

    def __init__(self, collective: Collective) -> None:
        first = collective.rank == 0
        self._held = SharedMemory.of(collective.world_size, Path(tempfile.gettempdir())) if first else None
        told: dict[str, Any] = collective.all_gather(self._held.paths() if self._held is not None else None)[0]
        here = all(os.access(path, os.R_OK | os.W_OK) for path in (told["gradients"], *told["records"]))
        answers = collective.all_gather([here, os.getpid()])
        self._pids = [pid for _, pid in answers]
        self.paths: dict[str, Any] | None = told if all(found for found, _ in answers) else None

    def watch(self) -> Callable[[], None]:
        """What is to be called while other ranks are waited for; it raises an EngineError once one of them is gone."""
        next_look = [time.monotonic() + LOOK_EVERY_S]

        def look() -> None:
            if time.monotonic() < next_look[0]:
                return
            next_look[0] = time.monotonic() + LOOK_EVERY_S
            for rank, pid in enumerate(self._pids):
                if not is_alive(pid):
                    raise EngineError(
                        f"rank {rank} (pid {pid}) is gone while this rank waits for its gradients: see its log"
                    )

        return look

    def close(self) -> None:
        """Lets the memory go."""
        if self._held is not None:
            self._held.close()
            self._held = None
