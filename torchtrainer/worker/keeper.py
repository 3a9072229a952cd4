"""When a rank's state is saved, what goes into it, and how it is put back: the rank's side of checkpoints.

Everything here runs in the thread that trains, at step boundaries or between calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torchtrainer.checkpoint.writer import read_state
from torchtrainer.errors import InvalidArgumentError
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
from torchtrainer.train.loop import Resumed

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator


@dataclass(frozen=True, kw_only=True)
class Collected:
    """A rank's complete state at a step boundary.

    Attributes:
        shared: alike on all ranks; its tensors are those of the training.
        mine: of this rank only.
        movable: addresses of tensors in ``shared`` that are equal on all ranks.
        meta: JSON data for the manifest; alike on all ranks.
    """

    shared: dict[str, Any]
    mine: dict[str, Any]
    movable: set[int]
    meta: dict[str, Any]


class Saver(Protocol):
    """Takes the state of this rank, together with the other ranks, to where it is durable. Collective."""

    def save(self, collect: Callable[[], Collected], *, must: bool) -> None:
        """Copies the state; returns when training may go on.

        Args:
            collect: gives the state, if it is wanted.
            must: wait for a checkpoint that is being written; else this one is left out.
        """


class RankKeeper:
    """Saves and restores the complete state of one rank.

    Args:
        operator: of the rank.
        saver: where states go; None: nothing is kept.
        every_steps: optimizer steps between two checkpoints; None: only when somebody asks.

    Attributes:
        mark: which call of the user's script is running, alike on all ranks; goes into the manifest.
        epoch_idx: of the pass hook that is running.
        modes: of the modules before a validation, while it runs.
    """

    def __init__(self, operator: TrainingOperator, saver: Saver | None, every_steps: int | None) -> None:
        self._operator = operator
        self._saver = saver
        self._every_steps = every_steps
        self._saved_step = 0
        self._resumed: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None
        self.mark: dict[str, Any] = {}
        self.epoch_idx = 0
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
        operator = self._operator
        mine = rank_state(operator, self.modes)
        mine["epoch_idx"] = self.epoch_idx
        shared = shared_state(operator)
        meta = {
            "step": operator.global_step,
            "epoch": shared["epoch"],
            "world_size": internals(operator).context.collective.world_size,
            "in_call": "steps" in mine,
            **self.mark,
        }
        return Collected(shared=shared, mine=mine, movable=exchanged_tensors(operator), meta=meta)

    def restore(self, path: str) -> None:
        """Puts everything to where a checkpoint has it; a call that was interrupted goes on when it is called next.

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
        step = shared["global_step"]
        mine = rank_states_for(ranks, context.collective.rank, here, context.settings.seed, step)
        put_loaders_back(operator, mine, same_ranks=len(ranks) == here)
        put_back(operator, shared, mine)
        set_modes(operator, mine["modes"])
        self._saved_step = operator.global_step
        context.progress.epoch, context.progress.step = shared["epoch"], operator.global_step
        if "steps" in mine:
            self._resumed = (shared, mine)

    def take_resumed(self) -> Resumed | None:
        """What the call that begins now goes on with; None if it begins at its beginning."""
        if self._resumed is None:
            return None
        (shared, mine), self._resumed = self._resumed, None

        def put_everything_back() -> None:
            put_back(self._operator, shared, mine)
            meters = internals(self._operator).meters
            if meters is not None and mine["meters"] is not None:
                meters.load_state_dict(mine["meters"])

        return Resumed(steps=mine["steps"], put_back=put_everything_back)

    def epoch_idx_of_resumed(self, otherwise: int) -> int:
        """The number that the hook of an interrupted call was given, or another one."""
        return otherwise if self._resumed is None else int(self._resumed[1]["epoch_idx"])

    def note_modes(self) -> None:
        """Remembers the modes of the modules, before a validation changes them."""
        self.modes = module_modes(self._operator)
