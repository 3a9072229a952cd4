"""A loader for a script with its own training loop: dealt out to the ranks, and resumable in the middle of a pass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch

from torchtrainer.comm.group import Collective
from torchtrainer.driver.causes import LoaderDied
from torchtrainer.observe.failures import refetched_line
from torchtrainer.observe.notices import warn
from torchtrainer.train.data import RankLoader
from torchtrainer.train.data_order import Dealing
from torchtrainer.train.refetching import LoaderLoss, Losing


class SessionLoader:
    """The batches of this rank: over all ranks each sample once per pass. Made by `torchtrainer.session.loader`.

    Iterating it runs one pass, or finishes the one that is running: so a resumed script goes on in the middle. Every rank
    iterates it alike. Its other attributes are those of the loader that it was made from.

    Args:
        loader: the user's.
        collective: the ranks.
        seed: of the order, unless the loader has one of its own.
        training: the ranks step together; else they may have unequal numbers of batches.
        name: what errors call it.
        dealing: how the end of a pass is dealt.
    """

    def __init__(
        self, loader: Any, collective: Collective, *, seed: int, training: bool, name: str, dealing: Dealing
    ) -> None:
        self._loader = loader
        self._world_size = collective.world_size
        self._weight = 1.0
        self.of_rank = RankLoader(
            loader,
            rank=collective.rank,
            world_size=collective.world_size,
            seed=seed,
            collective=collective,
            training=training,
            device=torch.device("cuda") if torch.cuda.is_initialized() else None,  # type: ignore[no-untyped-call]  # torch has no types here
            name=name,
            dealing=dealing,
            losing=Losing(tell=_tell),
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__.get("_loader"), name)

    @property
    def epoch(self) -> int:
        """Number of the pass that is running or comes next, from 0: passes that are complete."""
        return self.of_rank.passes_started - self.of_rank.in_pass

    @property
    def weight(self) -> float:
        """Factor for the loss of the current batch, where ranks have unequal numbers of samples.

        1 but for the last batch of a pass. DDP averages gradients over ranks; with it, the average is over samples. A rank for
        which no sample is left gets borrowed ones with weight 0.
        """
        return self._weight

    def __len__(self) -> int:
        batches = self.of_rank.batches_per_pass
        if batches is None:
            raise TypeError(f"the number of batches of {type(self._loader).__name__} is not known")
        return batches

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Any]:
        while (batch := self.of_rank.next_batch()) is not None:
            if batch.global_size:
                self._weight = batch.size * self._world_size / batch.global_size
            if batch.size or batch.data is not None:  # not a validation step without samples for this rank
                yield batch.data
            if not self.of_rank.in_pass:
                return


def _tell(loss: LoaderLoss) -> None:
    cause = {name: value for name, value in asdict(loss).items() if name != "seconds"}
    warn(refetched_line(LoaderDied(**cause), None, loss.seconds))
