"""How the user's optimizer goes through its parameters: one by one, in few calls for all of them, or in one fused kernel.

torch's own optimizers come in these three forms. They compute the same, but not all to the last bit: the pairs that do on the
CPU were found by trying (docs/performance.md), and the tests try them again with the torch that is installed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import optim

FOREACH_GIVES_THE_SAME_BITS: frozenset[type[optim.Optimizer]] = frozenset(
    (optim.SGD, optim.Adam, optim.AdamW, optim.Adagrad, optim.RMSprop, optim.Adadelta, optim.Adamax, optim.Rprop)
)
"""With parameters of 32 or 64 bits on the CPU. Subclasses may do other things."""
FOREACH_FROM_PARAMETERS = 16
FOREACH_TO_MEAN_ELEMENTS = 16 * 1024
"""On the CPU few calls pay where there are many parameters, and lose where these are larger than the caches."""
_EXACT_TYPES = (torch.float32, torch.float64)


def takes_closure(optimizer: Any) -> bool:
    """Whether an optimizer evaluates the loss itself, as LBFGS does: its ``step`` needs a function that does so."""
    kind: Any = type(optimizer)
    return _takes_closure(kind)


@functools.lru_cache(maxsize=64)
def _takes_closure(kind: Any) -> bool:
    step = getattr(kind, "step", None)
    given = inspect.signature(step).parameters.get("closure") if inspect.isfunction(step) else None
    return given is not None and given.default is given.empty


def choose_form(optimizer: Any, fused: bool | Literal["auto"], *, half: bool = False) -> str:
    """Has an optimizer without state step in the best form; it keeps to it when a state is loaded.

    Args:
        optimizer: just made; a form that the user has asked for stays.
        fused: see `torchtrainer.config.TrainSettings`.
        half: gradients come from a forward pass in half precision.

    Returns:
        Why it cannot do what was asked for; empty if it can.
    """
    if fused is False or not isinstance(optimizer, optim.Optimizer) or _chosen(optimizer):
        return ""
    if fused is True or half:
        reason = _why_not_fused(optimizer)
        if not reason:
            _keep(optimizer, {"fused": True, "foreach": False})
        if fused is True or not reason:
            return reason
    if _foreach_pays(optimizer):
        _keep(optimizer, {"foreach": True})
    return ""


def _chosen(optimizer: optim.Optimizer) -> bool:
    return any(group.get(form) is not None for group in optimizer.param_groups for form in ("foreach", "fused"))


def _keep(optimizer: optim.Optimizer, form: dict[str, bool]) -> None:
    def use(one: optim.Optimizer) -> None:
        for group in one.param_groups:
            group.update(form)

    use(optimizer)
    optimizer.register_load_state_dict_post_hook(use)  # a state has the form of the optimizer that it was taken from


def _why_not_fused(optimizer: optim.Optimizer) -> str:
    name = type(optimizer).__name__
    if "fused" not in optimizer.defaults or type(optimizer).__module__.split(".")[0] != "torch":
        return f"{name} has no fused kernel"
    if any(group.get("differentiable") or isinstance(group["lr"], torch.Tensor) for group in optimizer.param_groups):
        return f"{name} has none with differentiable=True or a learning rate that is a tensor"
    if not all(one.is_floating_point() and one.device.type in ("cpu", "cuda") for one in _parameters(optimizer)):
        return f"{name} has one for real numbers on the CPU and on CUDA only"
    if not all(one.is_contiguous() for one in _parameters(optimizer)):
        # torch's for the CPU are slower there, and wrong where a gradient has another layout than its parameter
        return f"{name} has none for parameters with their channels last"
    return ""


def _foreach_pays(optimizer: optim.Optimizer) -> bool:
    parameters = [one for one in _parameters(optimizer) if one.requires_grad]
    return (
        type(optimizer) in FOREACH_GIVES_THE_SAME_BITS
        and len(parameters) >= FOREACH_FROM_PARAMETERS
        and all(one.device.type == "cpu" and one.dtype in _EXACT_TYPES for one in parameters)
        and not any(group.get("differentiable") or group.get("capturable") for group in optimizer.param_groups)
        and sum(one.numel() for one in parameters) <= FOREACH_TO_MEAN_ELEMENTS * len(parameters)
    )


def _parameters(optimizer: optim.Optimizer) -> Iterable[torch.Tensor]:
    return (one for group in optimizer.param_groups for one in group["params"])
