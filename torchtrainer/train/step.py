"""One step: a batch to the device, forward, loss, backward, update; and the share of a rank's gradient in an uneven step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchtrainer.comm.uneven import UnevenStep, collectives_made
from torchtrainer.errors import InvalidArgumentTypeError, OperatorUseError
from torchtrainer.train.components import internals
from torchtrainer.train.data_passes import MicroBatches, RankBatch
from torchtrainer.train.formats import follow

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator

TARGET_KEYS = ("target", "targets", "label", "labels", "y")
"""Where the built-in step looks for the target in a batch that is a dict, in this order."""


def train_batch(operator: TrainingOperator, batch: Any, info: Mapping[str, Any] | None) -> dict[str, Any]:
    """The built-in training step; see `TrainingOperator.train_batch`."""
    stats = forward_backward(operator, batch)
    internals(operator).context.progress.enter("step")
    update(operator, info or {})
    return stats


def forward_backward(operator: TrainingOperator, batch: Any) -> dict[str, Any]:
    """The first part of a step: the gradients of a batch; returns its loss and how many samples are behind it."""
    if not isinstance(batch, MicroBatches):
        return _gradients(operator, batch)
    return _accumulated(operator, batch.parts)


def _accumulated(operator: TrainingOperator, parts: Sequence[RankBatch]) -> dict[str, Any]:
    """The gradients of several batches, each by its share of the samples; what was only lent to this rank weighs nothing."""
    components = internals(operator).components
    if components is None or not components.sharding.in_step:
        parts = [part for part in parts if part.size] or parts[-1:]
    whole, loss, samples = sum(part.size for part in parts), 0.0, 0
    for place, part in enumerate(parts):
        weight = part.size / whole if whole else 1.0
        with _exchanging(operator, last=place + 1 == len(parts)):
            stats = _gradients(operator, part.data, weight=weight, clear=place == 0)
        if weight:
            loss = loss + weight * stats["train_loss"]
            samples += stats["num_samples"]
    return {"train_loss": loss, "num_samples": samples}


@contextmanager
def _exchanging(operator: TrainingOperator, *, last: bool) -> Iterator[None]:
    """Has a backward pass exchange the gradients that were added up only if it is the last one of a step."""
    model = operator.model
    if last or not isinstance(model, DistributedDataParallel):
        yield
        return
    with model.no_sync():
        yield


def _gradients(operator: TrainingOperator, batch: Any, *, weight: float = 1.0, clear: bool = True) -> dict[str, Any]:
    """Forward and backward of one batch, whose gradients count by a weight; ``clear``: those that were there are gone."""
    model, optimizer = required(operator, "model", "train_batch"), required(operator, "optimizer", "train_batch")
    criterion = required(operator, "criterion", "train_batch")
    inside, timers = internals(operator), operator.timers
    progress, scaler = inside.context.progress, inside.amp.scaler
    if inside.bare_forward and isinstance(model, DistributedDataParallel) and not _has_hooks(model):
        model = model.module
    with timers.record("copy"):
        positional, named, target = _inputs(operator, batch)
    progress.enter("forward")
    with timers.record("fwd"), inside.amp.autocast():
        loss = criterion(model(*positional, **named), target)
    progress.enter("backward")
    with timers.record("grad"):
        if clear:
            optimizer.zero_grad()
        scaler.scale(loss if weight == 1.0 else loss * weight).backward()
        if inside.gradient_clock is not None and not inside.bare_forward:
            timers.push("sync", inside.gradient_clock.since_last())
    return {"train_loss": reading(loss), "num_samples": samples_in(target)}


def _inputs(operator: TrainingOperator, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Positional inputs, named inputs and target of a batch, on the device and in the memory format of the models."""
    positional, named, target = split_batch(to_device(batch, operator.device))
    components = internals(operator).components
    if components is not None and components.channels_last:
        positional = tuple(follow(one) for one in positional)
        named = {name: follow(one) for name, one in named.items()}
    return positional, named, target


def _has_hooks(model: nn.Module) -> bool:
    """Whether somebody wants to see the calls of this very module."""
    hooks = (model._forward_hooks, model._forward_pre_hooks, model._backward_hooks, model._backward_pre_hooks)
    return any(hooks)


def update(operator: TrainingOperator, info: Mapping[str, Any]) -> None:
    """The second part of a step: the optimizer's, by the gradients that are there; ``info`` is for `after_step`."""
    optimizer, scaler = operator.optimizer, internals(operator).amp.scaler
    with operator.timers.record("apply"):
        scaler.unscale_(optimizer)
        operator.clip_gradients()
        scaler.step(optimizer)
        scaler.update()
        operator.after_step(dict(info))


def validate_batch(operator: TrainingOperator, batch: Any) -> dict[str, Any]:
    """The built-in validation step; see `TrainingOperator.validate_batch`."""
    model, criterion = required(operator, "model", "validate_batch"), required(operator, "criterion", "validate_batch")
    positional, named, target = _inputs(operator, batch)
    internals(operator).context.progress.enter("forward")
    with operator.timers.record("eval_fwd"), internals(operator).amp.autocast():
        output = model(*positional, **named)
        loss = criterion(output, target)
    stats = {"val_loss": reading(loss), "num_samples": samples_in(target)}
    if _classes(output, target):
        correct = output.argmax(dim=1) == target
        stats["val_accuracy"] = reading(correct.sum()) / max(correct.numel(), 1)
    return stats


def required(operator: TrainingOperator, name: str, hook: str) -> Any:
    """An attribute of the operator that a built-in hook needs, or a RuntimeError that says what to set."""
    value = getattr(operator, name, None)
    if value is None:
        kind = "validation" if hook.startswith("validate") else "training"
        raise OperatorUseError(
            f"Either set self.{name} in setup function or override this method to implement a custom {kind} loop: "
            f"the built-in {hook} of {type(operator).__name__} needs self.{name}, which is not set"
        )
    return value


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor on the device; tuples, lists and dicts keep their shape, other things stay as they are.

    Copies to a GPU are queued behind the work there; from pinned memory they do not make the host wait.
    """
    if device.type == "cpu":
        return batch
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=device.type == "cuda")
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def split_batch(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Positional inputs, named inputs and target of a batch.

    ``(*features, target)`` gives positional inputs. A dict gives its target by one of `TARGET_KEYS`; the one other entry
    is the input, and several other entries are named inputs.

    Raises:
        InvalidArgumentTypeError: the batch has another form.
    """
    if isinstance(batch, Mapping):
        key = next((name for name in TARGET_KEYS if name in batch), None)
        features = {name: value for name, value in batch.items() if name != key}
        if key is not None and features:
            if len(features) == 1:
                return tuple(features.values()), {}, batch[key]
            return (), features, batch[key]
        found = f"a dict with the keys {list(batch)}"
    elif isinstance(batch, list | tuple) and len(batch) >= 2:
        return tuple(batch[:-1]), {}, batch[-1]
    else:
        found = (
            f"{type(batch).__name__} of length {len(batch)}"
            if isinstance(batch, list | tuple)
            else type(batch).__name__
        )
    raise InvalidArgumentTypeError(
        f"the built-in step takes batches (*features, target), or dicts with the target under one of "
        f"{', '.join(TARGET_KEYS)}; the loader gave {found}. Override train_batch and validate_batch for other batches"
    )


def samples_in(target: Any) -> int:
    """Number of samples of a batch: the first dimension of the first tensor in its target."""
    while isinstance(target, Mapping | list | tuple) and target:
        target = next(iter(target.values())) if isinstance(target, Mapping) else target[0]
    shape: tuple[int, ...] = tuple(getattr(target, "shape", ()))
    return shape[0] if shape else 1


def reading(value: torch.Tensor) -> Any:
    """A 0-d tensor as a number on the CPU; on other devices detached, so that nobody waits for the device now."""
    return value.item() if value.device.type == "cpu" else value.detach()


def _classes(output: Any, target: Any) -> bool:
    """Whether outputs are scores (N, C, ...) of the classes in the target (N, ...)."""
    if not isinstance(output, torch.Tensor) or not isinstance(target, torch.Tensor):
        return False
    whole = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
    return whole and output.dim() >= 2 and output.shape[:1] + output.shape[2:] == target.shape


class GradientShare:
    """Makes the exchange's mean over the ranks a mean over the samples, in steps in which the ranks have unequal shares.

    The gradient of a rank with n of B samples is multiplied by n * W / B before it is averaged over the W ranks; by zeros
    for a rank that lent itself a batch. Steps with equal shares are left alone and cost nothing. This is right for every
    loss that is a mean over the batch, and for every exchange that averages: DDP, or the user's own. What is weighed is what
    ``backward()`` adds to ``grad``: ``torch.autograd.grad`` gives the gradients of the rank's own loss in every step.

    Args:
        parameters: gives the trainable parameters, when they are needed.
        world_size: number of ranks.
    """

    def __init__(self, parameters: Callable[[], Iterable[nn.Parameter]], world_size: int) -> None:
        self._parameters = parameters
        self._world_size = world_size
        self._hooks: list[Any] = []
        self._nodes: list[Any] = []

    def apply(self, size: int, global_size: int) -> None:
        """Weighs the gradients of the coming step.

        Args:
            size: samples of this rank in the step.
            global_size: samples of all ranks in the step.
        """
        if self._world_size == 1 or global_size <= 0 or size * self._world_size == global_size:
            return
        scale = size * self._world_size / global_size
        # not g * 0: an infinite gradient of a lent batch would become NaN
        weigh = (lambda gradient: gradient * scale) if size else torch.zeros_like

        def weighed(gradients: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
            return tuple(None if one is None else weigh(one) for one in gradients)

        # On the node that adds to grad, not on the parameter, whose hooks torch.autograd.grad runs too. The nodes are kept:
        # torch makes new ones, without hooks, where nobody has them.
        self._nodes = [torch.autograd.graph.get_gradient_edge(one).node for one in self._parameters()]
        self._hooks = [node.register_prehook(weighed) for node in self._nodes]

    def remove(self) -> None:
        """Leaves the gradients alone again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._nodes.clear()


class UnevenWatch:
    """Has collectives of the user's fail with a word that helps, in steps of a call in which ranks have unequal numbers of samples.

    Only if this call has made collectives before, or may not have had the chance to. Compiled models are not watched: they would be
    run as they were before they were compiled.

    Args:
        operator: whose step it is.
        training: ranks without samples take part with borrowed ones.
    """

    def __init__(self, operator: TrainingOperator, *, training: bool) -> None:
        self._off = bool(internals(operator).context.settings.compile)
        self._training = training
        self._first = True
        self._made = collectives_made()
        self._mode: UnevenStep | None = None

    def begin(self, batch: RankBatch) -> None:
        """The step of a batch begins."""
        first, self._first = self._first, False
        if batch.even or self._off or not (first or collectives_made() > self._made):
            return
        samples = f"this rank has {batch.size} of the {batch.global_size} samples of this step"
        missing = 0 if self._training else batch.without
        if missing:
            samples += f" of a validation, and {missing} {'rank has' if missing == 1 else 'ranks have'} none"
        self._mode = UnevenStep(samples, missing=missing)
        self._mode.__enter__()  # type: ignore[no-untyped-call]  # torch has no types here

    def end(self) -> None:
        """The step is over."""
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # nor here


class GradientClock:
    """Knows when the last gradient of a backward pass was there; what follows is waiting for the exchange.

    Only while a call is profiled. On GPUs the times are those at which the work is done, not queued.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._last: float | torch.cuda.Event | None = None
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(self._note)  # type: ignore[no-untyped-call]  # nor here
            for parameter in parameters
        ]

    def since_last(self) -> float:
        """Seconds since the last gradient; 0.0 if there was none since it was last asked."""
        last, self._last = self._last, None
        if last is None:
            return 0.0
        if isinstance(last, float):
            return time.perf_counter() - last
        now = _event()
        now.synchronize()
        return float(last.elapsed_time(now)) / 1e3

    def remove(self) -> None:
        """Stops watching."""
        for hook in self._hooks:
            hook.remove()

    def _note(self, parameter: torch.Tensor) -> None:
        self._last = _event() if parameter.is_cuda else time.perf_counter()


def _event() -> torch.cuda.Event:
    """Tells when the GPU is done with what was queued so far."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # nor here
    event.record()
    return event
