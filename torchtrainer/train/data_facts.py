"""What a loader is, and whether the ranks can share it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    IterDataPipe,
    RandomSampler,
    SequentialSampler,
    Subset,
)

from torchtrainer.errors import InvalidArgumentError, InvalidArgumentTypeError, UnshardableLoaderError
from torchtrainer.train.data_generators import seed_of
from torchtrainer.train.sampler import is_even_split

Kind = Literal["samples", "batches", "list", "stream", "plain"]
AS_THEY_ARE = "pass add_dist_sampler=False if every rank's loader already reads its own part"


class Agreement(Protocol):
    """Agreement between ranks while loading; every rank makes the same calls in the same order."""

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        ...

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums over the ranks."""
        ...


@dataclass(frozen=True)
class LoaderFacts:
    """Facts about a loader that the ranks compare, as JSON data.

    Attributes:
        name: what the loader is for.
        kind: ``samples`` and ``batches`` (map-style, dealt one by one or batch by batch), ``list`` (of ready batches),
            ``stream`` (iterable dataset), ``plain`` (used as it is).
        problem: why it cannot be dealt, or None.
        seed: of its order.
        samples: length of what is dealt, or of the dataset, if known.
        batch_size: per rank.
        drop_last: of the loader.
        length: ``len(loader)``, if known and exact.
        drawn: its order is a sampler's of the user.
        part: tells parts of one data set apart, where that costs nothing.
    """

    name: str
    kind: Kind
    problem: str | None
    seed: int
    samples: int | None = None
    batch_size: int | None = None
    drop_last: bool = False
    length: int | None = None
    drawn: bool = False
    part: str = ""


def describe(loader: Any, *, name: str, seed: int, world_size: int, shard: bool) -> LoaderFacts:
    """The facts about a loader.

    Raises:
        InvalidArgumentTypeError: it cannot be iterated at all.
    """
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise InvalidArgumentTypeError(
            f"the {name} loader must be a DataLoader or another iterable of batches, got "
            f"{type(loader).__name__}: {loader!r}"
        )
    if shard and isinstance(loader, list | tuple):
        return LoaderFacts(name, "list", None, seed, samples=len(loader))
    problem = _problem(loader)
    if not shard or (problem is not None and world_size == 1):
        return LoaderFacts(name, "plain", None, seed, length=_exact_length(loader))
    if problem is not None:
        return LoaderFacts(name, "plain", problem, seed)
    if isinstance(loader.dataset, IterableDataset):
        return LoaderFacts(name, "stream", None, seed, batch_size=loader.batch_size, drop_last=loader.drop_last)
    return _describe_map_style(loader, name, seed)


def _describe_map_style(loader: DataLoader[Any], name: str, seed: int) -> LoaderFacts:
    facts = LoaderFacts(
        name, "batches", None, seed_of(loader, seed), length_of(loader.dataset), drawn=True, part=_part(loader.dataset)
    )
    batching = loader.batch_sampler
    if type(batching) is not BatchSampler:
        return facts
    standard = standard_order(batching.sampler)
    return replace(
        facts,
        kind="samples",
        samples=facts.samples if standard is None else standard[1],
        batch_size=batching.batch_size,
        drop_last=batching.drop_last,
        drawn=standard is None,
    )


def _part(dataset: Any) -> str:
    """Which part of a data set another one is; empty where that does not show."""
    if isinstance(dataset, Subset):
        indices = dataset.indices
        plain = indices.tolist() if hasattr(indices, "tolist") else list(indices)
        return hashlib.blake2b(repr(plain).encode(), digest_size=8).hexdigest()
    return str(getattr(dataset, "_fingerprint", ""))  # of Hugging Face's data sets


def _problem(loader: Any) -> str | None:
    """Why a loader cannot be dealt out, or None."""
    kind = type(loader).__name__
    if not isinstance(loader, DataLoader):
        return f"it is a {kind}, whose batches only it can divide; return a torch DataLoader or a list of batches"
    if type(loader).__iter__ is not DataLoader.__iter__:
        return (
            f"it is a {kind}, which overrides DataLoader.__iter__, so dealing out its dataset would bypass it; "
            f"return a plain DataLoader"
        )
    if isinstance(loader.dataset, IterDataPipe):
        return f"its dataset is the DataPipe {type(loader.dataset).__name__}, which divides itself by sharding_filter"
    return None


def check_facts(all_facts: Sequence[LoaderFacts]) -> None:
    """Checks that the ranks' loaders belong together.

    Args:
        all_facts: by rank.

    Raises:
        UnshardableLoaderError: they do not; the message names the values by rank.
    """
    first = all_facts[0]
    name = first.name
    for rank, facts in enumerate(all_facts):
        if facts.problem is not None:
            raise UnshardableLoaderError(
                f"the {name} loader of rank {rank} cannot be dealt out to {len(all_facts)} ranks: {facts.problem}; or "
                f"{AS_THEY_ARE}"
            )
    _must_agree(name, "kinds of loaders", [f"{facts.name}: {facts.kind}" for facts in all_facts])
    if first.kind == "plain":
        return
    what = "numbers of batches in the list" if first.kind == "list" else "dataset lengths"
    _must_agree(name, what, [facts.samples for facts in all_facts])
    _must_agree(name, "values of drop_last", [facts.drop_last for facts in all_facts])
    _must_agree(name, "kinds of samplers", ["own" if facts.drawn else "usual" for facts in all_facts])
    _must_agree(name, "parts of the data set", [facts.part for facts in all_facts])
    sizes = [facts.batch_size for facts in all_facts if facts.batch_size is not None]
    if first.kind == "samples" and not is_even_split(sizes):
        raise UnshardableLoaderError(
            f"the {name} loaders have batch sizes {sizes} by rank, which is not the even split of {sum(sizes)}: give "
            f"every rank the same batch_size, or batch_size=config[BATCH_SIZE]; or {AS_THEY_ARE}"
        )


def _must_agree(name: str, what: str, values: list[Any]) -> None:
    if any(value != values[0] for value in values):
        raise UnshardableLoaderError(
            f"the {name} loaders cannot be dealt out to {len(values)} ranks: they have different {what} by rank: "
            f"{values}; the data creator has to build the same loader on every rank; or {AS_THEY_ARE}"
        )


def check_even(all_facts: Sequence[LoaderFacts], even: str) -> None:
    """Checks that all ranks can have as many samples in each step, if that is wanted.

    Raises:
        InvalidArgumentError: their batch sizes differ.
    """
    sizes = [facts.batch_size for facts in all_facts]
    if even and any(size != sizes[0] for size in sizes):
        raise InvalidArgumentError(
            f"even_batches={even!r}, but the {all_facts[0].name} loader has batch sizes {sizes} by rank: use a "
            f"config[BATCH_SIZE] that {len(sizes)} ranks divide evenly"
        )


def check_orders(name: str, sampler: str, orders: Sequence[Any], epoch: int) -> None:
    """Checks that a sampler gave all ranks the same order.

    Args:
        name: what the loader is for.
        sampler: its kind.
        orders: number of elements and digest, by rank.
        epoch: of the pass.

    Raises:
        UnshardableLoaderError: it did not.
    """
    if any(order != orders[0] for order in orders):
        raise UnshardableLoaderError(
            f"the {name} loader's sampler {sampler} gives different orders on different ranks in epoch {epoch} (elements by "
            f"rank: {[order[0] for order in orders]}), so dealing them out would repeat and lose samples; let it depend only "
            f"on the epoch and on its seed, not on the rank; or {AS_THEY_ARE}"
        )


def check_undivided(facts: LoaderFacts, sampler: str, samples: int, names: Sequence[Sequence[str]]) -> None:
    """Checks that a sampler that gives all ranks the same does not mean it to be a part of the data set for each.

    Args:
        facts: of the loader.
        sampler: its kind.
        samples: that it gives.
        names: of its attributes that have the number of the rank, by rank.

    Raises:
        UnshardableLoaderError: it knows its rank, and gives less than the data set has.
    """
    ranks = sorted(set(names[0]).intersection(*names[1:]))
    if ranks and (facts.samples is None or samples < facts.samples):
        raise UnshardableLoaderError(
            f"the {facts.name} loader's sampler {sampler} gives {samples} samples of a data set of {facts.samples}, and "
            f"{ranks[0]} is the number of the rank: it divides the data set itself, and dealing out its part would "
            f"lose the rest; use a sampler that gives every rank all samples; or {AS_THEY_ARE}"
        )


def check_streams(name: str, firsts: Sequence[Sequence[int] | None]) -> None:
    """Checks that all ranks iterate the same stream.

    Args:
        name: what the loader is for.
        firsts: by rank: loader worker and fingerprint of the first element of its part, of the rank's first batch; None: it has none.

    Raises:
        UnshardableLoaderError: they do not.
    """
    parts: dict[int, dict[int, list[int]]] = {}
    for rank, first in enumerate(firsts):
        if first is not None:
            parts.setdefault(first[0], {}).setdefault(first[1], []).append(rank)
    for found in parts.values():
        if len(found) > 1:
            ranks = " and ".join(str(one) for one in sorted(found.values()))
            raise UnshardableLoaderError(
                f"the {name} loader's data set gives ranks {ranks} different streams (their first elements differ), so "
                "dividing them once more would lose samples: a stream that divides itself by rank, or shuffles by "
                "random numbers of its own, cannot be dealt out; let all ranks iterate over the same stream; or "
                f"{AS_THEY_ARE}"
            )


def to_json(facts: LoaderFacts) -> dict[str, Any]:
    """Facts as JSON data."""
    return asdict(facts)


def standard_order(sampler: Any) -> tuple[bool, int] | None:
    """Whether a sampler shuffles, and over how many samples; None if it has an order of its own."""
    if type(sampler) is SequentialSampler:
        return False, len(sampler.data_source)
    if type(sampler) is RandomSampler and not sampler.replacement:
        samples = len(sampler.data_source)
        return (True, samples) if sampler.num_samples == samples else None
    if type(sampler) is DistributedSampler:
        return bool(sampler.shuffle), len(sampler.dataset)  # type: ignore[arg-type]  # it calls len() itself
    return None


def _exact_length(loader: Any) -> int | None:
    """``len(loader)``; None if it has none, or only the estimate that a DataLoader gives for a stream."""
    if isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset):
        return None
    return length_of(loader)


def length_of(sized: Any) -> int | None:
    """``len(sized)``, or None if it has none."""
    try:
        return len(sized)
    except (TypeError, NotImplementedError, AttributeError):
        return None
