"""Files that exist only in memory, held by the host: what workers share through them outlives each worker."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STEP_BYTES = 8
"""Length of a worker's place in the file of steps."""


@dataclass
class MemoryFile:
    """One file.

    Attributes:
        fd: by which the host holds it.
        path: by which processes of the same user open it, for as long as the host lives.
    """

    fd: int
    path: str

    @classmethod
    def new(cls, name: str, private_dir: Path) -> MemoryFile:
        """An empty file: without a name in any directory, where the system has that.

        Args:
            name: shown by the system's tools.
            private_dir: where the file is made on other systems.
        """
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create(f"torchtrainer-{name}", os.MFD_CLOEXEC)
            return cls(fd, f"/proc/{os.getpid()}/fd/{fd}")
        return cls(*tempfile.mkstemp(prefix=f"{name}-", dir=private_dir))

    def close(self) -> None:
        """Gives the memory back, once nobody maps it any more."""
        os.close(self.fd)


@dataclass
class SharedMemory:
    """What the workers of one group share: gradients, records of the ranks, a state that one gives to another, and their steps."""

    gradients: MemoryFile
    records: list[MemoryFile]
    shared: MemoryFile
    steps: MemoryFile

    @classmethod
    def of(cls, world_size: int, private_dir: Path) -> SharedMemory:
        """Empty files for a group of so many ranks; the workers make them as long as they have to be."""
        steps = MemoryFile.new("steps", private_dir)
        os.ftruncate(steps.fd, world_size * STEP_BYTES)
        return cls(
            gradients=MemoryFile.new("gradients", private_dir),
            records=[MemoryFile.new(f"record-{place}", private_dir) for place in range(world_size + 1)],
            shared=MemoryFile.new("shared", private_dir),
            steps=steps,
        )

    def paths(self) -> dict[str, Any]:
        """Fields of `torchtrainer.worker.assembly.MemoryPaths`."""
        return {
            "gradients": self.gradients.path,
            "records": [one.path for one in self.records],
            "shared": self.shared.path,
            "steps": self.steps.path,
        }

    def step_of(self, worker: int) -> int:
        """Optimizer steps that a worker has completed, alive or not; see `torchtrainer.train.progress.StepMark`."""
        return int.from_bytes(os.pread(self.steps.fd, STEP_BYTES, worker * STEP_BYTES), "little")

    def furthest(self) -> int:
        """Optimizer steps of the worker that has completed most."""
        size_bytes = os.fstat(self.steps.fd).st_size
        return max((self.step_of(worker) for worker in range(size_bytes // STEP_BYTES)), default=0)

    def close(self) -> None:
        """Gives the memory back."""
        for one in (self.gradients, *self.records, self.shared, self.steps):
            one.close()
