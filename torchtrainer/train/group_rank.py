"""A rank whose gradients go through torch's process group: what its wrappers leave out is exchanged too, and it is compared.

``DistributedDataParallel`` and FSDP exchange the gradients of the models that they were put around, as these were at that time, if
they are called through the wrapper. The rest of what the optimizers update (a criterion, a layer that was unfrozen or added
later) is averaged here, as each backward pass ends. Everything runs in the thread that trains.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchtrainer.comm.backward import BackwardEnd
from torchtrainer.comm.board import UnequalExchangeError
from torchtrainer.comm.tags import average_through_group, open_tags
from torchtrainer.comm.wrapping import ddp_of
from torchtrainer.errors import OperatorUseError
from torchtrainer.train.components import internals
from torchtrainer.train.equality import compare_in_group
from torchtrainer.train.trained import TrainedParameters
from torchtrainer.train.updates import Updates

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator

_END = 1 << 62
"""Bit of the tag with which a rank says that its call is over."""


class GroupRank:
    """The rank of this process. Making one is a collective call.

    Args:
        operator: of this process, whose models are wrapped.
    """

    def __init__(self, operator: TrainingOperator) -> None:
        self._operator = operator
        self._trained = TrainedParameters(operator)
        self._updates = Updates(operator, self._trained)
        components = internals(operator).components
        assert components is not None
        self._divided = components.sharding.in_step
        self._wrappers = {unit: ddp for unit, one in enumerate(components.models) if (ddp := ddp_of(one)) is not None}
        self._covered = self._covered_parameters()
        self._called: set[int] = set()
        for unit, wrapper in self._wrappers.items():
            wrapper.register_forward_pre_hook(lambda *_, unit=unit: self._note_call(unit))
        self._rest: list[nn.Parameter] = []
        self._tags = open_tags(internals(operator).context.settings.timeout_s)
        self._ends = BackwardEnd(self._on_backward_end, self._on_backward_begin)
        self._watch()

    def begin_call(self) -> None:
        """A call of ``train`` begins; a collective call, in which the ranks compare what they hold."""
        self._follow_changes(begins=True)
        self._updates.begin_call()
        compare_in_group(self._operator)

    def at_boundary(self) -> None:
        """A step is complete."""
        steps = internals(self._operator).steps
        self._follow_changes()
        self._updates.look()
        if steps is not None and steps.compares_here:
            compare_in_group(self._operator)

    def end_call(self) -> None:
        """The call is over, and every exchange was made; a collective call."""
        if self._tags is not None:
            tag = self._tag()
            tag[0] |= _END
            self._tags.begin(tag)
            self._finish_tags()
        self._updates.end_call()

    def _covered_parameters(self) -> set[int]:
        """The parameters whose gradients the wrappers exchange, by their ids."""
        components = internals(self._operator).components
        assert components is not None
        covered = {
            id(one)
            for wrapper in self._wrappers.values()
            for name, one in wrapper.module.named_parameters()
            if one.requires_grad and name not in wrapper.parameters_to_ignore
        }
        if self._divided:
            covered.update(
                id(one) for model in components.raw_models for one in components.sharding.gradient_leaves(model)
            )
        return covered

    def _watch(self) -> None:
        for parameter, unit in zip(self._trained.parameters, self._trained.units, strict=True):
            if parameter.requires_grad:
                self._ends.watch((parameter,), unit)
        self._rest = [one for one in self._trained.parameters if id(one) not in self._covered]

    def _follow_changes(self, *, begins: bool = False) -> None:
        if self._trained.changed(begins=begins):
            self._watch()
            self._updates.watch()

    def _note_call(self, unit: int) -> None:
        if torch.is_grad_enabled() and self._wrappers[unit].require_backward_grad_sync:
            self._called.add(unit)

    @property
    def _syncs(self) -> bool:
        """Whether gradients are exchanged now: some model is not under ``no_sync``."""
        wrappers = self._wrappers.values()
        return not wrappers or any(one.require_backward_grad_sync for one in wrappers)

    def _tag(self) -> array[int]:
        return self._updates.tag(len(self._rest))

    def _on_backward_begin(self) -> None:
        if self._tags is not None and self._updates.training and self._syncs:
            self._tags.begin(self._tag())

    def _on_backward_end(self, touched: Mapping[int, int]) -> None:
        self._follow_changes()
        if not self._syncs:
            self._updates.kept_back.update(touched)
            return
        self._finish_tags()
        for unit, count in touched.items():
            if unit in self._wrappers and self._wrappers[unit].require_backward_grad_sync:
                self._check_exchanged(unit, count)
        self._called.clear()
        kept_back = {
            unit for unit in touched if unit in self._wrappers and not self._wrappers[unit].require_backward_grad_sync
        }
        self._updates.kept_back |= kept_back
        if self._rest:
            self._average_rest()
        self._updates.exchanged({*touched, *self._units_of_rest()} - kept_back)

    def _units_of_rest(self) -> set[int]:
        rest = {id(one) for one in self._rest}
        return {
            unit
            for one, unit in zip(self._trained.parameters, self._trained.units, strict=True)
            if id(one) in rest and unit not in self._wrappers
        }

    def _finish_tags(self) -> None:
        if self._tags is None or not self._tags.running:
            return
        try:
            self._tags.finish()
        except UnequalExchangeError as error:
            over = error.tag is not None and error.tag[0] & _END != 0
            told = UnequalExchangeError(error.rank, None) if over else error
            raise self._updates.explain(told, len(self._rest)) from None

    def _check_exchanged(self, unit: int, count: int) -> None:
        """Whether the wrapper of a model has exchanged, or is about to exchange, what this backward pass came to.

        Raises:
            OperatorUseError: it was not called, or waits for parameters that were not used.
        """
        wrapper = self._wrappers[unit]
        context = internals(self._operator).context
        where = f"in step {self._operator.global_step} of rank {context.collective.rank}"
        members = [
            (name, one)
            for name, one in wrapper.module.named_parameters()
            if id(one) in self._covered and one.requires_grad
        ]
        if unit not in self._called:
            raise OperatorUseError(
                f"{where}, the gradients of {members[0][0]} and {len(members) - 1} more come from a model that was not called "
                f"through what register returned, so that the ranks do not exchange them: call self.model(...) itself, and put "
                "what else the loss needs into its forward"
            )
        if count < len(members) and not (wrapper.find_unused_parameters or wrapper.static_graph):
            unused = (
                next(name for name, one in members if one.grad is None)
                if any(one.grad is None for _, one in members)
                else members[0][0]
            )
            raise OperatorUseError(
                f"{where}, {len(members) - count} of {len(members)} parameters got no gradient ({unused}, for instance), and "
                "DistributedDataParallel waits for all of them before it exchanges the last ones: pass "
                'ddp_args={"find_unused_parameters": True} to TorchTrainer'
            )

    @torch.no_grad()
    def _average_rest(self) -> None:
        """Averages the gradients that no wrapper exchanges; a rank without one counts with zeros."""
        present = torch.tensor([float(one.grad is not None) for one in self._rest])
        given = [torch.zeros_like(one) if one.grad is None else _dense(one.grad) for one in self._rest]
        present = present.to(given[0].device)
        average_through_group([*given, present])
        for parameter, mean, there in zip(self._rest, given, present.tolist(), strict=True):
            if there:
                sparse = parameter.grad is not None and parameter.grad.is_sparse
                parameter.grad = mean.to_sparse(1) if sparse else mean


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient


def group_rank_of(operator: TrainingOperator) -> GroupRank | None:
    """The rank of a process whose gradients go through a process group; None if the user's own code exchanges them."""
    inside = internals(operator)
    components: Any = inside.components
    if components is None or inside.context.collective.world_size == 1 or not inside.context.settings.wrap_ddp:
        return None
    trains = [any(one.requires_grad for one in raw.parameters()) for raw in components.raw_models]
    wrapped = [ddp_of(one) is not None or components.sharding.in_step for one in components.models]
    if any(here and not there for here, there in zip(trains, wrapped, strict=True)):
        return None
    return GroupRank(operator)
