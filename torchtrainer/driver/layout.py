"""Who carries which ranks: pure functions over ``{worker: its ranks}``."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

Layout = Mapping[int, tuple[int, ...]]


def spread(lost: Iterable[int], carried: Layout) -> dict[int, tuple[int, ...]]:
    """Deals ranks that nobody carries to the workers with the fewest ranks.

    Args:
        lost: the ranks.
        carried: by the survivors, at least one.

    Returns:
        What each worker gets on top; workers that get nothing are left out.
    """
    more: dict[int, tuple[int, ...]] = {}
    for rank in sorted(lost):
        worker = min(carried, key=lambda one: (len(carried[one]) + len(more.get(one, ())), one))
        more[worker] = (*more.get(worker, ()), rank)
    return more


def dealt(world_size: int, workers: Collection[int]) -> dict[int, tuple[int, ...]]:
    """All ranks in blocks over the given workers, as even as can be."""
    ordered = sorted(workers)
    blocks: dict[int, tuple[int, ...]] = dict.fromkeys(ordered, ())
    for rank in range(world_size):
        worker = ordered[rank * len(ordered) // world_size]
        blocks[worker] = (*blocks[worker], rank)
    return blocks


def taken(like: int, carried: Layout) -> dict[int, tuple[int, ...]]:
    """The ranks that a newcomer takes, and from whom, so that as few ranks as possible move.

    It takes the rank that it was built like, unless that is all that its carrier has, then one after the other from whoever
    has the most, until they are even.

    Returns:
        The ranks that each worker gives away; workers that keep theirs are left out.
    """
    left = {worker: list(ranks) for worker, ranks in carried.items()}
    given: dict[int, tuple[int, ...]] = {}

    def take(worker: int, rank: int) -> None:
        left[worker].remove(rank)
        given[worker] = (*given.get(worker, ()), rank)

    owner = next((worker for worker, ranks in left.items() if like in ranks and len(ranks) > 1), None)
    if owner is not None:
        take(owner, like)
    while left:
        most = max(left, key=lambda one: (len(left[one]), -one))
        if len(left[most]) - sum(map(len, given.values())) < 2:
            break
        take(most, left[most][-1])
    return given
