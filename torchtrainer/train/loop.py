"""The iterator that every loop draws its batches from, and the built-in loops.

Each ``next()`` of a `StepIterator` means: the step before is complete. There the position is counted, and there a request
to stop is honoured, for the built-in loops and for a user's own alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchtrainer.config import BATCH_COUNT, NUM_SAMPLES
from torchtrainer.errors import InvalidArgumentError, InvalidArgumentTypeError, OperatorUseError
from torchtrainer.train.components import internals
from torchtrainer.train.data import RankBatch, RankLoader
from torchtrainer.train.hooks import batch_info, bind_hook
from torchtrainer.train.metrics import AverageMeterCollection, is_one_number, plain
from torchtrainer.train.progress import Progress, StateSaver, StepGate
from torchtrainer.train.schedules import SchedulerSteps
from torchtrainer.train.timers import TimerCollection
from torchtrainer.train.uneven import GradientShare, UnevenWatch

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator

COMPARE_EVERY = 64
"""Steps between two comparisons of what the ranks hold: at a tenth of a millisecond for a small model, a hundredth of its steps."""
_COMPARED_EARLY = (1, 4, 16)


@dataclass(frozen=True, kw_only=True)
class Extent:
    """The extent of a call: how far it goes.

    Attributes:
        num_steps: batches per rank; None: to the end of the pass.
        new_pass: begin a new pass, and end with it at the latest.

    Raises:
        InvalidArgumentError: ``num_steps`` is no number of batches.
    """

    num_steps: int | None = None
    new_pass: bool = False

    def __post_init__(self) -> None:
        if self.num_steps is not None and (type(self.num_steps) is not int or self.num_steps < 0):
            raise InvalidArgumentError(
                f"num_steps must be None or a whole number of at least 0 batches per rank, got {self.num_steps!r}"
            )

    @property
    def one_pass(self) -> bool:
        """Whether the call ends with the pass."""
        return self.new_pass or self.num_steps is None


class StepIterator:
    """The batches of one ``train`` or ``validate`` call on one rank.

    Without ``num_steps`` it finishes the pass that is running, or runs one whole pass; with it, it goes on where the last
    call stopped and wraps into new passes. A pass that ended exactly is over: the next call starts a new one.

    Args:
        loader: the rank's loader; None: the operator registered none, an error once a batch is asked for.
        missing: what to say then.
        extent: how far the call goes; a pass that it gives up was given up before.
        progress: where the position is shown.
        gate: asked at every step boundary whether to continue.
        timers: measures the wait for data.
        share: weighs the gradients of steps with unequal shares; None: a validation, in which no steps are counted.
        on_step: called when a training step is complete.
        keeper: saves the state at boundaries; None: nobody does.
        resumed: where the call that this one continues with was interrupted.

    Attributes:
        batches: steps that were completed in this call, those of a validation without samples for this rank included.
        samples: samples of this rank in them; a borrowed batch has none.
        passes_completed: passes that ended in this call.
        passes_scheduled: those of them after which the schedulers were stepped.
        first_batch: number of the first batch that is still to come, where an interrupted call continues.
        current: the batch being worked on.
        uneven: watches the collectives of the user's; None: nobody does.
    """

    def __init__(
        self,
        loader: RankLoader | None,
        *,
        missing: str,
        extent: Extent,
        progress: Progress,
        gate: StepGate,
        timers: TimerCollection,
        share: GradientShare | None,
        on_step: Callable[[], None],
        keeper: StateSaver | None = None,
        resumed: Resumed | None = None,
    ) -> None:
        self.batches = 0
        self.samples = 0
        self.passes_completed = 0
        self.passes_scheduled = 0
        self.first_batch = 0
        self.current: RankBatch | None = None
        self._loader = loader
        self._missing = missing
        self._num_steps = extent.num_steps
        self._one_pass = extent.one_pass
        self._phase = "train" if share is not None else "validate"
        self._progress = progress
        self._gate = gate
        self._timers = timers
        self._share = share
        self._on_step = on_step
        self._keeper = keeper
        self._over = False
        self._length = _length(loader, extent)
        self._put_back: Callable[[], None] | None = None
        progress.batch, progress.batches, progress.samples = 0, self._length, 0
        if resumed is not None:
            self._resume(resumed)
        self._found = (self.batches, progress.samples)
        self.uneven: UnevenWatch | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __bool__(self) -> bool:
        return True

    def __len__(self) -> int:
        """Batches of the whole call, where that is known."""
        if self._length is None:
            raise TypeError("the number of batches is not known: the loader has no length; pass num_steps to have one")
        return self._length

    def __next__(self) -> Any:
        batch = self._next_step()
        while batch.size == 0 and self._share is None:  # a validation step without samples for this rank
            batch = self._next_step()
        if self._share is not None:
            self._share.apply(batch.size, batch.global_size)
        if self.uneven is not None:
            self.uneven.begin(batch)
        self._progress.enter(self._phase)
        return batch.data

    @property
    def steps_here(self) -> int:
        """Steps of the call that were completed in this process."""
        return self.batches - self._found[0]

    @property
    def samples_here(self) -> int:
        """Samples of all ranks in them."""
        return self._progress.samples - self._found[1]

    @property
    def compares_here(self) -> bool:
        """Whether the ranks compare what they hold in the step that comes: soon after the beginning, then every `COMPARE_EVERY`."""
        return self.batches in _COMPARED_EARLY or (self.batches > 0 and self.batches % COMPARE_EVERY == 0)

    def state_dict(self) -> dict[str, int]:
        """Where the call stands at a step boundary, as plain numbers."""
        return {
            "batches": self.batches,
            "samples": self.samples,
            "passes_completed": self.passes_completed,
            "passes_scheduled": self.passes_scheduled,
            "samples_shown": self._progress.samples,
        }

    def _resume(self, resumed: Resumed) -> None:
        at = resumed.steps
        self.batches, self.samples = at["batches"], at["samples"]
        self.passes_completed, self.passes_scheduled = at["passes_completed"], at["passes_scheduled"]
        self._put_back = resumed.put_back
        self.first_batch = self.batches
        if self._one_pass and self._length is not None:
            self._length += self.batches
            self._length = self._length if self._num_steps is None else min(self._length, self._num_steps)
        self._progress.batch, self._progress.batches = self.batches, self._length
        self._progress.samples = at["samples_shown"]

    def close(self, *, completed: bool) -> None:
        """Ends the call: the last batch counts if the hook came through, and gradients are left alone again."""
        if self.uneven is not None:
            self.uneven.end()
        self._over = True
        if completed:
            self._complete()
        elif self._share is not None:
            self._share.remove()
        self.current = None

    def _next_step(self) -> RankBatch:
        """Completes the step before, and turns to the batch of the next one, unless the call is over."""
        self._complete()
        if self._put_back is not None:  # last of all: what the hook did before its first batch must not count twice
            put_back, self._put_back = self._put_back, None
            self.first_batch = 0
            put_back()
        if self._finished() or self._stop_here():
            self._over = True
            raise StopIteration
        self._progress.enter("data")
        with self._timers.record("data"):
            batch = self._deal()
        if batch is None:
            self._over = True
            raise StopIteration
        self.current = batch
        return batch

    def _stop_here(self) -> bool:
        stop = self._gate.stop_requested(self.batches)
        if self._keeper is not None and (self._gate.save_wanted or self._keeper.due()):
            self._progress.enter("save")
            with self._timers.record("snapshot"):
                self._keeper.save(must=stop)
        return stop

    def _finished(self) -> bool:
        if self._over:
            return True
        return self._num_steps is not None and self.batches >= self._num_steps

    def _complete(self) -> None:
        """The step of the current batch is complete: every loop gets here through its next ``next()``."""
        if self.uneven is not None:
            self.uneven.end()
        batch, self.current = self.current, None
        if batch is None or self._loader is None:
            return
        if self._share is not None:
            self._share.remove()
            self._on_step()
        self.batches += 1
        self.samples += batch.size
        self._progress.batch = self.batches
        self._progress.samples += batch.global_size
        if not self._loader.in_pass:
            self._end_pass()

    def _end_pass(self) -> None:
        self.passes_completed += 1
        if self._one_pass:
            self._over = True

    def _deal(self) -> RankBatch | None:
        """The next batch; None if the pass turned out to be over, or a new one is empty."""
        loader = self._loader
        if loader is None:
            raise OperatorUseError(self._missing)
        while True:
            continued = loader.in_pass
            batch = loader.next_batch()
            if self._share is not None:
                self._progress.epoch = loader.passes_started
            if batch is not None or not continued:
                return batch
            # The end of a loader without length is noticed only here. A call that has dealt nothing of it starts anew.
            self.passes_completed += 1
            if self._one_pass and self.batches > 0:
                return None


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """An interrupted call that a `StepIterator` continues with.

    Attributes:
        steps: where it stood, from `StepIterator.state_dict`.
        put_back: puts the state of the ranks to where it was; called right before the first batch.
        epoch_idx: the number that its hook was given; None: it follows from the loader.
    """

    steps: Mapping[str, int]
    put_back: Callable[[], None]
    epoch_idx: int | None = None


def _length(loader: RankLoader | None, extent: Extent) -> int | None:
    if not extent.one_pass:
        return extent.num_steps
    if loader is None or loader.batches_per_pass is None:
        return None
    left = loader.batches_per_pass - (loader.batch_in_pass if loader.in_pass else 0)
    return left if extent.num_steps is None else min(left, extent.num_steps)


def train_epoch(
    operator: TrainingOperator,
    iterator: Iterable[Any],
    info: Mapping[str, Any],
    step: Callable[[Any, Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """The built-in training loop; see `TrainingOperator.train_epoch`.

    Args:
        operator: the operator.
        iterator: a `StepIterator`, or the user's own around it.
        info: the call's info with ``epoch_idx``.
        step: trains on a batch of the iterator; None: the operator's ``train_batch`` does, and its metrics are added up.
    """
    for module in modules_of(operator):
        module.train()
    if step is None:
        step = _hook_step(operator, "train_batch")
    steps = internals(operator).steps
    with SchedulerSteps(operator, steps) as schedulers:
        for batch_idx, batch in enumerate(iterator, start=steps.first_batch if steps is not None else 0):
            schedulers.before_batch()
            step(batch, batch_info(info, batch_idx, operator.global_step))
            schedulers.after_batch()
    return _summary(operator)


def validate(operator: TrainingOperator, iterator: Iterable[Any], info: Mapping[str, Any]) -> dict[str, Any]:
    """The built-in validation loop; see `TrainingOperator.validate`. Arguments as for `train_epoch`."""
    for module in modules_of(operator):
        module.eval()
    step, steps = _hook_step(operator, "validate_batch"), internals(operator).steps
    with torch.no_grad():
        for batch_idx, batch in enumerate(iterator, start=steps.first_batch if steps is not None else 0):
            step(batch, batch_info(info, batch_idx, operator.global_step))
    return _summary(operator)


def _hook_step(operator: TrainingOperator, name: str) -> Callable[[Any, Mapping[str, Any]], None]:
    """Calls a batch hook, and adds up the metrics that it returns."""
    meters = internals(operator).meters = AverageMeterCollection()
    hook = bind_hook(getattr(operator, name), ("batch_info",))
    return lambda batch, info: _measure(operator, meters, hook(batch, {"batch_info": info}), name)


def _summary(operator: TrainingOperator) -> dict[str, Any]:
    meters = internals(operator).meters
    return {} if meters is None else meters.summary()


def modules_of(operator: TrainingOperator) -> list[nn.Module]:
    """The modules that hooks call: the registered ones, wrapped, and a wrapper of the user's own in ``self.model(s)``."""
    components = internals(operator).components
    found: list[nn.Module] = list(components.models) if components is not None else []
    for name in ("model", "models"):
        value = getattr(operator, name, None)
        for one in value if isinstance(value, list | tuple) else [value]:
            if isinstance(one, nn.Module) and not any(one is known for known in found):
                found.append(one)
    return found


def _measure(operator: TrainingOperator, meters: AverageMeterCollection, stats: Any, hook: str) -> None:
    """Adds what a batch hook returned, weighted as it says by `weight_key` or ``num_samples``, else by the rank's samples."""
    if not isinstance(stats, Mapping):
        raise InvalidArgumentTypeError(
            f"{type(operator).__name__}.{hook} must return a dict of metrics, got {type(stats).__name__}: {stats!r}"
        )
    steps = internals(operator).steps
    batch = steps.current if steps is not None else None
    if batch is not None and batch.size == 0:
        meters.skip()
        return
    metrics = {name: value for name, value in stats.items() if name not in (NUM_SAMPLES, BATCH_COUNT)}
    meters.update(metrics, plain(stats.get(NUM_SAMPLES, batch.size if batch is not None else 1)))
    loss = next((stats[name] for name in ("train_loss", "val_loss", "loss") if name in stats), None)
    if is_one_number(loss):
        internals(operator).context.progress.losses[operator.world_rank] = loss
