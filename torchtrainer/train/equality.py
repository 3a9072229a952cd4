"""Checks that the processes of a run have equal parameters, because each makes the same update to its own."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from torchtrainer.comm.board import LOOK_PARTS
from torchtrainer.comm.flat import give
from torchtrainer.config import DIGESTS
from torchtrainer.errors import EngineError, OperatorUseError
from torchtrainer.train.components import internals, optimizers_of
from torchtrainer.train.digest import SAMPLE_EVERY, SAMPLED_FROM_ELEMENTS
from torchtrainer.train.records import RecordFile
from torchtrainer.train.trained import TrainedParameters, known_parameters, parameter_names

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator

_LOOK_BYTES = 16 * 1024
"""Of parameters, at most, that are looked at in each step."""
NOTHING_SEEN: Sequence[int] = (0,) * LOOK_PARTS
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def held(operator: TrainingOperator) -> Iterator[tuple[str, Any]]:
    """What all ranks have to hold alike: parameters, the optimizers' states, and the numbers in their groups.

    What a rank has only a share of is left out, as are step counters and the like that follow from the rest.

    Args:
        operator: of this process.

    Yields:
        A name (of a parameter its number, as text) and a tensor, or a list of numbers.
    """
    components = internals(operator).components
    known = _whole_parameters(operator)
    optimizers = optimizers_of(operator)
    divided = components is not None and components.sharding.divides_state
    for number, one in enumerate(known):
        yield str(number), one
    seen = {id(one) for one in known}
    for place, optimizer in enumerate(optimizers):
        state = getattr(optimizer, "state", {})
        for at, group in enumerate(getattr(optimizer, "param_groups", [])):
            plain = [value for name, value in sorted(group.items()) if name != "params"]
            yield f"the settings of group {at} of optimizer {place}", plain
            for number, one in enumerate(group["params"]):
                if id(one) not in seen and not hasattr(one, "full_tensor"):
                    yield f"parameter {number} of group {at} of optimizer {place}", one
                values = {} if divided else state.get(one, {})
                for name, value in values.items() if isinstance(values, dict) else ():
                    if isinstance(value, torch.Tensor) and value.dim():
                        yield f"{name} of parameter {number} of group {at} of optimizer {place}", value


def _whole_parameters(operator: TrainingOperator) -> list[nn.Parameter]:
    """The known parameters except for those of FSDP, which have no memory between two steps."""
    components = internals(operator).components
    known = list(known_parameters(operator))
    if components is None or not components.sharding.in_step:
        return known
    divided = {id(one) for model in components.raw_models for one in components.sharding.gradient_leaves(model)}
    return [one for one in known if id(one) not in divided]


@torch.no_grad()
def checksums(operator: TrainingOperator, *, sampled: bool) -> list[int]:
    """One number for each thing `held` that differs, except for rare accidents, if any of its bits does.

    Args:
        operator: of this process.
        sampled: look at a part of large tensors only.
    """
    return [
        _checksum(value, sampled=sampled)
        if isinstance(value, torch.Tensor)
        else zlib.crc32(repr([_plain(one) for one in value]).encode())
        for _, value in held(operator)
    ]


def _checksum(tensor: torch.Tensor, *, sampled: bool) -> int:
    words = tensor.detach()
    if words.is_sparse:
        words = words.coalesce().values()
    words = words.contiguous().view(-1)
    if sampled and words.numel() >= SAMPLED_FROM_ELEMENTS:
        words = words[::SAMPLE_EVERY].contiguous()
    if words.is_complex():
        words = torch.view_as_real(words).view(-1)
    if words.element_size() not in _WORDS or not words.numel():
        return 0
    whole = words.view(_WORDS[words.element_size()])
    # a weight by place, so that values that change places are seen too
    return int(whole.sum(dtype=torch.int64)) * 31 + int(whole[:: max(1, len(whole) // 7)].sum())


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, bool | int | float | str | None) else type(value).__name__


class _Piece(NamedTuple):
    """Part of the memory of a parameter, as integers of NumPy, which adds up few of them in the least time."""

    parameter: torch.Tensor
    address: int
    words: Any


class Look:
    """Sums over some of the parameters, over others in each step, which go along with the exchange of gradients.

    So a changed bit is noticed before the next update if the model is small, and some steps later if it is large: what a look
    costs does not grow with the model. Parameters on other devices than the CPU, for which the host would have to wait, are left
    to `Comparison`, as are those of FSDP.

    Args:
        operator: of this process.
        trained: its parameters.
    """

    def __init__(self, operator: TrainingOperator, trained: TrainedParameters) -> None:
        self._operator = operator
        self._trained = trained
        self._looks: list[list[_Piece]] = []
        self._latest: list[_Piece] = []

    def watch(self) -> None:
        """Looks at the parameters that are trained now."""
        whole = {id(one) for one in _whole_parameters(self._operator)}
        self._looks, room = [], 0
        for parameter in self._trained.parameters:
            for piece in _pieces_of(parameter) if id(parameter) in whole else ():
                if piece.words.nbytes > room or len(self._looks[-1]) == LOOK_PARTS:
                    self._looks.append([])
                    room = _LOOK_BYTES
                self._looks[-1].append(piece)
                room -= piece.words.nbytes

    def take(self) -> Sequence[int]:
        """The sums for the step that comes, `LOOK_PARTS` of them."""
        if not self._looks:
            return NOTHING_SEEN
        import numpy  # torch has made views by it

        pieces = self._latest = self._looks[self._operator.global_step % len(self._looks)]
        sums = []
        for parameter, address, words in pieces:
            if parameter.data_ptr() != address:  # somebody has given it other memory
                self.watch()
                return self.take()
            sums.append(int(numpy.add.reduce(words)))
        return sums + [0] * (LOOK_PARTS - len(sums))

    def named(self, mine: Sequence[int], theirs: Sequence[int]) -> str:
        """What users call the first parameter of the latest look whose sums differ."""
        place = next(place for place, (one, other) in enumerate(zip(mine, theirs, strict=True)) if one != other)
        if place >= len(self._latest):
            return "the number of parameters"
        return parameter_names(self._operator)[id(self._latest[place].parameter)]


def _pieces_of(parameter: torch.Tensor) -> Iterator[_Piece]:
    """The memory of a parameter in pieces of `_LOOK_BYTES` at most; none if that cannot be read, or has gaps."""
    here = parameter.detach()
    count = here.numel()
    if here.device.type != "cpu" or here.layout is not torch.strided or not count or hasattr(here, "full_tensor"):
        return
    if sum((size - 1) * stride for size, stride in zip(here.shape, here.stride(), strict=True)) != count - 1:
        return
    memory = torch.as_strided(here, (count,), (1,), here.storage_offset()).view(torch.uint8).numpy()
    for begin in range(0, len(memory), _LOOK_BYTES):
        piece = memory[begin : begin + _LOOK_BYTES]
        size = next(size for size in (8, 4, 2, 1) if piece.nbytes % size == 0)
        yield _Piece(parameter, parameter.data_ptr(), piece.view(f"i{size}"))


class Comparison:
    """Compares what the ranks hold as a call begins, and now and then in it, when all have given their next gradients.

    Args:
        operator: of this process.

    Attributes:
        sums: checksums for the records; None: they were compared.
    """

    def __init__(self, operator: TrainingOperator) -> None:
        self.sums: list[int] | None = None
        self._operator = operator

    def begin(self) -> None:
        """Takes the checksums. Whole ones where `torchtrainer verify-resume` watches."""
        self.sums = checksums(self._operator, sampled=DIGESTS not in os.environ)

    def finish(self, records: Sequence[RecordFile], number: int) -> None:
        """To be called after every exchange; arguments and errors as for `compare`."""
        if self.sums is not None:
            sums, self.sums = self.sums, None
            compare(self._operator, sums, records, number)


def compare(operator: TrainingOperator, mine: list[int], records: Sequence[RecordFile], number: int) -> None:
    """Compares with the records of the other ranks.

    A record that has been written over by now is of a rank that is ahead, which has compared with this one.

    Args:
        operator: of this process.
        mine: checksums as a call began.
        records: by rank.
        number: of the exchange after which the call began.

    Raises:
        OperatorUseError: they differ; names the parameter.
    """
    for rank, record in enumerate(records):
        try:
            _, plain = record.read(number)
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
        buffers = (one for module in components.modules for one in module.buffers())
        give((*known_parameters(operator), *buffers))


def compare_in_group(operator: TrainingOperator) -> None:
    """Compares what the ranks hold through their process group; a collective call.

    Raises:
        OperatorUseError: they differ; names the parameter.
    """
    mine = checksums(operator, sampled=DIGESTS not in os.environ)
    for rank, theirs in enumerate(internals(operator).context.collective.all_gather(mine)):
        if theirs != mine:
            raise OperatorUseError(_difference(operator, mine, theirs, rank))


def _difference(operator: TrainingOperator, mine: list[int], theirs: list[int], rank: int) -> str:
    place = next((at for at, (one, other) in enumerate(zip(mine, theirs, strict=False)) if one != other), None)
    what = [name for name, _ in held(operator)]
    name = what[place] if place is not None and place < len(what) else "the number of parameters"
    if name.isdecimal():
        name = parameter_names(operator)[id(_whole_parameters(operator)[int(name)])]
    return unequal(operator, name, rank)


def unequal(operator: TrainingOperator, name: str, rank: int) -> str:
    """The message about a value that differs between a rank and this one."""
    here = internals(operator).context.collective.rank
    return (
        f"the ranks have different models: ranks {here} and {rank} differ in {name} in step "
        f"{operator.global_step}. All ranks train one model, so change it on all of them alike (in apply_all_operators, for "
        "instance), or load one state by load_state_dict"
    )
