"""Trains from a loader with processes of its own; when it is asked to stop, it needs the loader once more before it saves."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

from torch.utils.data import DataLoader

SAMPLES = 64
"""More than two loader processes fetch ahead."""
EXIT_PREEMPTED = 75

if __name__ == "__main__":
    asked, ask = os.pipe()

    def told(number: int, frame: FrameType | None) -> None:
        os.write(ask, b"!")

    batches = iter(DataLoader(range(SAMPLES), batch_size=1, num_workers=2))
    next(batches)
    signal.signal(signal.SIGTERM, told)
    os.write(1, f"ready {os.environ['RANK']}\n".encode())
    os.read(asked, 1)
    seen = 1 + len(list(batches))
    os.write(1, f"saved after {seen} samples {os.environ['RANK']}\n".encode())
    sys.exit(EXIT_PREEMPTED)
