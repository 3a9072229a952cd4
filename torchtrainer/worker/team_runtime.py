"""What the ranks of a worker process do, call by call: several ranks in one process, or one, whose gradients travel in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torchtrainer.checkpoint.snapshot import assemble
from torchtrainer.errors import OperatorUseError
from torchtrainer.operator import TrainingOperator
from torchtrainer.train.complete_state import set_modes
from torchtrainer.train.components import internals
from torchtrainer.train.extras import SHARED_EXTRAS
from torchtrainer.train.hooks import epoch_info
from torchtrainer.train.lone import LoneRank, rank_state_of
from torchtrainer.train.loop import Extent, Resumed, StepIterator
from torchtrainer.train.metrics import PassResult
from torchtrainer.train.rng import set_rng_state, streams_from_plain
from torchtrainer.train.state import restore
from torchtrainer.train.team import Team
from torchtrainer.train.team_loop import TeamLoader, train_epoch
from torchtrainer.train.weights import WEIGHTS
from torchtrainer.worker.runtime import RankRuntime


class ByRank(dict[int, Any]):
    """What a call returned for each rank of this process."""


class TeamRuntime(RankRuntime):
    """The calls of a process that can carry any number of ranks.

    Args:
        operator, arguments: as for `RankRuntime`.
        team: the ranks of this process.
    """

    _clocked = False

    def __init__(self, operator: TrainingOperator, team: Team, **arguments: Any) -> None:
        super().__init__(operator, **arguments)
        self.team = team
        self._keeper.team = team
        self._late: Callable[[int], Any] | None = None
        internals(operator).bare_forward = True

    def late_result(self, rank: int) -> Any:
        """What the latest call returns for a rank that was taken over after this process had come to its end."""
        return self._late(rank) if self._late is not None else None

    def settle(self, method: str, value: Any) -> None:
        """To be called after every call, with what it returned: the cards follow what it changed."""
        if method not in ("train", "validate"):
            self._late = lambda _: value
        if method != "train":
            self.team.refresh()
        self.team.turn_to_lowest()  # for calls that are made once per process

    # Calls

    def train(
        self,
        *,
        num_steps: int | None = None,
        profile: bool = False,
        trace: str | None = None,
        info: dict[str, Any] | None = None,
        new_pass: bool = False,
        mark: dict[str, Any] | None = None,
    ) -> PassResult:
        """Trains all ranks of this process; see `RankRuntime.train`."""
        self._late, extent = None, Extent(num_steps=num_steps, new_pass=new_pass)
        team, loader = self.team, self._loader("train")
        team.new_pass = new_pass
        team.begin_call(anew=not self._keeper.resuming)
        passes = loader.passes_started - loader.in_pass if loader is not None else 0
        self._keeper.mark, self._keeper.epoch_idx = mark or {}, self._keeper.epoch_idx_of_resumed(passes)
        team.training = True
        try:
            if trace is not None:
                team.turn_to_lowest()  # after which the trace is called
            dealt = TeamLoader(team) if loader is not None else None
            with self._pass(dealt, "train", extent, profile, trace) as steps:
                team.show_means()
                with self.operator.timers.record("train_epoch"):
                    told = epoch_info(info, self.operator, num_steps)
                    train_epoch(team, self.operator, steps, {**told, "epoch_idx": self._keeper.epoch_idx})
        finally:
            team.end_call()
        self._late = lambda rank: self._train_result(rank, steps)
        return ByRank({rank: self._train_result(rank, steps) for rank in team.ranks})  # type: ignore[return-value]

    def _train_result(self, rank: int, steps: StepIterator) -> PassResult:
        seat = self.team.seats[rank]
        self.team.turn_to(seat)
        steps.samples = seat.samples
        internals(self.operator).meters = seat.meters  # whose weights go into the result
        epoch = {"epoch": seat.loaders["train"].passes_started if "train" in seat.loaders else 0}
        return self._result(seat.meters.summary(), steps, epoch)

    def validate(
        self,
        *,
        num_steps: int | None = None,
        profile: bool = False,
        info: dict[str, Any] | None = None,
        new_pass: bool = False,
        mark: dict[str, Any] | None = None,
    ) -> PassResult:
        """Evaluates rank after rank; see `RankRuntime.validate`."""
        Extent(num_steps=num_steps)  # checked for a process without ranks too
        team = self.team
        keywords = {"num_steps": num_steps, "profile": profile, "info": info, "new_pass": new_pass, "mark": mark}
        found, losses = ByRank(), dict[int, Any]()

        def one(rank: int) -> PassResult:
            team.turn_to_rank(rank)
            return RankRuntime.validate(self, **keywords)  # type: ignore[arg-type]

        self._late = one
        while left := [rank for rank in team.ranks if rank not in found]:  # ranks of lost processes come in between
            found[left[0]] = one(left[0])
            losses.update(self._progress.losses)
        self._progress.losses = losses
        return found  # type: ignore[return-value]

    def apply_operator(self, fn: Callable[[TrainingOperator], Any]) -> Any:
        """Returns ``fn(operator)``; what it changes of the operator's own state it changes for all ranks of this process."""
        with self.team.for_all():
            return super().apply_operator(fn)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads a state; see `RankRuntime.load_state_dict`."""
        super().load_state_dict(state)
        if WEIGHTS in state:
            self.team.take_in()
            return
        now = {name: one.state_dict() for name, one in internals(self.operator).loaders.items()}
        for seat in self.team.seats.values():
            for name, loader in seat.loaders.items():
                loader.load_state_dict(now[name])
        self.team.take_in()

    def close(self) -> None:
        """Ends the loaders' worker processes."""
        for seat in self.team.seats.values():
            seat.close()

    # Joining

    def join(self, path: str, number: int, ranks: list[int], at: Mapping[str, Any]) -> None:
        """Takes over ranks with the state that another worker has shared.

        Args:
            path, number: of the shared state.
            ranks: to carry; their cards are there.
            at: where the running call stands.
        """
        team, shared = self.team, assemble([path], number)["shared"]
        restore(self.operator, shared)
        team.extras.share(shared[SHARED_EXTRAS])
        team.join(at)
        team.assign(ranks)
        team.take_buffers()
        self._progress.reach(self.operator.global_step, shared["epoch"])
        if at["steps"] is not None:
            self._keeper.resume_with(Resumed(steps=at["steps"], put_back=lambda: self._take_seats(shared)))

    def _take_seats(self, shared: Mapping[str, Any]) -> None:
        """Right before the first batch: whatever the call did before it does not count."""
        restore(self.operator, shared)
        self.team.adopt_again()
        self.team.take_buffers()

    # Parts

    def _keeps(self, name: str) -> bool:
        """A validation of several ranks, one after the other, has no boundary at which all of them stand."""
        return super()._keeps(name) and (name == "train" or len(self.team.seats) == 1)

    @property
    def _exchanging(self) -> int:
        return 1  # each rank's share is weighed when it is computed

    def _take_buffers(self, syncing: list[Any]) -> None:
        self.team.follow_first_rank()


class LoneRuntime(RankRuntime):
    """The calls of a process whose operator makes the update itself.

    Args:
        operator, arguments: as for `RankRuntime`.
        lone: the rank of this process.
    """

    _clocked = False

    def __init__(self, operator: TrainingOperator, lone: LoneRank, **arguments: Any) -> None:
        super().__init__(operator, **arguments)
        self.lone = lone
        lone.epoch_idx = lambda: self._keeper.epoch_idx

    def train(self, **keywords: Any) -> PassResult:
        """See `RankRuntime.train`."""
        self.lone.begin_call(anew=not self._keeper.resuming)
        return super().train(**keywords)

    def settle(self, method: str, value: Any) -> None:
        """To be called after every call: the card follows what it changed."""
        self.lone.end_call()
        self.lone.at_boundary()

    def join(self, path: str, number: int, ranks: list[int], at: Mapping[str, Any]) -> None:
        """Takes over a rank; see `TeamRuntime.join`."""
        if ranks != [internals(self.operator).context.collective.rank]:
            raise OperatorUseError(f"this process was built for another rank than {ranks}")
        shared = assemble([path], number)["shared"]
        self.lone.join(at)
        buffers, card = self.lone.card()
        mine = rank_state_of(card)
        for name, position in mine["loaders"].items():
            internals(self.operator).loaders[name].load_state_dict(position)

        def put_everything_back() -> None:
            _put_card_back(self.operator, shared, mine)
            self.lone.load_buffers(buffers)
            set_rng_state(streams_from_plain(card["streams"]))

        put_everything_back()
        set_modes(self.operator, mine["modes"])
        self._progress.reach(self.operator.global_step, shared["epoch"])
        if "steps" in mine:  # it was lost in the running call; between two calls a card has none
            self._keeper.resume_with(Resumed(steps=mine["steps"], put_back=put_everything_back), mine["epoch_idx"])

    def _take_buffers(self, syncing: list[Any]) -> None:
        self.lone.follow_first_rank()


def _put_card_back(operator: TrainingOperator, shared: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    restore(operator, {**shared, "operator": mine["operator"]} if "operator" in mine else shared)
    meters = internals(operator).meters
    if meters is not None and mine["meters"] is not None:
        meters.load_state_dict(mine["meters"])
