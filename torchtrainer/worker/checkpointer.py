"""When a rank's state is saved, what goes into it, and how it is put back: the rank's side of checkpoints.

Everything here runs in the thread that trains, at step boundaries or between calls.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torchtrainer.checkpoint.writer import read_state
from torchtrainer.config import DIGESTS
from torchtrainer.errors import InvalidArgumentError
from torchtrainer.observe.notices import notice
from torchtrainer.train.complete_state import (
    exchanged_tensors,
    module_modes,
    put_back,
    put_loaders_back,
    rank_state,
    rank_states_for,
    set_modes,
    shared_state,
)
from torchtrainer.train.components import internals
from torchtrainer.train.loop import Resumed, StepIterator
from torchtrainer.train.state import detached

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator
    from torchtrainer.train.gradient_sync import GradientSync
    from torchtrainer.train.rank_context import RankContext


@dataclass(frozen=True, kw_only=True)
class Collected:
    """A rank's complete state at a step boundary.

    Attributes:
        shared: the same on all ranks; its tensors are those of the training.
        mine: of single ranks only: of each that this process carries.
        movable: addresses of tensors in ``shared`` that are equal on all ranks.
        meta: JSON data for the manifest; the same on all ranks.
    """

    shared: dict[str, Any]
    mine: dict[int, dict[str, Any]]
    movable: set[int]
    meta: dict[str, Any]


class Saver(Protocol):
    """Takes the state of this rank, together with the other ranks, to where it is durable. Collective."""

    def save(self, collect: Callable[[], Collected], *, must: bool) -> None:
        """Copies the state; returns when training may continue.

        Args:
            collect: gives the state, if it is wanted.
            must: wait for a checkpoint that is being written; else this one is left out.
        """


class RankCheckpointer:
    """Saves and restores the complete state of the ranks of this process.

    Args:
        operator: of this process.
        sync: its ranks.
        saver: where states go; None: nothing is kept.
        every_steps: optimizer steps between two checkpoints; None: only when somebody asks.

    Attributes:
        mark: which call of the user's script is running, the same on all ranks; goes into the manifest.
        modes: of the modules before a validation, while it runs.
    """

    def __init__(
        self, operator: TrainingOperator, sync: GradientSync, saver: Saver | None, every_steps: int | None
    ) -> None:
        self._operator = operator
        self._sync = sync
        self._saver = saver
        self._every_steps = every_steps
        self._saved_step = 0
        self._resumed: Resumed | None = None
        self.mark: dict[str, Any] = {}
        self.modes: Sequence[bool] | None = None

    @property
    def active(self) -> bool:
        """Whether states are kept at all."""
        return self._saver is not None

    def due(self) -> bool:
        """Whether ``every_steps`` asks for a checkpoint here."""
        step = self._operator.global_step
        return self._every_steps is not None and step % self._every_steps == 0 and step != self._saved_step

    def save(self, *, must: bool = False) -> None:
        """Saves the complete state; a collective call.

        Args:
            must: also if another checkpoint is still being written.
        """
        if self._saver is not None:
            self._saved_step = self._operator.global_step
            self._saver.save(self._collect, must=must)

    def _collect(self) -> Collected:
        operator, several = self._operator, len(self._sync.contexts) > 1
        mine = {context.rank: self._of_rank(context, several=several) for context in self._sync.each()}
        shared = shared_state(operator)
        meta = {
            "step": operator.global_step,
            "epoch": shared["epoch"],
            "world_size": internals(operator).context.collective.world_size,
            "in_call": any("steps" in one for one in mine.values()),
            **self.mark,
        }
        return Collected(shared=shared, mine=mine, movable=exchanged_tensors(operator), meta=meta)

    def _of_rank(self, context: RankContext, *, several: bool) -> dict[str, Any]:
        state, steps = rank_state(self._operator, self.modes), internals(self._operator).steps
        if steps is not None:
            state["steps"]["samples"] = self._sync.samples_of(context, steps)
        for name in ("buffers", "operator") if several else ():  # the next rank's will take their place
            if name in state:
                state[name] = detached(state[name])
        return {**state, "epoch_idx": self._sync.epoch_idx}

    def restore(self, path: str) -> None:
        """Puts everything to where a checkpoint has it; a call that was interrupted continues when it is called next.

        Args:
            path: of the state's file, in a checkpoint that verified.

        Raises:
            InvalidArgumentError, OperatorUseError: the state is another model's, or of other ranks.
        """
        operator = self._operator
        context = internals(operator).context
        state = read_state(Path(path))
        shared, ranks = state["shared"], state["ranks"]
        here = context.collective.world_size
        if len(ranks) != here and "own" in ranks[0]:
            raise InvalidArgumentError(
                f"the checkpoint is of {len(ranks)} ranks that each had a state of their own, which {here} ranks cannot take "
                f"over: use num_workers={len(ranks)}, or resume=False to start anew"
            )
        _say_what_begins_anew(operator)
        states = {
            rank: rank_states_for(ranks, rank, here, context.settings.seed, shared["global_step"])
            for rank in self._sync.contexts
        }
        for one in self._sync.each():
            mine = states[one.rank]
            put_loaders_back(operator, mine, same_ranks=len(ranks) == here)
            put_back(operator, shared, mine)
            set_modes(operator, mine["modes"])
            self._sync.restored(one)
        self._saved_step = operator.global_step
        context.progress.reach(operator.global_step, shared["epoch"])
        some = next(iter(states.values()))
        if "steps" in some:
            self.resume_with(
                Resumed(
                    steps=some["steps"],
                    put_back=lambda: self._put_everything_back(shared, states),
                    epoch_idx=int(some["epoch_idx"]),
                )
            )

    def resume_with(self, resumed: Resumed) -> None:
        """The next call continues with an interrupted one."""
        self._resumed = resumed

    @property
    def resuming(self) -> bool:
        """Whether the next call continues with an interrupted one."""
        return self._resumed is not None

    def take_resumed(self) -> Resumed | None:
        """What the call that begins now continues with; None if it begins at its beginning."""
        resumed, self._resumed = self._resumed, None
        return resumed

    def epoch_idx_of_resumed(self, otherwise: int) -> int:
        """The number that the hook of an interrupted call was given, or another one."""
        epoch_idx = self._resumed.epoch_idx if self._resumed is not None else None
        return otherwise if epoch_idx is None else epoch_idx

    def _put_everything_back(self, shared: Mapping[str, Any], states: Mapping[int, Mapping[str, Any]]) -> None:
        for context in self._sync.each():
            mine = states[context.rank]
            put_back(self._operator, shared, mine)
            context.samples = mine["steps"]["samples"]
            meters = internals(self._operator).meters
            if meters is not None and mine["meters"] is not None:
                meters.load_state_dict(mine["meters"])
            self._sync.restored(context)

    def note_modes(self) -> None:
        """Remembers the modes of the modules, before a validation changes them."""
        self.modes = module_modes(self._operator)


def _say_what_begins_anew(operator: TrainingOperator) -> None:
    """Has rank 0 say that a run that goes on does not get the bits of an undisturbed one, where that is so."""
    context = internals(operator).context
    if context.settings.comm_hook == "powersgd" and context.collective.world_size > 1 and context.collective.rank == 0:
        notice(
            'comm_hook="powersgd": no checkpoint holds what the compression has left out so far, so the numbers differ '
            "slightly from those of an uninterrupted run"
        )


def step_iterator(operator: TrainingOperator, checkpointer: RankCheckpointer) -> Callable[..., StepIterator]:
    """What makes the iterator of a call; under ``torchtrainer verify-resume`` one that writes the states down.

    Args:
        operator: of the rank.
        checkpointer: knows which call of the script is running.
    """
    if DIGESTS not in os.environ:
        return StepIterator
    from torchtrainer.worker.digests import watched_steps

    return watched_steps(operator, checkpointer)
