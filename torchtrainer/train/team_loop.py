"""The built-in training loop of a process that carries any number of ranks, and the batches that it draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torchtrainer.train.data import RankBatch
from torchtrainer.train.hooks import batch_info
from torchtrainer.train.loop import StepIterator, modules_of
from torchtrainer.train.schedules import SchedulerSteps
from torchtrainer.train.team import Team

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator


def train_epoch(team: Team, operator: TrainingOperator, steps: StepIterator, info: Mapping[str, Any]) -> None:
    """The built-in training loop for all seats of a process; see `torchtrainer.train.loop.train_epoch`."""
    for module in modules_of(operator):
        module.train()
    with SchedulerSteps(operator, steps) as schedulers:
        for _ in steps:
            schedulers.before_batch()
            team.step(batch_info(info, steps.batches, operator.global_step))
            schedulers.after_batch()


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
