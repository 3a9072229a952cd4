"""How the ranks of a process get the gradients of all ranks: the executor's interface, and one that does nothing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

from torchtrainer.train.components import internals
from torchtrainer.train.loop import Resumed, StepIterator
from torchtrainer.train.rank_context import RankContext

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator
    from torchtrainer.train.data import RankLoader


class GradientSync(Protocol):
    """Gradients of this process's ranks become those of all ranks. Used by the thread that trains.

    There are `torchtrainer.train.shared_step.SharedStep` (any number of ranks, one update for all of them),
    `torchtrainer.train.backward_sync.BackwardSync` (one rank, as its backward pass ends) and `NoSync`.

    Attributes:
        contexts: what only one rank has, by rank, of the ranks that this process carries.
        step: makes a step of all ranks here, which the executor's loop calls; None: the operator's own hooks make the steps.
        clocked: gradients are exchanged inside backward, by what does not measure it.
        averages_over: how many ranks backward averages over, so that uneven shares are weighed before it; 1: none.
        call: number of the call that is running, or was the latest; the same in all processes.
        epoch_idx: of the running pass hook.
    """

    contexts: dict[int, RankContext]
    clocked: bool
    averages_over: int
    call: int
    epoch_idx: int

    @property
    def step(self) -> Callable[[Any, Mapping[str, Any]], None] | None: ...  # noqa: D102  # above

    @property
    def loader(self) -> RankLoader | None:
        """What the iterator of a ``train`` call draws from."""

    def each(self) -> Iterator[RankContext]:
        """Every rank in order; the operator is that of its rank meanwhile, and what is changed there stays with the rank."""

    def turn_to_rank(self, rank: int) -> RankContext:
        """Has the operator be that of a rank."""

    def turn_to_lowest(self) -> None:
        """Has the operator be that of the lowest rank, as it is between steps and calls."""

    def for_all(self) -> AbstractContextManager[None]:
        """What the block changes of the operator's own state changes for every rank here."""

    def begin_call(self, *, anew: bool, new_pass: bool) -> None:
        """A call of ``train`` begins.

        Args:
            anew: it continues with no call that was interrupted.
            new_pass: it begins a new pass.
        """

    def samples_of(self, context: RankContext, steps: StepIterator) -> int:
        """Samples of a rank in the running call."""

    def end_call(self, *, completed: bool) -> None:
        """The call is over; ``completed``: by its end, not by an error."""

    def at_boundary(self) -> None:
        """A step is complete."""

    def settle(self, *, trained: bool, reply: tuple[Any, ...] | None = None) -> None:
        """A call of any kind has returned.

        Args:
            trained: it was one of ``train``.
            reply: what is about to be told of it, as plain data, which a process that takes the rank over may have to tell.
        """

    def take_first_buffers(self, wrapped: Sequence[Any]) -> None:
        """Gives this process the buffers of rank 0, such as batch-norm statistics, as DDP does before each forward.

        Args:
            wrapped: models whose wrappers exchange buffers.
        """

    def state_loaded(self, *, positions: bool) -> None:
        """A state was loaded into the operator, which all ranks here have now; ``positions``: those of the loaders too."""

    def restored(self, context: RankContext) -> None:
        """The rank whose turn it is was put where a checkpoint has it."""


class RecoverableSync(GradientSync, Protocol):
    """One whose ranks can be taken over from a process that is lost, and given to another.

    Attributes:
        on_wait: called while others are waited for.
    """

    on_wait: Callable[[], None]

    @property
    def unlike(self) -> str:
        """Why nobody could take a rank over, as it has turned out; empty: nothing."""

    def why_not_shared(self, ranks: Sequence[int]) -> str:
        """Why these ranks cannot continue from the state of this process; empty if they can."""

    def shared_state(self) -> dict[str, Any]:
        """What a process that joins needs beside the operator's state."""

    def where(self) -> dict[str, Any]:
        """Where this process stands, as plain data for one that joins."""

    def join(self, shared: Mapping[str, Any], ranks: Sequence[int], at: Mapping[str, Any]) -> Resumed | None:
        """Takes ranks over with a state that another process shared; returns the interrupted call that continues here.

        Args:
            shared: the state.
            ranks: to carry.
            at: what `where` gave there, and ``steps``: the place in the running call, None between calls.
        """

    def kept_reply(self, call: int) -> tuple[Any, ...] | None:
        """What the process that had the rank before was about to tell of a call; None: the call has to be made here."""

    def adopt(self, rank: int) -> RankContext:
        """Takes over a rank whose process is gone, as its record of the latest exchange has it."""

    def catch_up(self, rank: int) -> int:
        """In the middle of a step: takes a rank over and does what it had not done; returns the shares that were computed."""

    def assign(self, ranks: Collection[int]) -> None:
        """Carries exactly these ranks from now on; at a step boundary or between calls."""


class OneRank:
    """What `GradientSync` asks for of a process that carries one rank, whose operator is always that of this rank.

    Args:
        operator: of this process.
    """

    step = None

    def __init__(self, operator: TrainingOperator) -> None:
        self._collective: Any = internals(operator).context.collective
        self.rank: int = self._collective.rank
        self.context = RankContext(rank=self.rank, loaders=internals(operator).loaders)
        self.contexts = {self.rank: self.context}
        self.averages_over: int = self._collective.world_size
        self.call = 0
        self.epoch_idx = 0

    @property
    def loader(self) -> RankLoader | None:
        """See `GradientSync`, as for all that follows."""
        return self.context.loaders.get("train")

    def each(self) -> Iterator[RankContext]:  # noqa: D102
        yield self.context

    def turn_to_rank(self, rank: int) -> RankContext:  # noqa: D102
        return self.contexts[rank]

    def turn_to_lowest(self) -> None:  # noqa: D102
        pass

    def for_all(self) -> AbstractContextManager[None]:  # noqa: D102
        return nullcontext()

    def take_first_buffers(self, wrapped: Sequence[Any]) -> None:  # noqa: D102
        if wrapped:
            self._collective.broadcast_buffers([model for model in wrapped if model.broadcast_buffers])

    def state_loaded(self, *, positions: bool) -> None:  # noqa: D102
        pass

    def restored(self, context: RankContext) -> None:  # noqa: D102
        pass

    def samples_of(self, context: RankContext, steps: StepIterator) -> int:  # noqa: D102
        return steps.samples


class NoSync(OneRank):
    """One rank that exchanges nothing here: it is alone, or the user's own code exchanges.

    Args:
        operator: of this process.
    """

    clocked = True

    def begin_call(self, *, anew: bool, new_pass: bool) -> None:  # noqa: D102
        if anew:
            self.context.begin_call(new_pass=new_pass)

    def end_call(self, *, completed: bool) -> None:  # noqa: D102
        pass

    def at_boundary(self) -> None:  # noqa: D102
        pass

    def settle(self, *, trained: bool, reply: tuple[Any, ...] | None = None) -> None:  # noqa: D102
        pass
