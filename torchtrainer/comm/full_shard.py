"""Models whose parameters are divided between the ranks, by torch's ``fully_shard`` (FSDP2).

torch is asked for it when it is first needed: importing it takes longer than a start of the ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from torchtrainer.errors import InvalidArgumentError, NotAvailableError

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

BLOCK_PARAMETERS = 100_000
"""Smallest block of a model, in elements, gathered by itself; a smaller one is gathered with its surroundings."""


def shard_fully(model: nn.Module, device: torch.device) -> list[FSDPModule]:
    """Divides a model's parameters between the ranks, in place; a collective call, made by every rank.

    Args:
        model: on ``device``, and equal on all ranks.
        device: the rank's device.

    Returns:
        The modules whose parameters are gathered together; the model itself is the last one.

    Raises:
        NotAvailableError: this torch is too old.
        InvalidArgumentError: torch cannot divide this model.
    """
    try:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard
    except ImportError:
        raise _too_old() from None
    if not hasattr(FSDPModule, "set_reshard_after_forward"):
        raise _too_old()
    blocks = list(_separate(model, _blocks(model)))
    try:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        return [one for one in (*blocks, model) if isinstance(one, FSDPModule)]
    except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
        raise InvalidArgumentError(
            f'strategy="fsdp" cannot divide {type(model).__name__}: {error}. Use strategy="zero1" or "ddp"'
        ) from error


def gather(modules: Iterable[FSDPModule]) -> None:
    """Puts whole parameters in place of the shares, on every rank, until `scatter`; forward passes leave them there."""
    for one in modules:
        one.unshard()
        one.set_reshard_after_forward(False, recurse=False)


def scatter(modules: Sequence[FSDPModule]) -> None:
    """Undoes `gather`."""
    for one in modules:
        one.set_reshard_after_forward(one is not modules[-1], recurse=False)
        one.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor of which this rank may have a share; a collective call, made by every rank."""
    full: Any = getattr(tensor, "full_tensor", None)  # a DTensor has it; its class is not there before the first use
    return tensor if full is None else full()


def share(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This rank's share of a whole tensor if it has the shape of a divided parameter; every rank calls this alike."""
    if not hasattr(parameter, "full_tensor") or tensor.shape != parameter.shape:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(tensor.detach().to(parameter.device), parameter.device_mesh, parameter.placements)


def _too_old() -> NotAvailableError:
    return NotAvailableError(
        f'strategy="fsdp" needs torch 2.8 or newer, this is torch {torch.__version__}: use strategy="zero1" or "ddp"'
    )


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The large members of lists and sequences of layers, from the outside: no block is within another."""
    for child in module.children():
        listed = isinstance(module, nn.ModuleList | nn.Sequential) and not isinstance(child, nn.ModuleList)
        if listed and sum(one.numel() for one in child.parameters()) >= BLOCK_PARAMETERS:
            yield child
        else:
            yield from _blocks(child)


def _separate(model: nn.Module, blocks: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Those that share no parameter with the rest of the model: torch would divide it twice, and they would part."""
    for block in blocks:
        inside, own = set(block.modules()), set(block.parameters())
        around = (module for module in model.modules() if module not in inside)
        if not any(one in own for module in around for one in module.parameters(recurse=False)):
            yield block
