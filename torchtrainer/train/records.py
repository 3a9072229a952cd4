"""Records: what only one rank has at a step boundary, in memory that outlives the process that carries the rank.

A record is written before the rank's share of a step is published, for the step after it. So whoever takes a rank over finds the
record of the very step that the rank had not done yet. Each rank has a file with places for two records, used in turn:

    turn, room | number, where, size | number, where, size | ... tensors, plain data ... | ... tensors, plain data ...

The turn is written last: a record that is half written when its process dies is not there. Written and read by threads that train;
nobody writes the record of a rank that somebody else carries.
"""

from __future__ import annotations

import marshal
import math
import mmap
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from torchtrainer.checkpoint.memory import map_shared
from torchtrainer.errors import EngineError

_TURN = struct.Struct("<QQ")
"""Which place holds the latest record, and the room for plain data in each."""
_ENTRY = struct.Struct("<QQQ")
"""Number of the record, where its plain data begin, and how long they are."""
_OTHERS = 1 << 63
"""Added to the length where the plain data hold the tensors, too."""
_HEAD_BYTES = 256
ALIGNMENT_BYTES = 64
SPARE_BYTES = 16 * 1024
"""Room for plain data beyond those of the first record: means of metrics come and go."""
PLACES = 2


def packed(value: Any) -> Any:
    """Plain data as it is, anything else as bytes: what users' hooks call a loss may be any object."""
    try:
        marshal.dumps(value)
    except ValueError:
        return pickle.dumps(value)
    return value


def _as_bytes(tensor: torch.Tensor | None) -> tuple[str, tuple[int, ...], bytes] | None:
    """A tensor as plain data."""
    if tensor is None:
        return None
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), data.numpy().tobytes()


def _from_bytes(data: tuple[str, tuple[int, ...], bytes] | None) -> torch.Tensor | None:
    """What `_as_bytes` was given."""
    if data is None:
        return None
    dtype, shape, content = getattr(torch, data[0]), data[1], data[2]
    return (torch.frombuffer(bytearray(content), dtype=dtype) if content else torch.empty(0, dtype=dtype)).view(shape)


def unpacked(value: Any) -> Any:
    """What `packed` was given."""
    return pickle.loads(value) if isinstance(value, bytes) else value  # own workers' memory, as in `RecordFile.read`


class RecordFile:
    """The records of one rank.

    Args:
        path: of the memory file; it may be empty still. None: memory of this process alone.
        rank: whose records they are.
        tensors: the shapes and dtypes of what a record holds besides plain data; alike for all ranks. There is a place for each. A
            record of others, that grew for instance, has them among its plain data.
    """

    def __init__(self, path: str | None, *, rank: int, tensors: Sequence[torch.Tensor | None]) -> None:
        self._path = path
        self._rank = rank
        placed = [torch.empty(0) if one is None else one for one in tensors]
        self._forms = [None if one is None else (one.shape, one.dtype) for one in tensors]
        self._templates = [(one.shape, one.dtype, one.nbytes, one.numel()) for one in placed]
        offsets, end = [], 0
        for _, _, nbytes, _ in self._templates:
            offsets.append(end)
            end += math.ceil(nbytes / ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self._offsets, self._tensor_bytes = offsets, end
        self._map: mmap.mmap | None = None
        self._room = 0
        self._views: list[list[torch.Tensor]] = []

    def write(self, number: int, tensors: Sequence[torch.Tensor | None], plain: Any) -> None:
        """Writes a record; the one before it stays until the next one is written.

        Args:
            number: of the exchange after which the rank is as the record says.
            tensors: of whatever shapes and types.
            plain: numbers, text, bytes, and lists, tuples and dicts of them.

        Raises:
            EngineError: there is no memory for it.
        """
        fits = [None if one is None else (one.shape, one.dtype) for one in tensors] == self._forms
        data = marshal.dumps(plain if fits else (plain, [_as_bytes(one) for one in tensors]))
        memory = self._memory(len(data))
        place = (_TURN.unpack_from(memory, 0)[0] + 1) % PLACES
        start = self._start(place) + self._tensor_bytes
        _ENTRY.pack_into(
            memory, _TURN.size + place * _ENTRY.size, number, start, 0
        )  # no record, for whoever reads it now
        there = [one for one in tensors if one is not None]
        if fits and there:
            views = [view for view, form in zip(self._views[place], self._forms, strict=True) if form is not None]
            torch._foreach_copy_(views, there)
        memory[start : start + len(data)] = data
        size = len(data) if fits else len(data) | _OTHERS
        _ENTRY.pack_into(memory, _TURN.size + place * _ENTRY.size, number, start, size)
        _TURN.pack_into(memory, 0, place, self._room)

    def read(self, number: int) -> tuple[list[torch.Tensor | None], Any]:
        """The record with a number: its tensors, as for `tensors`, and its plain data.

        Raises:
            EngineError: there is no such record, or it was written over while it was read.
        """
        place, start, size = self._find(number)
        assert self._map is not None
        data = self._map[start : start + (size & ~_OTHERS)]
        if self._find(number) != (
            place,
            start,
            size,
        ):  # a rank that is a step ahead is writing the record after the next one
            raise EngineError(f"rank {self._rank} wrote over its state of exchange {number}")
        plain = marshal.loads(data)  # noqa: S302  # only this group's workers can open the file
        if not size & _OTHERS:
            return self._placed(place), plain
        plain, others = plain
        return [_from_bytes(one) for one in others], plain

    def tensors(self, number: int) -> list[torch.Tensor | None]:
        """The tensors of a record: most are views of the memory, valid until the record after the next one is written."""
        place, _, size = self._find(number)  # may map the file anew
        return self.read(number)[0] if size & _OTHERS else self._placed(place)

    def _placed(self, place: int) -> list[torch.Tensor | None]:
        """The tensors that have the shapes and types given at first."""
        pairs = zip(self._views[place], self._forms, strict=True)
        return [None if form is None else view for view, form in pairs]

    def has(self, number: int) -> bool:
        """Whether the record with a number is there."""
        try:
            self._find(number)
        except EngineError:
            return False
        return True

    def _start(self, place: int) -> int:
        return _HEAD_BYTES + place * (self._tensor_bytes + self._room)

    def _find(self, number: int) -> tuple[int, int, int]:
        self._follow()
        if self._map is not None:
            turn = _TURN.unpack_from(self._map, 0)[0]
            for place in (turn, (turn + 1) % PLACES):
                found, start, size = _ENTRY.unpack_from(self._map, _TURN.size + place * _ENTRY.size)
                if found == number and size:
                    return place, start, size
        raise EngineError(f"rank {self._rank} left no state of exchange {number} behind")

    def _follow(self) -> None:
        """Maps the file if another process has made it, or has made it longer."""
        if self._path is None or (self._map is not None and _TURN.unpack_from(self._map, 0)[1] == self._room):
            return
        size = Path(self._path).stat().st_size
        if size:
            self._use(map_shared(self._path, size))

    def _memory(self, data_bytes: int) -> mmap.mmap:
        self._follow()
        if self._map is None:
            self._open(data_bytes + SPARE_BYTES)
        elif data_bytes > self._room:
            self._move(data_bytes + max(SPARE_BYTES, data_bytes // 2))
        assert self._map is not None
        return self._map

    def _open(self, room: int) -> None:
        size = _HEAD_BYTES + PLACES * (self._tensor_bytes + room)
        try:
            self._use(mmap.mmap(-1, size) if self._path is None else map_shared(self._path, size))
        except OSError as error:
            raise EngineError(
                f"rank {self._rank} found no shared memory for {size / 1e6:.1f} MB of its own state ({error}): give the machine "
                "or the container more memory"
            ) from error

    def _move(self, room: int) -> None:
        """Makes room for longer plain data; both records move along."""
        assert self._map is not None
        turn = _TURN.unpack_from(self._map, 0)[0]
        kept = []
        for place in ((turn + 1) % PLACES, turn):
            number, start, size = _ENTRY.unpack_from(self._map, _TURN.size + place * _ENTRY.size)
            kept.append(
                (
                    number,
                    [one.clone() for one in self._views[place]],
                    self._map[start : start + (size & ~_OTHERS)],
                    size,
                )
            )
        self._open(room)
        assert self._map is not None
        _TURN.pack_into(self._map, 0, turn, self._room)
        for place, (number, tensors, data, size) in enumerate(kept):
            if tensors:
                torch._foreach_copy_(self._views[place], tensors)
            start = self._start(place) + self._tensor_bytes
            self._map[start : start + len(data)] = data
            _ENTRY.pack_into(self._map, _TURN.size + place * _ENTRY.size, number, start, size)
        _TURN.pack_into(self._map, 0, 1, self._room)

    def _use(self, memory: mmap.mmap) -> None:
        self._map = memory
        self._room = (len(memory) - _HEAD_BYTES) // PLACES - self._tensor_bytes
        self._views = [
            [
                (
                    torch.frombuffer(memory, dtype=dtype, count=count, offset=self._start(place) + offset)
                    if count
                    else torch.empty(0, dtype=dtype)
                ).view(shape)
                for (shape, dtype, _, count), offset in zip(self._templates, self._offsets, strict=True)
            ]
            for place in range(PLACES)
        ]
