"""Where the gradients of one rank lie in its slot: the parameters of one type after another."""

from __future__ import annotations

from collections.abc import Sequence
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


class SlotLayout:
    """How the gradients of one rank are laid out; alike in all processes, as it follows from the parameters alone.

    Args:
        parameters: whose gradients are exchanged, in the order in which they are given.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self.runs: list[Run] = []
        self.places: list[Place] = []
        self.size_bytes = 0
        fills: dict[torch.dtype, int] = {}
        order = list(dict.fromkeys(parameter.dtype for parameter in parameters))
        for parameter in parameters:
            dense = torch.empty_like(parameter, device="meta")  # the strides that autograd gives a gradient
            first = fills.get(parameter.dtype, 0)
            place = Place(run=order.index(parameter.dtype), first=first, shape=parameter.shape, strides=dense.stride())
            self.places.append(place)
            fills[parameter.dtype] = first + parameter.numel()
        for dtype in order:
            self.runs.append(Run(dtype=dtype, begin=self.size_bytes, numel=fills[dtype]))
            self.size_bytes += aligned(fills[dtype] * dtype.itemsize)

    def flat(self, slot: torch.Tensor) -> list[torch.Tensor]:
        """The runs of a slot, each as one long tensor. ``slot``: its bytes."""
        return [slot[run.begin : run.begin + run.numel * run.dtype.itemsize].view(run.dtype) for run in self.runs]

    def by_parameter(self, runs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """One view per parameter of the runs of a slot."""
        return [
            runs[place.run].as_strided(place.shape, place.strides, runs[place.run].storage_offset() + place.first)
            for place in self.places
        ]


def aligned(size_bytes: int) -> int:
    """The size, rounded up so that what follows begins at a line of the cache."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
