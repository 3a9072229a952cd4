"""``strategy="fsdp"``: each rank keeps its share of parameters, gradients and the optimizer's state."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from torchtrainer.comm import full_shard
from torchtrainer.comm.group import GroupCollective
from torchtrainer.errors import InvalidArgumentError
from torchtrainer.train.sharding import Unsharded, check_divisible


class FullySharded(Unsharded):
    """Models are divided between the ranks, and with their parameters all that optimizers keep for them.

    Buffers stay whole, and follow rank 0 as under DDP.

    Args:
        models: on the device, and not wrapped; they are changed in place.
        optimizers: made from their parameters, and without a state yet; they get the divided parameters instead.
        device: the rank's device.
        collective: the ranks.
        broadcast_buffers: before each forward pass all ranks take over the buffers of rank 0.

    Raises:
        InvalidArgumentError: a model or an optimizer cannot be divided.
        NotAvailableError: this torch is too old.
    """

    in_step = True
    divides_state = True

    def __init__(
        self,
        models: list[nn.Module],
        optimizers: list[Any],
        *,
        device: torch.device,
        collective: GroupCollective,
        broadcast_buffers: bool,
    ) -> None:
        _check(models, optimizers)
        self._device = device
        self._collective = collective
        self._modules: dict[nn.Module, list[Any]] = {}
        self._leaves: dict[nn.Module, list[nn.Parameter]] = {}
        self._blanks: dict[nn.Module, nn.Module] = {}
        divided: dict[torch.Tensor, nn.Parameter] = {}
        for model in models:
            if any(one.requires_grad for one in model.parameters()):
                divided.update(self._divide(model))
                self._follow_buffers(model, broadcast_buffers)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [divided.get(one, one) for one in group["params"]]

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """All of a parameter, of its gradient or of its optimizer state."""
        return full_shard.whole(tensor)

    def share(self, tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole tensor that has the shape of a parameter."""
        return full_shard.share(tensor, parameter)

    def gradient_leaves(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """The gathered parameters: autograd never sees the divided ones, and torch keeps these objects."""
        yield from self._leaves.get(model) or model.parameters()

    def model_state(self, model: nn.Module) -> Mapping[str, Any]:
        """The whole state dict; its parameters are copies on the CPU."""
        state = model.state_dict()
        whole = OrderedDict((name, self._on_cpu(value)) for name, value in state.items())
        whole._metadata = getattr(state, "_metadata", {})  # type: ignore[attr-defined]  # versions of modules; torch keeps them there
        return whole

    def model_share(self, model: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """The state dict with this rank's part of each divided parameter."""
        here = model.state_dict()
        share = OrderedDict(
            (name, self.share(value, here[name]) if isinstance(here.get(name), torch.Tensor) else value)
            for name, value in state.items()
        )
        share._metadata = getattr(state, "_metadata", {})  # type: ignore[attr-defined]  # as above
        return share

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The whole state dict; what is divided is copied to the CPU."""
        state = optimizer.state_dict()
        whole = {
            place: {name: self._on_cpu(value) for name, value in values.items()}
            for place, values in state["state"].items()
        }
        return {**state, "state": whole}

    def optimizer_share(self, optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
        """The state dict with this rank's part of each tensor that has the shape of its parameter."""
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        share = {}
        for place, values in state["state"].items():
            parameter = parameters[place] if isinstance(place, int) and place < len(parameters) else None
            share[place] = {
                name: self.share(value, parameter)
                if isinstance(value, torch.Tensor) and value.dim() and parameter is not None
                else value
                for name, value in values.items()
            }
        return {**state, "state": share}

    def copy_of(self, model: nn.Module) -> nn.Module:
        """A plain copy with whole parameters, on the rank's device."""
        if model not in self._blanks:
            return super().copy_of(model)
        blank, here = self._blanks[model], dict(model.named_parameters())
        memo: dict[int, Any] = {
            id(one): nn.Parameter(self.whole(here[name].detach()), requires_grad=here[name].requires_grad)
            for name, one in blank.named_parameters()
        }
        made = copy.deepcopy(blank, memo)
        buffers = dict(model.named_buffers())
        for name, buffer in made.named_buffers():
            buffer.data = buffers[name].detach().clone()
        for ours, theirs in zip(made.modules(), model.modules(), strict=True):
            ours.training = theirs.training
        return made

    @contextmanager
    def undivided(self) -> Iterator[None]:
        """While it lasts, every rank has the whole models."""
        for modules in self._modules.values():
            full_shard.gather(modules)
        try:
            yield
        finally:
            for modules in self._modules.values():
                full_shard.scatter(modules)

    def _divide(self, model: nn.Module) -> dict[torch.Tensor, nn.Parameter]:
        """Divides a model; returns what stands for each of its parameters now."""
        self._collective.broadcast([*model.parameters(), *model.buffers()])
        # Without the memory of its parameters: torch's own copy of a divided model is refused.
        bare: dict[int, Any] = {
            id(one): nn.Parameter(torch.empty_like(one, device="meta"), requires_grad=one.requires_grad)
            for one in model.parameters()
        }
        self._blanks[model] = copy.deepcopy(model, bare)
        before = dict(model.named_parameters())
        modules = full_shard.shard_fully(model, self._device)
        after = dict(model.named_parameters())
        self._modules[model] = modules
        full_shard.gather(modules)
        self._leaves[model] = list(model.parameters())
        full_shard.scatter(modules)
        return {one: after[name] for name, one in before.items()}

    def _follow_buffers(self, model: Any, follows: bool) -> None:
        """By the names that DDP has for it, so that whoever switches it off for a validation need not tell them apart."""
        model.require_forward_param_sync, model.broadcast_buffers = True, follows

        def take(module: Any, _: Any) -> None:
            if module.require_forward_param_sync and module.broadcast_buffers:
                self._collective.broadcast_buffers([module])

        if any(True for _ in model.buffers()):
            model.register_forward_pre_hook(take)

    def _on_cpu(self, value: Any) -> Any:
        return self.whole(value).cpu() if hasattr(value, "full_tensor") else value


def _check(models: list[nn.Module], optimizers: list[Any]) -> None:
    owners: dict[torch.Tensor, nn.Module] = {}
    for model in models:
        for parameter in model.parameters():
            if owners.setdefault(parameter, model) is not model:
                raise InvalidArgumentError(
                    f'strategy="fsdp" cannot divide models that share parameters: {type(owners[parameter]).__name__} and '
                    f'{type(model).__name__}. Register one model that contains both, or use strategy="zero1"'
                )
    for optimizer in optimizers:
        check_divisible(optimizer, "fsdp")
        if optimizer.state:
            raise InvalidArgumentError(
                f'strategy="fsdp" cannot divide {type(optimizer).__name__}, which has a state before its first step: load it '
                'into the trainer later, or use strategy="zero1"'
            )
