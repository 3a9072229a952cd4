"""The update of a batch: as Lightning makes it by itself, or as the module makes it in ``training_step``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchtrainer.errors import InvalidArgumentError, OperatorUseError
from torchtrainer.lightning.module import step_arguments, step_metrics, training_loss
from torchtrainer.train.components import internals

if TYPE_CHECKING:
    from torchtrainer.lightning.operator import LightningOperator


class HookedOptimizer:
    """What the module gets for an optimizer: it steps with the hooks and the precision of the trainer.

    It is an instance of the optimizer's class too, and has everything else that the optimizer has.

    Args:
        optimizer: the user's.
        stepping: makes the updates.
    """

    def __init__(self, optimizer: Any, stepping: Stepping) -> None:
        self._optimizer = optimizer
        self._stepping = stepping
        self.__class__ = type(type(optimizer).__name__, (HookedOptimizer, type(optimizer)), {})

    @property
    def optimizer(self) -> Any:
        """The user's optimizer."""
        return self._optimizer

    def step(self, closure: Callable[[], Any] | None = None, **options: Any) -> Any:
        """One update.

        Args:
            closure: computes gradients; called before the update, or by an optimizer that calls it itself.
            options: of the optimizer's own ``step``.
        """
        return self._stepping.update(self._optimizer, closure, options)

    @contextmanager
    def toggle_model(self, sync_grad: bool = True) -> Iterator[None]:
        """Inside, only this optimizer's parameters get gradients.

        Args:
            sync_grad: False: gradients are added up on each rank, and not exchanged.
        """
        module = self._stepping.operator.model
        with self._stepping.exchanging(sync_grad):
            module.toggle_optimizer(self)
            yield
            module.untoggle_optimizer(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_optimizer"], name)


class Stepping:
    """Makes the updates of a module's optimizers.

    Args:
        operator: trains the module.
        forward: the module's `ForwardPass`, with what exchanges gradients around it.

    Attributes:
        operator: as given.
        optimizers: as the module gets them.
        updates: how many were made.
    """

    def __init__(self, operator: LightningOperator, forward: nn.Module) -> None:
        self.operator = operator
        self.optimizers = [HookedOptimizer(one, self) for one in operator.optimizers]
        self.updates = 0
        self._forward = forward
        self._exchanges = True
        self._inside = internals(operator)
        for one in operator.optimizers:
            if self._inside.amp.scaler.is_enabled() and isinstance(one, torch.optim.LBFGS):
                raise InvalidArgumentError(
                    "LBFGS evaluates the loss several times in a step, in which losses cannot be scaled: use "
                    'precision="bf16" or "fp32"'
                )

    def run(self, batch: Any, index: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Trains on a batch; returns the metrics, and what ``on_train_batch_end`` gets."""
        raise NotImplementedError

    def update(self, optimizer: Any, closure: Callable[[], Any] | None, options: Mapping[str, Any]) -> Any:
        """One update by an optimizer; see `HookedOptimizer.step`."""
        scaler, timers = self._inside.amp.scaler, self.operator.timers
        if _evaluates(optimizer) and not scaler.is_enabled():
            with timers.record("apply"):
                found = optimizer.step(closure=lambda: self._mean(self._compute(optimizer, closure)), **options)
        else:
            found = self._compute(optimizer, closure)
            if self._skips(closure, found):
                return None
            with timers.record("apply"):
                scaler.step(optimizer, **options)
                scaler.update()
        self.updates += 1
        return found

    @contextmanager
    def exchanging(self, wanted: bool) -> Iterator[None]:
        """Whether gradients are exchanged inside, where the module asks for them itself."""
        before, self._exchanges = self._exchanges, wanted
        try:
            yield
        finally:
            self._exchanges = before

    def _compute(self, optimizer: Any, closure: Callable[[], Any] | None) -> Any:
        """Has a closure compute gradients, and prepares them for an update."""
        with torch.enable_grad():
            found = closure() if closure is not None else None
        self._inside.context.progress.enter("step")
        if not self._skips(closure, found):
            self._inside.amp.scaler.unscale_(optimizer)
            self._prepare(optimizer)
        return found

    def _skips(self, closure: Callable[[], Any] | None, found: Any) -> bool:
        """Whether a closure had no loss: the batch is to be skipped."""
        return False

    def _prepare(self, optimizer: Any) -> None:
        """The gradients are there, whole and not scaled."""
        self.operator.model.on_before_optimizer_step(optimizer)

    def _differentiate(self, loss: torch.Tensor, *arguments: Any, **options: Any) -> None:
        """Backward, with its hooks."""
        module = self.operator.model
        self._inside.context.progress.enter("backward")
        with self.operator.timers.record("grad"):
            module.on_before_backward(loss)
            module.backward(loss, *arguments, **options)
            module.on_after_backward()
            if self._inside.gradient_clock is not None:
                self.operator.timers.push("sync", self._inside.gradient_clock.since_last())

    def _mean(self, loss: Any) -> Any:
        """The loss over all ranks, for an optimizer that decides by it: all of them have to decide alike."""
        operator = self.operator
        if operator.world_size == 1 or loss is None:
            return loss
        samples, value = operator.position.weight(self._inside.steps), torch.as_tensor(loss).detach()
        total, count = self._inside.context.collective.sum([value.item() * samples if samples else 0.0, samples])
        return value.new_tensor(total / count)


class AutomaticStepping(Stepping):
    """Lightning's automatic optimization: ``training_step`` returns the loss, and the rest is done here."""

    def run(self, batch: Any, index: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Trains on a batch; see `Stepping.run`."""
        operator, module = self.operator, self.operator.model
        epoch, optimizer = operator.position.epoch_idx, operator.optimizer
        name = type(module).__name__
        outputs: dict[str, Any] = {}

        def closure() -> Any:
            self._inside.context.progress.enter("forward")
            with operator.timers.record("fwd"), self._inside.amp.autocast():
                output = self._forward(module.training_step, *step_arguments(module.training_step, batch, index))
            loss = training_loss(output, name, operator.world_size)
            module.on_before_zero_grad(optimizer)
            module.optimizer_zero_grad(epoch, index, optimizer)
            if loss is None:
                return None
            self._differentiate(self._inside.amp.scaler.scale(loss))
            outputs.update(output if isinstance(output, Mapping) else {})
            outputs["loss"] = loss.detach()
            return outputs["loss"]

        before = self.updates
        module.optimizer_step(epoch, index, self.optimizers[0], closure)
        operator.position.stepped = self.updates - before
        return step_metrics(outputs, "train_loss"), outputs

    def _skips(self, closure: Callable[[], Any] | None, found: Any) -> bool:
        return closure is not None and found is None

    def _prepare(self, optimizer: Any) -> None:
        super()._prepare(optimizer)
        self.operator.model.configure_gradient_clipping(optimizer, gradient_clip_val=None, gradient_clip_algorithm=None)
        self.operator.clip_gradients()


class ManualStepping(Stepping):
    """Lightning's manual optimization: ``training_step`` calls `backward` and steps its optimizers itself."""

    def __init__(self, operator: LightningOperator, forward: nn.Module) -> None:
        super().__init__(operator, forward)
        self._passes = 0
        self._used = dict.fromkeys(map(id, operator.optimizers), 0)
        if isinstance(forward, DistributedDataParallel):
            for one in operator.optimizers:
                if isinstance(one, torch.optim.Optimizer):
                    one.register_step_pre_hook(self._check)

    def run(self, batch: Any, index: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """Trains on a batch; see `Stepping.run`."""
        operator, module = self.operator, self.operator.model
        if isinstance(self._forward, DistributedDataParallel):
            with self._forward.no_sync():  # takes over the buffers of rank 0, as before each forward pass
                self._forward(_nothing)
        self._inside.context.progress.enter("forward")
        with operator.timers.record("fwd"), self._inside.amp.autocast():
            output = module.training_step(*step_arguments(module.training_step, batch, index))
        outputs = dict(output) if isinstance(output, Mapping) else {} if output is None else {"loss": output}
        if isinstance(outputs.get("loss"), torch.Tensor):
            outputs["loss"] = outputs["loss"].detach()
        return step_metrics(outputs, "train_loss"), outputs

    def backward(self, loss: Any, *arguments: Any, **options: Any) -> None:
        """Takes the place of the module's ``manual_backward``: the gradients are exchanged when it returns.

        Args:
            loss: with a graph.
            arguments, options: of the module's ``backward``.
        """
        self._passes += self._exchanges
        scaled = self._inside.amp.scaler.scale(loss)
        if self._exchanges and isinstance(self._forward, DistributedDataParallel):
            self._forward.require_forward_param_sync = False  # the graph may need the buffers as they are
            scaled = self._forward(_same, scaled)
        self._differentiate(scaled, *arguments, **options)

    def _check(self, optimizer: Any, *_: Any) -> None:
        """No update without an exchange before it."""
        if self._used[id(optimizer)] == self._passes and not _evaluates(optimizer):
            raise OperatorUseError(
                f"{type(optimizer).__name__} was stepped without a self.manual_backward(loss) since its latest step, so that its "
                f"gradients are those of rank {self.operator.world_rank} alone: call self.manual_backward(loss) in place of "
                "loss.backward()"
            )
        self._used[id(optimizer)] = self._passes


def _evaluates(optimizer: Any) -> bool:
    """Whether an optimizer is to call the closure itself: LBFGS, and those of the user's own that take one."""
    kind = type(optimizer)
    if kind.__module__.startswith("torch.optim."):
        return isinstance(optimizer, torch.optim.LBFGS)
    return "closure" in inspect.signature(kind.step).parameters


def _same(loss: torch.Tensor) -> torch.Tensor:
    return loss


def _nothing() -> None:
    return None
