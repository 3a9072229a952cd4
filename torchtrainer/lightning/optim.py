"""What a Lightning module's ``configure_optimizers`` returned, in one form, and when its schedulers are stepped."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch.optim.lr_scheduler import ReduceLROnPlateau

from torchtrainer.errors import InvalidArgumentError
from torchtrainer.train.components import as_list, check_optimizers, check_schedulers

Interval = Literal["epoch", "step"]
_KEYS = ("scheduler", "interval", "frequency", "monitor", "strict", "reduce_on_plateau", "name")


@dataclass(kw_only=True)
class Schedule:
    """One learning rate scheduler and when it is stepped; fields are named as in Lightning's own record.

    Attributes:
        scheduler: the user's scheduler.
        interval: what is counted: training passes or optimizer steps.
        frequency: how many of them lie between two steps of the scheduler.
        monitor: the metric that a plateau scheduler is stepped with.
        strict: a metric that validation does not have is an error.
        reduce_on_plateau: stepped with a metric.
        name: given by the user for their own use.
        waiting: due, and stepped as soon as there is a new value of the metric.
    """

    scheduler: Any
    interval: Interval = "epoch"
    frequency: int = 1
    monitor: str | None = None
    strict: bool = True
    reduce_on_plateau: bool = False
    name: str | None = None
    waiting: bool = False


def read_optimizers(
    returned: Any, *, who: str, default_interval: Interval, automatic: bool
) -> tuple[list[Any], list[Schedule]]:
    """The optimizers and schedulers in any of the forms that ``configure_optimizers`` may return.

    Args:
        returned: an optimizer, a list of them, ``(optimizers, schedulers)``, a dict with ``optimizer`` and ``lr_scheduler``,
            or a list of such dicts.
        who: the module's name, for errors.
        default_interval: for schedulers that state none.
        automatic: optimizer and schedulers are stepped here, else by the module.

    Raises:
        InvalidArgumentTypeError: not an optimizer or scheduler.
        InvalidArgumentError: several optimizers that nobody would step, or a scheduler dict that cannot work.
    """
    optimizers, given = _split(returned)
    check_optimizers(optimizers, f"what configure_optimizers of {who} returns")
    if automatic and len(optimizers) > 1:
        raise InvalidArgumentError(
            f"configure_optimizers of {who} returned {len(optimizers)} optimizers, which Lightning takes only with manual "
            "optimization: set self.automatic_optimization = False in __init__, and step them in training_step "
            "(a, b = self.optimizers(); self.manual_backward(loss); a.step()). Or return one optimizer; it may have several "
            "parameter groups"
        )
    schedules = [_read_schedule(one, who, default_interval) for one in given]
    for schedule in schedules if automatic else ():
        _check_schedule(schedule, f"the scheduler that configure_optimizers of {who} returns")
    return optimizers, schedules


def _split(returned: Any) -> tuple[list[Any], list[dict[str, Any]]]:
    """Optimizers, and schedulers as dicts."""
    if isinstance(returned, Mapping):
        return _split([returned])
    if not isinstance(returned, list | tuple):
        return [returned], []
    if returned and all(isinstance(one, Mapping) for one in returned):
        given = [
            {"monitor": one.get("monitor"), **_as_dict(one["lr_scheduler"])}
            for one in returned
            if one.get("lr_scheduler") is not None
        ]
        return [one.get("optimizer") for one in returned], given
    if len(returned) == 2 and isinstance(returned[0], list | tuple):
        return list(returned[0]), [_as_dict(one) for one in as_list(returned[1])]
    return list(returned), []


def _as_dict(scheduler: Any) -> dict[str, Any]:
    return dict(scheduler) if isinstance(scheduler, Mapping) else {"scheduler": scheduler}


def _read_schedule(given: dict[str, Any], who: str, default_interval: Interval) -> Schedule:
    where = f"the scheduler that configure_optimizers of {who} returns"
    unknown = [key for key in given if key not in _KEYS]
    if unknown:
        warnings.warn(f"{where} has unknown entries: {unknown}; known are {', '.join(_KEYS)}", stacklevel=2)
    check_schedulers(given.get("scheduler"), where)
    known = {key: value for key, value in given.items() if key in _KEYS}
    known.setdefault("interval", default_interval)
    known.setdefault("reduce_on_plateau", isinstance(given["scheduler"], ReduceLROnPlateau))
    return Schedule(**known)


def _check_schedule(schedule: Schedule, where: str) -> None:
    if schedule.interval not in ("epoch", "step"):
        raise InvalidArgumentError(f'{where} must have the interval "epoch" or "step", got {schedule.interval!r}')
    if not isinstance(schedule.frequency, int) or schedule.frequency < 1:
        raise InvalidArgumentError(
            f"{where} must have a whole number of at least 1 as frequency, got {schedule.frequency!r}"
        )
    if schedule.reduce_on_plateau and schedule.monitor is None:
        raise InvalidArgumentError(
            f'{where} is a {type(schedule.scheduler).__name__}, which is stepped with a metric: return {{"optimizer": ..., '
            f'"lr_scheduler": {{"scheduler": ..., "monitor": "val_loss"}}}} with the name of the metric'
        )


class Schedules:
    """Steps a module's schedulers when their dicts say so; every rank does it alike, with the same metrics.

    Args:
        members: the schedulers, in the order given.
        step: ``(scheduler, metric or None)``, the module's own hook for it.
        active: False: nothing is stepped here, the user does it.
    """

    def __init__(self, members: Sequence[Schedule], step: Callable[[Any, Any], Any], *, active: bool) -> None:
        self.members = list(members)
        self._step = step
        self._active = active

    def after_step(self, batch_idx: int) -> None:
        """An optimizer step is complete: those without a metric are stepped.

        Args:
            batch_idx: its place in the pass, from 0.
        """
        for one in self._due("step", batch_idx):
            if not one.reduce_on_plateau:
                self._step(one.scheduler, None)

    def after_batch(self, batch_idx: int, latest: Callable[[], Mapping[str, Any]]) -> None:
        """The hooks of a batch are over too: those with a metric are stepped.

        Args:
            batch_idx: its place in the pass, from 0.
            latest: gives the latest metrics over all ranks; every rank calls it alike.
        """
        due = [one for one in self._due("step", batch_idx) if one.reduce_on_plateau]
        if not due:
            return
        metrics = latest()
        for one in due:
            one.waiting = True
        self._offer(metrics)
        self._refuse_waiting("the latest training step", metrics)

    def after_pass(self, epoch_idx: int) -> None:
        """The last batch of a training pass is complete: those without a metric are stepped.

        Args:
            epoch_idx: index of the pass, from 0.
        """
        for one in self._due("epoch", epoch_idx):
            if not one.reduce_on_plateau:
                self._step(one.scheduler, None)

    def after_pass_hooks(self, epoch_idx: int, metrics: Mapping[str, Any]) -> None:
        """The hooks of a training pass are over too: those with a metric are due.

        Args:
            epoch_idx: index of the pass, from 0.
            metrics: what it came to over all ranks. One whose metric is not among them waits for the next validation.
        """
        for one in self._due("epoch", epoch_idx):
            one.waiting = one.reduce_on_plateau
        self._offer(metrics)

    def after_validation(self, metrics: Mapping[str, Any]) -> None:
        """A validation is complete: schedulers that wait for one of its metrics are stepped, once for each training pass.

        Raises:
            InvalidArgumentError: a scheduler waits for a metric that neither training nor validation has.
        """
        self._offer(metrics)
        self._refuse_waiting("the training pass or the validation", metrics)

    def _due(self, interval: Interval, index: int) -> list[Schedule]:
        """Those that are stepped after so many batches or passes."""
        return [
            one
            for one in self.members
            if self._active and one.interval == interval and (index + 1) % one.frequency == 0
        ]

    def _offer(self, metrics: Mapping[str, Any]) -> None:
        for one in self.members:
            if one.waiting and one.monitor is not None and one.monitor in metrics:
                one.waiting = False
                self._step(one.scheduler, metrics[one.monitor])

    def _refuse_waiting(self, where: str, metrics: Mapping[str, Any]) -> None:
        for one in self.members:
            if one.waiting and one.strict:
                raise InvalidArgumentError(
                    f"{type(one.scheduler).__name__} monitors {one.monitor!r}, which is not a metric of {where}; there "
                    f"is {', '.join(sorted(metrics)) or 'nothing'}. Log it with self.log, "
                    f'or change "monitor"'
                )
