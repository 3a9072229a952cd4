"""Tracks what torch's wrappers around the models exchange, and whether a backward pass really went through them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from torchtrainer.comm.wrapping import ddp_of
from torchtrainer.errors import OperatorUseError
from torchtrainer.train.components import internals

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator


class Wrappers:
    """``DistributedDataParallel`` and FSDP around the registered models.

    Args:
        operator: of this process.

    Attributes:
        covered: ids of the parameters whose gradients they exchange.
    """

    def __init__(self, operator: TrainingOperator) -> None:
        self._operator = operator
        components: Any = internals(operator).components
        self._ddp = {unit: ddp for unit, one in enumerate(components.models) if (ddp := ddp_of(one)) is not None}
        self.covered = {
            id(one)
            for wrapper in self._ddp.values()
            for name, one in wrapper.module.named_parameters()
            if one.requires_grad and name not in wrapper.parameters_to_ignore
        }
        if components.sharding.in_step:
            leaves = components.sharding.gradient_leaves
            self.covered.update(id(one) for model in components.raw_models for one in leaves(model))
        self._called: set[int] = set()
        for unit, wrapper in self._ddp.items():
            wrapper.register_forward_pre_hook(lambda *_, unit=unit: self._note_call(unit))

    def _note_call(self, unit: int) -> None:
        if torch.is_grad_enabled() and self._ddp[unit].require_backward_grad_sync:
            self._called.add(unit)

    def check(self, touched: Mapping[int, int]) -> None:
        """Whether the wrappers have exchanged, or are about to exchange, what a backward pass came to.

        Args:
            touched: how many parameters of each unit got a gradient.

        Raises:
            OperatorUseError: one was not called, or waits for parameters that were not used.
        """
        for unit, count in touched.items():
            if unit in self._ddp and self._ddp[unit].require_backward_grad_sync:
                self._check(unit, count)
        self._called.clear()

    def _check(self, unit: int, count: int) -> None:
        wrapper = self._ddp[unit]
        where = f"in step {self._operator.global_step} of rank {internals(self._operator).context.collective.rank}"
        members = [
            (name, one)
            for name, one in wrapper.module.named_parameters()
            if id(one) in self.covered and one.requires_grad
        ]
        if unit not in self._called:
            raise OperatorUseError(
                f"{where}, the gradients of {members[0][0]} and {len(members) - 1} more come from a model that was not called "
                "through what register returned, so that the ranks do not exchange them: call self.model(...) itself, "
                "and compute what else the loss needs in its forward"
            )
        if count < len(members) and not (wrapper.find_unused_parameters or wrapper.static_graph):
            unused = next((name for name, one in members if one.grad is None), members[0][0])
            raise OperatorUseError(
                f"{where}, {len(members) - count} of {len(members)} parameters got no gradient ({unused}, for instance), and "
                "DistributedDataParallel waits for all of them before it exchanges the last ones: pass "
                'ddp_args={"find_unused_parameters": True} to TorchTrainer'
            )


def wrapped_by_torch(operator: TrainingOperator) -> bool:
    """Whether gradients go through a process group, by wrappers; else this rank is alone or the user's own code exchanges them."""
    inside = internals(operator)
    components: Any = inside.components
    if components is None or inside.context.collective.world_size == 1 or not inside.context.settings.wrap_ddp:
        return False
    trains = [any(one.requires_grad for one in raw.parameters()) for raw in components.raw_models]
    wrapped = [ddp_of(one) is not None or components.sharding.in_step for one in components.models]
    return all(there or not here for here, there in zip(trains, wrapped, strict=True))
