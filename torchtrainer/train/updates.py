"""Ensures that every update of an optimizer follows an exchange of gradients in which all ranks took part.

Ranks whose updates differ train different models, and nothing else tells: losses look well, and checkpoints hold one of them.
So exchanges and updates are counted, and the counts go along with every exchange. In the thread that trains.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from torchtrainer.comm.board import UnequalExchangeError, exchange_tag
from torchtrainer.comm.exchange import Exchange
from torchtrainer.errors import OperatorUseError
from torchtrainer.train.components import internals, optimizers_of
from torchtrainer.train.equality import NOTHING_SEEN, Look, unequal
from torchtrainer.train.trained import TrainedParameters

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator

_ADVICE = (
    "Every rank must call backward() the same number of times in a step, and step its optimizers the same number of times: let a rank that has nothing "
    "to learn from its batch call backward() on loss * 0, or decide by a value that is alike on all ranks"
)


class Updates:
    """The exchanges of a process and the updates of its optimizers: refuses an update by gradients that were not exchanged.

    Args:
        operator: of this process.
        trained: its parameters.
        exchange: with the other processes, laid out for them.

    Attributes:
        trained: as given.
        count: updates so far; the same on all ranks.
        kept_back: units whose latest gradients were computed under ``no_sync``.
        training: a ``train`` call is running: updates are counted.
        call: number of the ``train`` call that is running, or was the latest.
    """

    def __init__(self, operator: TrainingOperator, trained: TrainedParameters, exchange: Exchange) -> None:
        self.count = 0
        self.call = 0
        self.kept_back: set[int] = set()
        self.trained = trained
        self._operator = operator
        self._exchange = exchange
        self.training = False
        self._exchanges = 0
        self._depth = 0  # more than 1: an optimizer's step calls that of its base class, or of another optimizer
        self._sums: Sequence[int] = NOTHING_SEEN
        self._look = Look(operator, trained)
        self._latest: dict[int, int] = {}
        self._used: dict[Any, int] = {}
        self._units: dict[Any, set[int]] = {}
        self.watch()

    def watch(self) -> None:
        """Watches every optimizer that there is now."""
        self._look.watch()
        unit_of = self.trained.unit_by_id()
        for optimizer in optimizers_of(self._operator):
            if optimizer not in self._used and hasattr(optimizer, "register_step_pre_hook"):
                optimizer.register_step_pre_hook(self._before_update)
                optimizer.register_step_post_hook(self._after_update)
                self._used[optimizer] = -1
            parameters = [one for group in optimizer.param_groups for one in group["params"]]
            self._units[optimizer] = {unit_of[id(one)] for one in parameters if id(one) in unit_of}

    def begin_call(self) -> None:
        """A call of ``train`` begins: from now on updates are counted."""
        self.training = True
        self.call += 1
        self.look()

    def end_call(self) -> None:
        """The call is over: what the user's functions do between calls is compared when the next one begins."""
        self.training = False

    def look(self) -> None:
        """A step begins, and the exchanges in it tell the other ranks what this process holds; see `Look`."""
        self._sums = self._look.take()

    @property
    def place(self) -> int:
        """Grows with every step and call, the same on all ranks."""
        return (2 * self.call + (not self.training)) << 40 | self._operator.global_step

    def follow_changes(self, *, begins: bool = False) -> bool:
        """Exchanges the gradients of other parameters if others are trained than before; returns whether that is so.

        Args:
            begins: a call begins: every parameter is looked at.
        """
        changed = self.trained.changed(begins=begins)
        if changed:
            self._exchange.lay_out(self.trained.parameters, self.trained.by_rows)
            self.watch()
        return changed

    def tag(self) -> array[int]:
        """What has to be the same on all ranks in an exchange."""
        step, layout = self._operator.global_step, self._exchange.layout
        return exchange_tag(step=step, updates=self.count, layout=layout, sums=self._sums)

    def finish(
        self, tag: array[int], *, carried: Callable[[], Collection[int]], on_wait: Callable[[], None], by_place: bool
    ) -> list[torch.Tensor | None]:
        """Finishes the running exchange; see `Exchange.finish`. ``by_place``: a rank that went past it is noticed.

        Raises:
            OperatorUseError: the ranks do not exchange alike.
        """
        place = self.place if by_place else None
        try:
            return self._exchange.finish(carried=carried, on_wait=on_wait, tag=tag, place=place)
        except UnequalExchangeError as error:
            raise self._explained(error) from None

    def leave(self) -> None:
        """The call came to its end, and every exchange was made.

        Raises:
            OperatorUseError: another rank still exchanges.
        """
        try:
            self._exchange.leave(self.tag())
        except UnequalExchangeError as error:
            raise self._explained(error) from None

    def where(self) -> dict[str, Any]:
        """How far this process is with its exchanges, as plain data for one that joins."""
        return {
            "exchange": self._exchange.number,
            "region": self._exchange.region,
            "trained": self.trained.state(),
            "updates": self.count,
            "train_call": self.call,
        }

    def go_to(self, at: Mapping[str, Any]) -> None:
        """Brings this process to where another one was, as `where` has it.

        Args:
            at: with ``steps``, which is None where no pass is running: else the call that is running is begun again here.
        """
        self.trained.load(at["trained"])
        self.watch()
        self.count, self.call = at["updates"], at["train_call"] - (at["steps"] is not None)
        self._exchange.number = at["exchange"]
        self._exchange.lay_out(self.trained.parameters, self.trained.by_rows, at["region"])

    def exchanged(self, units: Collection[int]) -> None:
        """The gradients of these units are those of all ranks."""
        self._exchanges += 1
        self._depth = 0  # an update that an error broke off has no end
        self._latest.update(dict.fromkeys(units, self._exchanges))
        self.kept_back.difference_update(units)

    def _explained(self, error: UnequalExchangeError) -> OperatorUseError:
        """The message about a rank that took part in an exchange differently from this one."""
        step, rank = self._operator.global_step, internals(self._operator).context.collective.rank
        names = self.trained.names(list(range(len(self.trained.parameters))))
        of_what = _few(names)
        mine, *sums = self.tag()
        theirs, *their_sums = error.tag if error.tag is not None else (0,)
        if error.tag is None:
            what = (
                f"rank {error.rank} went on without exchanging its gradients of {of_what} in step {step}, in which rank {rank} "
                "waits for them"
            )
        elif theirs == mine:
            return OperatorUseError(unequal(self._operator, self._look.named(sums, their_sums), error.rank))
        elif (theirs ^ mine) >> 40:
            what = (
                f"in step {step} rank {rank} trains other parameters than rank {error.rank}. Here they are {of_what}. Freeze, "
                "unfreeze and add parameters on all ranks alike, between the same two steps"
            )
            return OperatorUseError(what)
        elif (theirs ^ mine) & 0xFFFFFF:
            their_step = step + ((theirs - mine + (1 << 23)) % (1 << 24)) - (1 << 23)
            ahead, behind = (error.rank, rank) if their_step > step else (rank, error.rank)
            what = (
                f"rank {ahead} did not exchange its gradients of {of_what} in step {min(step, their_step)}, in which rank {behind} "
                f"did, and is in step {max(step, their_step)}"
            )
        else:
            what = (
                f"by step {step} the optimizers of rank {error.rank} have made more or fewer updates of {of_what} than those of "
                f"rank {rank}"
            )
        return OperatorUseError(f"the ranks have parted: {what}. {_ADVICE}")

    def _before_update(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth += 1
        if not self.training or self._depth > 1:
            return
        units = self._units[optimizer]
        latest = max([self._latest.get(unit, -1) for unit in units], default=-1)
        if latest <= self._used[optimizer] or not self.kept_back.isdisjoint(units):
            self._refuse(optimizer)
        self._used[optimizer] = self._exchanges
        self.count += 1

    def _after_update(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._depth = max(0, self._depth - 1)

    def _refuse(self, optimizer: Any) -> None:
        """Raises an error unless there is nothing that the update could use."""
        names = dict(zip(map(id, self.trained.parameters), range(len(self.trained.parameters)), strict=True))
        given = [one for group in optimizer.param_groups for one in group["params"] if one.grad is not None]
        if not given:
            return
        of_what = _few(self.trained.names([names[id(one)] for one in given if id(one) in names]))
        where = f"step {self._operator.global_step} of rank {internals(self._operator).context.collective.rank}"
        if self.kept_back & self._units[optimizer]:
            why = "they were computed under no_sync(). Leave no_sync() for the last backward() before the update"
        else:
            why = (
                "there was no backward() since its latest update. Call backward() before each step(), and let it fill .grad; to "
                "average gradients in your own way, pass wrap_ddp=False"
            )
        raise OperatorUseError(
            f"in {where}, {type(optimizer).__name__} would update {of_what} by gradients that the ranks have not exchanged: {why}"
        )


def _few(names: Sequence[str]) -> str:
    """Some names for a message."""
    if not names:
        return "no parameters"
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
