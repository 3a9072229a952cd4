"""Calls the user's hooks, whose signatures differ: each gets the arguments that it takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator


def bind_hook(hook: Callable[..., Any], offered: tuple[str, ...]) -> Callable[..., Any]:
    """Makes a hook callable as ``bound(first, {name: value})``, whatever of ``offered`` its signature takes.

    The first argument goes by position. The names in ``offered`` go by keyword where the hook has them; the first of them
    goes by position to a second required parameter with a name of its own.
    """
    try:
        parameters = list(inspect.signature(hook).parameters.values())
    except (TypeError, ValueError):  # a callable written in C
        return lambda first, values: hook(first, **values)
    open_ended = any(one.kind is one.VAR_KEYWORD for one in parameters)
    named = {one.name for one in parameters[1:] if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    own_name = None
    if offered[0] not in named and len(parameters) > 1:
        second = parameters[1]
        positional = second.kind in (second.POSITIONAL_ONLY, second.POSITIONAL_OR_KEYWORD)
        if positional and second.default is second.empty and second.name not in offered:
            own_name = offered[0]
    keywords = [name for name in offered if name != own_name and (open_ended or name in named)]

    def bound(first: Any, values: Mapping[str, Any]) -> Any:
        positional = (first,) if own_name is None else (first, values[own_name])
        return hook(*positional, **{name: values[name] for name in keywords})

    return bound


def epoch_info(info: Mapping[str, Any] | None, operator: TrainingOperator, num_steps: int | None) -> dict[str, Any]:
    """What a training hook is told: the user's own keys, and what every release of RaySGD, or its first one, says there."""
    told = {
        "scheduler_step": operator.scheduler_step_freq,
        "__num_steps__": num_steps,
        "__use_fp16__": operator.use_fp16,
    }
    return {**(info or {}), **told}


def batch_info(info: Mapping[str, Any], batch_idx: int, global_step: int) -> dict[str, Any]:
    """What a batch hook gets: the user's own keys; the names of the position are always ours."""
    return {**info, "batch_idx": batch_idx, "global_step": global_step}
