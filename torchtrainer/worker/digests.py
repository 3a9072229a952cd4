"""Records digests of a rank's state at every step boundary, only under ``torchtrainer verify-resume``.

Everything here runs in the thread that trains.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torchtrainer.config import DIGESTS
from torchtrainer.observe.digest_log import (
    HELD,
    ORDERS,
    Details,
    DigestFile,
    DigestOrders,
    DigestWriter,
    Place,
    Spot,
    differing,
    log_path,
    next_trainer,
    value_path,
)
from torchtrainer.train.complete_state import rank_state, shared_state
from torchtrainer.train.components import internals
from torchtrainer.train.data import RankBatch
from torchtrainer.train.data_passes import data_of
from torchtrainer.train.digest import combined, digest, digest_of_all, is_plain, leaves
from torchtrainer.train.loop import StepIterator
from torchtrainer.worker.checkpointer import RankCheckpointer
from torchtrainer.worker.held import held_values
from torchtrainer.worker.link import StepBarrier

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator

HOLD_S = 60.0
"""Longest time that a rank holds where it was told to: after that, whoever told it is gone, and the rank continues."""
HOLD_POLL_S = 0.005
MAX_ATTRIBUTE_ITEMS, MAX_ATTRIBUTE_CHARACTERS = 16, 80
"""Attributes that are larger are left out: they are for people to read."""


def watched_steps(operator: TrainingOperator, checkpointer: RankCheckpointer) -> Callable[..., StepIterator]:
    """What makes the iterator of a call in a run that is watched.

    Args:
        operator: of the rank.
        checkpointer: knows which call of the script is running.
    """
    return partial(WatchedSteps, StateLog(Path(os.environ[DIGESTS]), operator, checkpointer))


class WatchedSteps(StepIterator):
    """A `StepIterator` that has every boundary written down, and holds where it is told to.

    Args:
        log: of the rank.
        loader, arguments: as for `StepIterator`.
    """

    def __init__(self, log: StateLog, loader: Any, **arguments: Any) -> None:
        self._log = log
        self._data = ""
        self._stopped = False
        super().__init__(loader, **arguments)

    def close(self, *, completed: bool) -> None:
        """See `StepIterator`."""
        super().close(completed=completed)
        if completed and not self._stopped:
            self._log.note(self.batches, self._data, end=True)

    def _stop_here(self) -> bool:
        self._log.note(self.batches, self._data)
        if self._log.holds_at(self.batches):
            self._log.hold(lambda: isinstance(self._gate, StepBarrier) and self._gate._preparing)
        self._stopped = super()._stop_here()
        return self._stopped

    def _deal(self) -> RankBatch | None:
        batch = super()._deal()
        self._data = digest_of_all(data_of(batch)) if batch is not None else ""
        return batch


class StateLog:
    """The log of one rank.

    Args:
        directory: where the logs of this start of the script are, with orders for it.
        operator: of the rank.
        checkpointer: knows which call of the script is running.
    """

    def __init__(self, directory: Path, operator: TrainingOperator, checkpointer: RankCheckpointer) -> None:
        self._directory = directory
        self._operator = operator
        self._checkpointer = checkpointer
        collective = internals(operator).context.collective
        self._rank = collective.rank
        self._trainer = int(collective.all_gather(next_trainer(directory))[0])
        self._orders = DigestOrders.read(directory)
        facts = {"operator": type(operator).__name__, "own_hooks": _own_hooks(operator)}
        self._writer = DigestWriter(directory, self._trainer, self._rank, facts)
        self._reference: DigestFile | None = None
        if self._orders.reference is not None:
            path = log_path(Path(self._orders.reference), self._trainer, self._rank)
            self._reference = DigestFile(path) if path.exists() else None

    def note(self, batch: int, data: str, *, end: bool = False) -> None:
        """Writes down the complete state, and what the operator holds besides.

        Args:
            batch: batches of the call that were completed.
            data: digest of the last one.
            end: the call is over.
        """
        place = self._place(batch, end=end)
        values = dict(leaves(complete_state(self._operator, self._checkpointer.modes)))
        state = {name: digest(value) for name, value in values.items()}
        whole = combined(f"{name}={one}" for name, one in state.items())
        held = {name: digest_of_all(value) for name, value in held_values(self._operator).items()}
        details = Details(state=state, held=held, attributes=attributes_of(self._operator))
        self._writer.add(
            place,
            step=self._operator.global_step,
            whole=whole,
            data=data,
            held=combined(f"{name}={one}" for name, one in held.items()),
            call=str(self._checkpointer.mark.get("call", "")),
            details=details,
        )
        self._keep_ordered(place, values)
        self._keep_first_difference(place, values, state, whole)

    def holds_at(self, batch: int) -> bool:
        """Whether the orders are to hold here."""
        return self._orders.hold == Spot(trainer=self._trainer, place=self._place(batch))

    def hold(self, stopping: Callable[[], bool]) -> None:
        """Waits until the process is ended, a stop is under way, or the orders are withdrawn."""
        (self._directory / HELD).touch()
        deadline = time.monotonic() + HOLD_S
        while not stopping() and (self._directory / ORDERS).exists() and time.monotonic() < deadline:
            time.sleep(HOLD_POLL_S)

    def _place(self, batch: int, *, end: bool = False) -> Place:
        return Place(call=int(self._checkpointer.mark.get("index", 0)), batch=batch, end=end)

    def _keep_ordered(self, place: Place, values: Mapping[str, Any]) -> None:
        wanted = self._orders.keep
        if wanted == Spot(trainer=self._trainer, place=place) and self._orders.keep_name in values:
            self._keep(values[self._orders.keep_name])

    def _keep_first_difference(
        self, place: Place, values: Mapping[str, Any], state: Mapping[str, str], whole: str
    ) -> None:
        if self._reference is None:
            return
        entry = self._reference.at.get(place)
        if entry is None or entry.whole == whole:
            return
        names = differing(state, self._reference.details(entry).state)
        self._reference = None
        if names and names[0] in values:
            self._keep(values[names[0]])

    def _keep(self, value: Any) -> None:
        if isinstance(value, torch.Tensor | int | float):
            torch.save(value, value_path(self._directory, self._trainer, self._rank))


def complete_state(operator: TrainingOperator, modes: Sequence[bool] | None) -> dict[str, Any]:
    """All that a checkpoint keeps of this rank: not the buffers that the rank takes over from rank 0 before it uses them.

    Args:
        operator: of the rank.
        modes: of its modules, if the present ones are only for a validation.
    """
    shared, mine = shared_state(operator), rank_state(operator, modes)
    components = internals(operator).components
    if mine.pop("own", None) is None and internals(operator).context.collective.rank > 0 and components is not None:
        for state, model in zip(shared["models"], components.raw_models, strict=True):
            for name, _ in model.named_buffers():
                state.pop(name, None)
    return {**shared, **mine}


def attributes_of(operator: TrainingOperator) -> dict[str, str]:
    """Small plain attributes of the user's in the operator and its data sets, as text, by name."""
    from torchtrainer.operator import TrainingOperator as Base

    own = [vars(kind) for kind in reversed(type(operator).__mro__) if issubclass(kind, Base) and kind is not Base]
    members = {name: value for group in (*own, vars(operator)) for name, value in group.items()}
    found = {f"self.{name}": value for name, value in members.items() if not name.startswith("__")}
    for loader in ("train_loader", "validation_loader"):
        dataset = getattr(getattr(operator, loader), "dataset", None)
        if hasattr(dataset, "__dict__"):
            found.update({f"{loader}.dataset.{name}": value for name, value in vars(dataset).items()})
    return {name: text for name, value in found.items() if (text := _as_text(value)) is not None}


def _as_text(value: Any) -> str | None:
    if isinstance(value, torch.Tensor):
        return f"a tensor ({digest(value)})" if value.numel() <= MAX_ATTRIBUTE_ITEMS else None
    items = list(value.values()) if isinstance(value, dict) else value
    if isinstance(items, list | tuple):
        if len(items) > MAX_ATTRIBUTE_ITEMS or not all(map(is_plain, items)):
            return None
    elif not is_plain(value):
        return None
    text = repr(value)
    return text if len(text) <= MAX_ATTRIBUTE_CHARACTERS else None


def _own_hooks(operator: TrainingOperator) -> list[str]:
    from torchtrainer.operator import TrainingOperator as Base

    hooks = ("train_epoch", "train_batch", "validate", "validate_batch")
    return [name for name in hooks if getattr(type(operator), name) is not getattr(Base, name)]
