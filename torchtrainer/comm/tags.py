"""What the ranks of a process group tell each other beside their gradients, so that they notice when they part."""

from __future__ import annotations

from array import array
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from torchtrainer.comm.board import UnequalExchangeError


class Tags:
    """Every rank's tag for each exchange, over a process group of their own. Making one is a collective call.

    Their own group, since a rank that leaves out an exchange goes on to other collectives: tags then meet tags, and differ.

    Args:
        timeout_s: longest wait for the tags of the others.
    """

    def __init__(self, timeout_s: float) -> None:
        self._group: Any = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._size = dist.get_world_size()
        self._mine = torch.empty(0, dtype=torch.int64)
        self._all: list[torch.Tensor] = []
        self._work: dist.Work | None = None

    @property
    def running(self) -> bool:
        """Whether tags are on their way."""
        return self._work is not None

    def begin(self, tag: array[int]) -> None:
        """Sends this rank's tag; does not wait."""
        self._mine = torch.tensor(tag, dtype=torch.int64)
        self._all = [torch.zeros_like(self._mine) for _ in range(self._size)]
        self._work = dist.all_gather(self._all, self._mine, group=self._group, async_op=True)

    def finish(self) -> None:
        """Waits for the tags of the others, and compares.

        Raises:
            UnequalExchangeError: a rank has another one.
            RuntimeError: torch's, if a rank is gone or does not come.
        """
        work, self._work = self._work, None
        if work is None:
            return
        work.wait()
        for rank, found in enumerate(self._all):
            if not torch.equal(found, self._mine):
                raise UnequalExchangeError(rank, found.tolist())


def open_tags(timeout_s: float) -> Tags | None:
    """Tags for the ranks of the process group, a collective call; None where they cannot be read without waiting for a GPU."""
    return Tags(timeout_s) if "gloo" in dist.get_backend() else None


def average_through_group(gradients: list[torch.Tensor]) -> None:
    """Makes each gradient the mean over all ranks, in place, in one message per type. Every rank gives the same shapes.

    Args:
        gradients: dense.
    """
    by_type: dict[torch.dtype, list[torch.Tensor]] = {}
    for one in gradients:
        real = torch.view_as_real(one) if one.is_complex() else one
        by_type.setdefault(real.dtype, []).append(real)
    for members in by_type.values():
        flat = torch.cat([one.reshape(-1) for one in members]).div_(dist.get_world_size())
        dist.all_reduce(flat)
        for one, part in zip(members, torch.split(flat, [one.numel() for one in members]), strict=True):
            one.copy_(part.view(one.shape))
