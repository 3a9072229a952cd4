"""What happened, as frozen records, and the user's callbacks, which get them in the driver."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from torchtrainer.errors import InvalidArgumentError, InvalidArgumentTypeError
from torchtrainer.observe.devices import DeviceUse
from torchtrainer.observe.failures import FailureRecord


@dataclass(frozen=True, kw_only=True)
class RunStartEvent:
    """The ranks are built, and nothing has been called yet.

    Attributes:
        config: what the trainer was given.
        run_dir: where the run keeps its files; None: nothing is kept.
        resumed_step: optimizer steps of the state that the run goes on from; None: it is a new run.
        world_size: ranks.
    """

    config: Any
    run_dir: str | None
    resumed_step: int | None
    world_size: int


@dataclass(frozen=True, kw_only=True)
class StepEvent:
    """How far the running ``train()`` or ``validate()`` call is.

    Attributes:
        epoch: passes over the training data that were started.
        step: optimizer steps of the run so far.
        batch: batches of each rank completed in this call.
        batches: batches of each rank that this call will take; None: not known.
        samples: samples of all ranks handled in this call.
        samples_per_s: samples of all ranks per second, lately; None: not known yet.
        loss: mean of the latest losses of all ranks, under a launcher that of rank 0; None: the operator reports none.
        phase: what the ranks are doing: ``train`` or ``validate``, or a part of a step.
        devices: use of the GPUs, or of the CPU by the worker processes.
    """

    epoch: int
    step: int
    batch: int
    batches: int | None
    samples: int
    samples_per_s: float | None = None
    loss: float | None = None
    phase: str = "train"
    devices: tuple[DeviceUse, ...] = ()


@dataclass(frozen=True, kw_only=True)
class EpochEvent:
    """A ``train()`` call is done.

    Attributes:
        epoch: passes over the training data that were started.
        step: optimizer steps of the run so far.
        metrics: what ``train()`` returns: a dict, or one per rank.
    """

    epoch: int
    step: int
    metrics: Any


@dataclass(frozen=True, kw_only=True)
class ValidateEvent:
    """A ``validate()`` call is done.

    Attributes:
        epoch: passes over the training data that were started.
        step: optimizer steps of the run so far.
        metrics: what ``validate()`` returns: a dict, or one per rank.
    """

    epoch: int
    step: int
    metrics: Any


@dataclass(frozen=True, kw_only=True)
class FailureEvent(FailureRecord):
    """A failure, told when its outcome is known: recovered, or the end of the call.

    Has the attributes of `FailureRecord`, and:

    Attributes:
        message: the whole story, for a person: the error, or who took over, with stacks of a process that hung.
    """

    message: str


@dataclass(frozen=True, kw_only=True)
class CheckpointEvent:
    """A checkpoint is complete and verified.

    Attributes:
        step: the optimizer step whose state it holds.
        epoch: passes over the training data that were started by then.
        path: directory or URL.
        seconds: from the decision to save to the verified checkpoint.
        stall_s: for how long of that training stood still.
    """

    step: int
    epoch: int
    path: str
    seconds: float
    stall_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RunEndEvent:
    """The trainer was shut down, or its run failed.

    Attributes:
        reason: in a word or two, such as ``finished``, ``failed``, ``interrupted``, ``preempted``.
        step: optimizer steps done.
        epoch: passes over the training data that were started.
        seconds: from the creation of the trainer to now, monotonic.
        failures: how many there were, recovered or not.
        lost_s: for how long training stood still because of them.
    """

    reason: str
    step: int
    epoch: int
    seconds: float
    failures: int = 0
    lost_s: float = 0.0


class Callback(Protocol):
    """What a trainer's ``callbacks`` are told: any object with at least one of these methods is one, subclass or not.

    They are called in the driver, under a launcher on rank 0, in the thread that called the trainer, and what they raise comes out of that
    call. `docs/extending.md` shows a logger.
    """

    def on_run_start(self, run: RunStartEvent, /) -> object:
        """The ranks are built."""

    def on_step(self, event: StepEvent, /) -> object:
        """The latest step; at most ten times a second."""

    def on_epoch_end(self, event: EpochEvent, /) -> object:
        """A ``train()`` call is done."""

    def on_validate_end(self, event: ValidateEvent, /) -> object:
        """A ``validate()`` call is done."""

    def on_failure(self, event: FailureEvent, /) -> object:
        """There was a failure, and its outcome is known."""

    def on_checkpoint(self, event: CheckpointEvent, /) -> object:
        """A checkpoint is on disk, and verified."""

    def on_run_end(self, event: RunEndEvent, /) -> object:
        """The trainer was shut down, or its run failed."""


CALLBACK_METHODS: tuple[str, ...] = tuple(name for name in vars(Callback) if name.startswith("on_"))


class Callbacks:
    """Hands events to the user's objects, each method in the order of the objects.

    A callback runs in the driver, on the thread that called the trainer, and its exception is not caught. Steps come
    faster than anyone needs to see them: within one interval only the latest is kept, and unless a newer step replaces
    it, it is delivered before the next event of another kind. So the last step of a pass is never missed.

    Args:
        objects: each has at least one of the methods in ``CALLBACK_METHODS``.
        steps_per_s: how many steps a second are delivered at most.
        clock: monotonic seconds.

    Raises:
        InvalidArgumentTypeError: not a list of objects, or an object that could never be called.
        InvalidArgumentError: ``steps_per_s`` is not more than 0.
    """

    def __init__(
        self, objects: Iterable[object], *, steps_per_s: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if not steps_per_s > 0:
            raise InvalidArgumentError(f"steps_per_s must be more than 0, got {steps_per_s!r}")
        self._methods = _methods_of(objects)
        self._interval_s = 1.0 / steps_per_s
        self._clock = clock
        self._due = -float("inf")
        self._held_back: StepEvent | None = None

    def __bool__(self) -> bool:
        return any(self._methods.values())

    def on_run_start(self, event: RunStartEvent) -> None:
        """Delivers the event."""
        self._deliver("on_run_start", event)

    def on_step(self, event: StepEvent) -> None:
        """Delivers the event now, or keeps it as the latest one if the last delivery was too recent."""
        if not self._methods["on_step"]:
            return
        self._held_back = event
        if self._clock() >= self._due:
            self._deliver_step()

    def on_epoch_end(self, event: EpochEvent) -> None:
        """Delivers the latest step, then the event."""
        self._deliver("on_epoch_end", event)

    def on_validate_end(self, event: ValidateEvent) -> None:
        """Delivers the latest step, then the event."""
        self._deliver("on_validate_end", event)

    def on_failure(self, event: FailureEvent) -> None:
        """Delivers the latest step, then the event."""
        self._deliver("on_failure", event)

    def on_checkpoint(self, event: CheckpointEvent) -> None:
        """Delivers the latest step, then the event."""
        self._deliver("on_checkpoint", event)

    def on_run_end(self, event: RunEndEvent) -> None:
        """Delivers the latest step, then the event."""
        self._deliver("on_run_end", event)

    def _deliver(self, method: str, event: object) -> None:
        self._deliver_step()
        for call in self._methods[method]:
            call(event)

    def _deliver_step(self) -> None:
        event, self._held_back = self._held_back, None
        if event is None:
            return
        self._due = self._clock() + self._interval_s
        for call in self._methods["on_step"]:
            call(event)


def _methods_of(objects: Iterable[object]) -> dict[str, list[Callable[[Any], object]]]:
    if isinstance(objects, str) or not isinstance(objects, Iterable):
        raise InvalidArgumentTypeError(
            f"callbacks must be a list or tuple of objects, got {objects!r}; write callbacks=[...] around a single one"
        )
    methods: dict[str, list[Callable[[Any], object]]] = {name: [] for name in CALLBACK_METHODS}
    for position, candidate in enumerate(objects):
        if isinstance(candidate, type):
            raise InvalidArgumentTypeError(
                f"callbacks[{position}] is the class {candidate.__name__}; pass an instance, such as "
                f"{candidate.__name__}()"
            )
        found = [name for name in CALLBACK_METHODS if callable(getattr(candidate, name, None))]
        if not found:
            raise InvalidArgumentTypeError(_no_method(position, candidate))
        for name in found:
            if getattr(type(candidate), name, None) is not getattr(Callback, name):  # inherited, and does nothing
                methods[name].append(getattr(candidate, name))
    return methods


def _no_method(position: int, candidate: object) -> str:
    names = [name for name in dir(candidate) if not name.startswith("_")]
    near = {name: difflib.get_close_matches(name, CALLBACK_METHODS, n=1) for name in names}
    hints = [f"{name} looks like {match[0]}" for name, match in near.items() if match]
    return (
        f"callbacks[{position}], a {type(candidate).__name__}, has none of the callback methods: {', '.join(CALLBACK_METHODS)}"
        + (f" ({'; '.join(hints)})" if hints else "")
    )
