"""What a Lightning module finds when it looks at ``self.trainer.strategy``: the ranks, and what they can say to each other."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import torch

from torchtrainer.comm.group import Collective
from torchtrainer.errors import InvalidArgumentError, OperatorUseError
from torchtrainer.train.components import internals

if TYPE_CHECKING:
    from torchtrainer.lightning.operator import LightningOperator


class StrategyView:
    """The ranks as a module sees them. What is exchanged is the module's own affair, and every rank has to take part.

    Args:
        operator: trains the module.
    """

    def __init__(self, operator: LightningOperator) -> None:
        self._operator = operator
        self._collective = internals(operator).context.collective

    @property
    def root_device(self) -> torch.device:
        """Where this rank trains."""
        return self._operator.device

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._operator.world_size

    @property
    def global_rank(self) -> int:
        """This rank, from 0."""
        return self._operator.world_rank

    @property
    def local_rank(self) -> int:
        """Place of this rank on its machine, from 0."""
        return self._operator.local_rank

    @property
    def is_global_zero(self) -> bool:
        """Whether this is rank 0."""
        return self._operator.world_rank == 0

    def barrier(self, *_: Any) -> None:
        """Waits for all ranks."""
        self._collective.barrier()

    def all_gather(self, tensor: torch.Tensor, group: Any = None, sync_grads: bool = False) -> torch.Tensor:
        """The tensors of all ranks, stacked in rank order; with one rank the tensor as it is.

        Args:
            tensor: of one shape on all ranks.
            group: not used: all ranks take part.
            sync_grads: gradients flow back to the rank that each part is from.

        Raises:
            OperatorUseError: the shapes are unequal.
        """
        if self.world_size == 1:
            return tensor
        if sync_grads:
            gathered: torch.Tensor = _Gathered.apply(tensor, self._collective)
            return gathered
        return _gather(tensor, self._collective)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: str = "mean") -> Any:
        """The mean or the sum of a tensor over the ranks.

        Args:
            tensor: of one shape on all ranks; other things come back as they are.
            group: not used: all ranks take part.
            reduce_op: ``mean``, ``avg`` or ``sum``.
        """
        if not isinstance(tensor, torch.Tensor):
            return tensor
        operation = str(reduce_op).lower().rpartition(".")[2]
        if operation not in ("mean", "avg", "sum"):
            raise InvalidArgumentError(f"strategy.reduce takes reduce_op mean or sum, got {reduce_op!r}")
        rows = self.all_gather(tensor) if self.world_size > 1 else tensor[None]
        if operation == "sum":
            return rows.sum(0)
        return (rows if rows.is_floating_point() or rows.is_complex() else rows.float()).mean(0)

    def broadcast(self, value: Any, src: int = 0) -> Any:
        """What rank ``src`` has: a tensor, or numbers, text and containers of them."""
        if self.world_size == 1:
            return value
        return _exchange(value, self._collective)[src]


class _Gathered(torch.autograd.Function):
    """`_gather` with gradients: each rank's part gets what all ranks say of it."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, collective: Collective) -> torch.Tensor:
        ctx.collective = collective
        return _gather(tensor, collective)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _gather(gradients[0], ctx.collective)[:, ctx.collective.rank].sum(0), None


def _gather(tensor: torch.Tensor, collective: Collective) -> torch.Tensor:
    rows = _exchange(tensor, collective)
    shapes = [tuple(one.shape) for one in rows]
    if len(set(shapes)) > 1:
        raise OperatorUseError(
            f"all_gather takes tensors of one shape, and those of the ranks are uneven: {shapes} in rank order. The last "
            "batch of a pass may be smaller on some ranks: use drop_last=True, or pad the tensors"
        )
    return torch.stack([one.to(tensor.device) for one in rows])


def _exchange(value: Any, collective: Collective) -> list[Any]:
    """Every rank's value. No pickle is opened."""
    buffer = io.BytesIO()
    torch.save(value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value, buffer)
    return [torch.load(io.BytesIO(one), weights_only=True) for one in collective.gather_tensors(buffer.getvalue())]
