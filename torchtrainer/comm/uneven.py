"""The user's collectives in a step with unequal numbers of samples on the ranks: an error that says so, at once.

Torch's collectives need tensors of equal shapes on all ranks, and all ranks to take part. What happens else is up to the
library: an error about a connection or a length, or a wait until the time-out.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from torchtrainer.errors import OperatorUseError

c10d: Any = dist.distributed_c10d  # what is used of it has no types

_INPUT = {
    "allgather_": 1,
    "_allgather_base_": 1,
    "allgather_coalesced_": 1,
    "reduce_scatter_": 1,
    "_reduce_scatter_base_": 1,
    "all_gather_into_tensor": 0,
    "reduce_scatter_tensor": 0,
    "allreduce_": 0,
    "allreduce_coalesced_": 0,
    "all_reduce": 0,
    "all_reduce_": 0,
    "broadcast_": 0,
    "broadcast": 0,
    "reduce_": 0,
}
"""Operators of torch that need equal shapes on all ranks, and which of their arguments they take."""
_WAY_OUT = (
    'give all ranks as many samples: even_batches=True (some samples come twice) or even_batches="drop" (some are left out) of '
    "TorchTrainer, or drop_last=True of the DataLoader"
)


def collectives_made() -> int:
    """How many collectives this process has made so far, in all its groups."""
    if not dist.is_available() or not dist.is_initialized():
        return 0
    return sum(_made(group) for group in c10d._world.pg_map)  # noqa: SLF001  # torch tells it in no other way


def _made(group: Any) -> int:
    try:
        return int(group._get_sequence_number_for_group())  # noqa: SLF001  # nor this
    except RuntimeError:  # this kind of group does not count
        return 0


class UnevenStep(TorchDispatchMode):  # type: ignore[no-untyped-call]  # nor has this
    """While it is active, a collective that cannot work raises an error that says why.

    Collectives in a backward pass are left alone: a hook that exchanges gradients in several messages, as PowerSGD's, calls the
    later ones in whichever thread saw the earlier one end, and this looks at one thread only.

    Args:
        what: is uneven, for the error.
        missing: ranks that take no part in the step; with any, there can be no collective in it.
    """

    def __init__(self, what: str, *, missing: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._what = what
        self._missing = missing

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called for every operator."""
        if func.namespace in ("c10d", "_c10d_functional") and not _in_backward():
            self._check(func.__name__.partition(".")[0], args)
        return func(*args, **(kwargs or {}))

    def _check(self, name: str, args: Any) -> None:
        group = _group_of(args)
        if group is None or group.size() == 1:
            return
        if self._missing:
            raise OperatorUseError(
                f"uneven batches: {self._what}, so {self._missing} of the ranks would not take part in the collective {name} that "
                f"was called; {_WAY_OUT}"
            )
        place = _INPUT.get(name)
        tensors = _tensors_of(args[place]) if place is not None else []
        if not tensors or tensors[0].device.type != "cpu":
            return
        shapes = repr([(tuple(one.shape), one.dtype) for one in tensors])
        digest = int.from_bytes(hashlib.blake2b(shapes.encode(), digest_size=7).digest(), "big")
        mine = torch.tensor([digest, tensors[0].shape[0] if tensors[0].dim() else 1])
        rows = [torch.empty_like(mine) for _ in range(group.size())]
        group.allgather([rows], [mine]).wait()
        if any(not torch.equal(row, mine) for row in rows):
            raise OperatorUseError(
                f"uneven batches: {self._what}, and the collective {name} was called with tensors of different shapes (first "
                f"dimensions by rank: {[int(row[1]) for row in rows]}); {_WAY_OUT}"
            )


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1  # noqa: SLF001  # torch tells it in no other way


def _tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [one for part in value for one in _tensors_of(part)]
    return []


def _group_of(args: Any) -> Any:
    """The process group of an operator that exchanges; None: it has none."""
    for one in args:
        if isinstance(one, torch.ScriptObject) and str(one._type()).endswith(".ProcessGroup"):  # noqa: SLF001  # no other way
            return dist.ProcessGroup.unbox(one)
    name = args[-1] if args else None
    return c10d._resolve_process_group(name) if isinstance(name, str) else None  # noqa: SLF001  # nor this
