"""What a loader is, and whether the ranks can share it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    IterDataPipe,
    RandomSampler,
    SequentialSampler,
)

from torchtrainer.errors import InvalidArgumentTypeError, UnshardableLoaderError
from torchtrainer.train.sampler import is_even_split

Kind = Literal["samples", "batches", "list", "stream", "plain"]
AS_THEY_ARE = "pass add_dist_sampler=False if every rank's loader already reads its own part"


class Agreement(Protocol):
    """What loading needs of the other ranks; every rank makes the same calls in the same order."""

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        ...

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums over the ranks."""
        ...


@dataclass(frozen=True)
class LoaderFacts:
    """What the ranks compare of their loaders, as JSON data.

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
    """

    name: str
    kind: Kind
    problem: str | None
    seed: int
    samples: int | None = None
    batch_size: int | None = None
    drop_last: bool = False
    length: int | None = None


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
    seed = _loader_seed(loader, seed)
    batching = loader.batch_sampler
    if type(batching) is not BatchSampler:
        return LoaderFacts(name, "batches", None, seed, samples=length_of(loader.dataset))
    standard = standard_order(batching.sampler)
    samples = standard[1] if standard is not None else length_of(loader.dataset)
    return LoaderFacts(name, "samples", None, seed, samples, batching.batch_size, batching.drop_last)


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


def to_json(facts: LoaderFacts) -> dict[str, Any]:
    """Facts as JSON data."""
    return asdict(facts)


def generators_of(loader: Any) -> list[torch.Generator]:
    """The torch generators of a loader and its samplers."""
    owners = [*samplers_of(loader), loader]
    found = [getattr(owner, "generator", None) for owner in owners]
    return [one for one in found if isinstance(one, torch.Generator)]


def samplers_of(loader: Any) -> list[Any]:
    """The samplers of a loader, innermost first."""
    batching = getattr(loader, "batch_sampler", None)
    found = [getattr(batching, "sampler", None), getattr(loader, "sampler", None), batching]
    return list({id(one): one for one in found if one is not None}.values())


def _loader_seed(loader: Any, seed: int) -> int:
    """The seed of a loader's order: a DistributedSampler's, that of a generator of the user's, or the trainer's."""
    for sampler in samplers_of(loader):
        if type(sampler) is DistributedSampler:
            return int(sampler.seed)
    generators = generators_of(loader)
    return int(generators[0].initial_seed()) if generators else seed


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
