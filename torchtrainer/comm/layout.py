"""Where the gradients of one rank lie in its slot: the parameters of one type after another."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

ALIGNMENT_BYTES = 64
"""A line of the processor's cache."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """The parameters of one type, end to end.

    Attributes:
        dtype: of all of them.
        begin: offset in a slot, in bytes.
        numel: elements of all of them.
    """

    dtype: torch.dtype
    begin: int
    numel: int


@dataclass(frozen=True, kw_only=True)
class Place:
    """One parameter: the run that it is in, its first element there, and how its gradient is laid out."""

    run: int
    first: int
    shape: torch.Size
    strides: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class RowsPlace:
    """One parameter whose gradients may be sparse: a count, the numbers of rows, and the rows; or all rows, dense.

    Attributes:
        begin: offset of the count in a slot, in bytes; the row numbers and the rows follow, each at a line of the cache.
        shape, dtype: of the parameter.
    """

    begin: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        """Room for as many rows as the parameter has. Memory that no gradient touches is never taken."""
        return self.values_at - self.begin + aligned(self.shape.numel() * self.dtype.itemsize)

    @property
    def values_at(self) -> int:
        """Offset of the rows."""
        return self.begin + ALIGNMENT_BYTES + aligned(self.shape[0] * torch.int64.itemsize)


class SlotLayout:
    """How the gradients of one rank are laid out; the same in all processes, as it follows from the parameters alone.

    Args:
        parameters: whose gradients are exchanged, in the order in which they are given.
        by_rows: numbers of those whose gradients may be sparse.

    Attributes:
        runs: the dense gradients, by type.
        places: by parameter; None: it is in ``rows``.
        rows: the parameters whose gradients may be sparse, by number.
        dense_bytes: size of the runs.
        size_bytes: size of a slot.
        checksum: differs between layouts.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], by_rows: Collection[int] = ()) -> None:
        self.runs: list[Run] = []
        self.places: list[Place | None] = []
        self.rows: dict[int, RowsPlace] = {}
        self.dense_bytes = 0
        fills: dict[torch.dtype, int] = {}
        dense = [one for number, one in enumerate(parameters) if number not in by_rows]
        order = list(dict.fromkeys(parameter.dtype for parameter in dense))
        for number, parameter in enumerate(parameters):
            if number in by_rows:
                self.places.append(None)
                continue
            meta = torch.empty_like(parameter, device="meta")  # the strides that autograd gives a gradient
            first = fills.get(parameter.dtype, 0)
            place = Place(run=order.index(parameter.dtype), first=first, shape=parameter.shape, strides=meta.stride())
            self.places.append(place)
            fills[parameter.dtype] = first + parameter.numel()
        for dtype in order:
            self.runs.append(Run(dtype=dtype, begin=self.dense_bytes, numel=fills[dtype]))
            self.dense_bytes += aligned(fills[dtype] * dtype.itemsize)
        self.size_bytes = self.dense_bytes
        for number in sorted(by_rows):
            self.rows[number] = RowsPlace(
                begin=self.size_bytes, shape=parameters[number].shape, dtype=parameters[number].dtype
            )
            self.size_bytes += self.rows[number].size_bytes
        self.checksum = zlib.crc32(repr([(tuple(one.shape), str(one.dtype)) for one in parameters]).encode())

    def flat(self, slot: torch.Tensor) -> list[torch.Tensor]:
        """The runs of a slot, each as one long tensor. ``slot``: its bytes."""
        return [slot[run.begin : run.begin + run.numel * run.dtype.itemsize].view(run.dtype) for run in self.runs]

    def by_parameter(self, runs: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
        """One view per parameter of the runs of a slot; None for those that are not in a run."""
        return [
            None
            if place is None
            else runs[place.run].as_strided(place.shape, place.strides, runs[place.run].storage_offset() + place.first)
            for place in self.places
        ]


def aligned(size_bytes: int) -> int:
    """The size, rounded up so that what follows begins at a line of the cache."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
