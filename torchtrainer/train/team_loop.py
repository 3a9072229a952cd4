"""The built-in loop over the steps of all ranks of a process, and the loader that it draws from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchtrainer.train.data import RankBatch
from torchtrainer.train.loop import StepIterator, modules_of, step_for_passes, step_schedulers

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator
    from torchtrainer.train.team import Team


def train_epoch(team: Team, operator: TrainingOperator, steps: StepIterator) -> None:
    """The built-in training loop for all seats of a process; see `torchtrainer.train.loop.train_epoch`."""
    for module in modules_of(operator):
        module.train()
    frequency = operator.scheduler_step_freq
    for _ in steps:
        if frequency == "epoch":
            step_for_passes(operator, steps)
        team.step()
        if frequency == "batch":
            step_schedulers(operator)
    if frequency == "epoch":
        step_for_passes(operator, steps)


class TeamLoader:
    """The train loaders of all seats, as one: what a `StepIterator` draws from. All of them stand at the same place.

    Args:
        team: of this process.
    """

    def __init__(self, team: Team) -> None:
        self._team = team

    def __getattr__(self, name: str) -> Any:
        team: Team = self.__dict__["_team"]
        return getattr(team.seats[team.ranks[0]].loaders["train"], name)

    def next_batch(self) -> RankBatch | None:
        """The batches of all seats."""
        return self._team.deal()
