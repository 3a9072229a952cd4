"""What only one rank has while a process carries it, and what of an operator all ranks share or each has for itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchtrainer.errors import EngineError
from torchtrainer.train.components import Components, internals
from torchtrainer.train.data import RankLoader
from torchtrainer.train.extras import Entries
from torchtrainer.train.metrics import AverageMeterCollection
from torchtrainer.train.optimizers import takes_closure
from torchtrainer.train.records import RecordFile
from torchtrainer.train.rng import RngState
from torchtrainer.train.trained import known_parameters

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator


def nothing() -> None:
    """Nobody has anything to do while others are waited for."""


@dataclass(kw_only=True)
class RankContext:
    """State that only one rank has.

    Attributes:
        rank: whose it is.
        loaders: its shares of the loaders, by name.
        streams: its random streams, while those of another rank are in use.
        samples: that it had in the running call.
        meters: its means in the running call.
        extras: its entries of the operator's own state, as its latest record or the end of its latest turn has them.
    """

    rank: int
    loaders: dict[str, RankLoader]
    streams: RngState | None = None
    samples: int = 0
    meters: AverageMeterCollection = field(default_factory=AverageMeterCollection)
    extras: Entries = field(default_factory=dict)

    def begin_call(self, *, new_pass: bool) -> None:
        """A call of ``train`` begins; ``new_pass``: with a new pass."""
        self.samples, self.meters = 0, AverageMeterCollection()
        if new_pass and "train" in self.loaders:
            self.loaders["train"].give_up()

    def close(self) -> None:
        """Ends its loaders' workers."""
        for loader in self.loaders.values():
            loader.close()


class Buffers:
    """The buffers of an operator's models: those that all ranks take over from rank 0, and those that each rank has.

    Args:
        operator: of this process.
    """

    def __init__(self, operator: TrainingOperator) -> None:
        components = internals(operator).components or _NOTHING
        self._followed: list[dict[str, Any]] = []
        self._own: list[dict[str, Any]] = []
        for raw, follows in components.followers():
            members = [module._buffers for module in raw.modules()]
            if any(members):
                (self._followed if follows else self._own).extend(members)

    @property
    def followed(self) -> list[torch.Tensor | None]:
        """Those that all ranks take over from rank 0. Looked up each time: a module may put another tensor in its place."""
        return _values_of(self._followed)

    @property
    def own(self) -> list[torch.Tensor | None]:
        """Those that each rank has."""
        return _values_of(self._own)

    @property
    def tensors(self) -> list[torch.Tensor | None]:
        """All of them, in the order of a record; None for one that is not there now."""
        return [*self.followed, *self.own]

    def load_for(self, rank: int, records: Sequence[RecordFile], number: int, *, alone: bool) -> None:
        """Makes the buffers those with which a rank begins a step: rank 0's, and the rank's own.

        Args:
            rank: about to begin.
            records: by rank.
            number: of the exchange before.
            alone: the process carries no other rank, so that its buffers are the rank's own already.
        """
        if self._followed and not (alone and rank == 0):
            self.load(records[0].tensors(number), followed=True)
        if self._own and not alone:
            self.load(records[rank].tensors(number), followed=False)

    @torch.no_grad()
    def load(self, values: Sequence[torch.Tensor | None], *, followed: bool) -> None:
        """Copies values of a record into the followed buffers, or into the others; autograd takes no notice.

        A buffer of another shape or type is replaced.

        Raises:
            EngineError: there are more or fewer.
        """
        split = len(self.followed)
        members, there = (self._followed, values[:split]) if followed else (self._own, values[split:])
        places = [(one, name) for one in members for name in one.keys()]  # noqa: SIM118  # a scripted module's have no iterator
        if len(places) != len(there):
            raise EngineError(
                f"the models have {len(places)} buffers here and {len(there)} on another rank: register the same ones on all ranks"
            )
        alike: list[tuple[torch.Tensor, torch.Tensor]] = []
        for (one, name), value in zip(places, there, strict=True):
            here = one[name]
            if here is not None and value is not None and (here.shape, here.dtype) == (value.shape, value.dtype):
                alike.append((here.data, value))
            else:  # it grew, or came or went
                one[name] = None if value is None else value.clone()
        if alike:
            torch._foreach_copy_([here for here, _ in alike], [value for _, value in alike])


def _values_of(members: list[dict[str, Any]]) -> list[torch.Tensor | None]:
    return [value for one in members for value in one.values()]


_NOTHING = Components(raw_models=[], models=[], optimizers=[], criterion=None, schedulers=[])


def trainable_of(operator: TrainingOperator) -> Callable[[], Iterable[nn.Parameter]]:
    """A function that gives the parameters that are trained at the moment."""
    return lambda: (one for one in known_parameters(operator) if one.requires_grad)


def bound_reason(operator: TrainingOperator) -> str:
    """Why a process can carry only one rank of an operator; empty if it can carry any number."""
    from torchtrainer.operator import TrainingOperator as Base

    inside, kind = internals(operator), type(operator)
    for name in ("train_batch", "train_epoch"):
        if getattr(kind, name) is not getattr(Base, name):
            return f"{kind.__name__} has its own {name}, which makes the update itself"
    for optimizer in inside.components.optimizers if inside.components else []:
        if takes_closure(optimizer):
            return f"{type(optimizer).__name__} evaluates the loss several times in a step"
    for name, loader in inside.loaders.items():
        if not loader.any_world_size:
            return f"the {name} loader is a stream, or used as it is: only its own rank can continue it"
    for model in inside.components.raw_models if inside.components else []:
        for part in model.modules():
            if isinstance(part, nn.SyncBatchNorm):
                return "the model has SyncBatchNorm layers, which exchange in the forward pass"
    return ""
