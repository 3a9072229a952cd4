"""One step: a batch to the device, forward, loss, backward, update; and the share of a rank's gradient in an uneven step."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchtrainer.comm.group import GroupCollective
from torchtrainer.errors import InvalidArgumentTypeError, OperatorUseError
from torchtrainer.train.batches import holds_classes, parameters_of, samples_in, split_batch, to_device
from torchtrainer.train.components import internals
from torchtrainer.train.data_passes import MicroBatches, RankBatch
from torchtrainer.train.formats import follow
from torchtrainer.train.losses import count, counted_classes, tells_count
from torchtrainer.train.metrics import weight_key
from torchtrainer.train.optimizers import takes_closure

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator


def train_batch(operator: TrainingOperator, batch: Any, info: Mapping[str, Any] | None) -> dict[str, Any]:
    """The built-in training step; see `TrainingOperator.train_batch`."""
    if takes_closure(getattr(operator, "optimizer", None)):
        stats = _step_by_closure(operator, batch)
        operator.after_step(dict(info or {}))
        return stats
    stats = forward_backward(operator, batch)
    internals(operator).context.progress.enter("step")
    update(operator, info or {})
    return stats


def _step_by_closure(operator: TrainingOperator, batch: Any) -> dict[str, Any]:
    """A step whose optimizer evaluates the loss of the batch as often as it likes; all ranks get the same loss, and do alike."""
    inside, found = internals(operator), list[dict[str, Any]]()
    if inside.amp.scaler.is_enabled():
        raise InvalidArgumentTypeError(
            f'{type(operator.optimizer).__name__} evaluates the loss itself, which precision="fp16" does not allow, as it scales '
            'the loss: use precision="bf16" or "fp32"'
        )

    def closure() -> torch.Tensor:
        inside.loss_here, inside.loss_of_all = 0.0, None
        found.append(forward_backward(operator, batch))
        operator.clip_gradients()
        return _loss_of_all(operator, found[-1])

    try:
        with operator.timers.record("apply"):
            operator.optimizer.step(closure)
    finally:
        inside.loss_here = None
    return found[0]


def _loss_of_all(operator: TrainingOperator, stats: dict[str, Any]) -> torch.Tensor:
    """The loss of a step over all ranks; where gradients go through a process group, a collective call."""
    inside = internals(operator)
    loss, collective = torch.as_tensor(stats["train_loss"], device=operator.device).double(), inside.context.collective
    if inside.loss_of_all is not None:
        return torch.as_tensor(inside.loss_of_all, dtype=torch.float64)
    if not isinstance(collective, GroupCollective) or collective.world_size == 1:
        return loss
    batch = inside.steps.current if inside.steps is not None else None
    stands = stats.get(weight_key("train_loss"), stats["num_samples"]) if batch is None or batch.size else 0.0
    whole = collective.total(torch.stack([loss * stands, torch.ones_like(loss) * stands]))
    return whole[0] / whole[1]


def forward_backward(operator: TrainingOperator, batch: Any) -> dict[str, Any]:
    """The first part of a step: the gradients of a batch; returns its loss and how many samples are behind it."""
    internals(operator).loss_count = None
    if not isinstance(batch, MicroBatches):
        return _gradients(operator, batch)
    return _accumulated(operator, batch.parts)


def _accumulated(operator: TrainingOperator, parts: Sequence[RankBatch]) -> dict[str, Any]:
    """The gradients of several batches, each by what its loss counts; what was only lent to this rank weighs nothing."""
    components, criterion = internals(operator).components, required(operator, "criterion", "train_batch")
    if components is None or not components.sharding.in_step:
        parts = [part for part in parts if part.size] or parts[-1:]
    counts: list[Any] = [part.size for part in parts]
    if told := tells_count(criterion):
        found = [count(criterion, to_device(split_batch(part.data)[2], operator.device)) for part in parts]
        told = all(one is not None for one in found)
        counts = [float(one) if part.size else 0.0 for one, part in zip(found, parts, strict=True)] if told else counts
    whole, loss, samples = sum(counts), 0.0, 0
    scale = _share_of_loss(operator, whole if told else None)
    for place, (part, counted) in enumerate(zip(parts, counts, strict=True)):
        weight = counted / whole if whole else 1.0
        with _exchanging(operator, last=place + 1 == len(parts)):
            stats = _gradients(operator, part.data, weight=weight * scale, clear=place == 0)
        if weight:
            loss = loss + weight * stats["train_loss"]
            samples += stats["num_samples"]
    return _stats("train_loss", loss, samples, whole if told else None)


def _stats(name: str, loss: Any, samples: int, counted: Any) -> dict[str, Any]:
    """A loss and what is behind it: samples, and what it counts if that is something else."""
    stats = {name: loss, "num_samples": samples}
    if counted is not None and (isinstance(counted, torch.Tensor) or counted != samples):
        stats[weight_key(name)] = counted
    return stats


def _share_of_loss(operator: TrainingOperator, counted: Any) -> Any:
    """What the loss of a step is multiplied with, so that ranks weigh by what their losses count, not by their samples.

    One where an exchange through memory takes the weight along (`Internals.weighs`), and where ranks count alike. Else the counts
    of all ranks are added up here: a collective call, in which the number stays on the device.

    Args:
        operator: of this rank.
        counted: by the loss of this rank's step; None: samples.
    """
    inside = internals(operator)
    inside.loss_count, collective = counted, inside.context.collective
    if counted is None or inside.weighs or not isinstance(collective, GroupCollective) or collective.world_size == 1:
        return 1.0
    batch = inside.steps.current if inside.steps is not None else None
    size, global_size = (batch.size, batch.global_size) if batch is not None else (1, collective.world_size)
    whole = reading(collective.total(torch.as_tensor(counted if size else 0.0, device=operator.device).double()))
    return counted * global_size / (size * whole) if size and (isinstance(whole, torch.Tensor) or whole) else 1.0


@contextmanager
def _exchanging(operator: TrainingOperator, *, last: bool) -> Iterator[None]:
    """Has a backward pass exchange the gradients that were added up only if it is the last one of a step."""
    model = operator.model
    if last or not isinstance(model, DistributedDataParallel):
        yield
        return
    with model.no_sync():
        yield


def _gradients(operator: TrainingOperator, batch: Any, *, weight: Any = None, clear: bool = True) -> dict[str, Any]:
    """Forward and backward of one batch, whose gradients count by a weight; ``clear``: those that were there are gone.

    ``weight``: of one of several batches; None: it is the only one of its step.
    """
    model, optimizer = required(operator, "model", "train_batch"), required(operator, "optimizer", "train_batch")
    criterion = required(operator, "criterion", "train_batch")
    inside, timers = internals(operator), operator.timers
    progress, scaler = inside.context.progress, inside.amp.scaler
    if inside.bare_forward and isinstance(model, DistributedDataParallel) and not _has_hooks(model):
        model = model.module
    with timers.record("copy"):
        positional, named, target = _inputs(operator, batch)
    progress.enter("forward")
    scale, counted = weight, None
    if weight is None:  # the batch is all of the step
        counted = count(criterion, target)
        scale = _share_of_loss(operator, counted)
    with timers.record("fwd"), inside.amp.autocast():
        loss = _one_number(criterion(model(*positional, **named), target), criterion)
    if inside.loss_here is not None:
        inside.loss_here += float(loss.detach()) * (1.0 if weight is None else float(weight))
    progress.enter("backward")
    with timers.record("grad"):
        if clear:
            optimizer.zero_grad()
        scaler.scale(_scaled(loss, scale)).backward()  # type: ignore[no-untyped-call]  # torch has no types here
        if inside.gradient_clock is not None and not inside.bare_forward:
            timers.push("sync", inside.gradient_clock.since_last())
    return _stats("train_loss", reading(loss), samples_in(target), counted)


def stands_for(operator: TrainingOperator, batch: RankBatch | None) -> dict[str, float]:
    """What the gradients of a step stand for on this rank: arguments of `torchtrainer.comm.shared_memory.SharedMemoryExchange.put`.

    A sample weighs what the loss counts in it on average, if the loss tells that.

    Args:
        operator: of this rank, after its backward pass.
        batch: of the step; None: nobody knows.
    """
    counted, internals(operator).loss_count = internals(operator).loss_count, None
    samples = 1 if batch is None else batch.size
    return {
        "weight": 1.0 if counted is None or not samples else counted / samples,
        "samples": float(samples),
        "loss": internals(operator).loss_here or 0.0,
    }


def _scaled(loss: torch.Tensor, scale: Any) -> torch.Tensor:
    if isinstance(scale, torch.Tensor):
        return loss * scale.to(loss.dtype)
    return loss if scale == 1.0 else loss * scale


def _one_number(loss: Any, criterion: Any) -> torch.Tensor:
    """The loss, which has to be one number.

    Raises:
        InvalidArgumentTypeError: it is not.
    """
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:
        return loss
    found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
    name = criterion if isinstance(criterion, nn.Module) else getattr(criterion, "__qualname__", criterion)
    raise InvalidArgumentTypeError(
        f"the built-in step needs a loss that is one number, and {name} returned {found}: use reduction='mean', take the mean "
        "in loss_creator's function, or override train_batch and validate_batch"
    )


def _inputs(operator: TrainingOperator, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Positional inputs, named inputs and target of a batch, on the device and in the memory format of the models."""
    positional, named, target = split_batch(
        to_device(batch, operator.device),
        parameters_of(getattr(operator, "model", None)) if isinstance(batch, Mapping) else (),
    )
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
        loss = _one_number(criterion(output, target), criterion)
    stats = _stats("val_loss", reading(loss), samples_in(target), count(criterion, target))
    if holds_classes(output, target):
        counts = counted_classes(criterion, target)
        correct, counted = reading(((output.argmax(dim=1) == target) & counts).sum()), reading(counts.sum())
        stats["val_accuracy"] = correct / (
            max(counted, 1) if not isinstance(counted, torch.Tensor) else counted.clamp(min=1)
        )
        if isinstance(counted, torch.Tensor) or counted != target.numel():
            stats[weight_key("val_accuracy")] = counted
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


def reading(value: torch.Tensor) -> Any:
    """A 0-d tensor as a number on the CPU; on other devices detached, so that nobody waits for the device now."""
    return value.item() if value.device.type == "cpu" else value.detach()


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
