"""When learning rate schedulers step: after an operator's batches or passes, in the built-in loops."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from torchtrainer.errors import InvalidArgumentTypeError, OperatorUseError
from torchtrainer.train.components import internals, optimizers_of

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator
    from torchtrainer.train.loop import StepIterator


class SchedulerSteps:
    """Steps the schedulers in one call of the built-in loop, as ``scheduler_step_freq`` says. A context manager.

    With ``batch`` a scheduler follows its optimizer: it steps once after each batch in which that one has stepped, so neither
    while a hook adds up gradients, nor where the loss scaler leaves an update out. With ``epoch`` it steps once per completed pass.

    Args:
        operator: whose schedulers they are.
        steps: the iterator of the call, which counts passes; None: nobody counts them.
    """

    def __init__(self, operator: TrainingOperator, steps: StepIterator | None) -> None:
        self._operator = operator
        self._steps = steps
        self._frequency = operator.scheduler_step_freq
        self._registered: set[int] = set()
        self._stepped: set[int] = set()
        self._hooks: list[Any] = []

    def __enter__(self) -> SchedulerSteps:
        if self._frequency == "batch":
            self._registered = {id(one) for one in optimizers_of(self._operator) if self._watch(one)}
            for scheduler in schedulers_of(self._operator):
                if id(getattr(scheduler, "optimizer", None)) not in self._registered:
                    self._watch(getattr(scheduler, "optimizer", None))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        if kind is None:
            self.before_batch()

    def before_batch(self) -> None:
        """A batch begins, or the call ends: passes that were completed before have had no step yet."""
        if self._frequency == "epoch" and self._steps is not None:
            while self._steps.passes_scheduled < self._steps.passes_completed:
                for scheduler in schedulers_of(self._operator):
                    self._step(scheduler)
                self._steps.passes_scheduled += 1

    def after_batch(self) -> None:
        """A batch has been trained on."""
        if self._frequency == "batch":
            for scheduler in schedulers_of(self._operator):
                if self._has_stepped(getattr(scheduler, "optimizer", None)):
                    self._step(scheduler)
            self._stepped.clear()

    def _watch(self, optimizer: Any) -> bool:
        """Has the steps of an optimizer noted; False: it has no hooks, as it is none of torch's, or only looks like one."""
        try:
            self._hooks.append(optimizer.register_step_post_hook(self._note))
        except AttributeError:
            return False
        return True

    def _note(self, optimizer: Any, *_: Any) -> None:
        self._stepped.add(id(optimizer))

    def _has_stepped(self, optimizer: Any) -> bool:
        """Whether an optimizer has stepped in this batch; one that is not registered belongs to one that is."""
        if id(optimizer) in self._registered:
            return id(optimizer) in self._stepped
        return bool(self._stepped) or not self._hooks

    def _step(self, scheduler: Any) -> None:
        if isinstance(scheduler, ReduceLROnPlateau):
            raise InvalidArgumentTypeError(
                f"ReduceLROnPlateau steps by a metric, which scheduler_step_freq={self._frequency!r} does not provide; "
                "use "
                f'scheduler_step_freq="manual" and call update_scheduler(metric) on the trainer'
            )
        scheduler.step()


def step_by_metric(operator: TrainingOperator, metric: float) -> None:
    """Calls ``step(metric)`` of every scheduler.

    Raises:
        OperatorUseError: there is none.
    """
    schedulers = schedulers_of(operator)
    if not schedulers:
        raise OperatorUseError(
            f"update_scheduler({metric!r}): {type(operator).__name__} has no scheduler; pass scheduler_creator= to "
            f"TorchTrainer, or schedulers= to self.register in setup"
        )
    for scheduler in schedulers:
        scheduler.step(metric)


def schedulers_of(operator: TrainingOperator) -> list[Any]:
    """Every scheduler: the registered ones, and one that the user only put in ``self.scheduler``."""
    components = internals(operator).components
    found = list(components.schedulers) if components is not None else []
    own = getattr(operator, "scheduler", None)
    if own is not None and not isinstance(own, list | tuple) and not any(own is known for known in found):
        found.append(own)
    return found
