"""``strategy="zero1"``: each rank keeps and updates its share of the optimizer's state.

After Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", stage 1. Gradients are
averaged on all ranks as ever; each parameter is updated by the one rank that owns it, which then gives it to the others.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import torch

from torchtrainer.comm.group import GroupCollective
from torchtrainer.train.sharding import Unsharded, check_divisible


class ShardedOptimizers(Unsharded):
    """The optimizers' states are divided between the ranks, each as `OptimizerShare` has it.

    Args:
        optimizers: the user's; they stay the same objects, and hold all parameters except for the moment of their step.
        collective: the ranks.

    Raises:
        InvalidArgumentError: an optimizer cannot be divided.
    """

    divides_state = True

    def __init__(self, optimizers: list[Any], collective: GroupCollective) -> None:
        for optimizer in optimizers:
            check_divisible(optimizer, "zero1")
        self._shares = {optimizer: OptimizerShare(optimizer, collective) for optimizer in optimizers}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The whole state dict, put together from the ranks' shares; on the CPU."""
        return self._shares[optimizer].whole_state()

    def optimizer_share(self, optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
        """The same without the state of parameters that other ranks own."""
        return self._shares[optimizer].own_state(state)


class OptimizerShare:
    """Divides one optimizer: in its step it sees the parameters that this rank owns, at any other time all of them.

    So ``zero_grad``, clipping, schedulers and ``state_dict`` work as they would, and a closure given to ``step`` too.

    Args:
        optimizer: updates each parameter by itself.
        collective: the ranks.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, collective: GroupCollective) -> None:
        self._optimizer = optimizer
        self._collective = collective
        self._owners: dict[torch.Tensor, int] = {}
        self._loads = [0] * collective.world_size
        self._whole: list[list[torch.Tensor]] | None = None
        self._deal()
        for parameter in [one for one in optimizer.state if not self._owns(one)]:
            del optimizer.state[parameter]
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    def whole_state(self) -> dict[str, Any]:
        """The state dict with the state of all parameters; its tensors are copies on the CPU. A collective call."""
        state = self._optimizer.state_dict()
        mine, forms = state["state"], self._forms(state["state"])
        found: dict[Any, Any] = {}
        for rank, form in enumerate(forms):
            own = rank == self._collective.rank
            share = mine if own else _mapped(form, lambda one: torch.empty_like(one, device="cpu"))
            self._collective.broadcast([one.detach() for one in _tensors(share)], rank)
            # copies here too: no rank may take one of them for a tensor that all ranks have
            found.update(_mapped(share, lambda one: one.detach().to("cpu", copy=True)) if own else share)
        places = range(sum(len(group["params"]) for group in state["param_groups"]))
        return {**state, "state": {place: found.pop(place) for place in places if place in found} | found}

    def own_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """A whole state dict without the state of parameters that other ranks own."""
        parameters = [one for group in self._optimizer.param_groups for one in group["params"]]
        strange = {place for place, parameter in enumerate(parameters) if not self._owns(parameter)}
        return {**state, "state": {place: values for place, values in state["state"].items() if place not in strange}}

    def _owns(self, parameter: torch.Tensor) -> bool:
        return self._owners.get(parameter, self._collective.rank) == self._collective.rank

    def _deal(self) -> None:
        """Gives each parameter without an owner one, largest first, to balance them; the same on all ranks."""
        parameters = [one for group in self._optimizer.param_groups for one in group["params"]]
        for parameter in sorted((one for one in parameters if one not in self._owners), key=lambda one: -one.numel()):
            rank = min(range(len(self._loads)), key=self._loads.__getitem__)
            self._owners[parameter] = rank
            self._loads[rank] += parameter.numel()

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._deal()
        self._divide()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            return None
        rest = {name: value for name, value in kwargs.items() if name != "closure"}
        return (args[0], self._with_all(closure), *args[2:]), rest

    def _after_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._join()
        for rank in range(self._collective.world_size):
            self._collective.broadcast([one for one, owner in self._owners.items() if owner == rank], rank)

    def _divide(self) -> None:
        if self._whole is None:
            self._whole = [group["params"] for group in self._optimizer.param_groups]
            for group in self._optimizer.param_groups:
                group["params"] = [one for one in group["params"] if self._owns(one)]

    def _join(self) -> None:
        if self._whole is not None:
            for group, parameters in zip(self._optimizer.param_groups, self._whole, strict=True):
                group["params"] = parameters
            self._whole = None

    def _with_all(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def called() -> Any:
            self._join()
            try:
                return closure()
            finally:
                self._divide()

        return called

    def _forms(self, mine: dict[Any, Any]) -> list[dict[Any, Any]]:
        """The ranks' shares with tensors that have a shape and a dtype, but no memory."""
        buffer = io.BytesIO()
        torch.save(_mapped(mine, lambda one: torch.empty_like(one, device="meta")), buffer)
        shares = self._collective.gather_tensors(buffer.getvalue())
        return [torch.load(io.BytesIO(one), weights_only=True) for one in shares]


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same containers with each tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(one, change) for key, one in value.items()}
    return type(value)(_mapped(one, change) for one in value) if type(value) in (list, tuple) else value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)
