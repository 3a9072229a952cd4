"""The orders that the user's sampler gives, pass by pass: the same in every process, whatever the sampler remembers.

Samplers keep all kinds of state: generators of their own, counts of epochs, lists that they shuffle in place. The order of pass
``e`` is what a sampler gives when it is drawn from for the ``e + 1``-th time, with all generators seeded by ``(seed, e)``. So a
process that comes later has the same orders: it draws those that it missed, if drawing changes more than generators. The order
of a pass that is running goes into checkpoints, and need not be drawn again.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from torchtrainer.errors import UnshardableLoaderError
from torchtrainer.train.data_facts import AS_THEY_ARE, length_of
from torchtrainer.train.data_generators import (
    MOST_PARTS,
    generators_seeded,
    is_generator,
    parts_of,
    plain_bytes,
    samplers_of,
)
from torchtrainer.train.fetch import call_set_epoch, seeded
from torchtrainer.train.fingerprints import fingerprint
from torchtrainer.train.records import RecordFile
from torchtrainer.train.sampler import derive_seed

_MOST_DRAWN = 1_000_000
_WITHOUT_MEMORY = (
    BatchSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    list,
    range,
)
"""Drawing from these changes nothing but generators."""


class EndlessSamplerError(UnshardableLoaderError):
    """A sampler gave far more than an epoch."""


class Order:
    """The order of one pass.

    Args:
        elements: of the sampler: indices, or batches of them.

    Attributes:
        elements: as given.
        samples: indices in them.
        digest: 56 bits that differ if anything else does.
    """

    def __init__(self, elements: list[Any]) -> None:
        self.elements = elements
        self._numbers = _as_numbers(elements)
        self.samples = len(elements if self._numbers is None else self._numbers[0])
        data = [repr(elements).encode()]
        if self._numbers is not None:
            data = [repr(None if one is None else len(one)).encode() + bytes(one or b"") for one in self._numbers]
        hashed = hashlib.blake2b(digest_size=7)
        for part in data:
            hashed.update(part)
        self.digest = int.from_bytes(hashed.digest(), "big")

    def saved(self) -> dict[str, Any] | None:
        """The order for a checkpoint; None if its elements are neither numbers nor batches of numbers."""
        if self._numbers is None:
            return None
        flat, sizes = self._numbers
        return {"order": torch.tensor(flat), "sizes": None if sizes is None else torch.tensor(sizes)}

    @classmethod
    def of_saved(cls, saved: Mapping[str, Any]) -> Order:
        """What was saved."""
        flat, sizes = saved["order"].tolist(), saved["sizes"]
        if sizes is None:
            return cls(flat)
        rest = iter(flat)
        return cls([list(islice(rest, size)) for size in sizes.tolist()])


def _as_numbers(elements: list[Any]) -> tuple[array[int], array[int] | None] | None:
    """Indices, or those of all batches one after the other and the sizes of the batches; None: they are something else."""
    try:
        return array("q", elements), None
    except (TypeError, OverflowError):
        pass
    try:
        if all(isinstance(one, list) for one in elements):
            return array("q", chain.from_iterable(elements)), array("q", map(len, elements))
    except (TypeError, OverflowError):
        pass
    return None


def _hidden(one: Any) -> bool:
    """Whether an object has a state that does not show, such as how far an iterator has come."""
    if isinstance(one, Mapping | list | tuple | set | frozenset | deque):
        return False
    return hasattr(one, "__next__") or not hasattr(one, "__dict__")


class DrawnOrders:
    """The orders that a sampler gives; one object for all ranks of a process.

    Args:
        loader: the user's.
        sampler: what is drawn from.
        seed: of the first rank, which all take.
        name: what the loader is for.
    """

    def __init__(self, loader: Any, sampler: Any, *, seed: int, name: str) -> None:
        self._loader = loader
        self._sampler = sampler
        self._seed = seed
        self._name = name
        self._next = 0
        self._remembers = False
        self._epoch = -1
        self._order = Order([])

    @property
    def kind(self) -> str:
        """Of the sampler, for errors."""
        return type(self._sampler).__name__

    def draw(self, epoch: int) -> Order:
        """The order of an epoch.

        Raises:
            EndlessSamplerError: the sampler does not end.
        """
        if epoch != self._epoch:
            if self._remembers:
                for missed in range(self._next, epoch):
                    self._draw(missed)
            self._order, self._epoch = Order(self._draw(epoch)), epoch
        return self._order

    def saved(self, epoch: int) -> dict[str, Any] | None:
        """The order of an epoch for a checkpoint, if it is the one that was drawn last, and its elements are numbers."""
        saved = self._order.saved() if epoch == self._epoch else None
        return None if saved is None else {"epoch": epoch, **saved}

    def put(self, saved: Mapping[str, Any]) -> None:
        """Takes an order from a checkpoint, so that it is not drawn."""
        if int(saved["epoch"]) != self._epoch:
            self._order, self._epoch = Order.of_saved(saved), int(saved["epoch"])

    def forget(self) -> None:
        """Has the next pass drawn again: the sampler may be changed until then. Not if drawing itself changed it."""
        if not self._remembers:
            self._epoch = -1

    def changed(self, epoch: int) -> str:
        """What to say if the order of a running pass is another one than when the pass began."""
        return (
            f"the {self._name} loader's sampler {self.kind} gives another order for epoch {epoch} than when this pass began, so "
            "that samples would be lost and repeated: let its order depend only on the epoch (set_epoch), on random generators "
            "and on what it keeps itself"
        )

    def _draw(self, epoch: int) -> list[Any]:
        first = self._next == 0 and not all(type(one) in _WITHOUT_MEMORY for one in samplers_of(self._loader))
        set_epochs(self._loader, epoch)
        before = _memory(self._sampler, self._loader) if first else b""
        seed = derive_seed(self._seed, epoch)
        known = max(length_of(self._sampler) or 0, length_of(self._loader.dataset) or 0)
        most = max(_MOST_DRAWN, 20 * known)
        with seeded(seed), generators_seeded(self._loader, seed):
            drawn = list(islice(iter(self._sampler), most + 1))
        if len(drawn) > most:
            raise EndlessSamplerError(
                f"the {self._name} loader's sampler {self.kind} did not end after {most} elements, so it cannot be dealt out; "
                "let it end after one epoch, or pass add_dist_sampler=False"
            )
        if first:
            after = _memory(self._sampler, self._loader)
            self._remembers = before is None or before != after
        self._next = epoch + 1
        return drawn


class OrderComparison:
    """Compares the orders that the processes of a run have drawn, once in each pass, by the records of the ranks."""

    def __init__(self) -> None:
        self._noted: dict[str, tuple[int, int]] = {}
        self._due = False

    def note(self, loaders: Mapping[str, Mapping[str, int]]) -> None:
        """To be called with the states of the loaders that go on a record."""
        orders = {
            name: (state["passes_started"], state["order"]) for name, state in loaders.items() if "order" in state
        }
        if orders != self._noted:
            self._noted, self._due = orders, True

    def finish(self, records: Sequence[RecordFile], number: int) -> None:
        """To be called when all ranks have given their gradients.

        A record that has been written over by now is of a rank that is ahead, which has compared with this one.

        Args:
            records: by rank.
            number: of the records that were noted last.

        Raises:
            UnshardableLoaderError: the orders differ.
        """
        if not self._due:
            return
        self._due = False
        for rank, record in enumerate(records):
            if not record.has(number):
                continue
            _, plain = record.read(number)
            for name, (passes, order) in self._noted.items():
                theirs = plain["loaders"].get(name, {})
                if theirs.get("passes_started") == passes and theirs.get("order", order) != order:
                    raise UnshardableLoaderError(
                        f"the {name} loader's sampler gave rank {rank} another order than this process in pass {passes}, so that dealing it out repeats and loses samples: let it "
                        f"depend only on the epoch and on its seed, not on the rank, the process or the time; or {AS_THEY_ARE}"
                    )


def set_epochs(loader: Any, epoch: int) -> None:
    """Calls ``set_epoch`` of whatever has it: the samplers of a loader and its dataset."""
    for one in (*samplers_of(loader), getattr(loader, "dataset", None)):
        call_set_epoch(one, epoch)


def _memory(sampler: Any, loader: Any) -> bytes | None:
    """A digest of what drawing from a sampler may change besides generators; None: that cannot be seen.

    What cannot be seen is, for instance, how far an iterator has come.
    """
    hashed, parts = hashlib.blake2b(), 0
    for one in parts_of([sampler], loader):
        parts += 1
        if is_generator(one) or type(one) is object:
            continue
        data = plain_bytes(one)
        if data is None and isinstance(one, torch.Tensor):
            data = fingerprint(one).to_bytes(7, "big")
        elif data is None and type(one).__module__ == "numpy":
            data = one.tobytes()
        elif data is None and _hidden(one):
            return None
        names = tuple(getattr(one, "__dict__", ())) if data is None else ()
        hashed.update(repr((type(one).__name__, names)).encode() + (data or b""))
    return hashed.digest() if parts < MOST_PARTS else None
