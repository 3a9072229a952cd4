"""The slots of one layout: where the gradients of all ranks of a machine lie, and the shared result."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch

from torchtrainer.comm.layout import SlotLayout, aligned
from torchtrainer.comm.sparse import NO_ROWS, average_rows, form_of, write_rows

_HAS_GRADIENT = b"\1"
_HAS_NONE = bytes([NO_ROWS])


class GradientSlots:
    """The gradients of all processes of a machine, which each of them can read.

    Args:
        memory: that all of them map.
        begin: where the slots begin in it, in bytes.
        world_size: number of ranks.
        layout: of one slot.
        buffers: slots per rank.
        result: whether there is room for a sum that all processes make together.

    Attributes:
        begin: as given.
        end: where they end.
        runs: by buffer and rank, the gradients as long tensors, one per type.
        result: long tensors, one per type; empty if there is no room for it.
    """

    def __init__(
        self, memory: mmap.mmap, begin: int, *, world_size: int, layout: SlotLayout, buffers: int, result: bool
    ) -> None:
        self._layout = layout
        self._memory: mmap.mmap | None = memory
        self._row_bytes = aligned(len(layout.places))
        self._all_rows = _HAS_GRADIENT * self._row_bytes * world_size
        slots_at = begin + 2 * len(self._all_rows)
        self.begin, self.end = begin, begin + self.size_bytes(layout, world_size, buffers=buffers, result=result)
        rows = memoryview(memory)[begin:slots_at]
        self._rows = (rows[: len(self._all_rows)], rows[len(self._all_rows) :])
        whole = torch.frombuffer(memory, dtype=torch.uint8)[slots_at : self.end]
        size = layout.size_bytes
        slots = [whole[place * size : (place + 1) * size] for place in range(buffers * world_size)]
        self.result: list[torch.Tensor] = layout.flat(whole[buffers * world_size * size :]) if result else []
        self._slots = [slots[buffer * world_size : (buffer + 1) * world_size] for buffer in range(buffers)]
        self.runs = [[layout.flat(slot) for slot in buffer] for buffer in self._slots]
        self._views: dict[tuple[int, int], list[torch.Tensor | None]] = {}

    @staticmethod
    def size_bytes(layout: SlotLayout, world_size: int, *, buffers: int, result: bool) -> int:
        """Bytes of memory that the slots take."""
        rows = 2 * aligned(len(layout.places)) * world_size
        return rows + buffers * world_size * layout.size_bytes + (layout.dense_bytes if result else 0)

    def put(self, rank: int, number: int, gradients: Sequence[torch.Tensor | None]) -> None:
        """Copies a rank's gradients to its slot for an exchange; zeros stand for those that it does not have."""
        buffer = number % len(self.runs)
        views = self._views_of(buffer, rank)
        if not self._layout.rows and len(dense := _dense(gradients)) == len(gradients):
            row = _HAS_GRADIENT * self._row_bytes
            if dense:
                torch._foreach_copy_([one for one in views if one is not None], dense)
        else:
            row = self._put_some(self._slots[buffer][rank], views, gradients)
        self._rows[number % 2][rank * self._row_bytes : (rank + 1) * self._row_bytes] = row

    def _put_some(
        self, slot: torch.Tensor, views: Sequence[torch.Tensor | None], gradients: Sequence[torch.Tensor | None]
    ) -> bytes:
        """Copies gradients of which some are missing or may be sparse; returns what stands in the rank's row."""
        for place, rows in self._layout.rows.items():
            gradient = gradients[place]
            if gradient is not None:
                write_rows(slot, rows, gradient)
        pairs = [(view, one) for view, one in zip(views, gradients, strict=True) if view is not None]
        missing = [view for view, one in pairs if one is None]
        if missing:
            torch._foreach_zero_(missing)
        if len(missing) < len(pairs):
            torch._foreach_copy_([view for view, one in pairs if one is not None], _dense([one for _, one in pairs]))
        return bytes(form_of(gradient) for gradient in gradients).ljust(self._row_bytes, _HAS_GRADIENT)

    def absent(self, number: int) -> list[int]:
        """The parameters for which no rank has a gradient in this exchange, by their places."""
        rows = bytes(self._rows[number % 2])
        if rows == self._all_rows:
            return []
        by_parameter = (rows[place :: self._row_bytes] for place in range(len(self._layout.places)))
        return [place for place, marks in enumerate(by_parameter) if not any(marks)]

    def average_rows(self, number: int, scales: list[float] | None) -> dict[int, torch.Tensor]:
        """The means of the gradients that may be sparse, by the places of the parameters; without absent ones.

        ``scales``: what those of each rank are multiplied with.
        """
        rows, slots = bytes(self._rows[number % 2]), self._slots[number % len(self.runs)]
        found = {}
        for place, where in self._layout.rows.items():
            forms = rows[place :: self._row_bytes]
            if any(forms):
                found[place] = average_rows(slots, where, forms, scales)
        return found

    def release(self) -> None:
        """Gives the memory of the slots back to the machine, for all processes: nobody reads them any more."""
        begin, end = -(-self.begin // mmap.PAGESIZE) * mmap.PAGESIZE, self.end // mmap.PAGESIZE * mmap.PAGESIZE
        if self._memory is not None and hasattr(mmap, "MADV_REMOVE") and end > begin:
            self._memory.madvise(mmap.MADV_REMOVE, begin, end - begin)
        self.close()

    def close(self) -> None:
        """Lets go of the memory."""
        for rows in self._rows:
            rows.release()
        self.runs, self.result, self._slots, self._memory = [], [], [], None
        self._views.clear()

    def _views_of(self, buffer: int, rank: int) -> list[torch.Tensor | None]:
        """The slot by parameter; made when first used, as a process gives for few ranks."""
        views = self._views.get((buffer, rank))
        if views is None:
            views = self._layout.by_parameter(self.runs[buffer][rank])
            self._views[buffer, rank] = views
        return views


def _dense(gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """Those that are there, none of them sparse."""
    return [one.to_dense() if one.is_sparse else one for one in gradients if one is not None]
