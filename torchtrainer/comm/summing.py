"""Averages of tensors in a fixed order, whole or in shares: the same bits however the elements are divided."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from torchtrainer.comm.layout import ALIGNMENT_BYTES

BLOCK_BYTES = 256 * 1024
"""Size of the chunks: one stays in a core's cache while the ranks are added up and the sum is divided."""


def share(run: torch.Tensor, part: int, parts: int) -> torch.Tensor:
    """The part of a run that one rank sums; the parts do not overlap in a line of the cache, and may be empty."""
    step = ALIGNMENT_BYTES // run.element_size()
    steps = -(-run.numel() // step)
    first, last = (min(run.numel(), steps * one // parts * step) for one in (part, part + 1))
    return run[first:last]


def average(into: torch.Tensor, summands: Sequence[torch.Tensor], scales: Sequence[float] | None = None) -> None:
    """Adds up in the order given, divides by how many there are. Every element by itself: the parts do not matter.

    Args:
        into: gets the average.
        summands: by rank.
        scales: what each is multiplied with before; by 0 it is left out, whatever is in it. None: nothing is.
    """
    block = BLOCK_BYTES // into.element_size()
    if into.numel() <= block:  # most runs: no views are made
        _average_block(into, summands, scales)
        return
    for first in range(0, into.numel(), block):
        _average_block(into[first : first + block], [summand[first : first + block] for summand in summands], scales)


def _average_block(into: torch.Tensor, summands: Sequence[torch.Tensor], scales: Sequence[float] | None) -> None:
    if scales is not None:
        _sum_scaled(into, summands, scales)
    elif len(summands) == 1:
        into.copy_(summands[0])
        return
    else:
        torch.add(summands[0], summands[1], out=into)
        for summand in itertools.islice(summands, 2, None):
            into.add_(summand)
    count = len(summands)
    if count & (count - 1):
        into.div_(count)
    else:
        into.mul_(1 / count)  # faster, and the same bits: the inverse of a power of two is exact


def _sum_scaled(into: torch.Tensor, summands: Sequence[torch.Tensor], scales: Sequence[float]) -> None:
    into.zero_()
    for summand, scale in zip(summands, scales, strict=True):
        if scale:
            into.add_(summand * scale)  # not fused: as if each rank had multiplied its own
