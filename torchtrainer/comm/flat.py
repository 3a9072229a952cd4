"""Tensors of one rank for all ranks, in as few messages as there are dtypes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist


@torch.no_grad()
def broadcast_tensors(tensors: Iterable[torch.Tensor], *, src: int, device: torch.device) -> None:
    """Gives every rank the values of rank ``src``.

    Args:
        tensors: the same ones on every rank, of any dtype and device.
        src: the rank whose values win.
        device: where the tensors of an exchange live.
    """
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for one in {id(one): one for one in tensors if one.numel() > 0}.values():
        by_dtype.setdefault(one.dtype, []).append(one)
    for members in by_dtype.values():
        flat = torch.cat([one.detach().reshape(-1).to(device) for one in members])
        dist.broadcast(flat.view(torch.uint8), src=src)  # as bytes: Gloo knows neither bool nor complex
        for one, part in zip(members, torch.split(flat, [one.numel() for one in members]), strict=True):
            one.copy_(part.view(one.shape))


def give(tensors: Iterable[torch.Tensor], src: int = 0) -> None:
    """Gives every rank these tensors of rank ``src``, as DDP does when it wraps a model. On the CPU."""
    broadcast_tensors(tensors, src=src, device=torch.device("cpu"))
