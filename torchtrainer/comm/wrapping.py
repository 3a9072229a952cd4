"""Models as hooks call them, each in a wrapper that exchanges its gradients, or in a stand-in for it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchtrainer.comm.copies import copy_of
from torchtrainer.errors import InvalidArgumentError


def wrap(model: nn.Module, *, device: torch.device, ddp_args: dict[str, Any], in_memory: bool = False) -> nn.Module:
    """Wrap a model so that its gradients are averaged over the ranks.

    Args:
        model: on ``device`` already; of torch's process group one without trainable parameters comes back as it is.
        device: the rank's device.
        ddp_args: arguments of ``DistributedDataParallel``; they win over ours.
        in_memory: gradients travel through shared memory, so that nothing is left to exchange for the wrapper.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return model
    if in_memory:
        return Replica(model, **ddp_args)
    ours: dict[str, Any] = {"device_ids": [device]} if device.type == "cuda" else {}
    return Exchanging(model, **{**ours, **ddp_args})


def unwrap(model: nn.Module) -> nn.Module:
    """Return the user's own module: without ``DistributedDataParallel`` and without ``torch.compile`` around it."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model


def ddp_of(model: nn.Module) -> DistributedDataParallel | None:
    """The ``DistributedDataParallel`` around the user's module, on either side of ``torch.compile``; None if there is none."""
    while not isinstance(model, DistributedDataParallel):
        if not isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            return None
        model = compiled
    return model


class Exchanging(DistributedDataParallel):
    """torch's, but that copies of it, and pickles, are of the model alone: an average of weights or a teacher exchanges nothing."""

    def __copy__(self) -> Any:
        return copy.copy(self.module)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy_of(self.module, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _itself, (self.module,)


class Replica(Exchanging):
    """A ``DistributedDataParallel`` to whoever asks, for gradients that are exchanged as each backward pass ends, outside of it.

    It makes no process group, no buckets and no collective.

    Args:
        module: the user's model.
        ddp_args: arguments of ``DistributedDataParallel``; those that tune its exchange mean nothing here.

    Raises:
        TypeError: ``DistributedDataParallel`` has no such argument.
    """

    def __init__(self, module: nn.Module, **ddp_args: Any) -> None:
        given = _bound(module, ddp_args)
        nn.Module.__init__(self)
        self.module = module
        self.require_backward_grad_sync = True
        self.require_forward_param_sync = bool(given.get("init_sync", True))
        self.broadcast_buffers = bool(given.get("broadcast_buffers", True))
        self.find_unused_parameters = bool(given.get("find_unused_parameters", False))
        self.static_graph = bool(given.get("static_graph", False))
        self.gradient_as_bucket_view = bool(given.get("gradient_as_bucket_view", False))
        self.device_ids = None
        self.output_device = None
        self.device = next(module.parameters()).device

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Calls the model."""
        return self.module(*inputs, **named)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """While it lasts, backward passes add up this rank's gradients; the first one after it exchanges the sum."""
        before, self.require_backward_grad_sync = self.require_backward_grad_sync, False
        try:
            yield
        finally:
            self.require_backward_grad_sync = before

    @contextmanager
    def join(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Nothing to do: the ranks get equally many batches."""
        yield

    def register_comm_hook(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: no gradients pass here."""
        raise InvalidArgumentError(
            "register_comm_hook: gradients go through shared memory here, not through DistributedDataParallel. Pass comm_hook= "
            "to TorchTrainer for smaller gradients"
        )


def _bound(module: nn.Module, ddp_args: dict[str, Any]) -> dict[str, Any]:
    """The arguments, if ``DistributedDataParallel`` takes them."""
    return dict(inspect.signature(DistributedDataParallel.__init__).bind(None, module, **ddp_args).arguments)


def _itself(module: nn.Module) -> nn.Module:
    return module
