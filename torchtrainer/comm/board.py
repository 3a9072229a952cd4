"""What each rank states about itself at the start of the memory through which gradients are exchanged."""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Sequence

from torchtrainer.comm.counters import LINE_BYTES, Counters
from torchtrainer.errors import EngineError

LOOK_PARTS = 8
"""Number of parameter sums that travel with each exchange."""
_WORD_BYTES = 8
_TAG_BUFFERS = 2
_TAG_WORDS = 1 + LOOK_PARTS
_STANDS_FOR = 3
"""Numbers that describe a rank's gradients: the weight of a sample, the number of samples, and the loss."""
_STEP_BITS, _UPDATES_BITS, _LAYOUT_BITS = 24, 16, 22
PAGE_BYTES = 4096
"""Alignment of what follows the board, so that the memory of each layout can be freed by itself."""


def exchange_tag(*, step: int, updates: int, layout: int, sums: Sequence[int] = (0,) * LOOK_PARTS) -> array[int]:
    """What has to be alike on all ranks when they exchange gradients: a word for what they do, and sums of what they hold.

    Of counts the lowest bits, which tell ranks apart that are a few steps apart.

    Args:
        step: optimizer steps that the rank has completed.
        updates: updates that its optimizers have made.
        layout: a checksum of the parameters whose gradients it exchanges.
        sums: `LOOK_PARTS` of them.
    """
    counts = step % (1 << _STEP_BITS) | updates % (1 << _UPDATES_BITS) << _STEP_BITS
    return array("q", (counts | layout % (1 << _LAYOUT_BITS) << (_STEP_BITS + _UPDATES_BITS), *sums))


NO_TAG = exchange_tag(step=0, updates=0, layout=0)
"""Tag of ranks that have nothing to compare."""


class UnequalExchangeError(EngineError):
    """The ranks exchange different gradients: another step, other parameters, or a rank does not take part at all.

    Attributes:
        rank: the one that differs.
        tag: its tag; None: it went on without this exchange.
    """

    def __init__(self, rank: int, tag: Sequence[int] | None) -> None:
        super().__init__(f"rank {rank} does not exchange gradients as this rank does")
        self.rank = rank
        self.tag = tag


class Board:
    """Counters, tags and places of all ranks, and what their gradients stand for.

    Args:
        memory: whose first `size_bytes` it takes.
        world_size: number of ranks.
        shared: other processes map this memory too.

    Attributes:
        given: per rank, the number of the exchange for which its gradients are in its slot.
        reduced: per rank, the number of the exchange for which its share of the result is made.
        places: per rank, a number that grows with every step and call, and tells ranks in other steps apart.
    """

    def __init__(self, memory: mmap.mmap, *, world_size: int, shared: bool) -> None:
        self.world_size = world_size
        lines = LINE_BYTES * world_size
        self.given = Counters(memory, 0, world_size=world_size, shared=shared)
        self.reduced = Counters(memory, lines, world_size=world_size, shared=shared)
        self.places = memoryview(memory)[2 * lines : 3 * lines].cast("Q")[:: LINE_BYTES // _WORD_BYTES]
        tags, each = memoryview(memory)[3 * lines :], _TAG_WORDS * _WORD_BYTES * world_size
        self._tags = [tags[buffer * each : (buffer + 1) * each].cast("q") for buffer in range(_TAG_BUFFERS)]
        stands, each = tags[_TAG_BUFFERS * each :], _STANDS_FOR * _WORD_BYTES * world_size
        self._stands = [stands[buffer * each : (buffer + 1) * each].cast("d") for buffer in range(_TAG_BUFFERS)]

    @staticmethod
    def size_bytes(world_size: int) -> int:
        """Bytes of memory that a board takes."""
        used = (3 * LINE_BYTES + _TAG_BUFFERS * (_TAG_WORDS + _STANDS_FOR) * _WORD_BYTES) * world_size
        return -(-used // PAGE_BYTES) * PAGE_BYTES

    def tag(self, rank: int, number: int, tag: array[int]) -> None:
        """Writes a rank's tag for an exchange, before the rank publishes it."""
        self._tags[number % _TAG_BUFFERS][rank * _TAG_WORDS : (rank + 1) * _TAG_WORDS] = memoryview(tag)

    def check_tags(self, number: int, mine: array[int]) -> None:
        """Compares the tags of all ranks, which have given their gradients.

        Raises:
            UnequalExchangeError: one of them has another tag than this process.
        """
        tags = self._tags[number % _TAG_BUFFERS].tobytes()
        if tags != mine.tobytes() * self.world_size:
            found = array("q", tags)
            by_rank = [found[rank * _TAG_WORDS : (rank + 1) * _TAG_WORDS] for rank in range(self.world_size)]
            rank = next(rank for rank, tag in enumerate(by_rank) if tag != mine)
            raise UnequalExchangeError(rank, by_rank[rank])

    def stand_for(self, rank: int, number: int, weight: float, samples: float, loss: float) -> None:
        """Writes what a rank's gradients stand for in an exchange, before the rank publishes them."""
        stands, first = self._stands[number % _TAG_BUFFERS], _STANDS_FOR * rank
        stands[first], stands[first + 1], stands[first + 2] = weight, samples, loss

    def scales(self, number: int) -> list[float] | None:
        """The factors of the ranks' gradients in their mean; None: a sample weighs the same on all ranks."""
        stands = self._stands[number % _TAG_BUFFERS].tolist()
        weights, samples = stands[::_STANDS_FOR], stands[1::_STANDS_FOR]
        if weights.count(weights[0]) == len(weights):
            return None
        counted = [weight for weight, size in zip(weights, samples, strict=True) if size]
        if not counted or min(counted) == max(counted):
            return None
        mean = sum(weight * size for weight, size in zip(weights, samples, strict=True)) / sum(samples)
        return [weight / mean if size else 0.0 for weight, size in zip(weights, samples, strict=True)]

    def loss(self, number: int) -> float:
        """The mean of the ranks' losses, by what they stand for; 0.0 if they stand for nothing."""
        stands = self._stands[number % _TAG_BUFFERS].tolist()
        ranks = list(zip(*(stands[place::_STANDS_FOR] for place in range(_STANDS_FOR)), strict=True))
        whole = sum(weight * samples for weight, samples, _ in ranks)
        return sum(weight * samples * loss for weight, samples, loss in ranks if samples) / whole if whole else 0.0

    def check_places(self, number: int, mine: int) -> None:
        """Whether a rank has completed the step in which this process waits for an exchange, and has given nothing for it.

        Places are read before what was given: a rank gives first and goes on afterwards, so that one which was ahead already
        has given by now, or will not any more.

        Raises:
            UnequalExchangeError: it will not.
        """
        ahead = [rank for rank, place in enumerate(self.places.tolist()) if place > mine]
        for rank in ahead:
            if self.given[rank] < number:
                raise UnequalExchangeError(rank, None)

    def close(self) -> None:
        """Lets go of the memory."""
        self.given.close()
        self.reduced.close()
        self.places.release()
        for tags in self._tags:
            tags.release()
        for stands in self._stands:
            stands.release()
