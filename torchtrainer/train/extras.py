"""An operator's own state, which its ``state_dict`` returns, divided into what all ranks share and what each has.

The rule is when an entry changes. What changes in the update of a step, from the exchange of gradients to `after_step`, belongs to
all ranks, as the parameters do: every process makes the update once, however many ranks it carries. Such are averages of the
weights, teachers, counters of updates. What changes elsewhere, in the forward pass or the loss, belongs to the rank: it is put
aside when another rank's turn comes, and goes on the rank's record. An entry is a leaf of nested dicts; a list is one entry.

Everything here runs in the thread that trains.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from torchtrainer.errors import EngineError
from torchtrainer.train.components import internals
from torchtrainer.train.digest import digest_of_all, is_plain, member
from torchtrainer.train.state import detached

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator

SHARED_EXTRAS = "shared_extras"
"""Key of `Extras.shared` in the state that a worker sends to one that joins."""
Path = tuple[Any, ...]
"""Keys that lead to an entry."""
Entries = dict[Path, Any]


class Extras:
    """The own state of the operator of a process that may carry several ranks.

    Args:
        operator: of this process.

    Attributes:
        sums: digests of what all ranks share, to be compared with those of the other ranks; None: nothing to compare.
        unlike: what they should share and do not, so that nobody can take a rank over; empty: nothing.
    """

    def __init__(self, operator: TrainingOperator) -> None:
        self.sums: dict[str, str] | None = None
        self.unlike = ""
        self._operator = operator
        self._kept = keeps_extras(operator)
        self._shared: set[Path] = set()
        self._above: set[Path] = set()

    @property
    def shared(self) -> list[list[Any]]:
        """The entries that all ranks share, as far as they have changed by now; for a process that joins."""
        return [list(path) for path in self._shared]

    def share(self, paths: Iterable[Sequence[Any]]) -> None:
        """All ranks share these entries too."""
        new = {tuple(path) for path in paths} - self._shared
        self._shared |= new
        self._above |= {path[:length] for path in new for length in range(len(path))}

    def of_rank(self) -> Entries:
        """A copy of the entries of the rank whose turn it is."""
        if not self._kept:
            return {}
        return {path: detached(value) for path, value in self._live() if not self._is_shared(path)}

    def put(self, mine: Entries) -> None:
        """Gives the operator the entries of a rank in the place of another's; what all share stays as it is."""
        if not self._kept:
            return
        live = dict(self._live())
        wanted = {path: value for path, value in mine.items() if not self._is_shared(path)}
        if not wanted and all(map(self._is_shared, live)):
            return
        kept = {path: value for path, value in live.items() if self._is_shared(path) or path in wanted}
        self._operator.load_state_dict(_nested({**kept, **wanted}, self._operator.state_dict()))

    def changed_since(self, before: Entries) -> tuple[Entries, set[Path]]:
        """What has become of the entries of the rank whose turn it is: a copy of those that changed, and which are gone."""
        now = {path: value for path, value in self._live() if not self._is_shared(path)}
        changed = {
            path: detached(value) for path, value in now.items() if path not in before or not _same(before[path], value)
        }
        return changed, {path for path in before if path not in now and not self._is_shared(path)}

    def updated(self, before: Entries) -> None:
        """The update of a step is over: what it changed belongs to all ranks from now on.

        Args:
            before: the entries of the rank whose turn it is, before the update.
        """
        if not self._kept:
            return
        changed, gone = self.changed_since(before)
        if changed or gone:
            self.share([*changed, *gone])
            self.begin_comparison()

    def begin_comparison(self) -> None:
        """Has the next record say what is shared, for the other ranks to compare."""
        if self._shared:
            self.sums = {
                _name(path): digest_of_all(value, sampled=True) for path, value in self._live() if self._is_shared(path)
            }

    def compare(self, others: Sequence[Mapping[str, str] | None]) -> None:
        """Compares with what is on the records of the other ranks.

        Args:
            others: by rank; None: has nothing to compare.
        """
        mine, self.sums = self.sums, None
        if mine is None or self.unlike:
            return
        for rank, theirs in enumerate(others):
            name = next((name for name in mine if theirs and theirs.get(name, mine[name]) != mine[name]), None)
            if name is not None:
                self._note_unlike(name, rank)
                return

    def _note_unlike(self, name: str, rank: int) -> None:
        context = internals(self._operator).context
        self.unlike = (
            f"{name} in the state_dict() of {type(self._operator).__name__} changes in the update, and is not the same on ranks "
            f"{context.collective.rank} and {rank}"
        )
        if context.say is not None:
            context.say(
                f"{self.unlike}: no other rank could continue with it, so a lost worker means a restart from the "
                "newest checkpoint. Make it from values that are equal on all ranks, or change it in the forward pass "
                "or the loss"
            )

    def _live(self) -> Iterator[tuple[Path, Any]]:
        return _entries(self._operator.state_dict()) if self._kept else iter(())

    def _is_shared(self, path: Path) -> bool:
        if path in self._shared or path in self._above:
            return True
        return bool(self._shared) and any(path[:length] in self._shared for length in range(len(path)))


def keeps_extras(operator: TrainingOperator) -> bool:
    """Whether the operator has a state of its own beside models, optimizers and schedulers."""
    from torchtrainer.operator import TrainingOperator as Base

    return type(operator).state_dict is not Base.state_dict


def packed_extras(value: Any) -> bytes:
    """An own state, or a rank's entries of it, for a record; empty for None."""
    if value is None:
        return b""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def unpacked_extras(data: bytes) -> Any:
    """What `packed_extras` was given.

    Raises:
        EngineError: it holds other things than tensors, numbers, text and containers of them.
    """
    try:
        return torch.load(io.BytesIO(data), weights_only=True)
    except pickle.UnpicklingError as error:
        raise EngineError(
            f"what the operator's state_dict() returned cannot be handed to another process ({str(error).splitlines()[0]}): let "
            "it return tensors, numbers, text, and lists and dicts of them"
        ) from error


def _entries(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """The leaves of nested dicts; an empty one is a leaf."""
    if isinstance(value, Mapping) and value:
        for key, one in value.items():
            yield from _entries(one, (*path, key))
    elif path or value is not None:
        yield path, value


def _nested(entries: Entries, like: Any) -> Any:
    """Entries as nested dicts, of the kinds that another such structure has."""
    if () in entries or not entries:
        return entries.get(())
    parts: dict[Any, Entries] = {}
    for (key, *rest), value in entries.items():
        parts.setdefault(key, {})[tuple(rest)] = value
    made = copy.copy(like) if isinstance(like, MutableMapping) else {}  # with what it has besides its members
    members = dict(made)
    made.clear()
    for key, part in parts.items():
        made[key] = _nested(part, members.get(key))
    return made


def _name(path: Path) -> str:
    name = ""
    for key in path:
        name = member(name, key)
    return name or "what stands"


def _same(one: Any, other: Any) -> bool:
    """Whether two values have the same bits."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape and one.layout == other.layout == torch.strided
        if alike and torch.equal(one, other):
            return True
    elif is_plain(one) and one == other:
        return True
    return digest_of_all(one) == digest_of_all(other)  # numbers that are none are not equal to themselves
