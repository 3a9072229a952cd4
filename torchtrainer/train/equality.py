"""Whether the processes of a run have equal parameters: they have to, as each makes the same update to its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from torchtrainer.comm.flat import give_model
from torchtrainer.errors import EngineError, OperatorUseError
from torchtrainer.train.cards import CardFile
from torchtrainer.train.components import internals

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


SAMPLED_FROM_ELEMENTS = 64 * 1024
SAMPLE_EVERY = 61
"""At the beginning of a call, of larger parameters every so manieth element is compared: a prime, so that all columns are hit."""


@torch.no_grad()
def checksums(operator: TrainingOperator, *, sampled: bool) -> list[int]:
    """One number per parameter that differs, but for rare accidents, if any of its bits does.

    Args:
        operator: of this process.
        sampled: look at a part of large parameters only.
    """
    components = internals(operator).components
    found = []
    for model in components.raw_models if components is not None else []:
        for parameter in model.parameters():
            words = parameter.detach().contiguous().view(-1)
            if sampled and words.numel() >= SAMPLED_FROM_ELEMENTS:
                words = words[::SAMPLE_EVERY].contiguous()
            if words.element_size() in _WORDS and words.numel():
                whole = words.view(_WORDS[words.element_size()])
                # a weight by place, so that values that change places are seen too
                found.append(int(whole.sum(dtype=torch.int64)) * 31 + int(whole[:: max(1, len(whole) // 7)].sum()))
            else:
                found.append(0)
    return found


class Comparison:
    """Compares the parameters of the ranks once in a call, when all of them have given their first gradients.

    Args:
        operator: of this process.

    Attributes:
        sums: checksums as the call began, for the cards; None: they were compared.
    """

    def __init__(self, operator: TrainingOperator) -> None:
        self.sums: list[int] | None = None
        self._operator = operator

    def begin(self) -> None:
        """A call begins."""
        self.sums = checksums(self._operator, sampled=True)

    def finish(self, cards: list[CardFile], number: int) -> None:
        """To be called after every exchange; arguments and errors as for `compare`."""
        if self.sums is not None:
            sums, self.sums = self.sums, None
            compare(self._operator, sums, cards, number)


def compare(operator: TrainingOperator, mine: list[int], cards: list[CardFile], number: int) -> None:
    """Compares with what is on the cards of the other ranks.

    A card that has been written over by now is of a rank that is ahead, which has compared with this one.

    Args:
        operator: of this process.
        mine: checksums as a call began.
        cards: by rank.
        number: of the exchange after which the call began.

    Raises:
        OperatorUseError: they differ; names the parameter.
    """
    for rank, card in enumerate(cards):
        try:
            _, plain = card.read(number)
        except EngineError:
            continue
        theirs = plain.get("sums")
        if theirs is not None and theirs != mine:
            raise OperatorUseError(_difference(operator, mine, theirs, rank))


def make_equal(operator: TrainingOperator, *, alone: bool) -> None:
    """Gives all ranks the parameters and buffers of rank 0 unless they are equal, as DDP does when it wraps a model.

    Args:
        operator: of this process, just built.
        alone: this process is built later than the others, and will get their state when it joins them.
    """
    components = internals(operator).components
    found = internals(operator).context.collective.all_gather(checksums(operator, sampled=False))
    if not alone and components is not None and any(one != found[0] for one in found):
        give_model(components.raw_models)


def _difference(operator: TrainingOperator, mine: list[int], theirs: list[int], rank: int) -> str:
    context, components = internals(operator).context, internals(operator).components
    names = [name for model in (components.raw_models if components else []) for name, _ in model.named_parameters()]
    place = next((at for at, (one, other) in enumerate(zip(mine, theirs, strict=False)) if one != other), None)
    name = names[place] if place is not None and place < len(names) else "the number of parameters"
    return (
        f"the ranks have different models: {name} of rank {context.collective.rank} is not that of rank {rank}. All ranks train "
        "one model, so change it on all of them alike (in apply_all_operators, for instance), or load one state by load_state_dict"
    )
