"""The memory through which the ranks of a machine exchange gradients: counters, slots and the shared result."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Sequence

import torch

from torchtrainer.checkpoint.memory import available_bytes, map_shared
from torchtrainer.comm.counters import LINE_BYTES, Counters
from torchtrainer.comm.futex import why_not_shared
from torchtrainer.comm.layout import SlotLayout, aligned
from torchtrainer.errors import EngineError

_HAS_GRADIENT = b"\1"
_HAS_NONE = b"\0"
_MB = 1e6


class ExchangeUnavailableError(EngineError):
    """Gradients cannot go through shared memory here: the platform cannot, or there is not enough memory."""


class GradientSlots:
    """What all processes of a machine see of each other's gradients.

    Args:
        path: of the file that they all map; None: memory of this process alone.
        world_size: number of ranks.
        layout: of one slot.
        buffers: slots per rank.
        result: whether there is room for a sum that all processes make together.

    Attributes:
        given: per rank, the number of the exchange for which its gradients are in its slot.
        reduced: per rank, the number of the exchange for which its share of the result is made.
        runs: by buffer and rank, the gradients as long tensors, one per type.
        result: long tensors, one per type; empty if there is no room for it.

    Raises:
        ExchangeUnavailableError: not on this platform, or there is not enough memory.
    """

    def __init__(self, path: str | None, *, world_size: int, layout: SlotLayout, buffers: int, result: bool) -> None:
        self._layout = layout
        self._row_bytes = aligned(len(layout.places))
        self._all_rows = _HAS_GRADIENT * self._row_bytes * world_size
        rows_at = 2 * LINE_BYTES * world_size
        slots_at = rows_at + 2 * len(self._all_rows)
        memory = _map(path, slots_at + (buffers * world_size + result) * layout.size_bytes, world_size)
        shared = path is not None
        self.given = Counters(memory, 0, world_size=world_size, shared=shared)
        self.reduced = Counters(memory, LINE_BYTES * world_size, world_size=world_size, shared=shared)
        rows = memoryview(memory)[rows_at:slots_at]
        self._rows = (rows[: len(self._all_rows)], rows[len(self._all_rows) :])
        whole = torch.frombuffer(memory, dtype=torch.uint8)[slots_at:]
        slots = [
            layout.flat(whole[place * layout.size_bytes : (place + 1) * layout.size_bytes])
            for place in range(buffers * world_size + result)
        ]
        self.result: list[torch.Tensor] = slots.pop() if result else []
        self.runs = [slots[buffer * world_size : (buffer + 1) * world_size] for buffer in range(buffers)]
        self._views: dict[tuple[int, int], list[torch.Tensor]] = {}

    def put(self, rank: int, number: int, gradients: Sequence[torch.Tensor | None]) -> None:
        """Copies a rank's gradients to its slot for an exchange; zeros stand for those that it does not have."""
        views = self._views_of(number % len(self.runs), rank)
        there = [gradient for gradient in gradients if gradient is not None]
        row = _HAS_GRADIENT * self._row_bytes
        if len(there) < len(views):
            pairs = list(zip(views, gradients, strict=True))
            torch._foreach_zero_([view for view, gradient in pairs if gradient is None])
            views = [view for view, gradient in pairs if gradient is not None]
            marks = b"".join(_HAS_NONE if gradient is None else _HAS_GRADIENT for gradient in gradients)
            row = marks + row[len(marks) :]
        if there:
            torch._foreach_copy_(views, there)
        self._rows[number % 2][rank * self._row_bytes : (rank + 1) * self._row_bytes] = row

    def absent(self, number: int) -> list[int]:
        """The parameters for which no rank has a gradient in this exchange, by their places."""
        rows = bytes(self._rows[number % 2])
        if rows == self._all_rows:
            return []
        by_parameter = (rows[place :: self._row_bytes] for place in range(self._row_bytes))
        return [place for place, marks in enumerate(by_parameter) if _HAS_GRADIENT not in marks]

    def close(self) -> None:
        """Lets go of the memory."""
        self.given.close()
        self.reduced.close()
        for rows in self._rows:
            rows.release()
        self.runs, self.result = [], []
        self._views.clear()

    def _views_of(self, buffer: int, rank: int) -> list[torch.Tensor]:
        """The slot by parameter; made when first used, as a process gives for few ranks."""
        views = self._views.get((buffer, rank))
        if views is None:
            views = self._layout.by_parameter(self.runs[buffer][rank])
            self._views[buffer, rank] = views
        return views


def _map(path: str | None, size_bytes: int, world_size: int) -> mmap.mmap:
    reason = why_not_shared() if path is not None else None
    if reason is not None:
        raise ExchangeUnavailableError(f"gradients cannot go through shared memory here: {reason}")
    try:
        if path is not None:
            return map_shared(path, size_bytes)
        available = available_bytes()
        if available is not None and size_bytes > available:
            raise OSError(errno.ENOMEM, f"{available / _MB:.0f} MB are free")
        return mmap.mmap(-1, size_bytes)
    except OSError as error:
        raise ExchangeUnavailableError(
            f"the gradients of {world_size} ranks need {size_bytes / _MB:.0f} MB of memory, which this machine or container "
            f"does not have: {error.strerror or error}. Raise the container's memory limit (memory.max of its control group; "
            "docker run --memory), or use a smaller num_workers"
        ) from error
