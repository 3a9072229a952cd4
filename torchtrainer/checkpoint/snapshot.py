"""A rank's share of a snapshot in memory that outlives the rank, and the whole state put together from the shares.

Every rank copies its share of the tensors into a region of its own: a file without a name that the host process holds, so
that it stays when the rank dies. The shares of the ranks are disjoint; rank 0 also writes the structure around the tensors.

    region | number | where the head is | tensors, each at a multiple of 64 bytes ... | head: table of tensors, structure |

The number is cleared before anything is copied, and written last: a region with a number is whole. Regions are written
again and again; one is written only when the snapshot before it is on disk.
"""

from __future__ import annotations

import io
import json
import math
import mmap
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from torchtrainer.checkpoint.memory import map_shared
from torchtrainer.errors import SnapshotError

_PROLOGUE = struct.Struct("<QQQ")
ALIGNMENT_BYTES = 64
"""Alignment of tensors: a cache line, which is enough for every dtype."""
GROWTH = 1.1
"""Spare room in a region, so that a state that grows a little still fits."""
SHARED, RANK = "shared", "rank"
METADATA = "_metadata"
"""Attribute of a state dict in which torch keeps the versions of the modules; ``load_state_dict`` reads it."""

Place = tuple[int, str, list[int]]
"""Place of a tensor in a region: offset in bytes, dtype, shape."""


class Region:
    """The memory of one rank's share. Used by the thread that trains.

    Args:
        path: of the file that the host holds open.
        rank: whose share it is.
        world_size: ranks.
    """

    def __init__(self, path: str, *, rank: int, world_size: int) -> None:
        self._path = path
        self._rank = rank
        self._world_size = world_size
        self._map: mmap.mmap | None = None
        self._layout: _Layout | None = None

    def prepare(self, shared: Any, mine: Any, movable: set[int]) -> Prepared:
        """Does everything for a snapshot but to touch the region.

        Args:
            shared: the same on all ranks.
            mine: of this rank only.
            movable: addresses of the tensors in ``shared`` that are equal on all ranks.

        Raises:
            SnapshotError: the state holds objects that a checkpoint cannot hold.
        """
        common, own = _Tree(shared, SHARED), _Tree(mine, RANK)
        signature = [(one.data_ptr(), one.dtype, one.shape) for one in common.tensors]
        signature += [
            (0, one.dtype, one.shape) for one in own.tensors
        ]  # new ones each time, such as states of generators
        if self._layout is None or self._layout.signature != signature:
            owners = deal(common.tensors, movable, self._world_size)
            held = [index for index, owner in enumerate(owners) if owner == self._rank]
            self._layout = _Layout(signature, common, own, held)
        tensors = [common.tensors[index] for index in self._layout.held] + own.tensors
        head = _head(self._layout.table, common.structure if self._rank == 0 else None, own.structure)
        return Prepared(layout=self._layout, tensors=tensors, head=head)

    def copy(self, prepared: Prepared, number: int) -> int:
        """Copies this rank's share; the tensors have to be as they were when it was prepared.

        Args:
            prepared: by `prepare`.
            number: of the snapshot, from 1.

        Returns:
            Bytes of the share.

        Raises:
            SnapshotError: there is no memory for the state.
        """
        layout, head = prepared.layout, prepared.head
        memory = self._memory(layout.end + len(head))
        if layout.views is None:
            layout.views = [_view(memory, place) for place in layout.places.values()]
        _PROLOGUE.pack_into(memory, 0, 0, 0, 0)
        for view, tensor in zip(layout.views, prepared.tensors, strict=True):
            view.copy_(tensor)
        memory[layout.end : layout.end + len(head)] = head
        _PROLOGUE.pack_into(memory, 0, number, layout.end, len(head))
        return layout.end + len(head)

    def write(self, shared: Any, mine: Any, movable: set[int], number: int) -> int:
        """Both in one; arguments and errors as for `prepare` and `copy`."""
        return self.copy(self.prepare(shared, mine, movable), number)

    def _memory(self, size_bytes: int) -> mmap.mmap:
        if self._map is None or len(self._map) < size_bytes:
            self._map = None
            if self._layout is not None:
                self._layout.views = None
            size_bytes = int(size_bytes * GROWTH)
            try:
                self._map = map_shared(self._path, size_bytes)
            except OSError as error:
                raise SnapshotError(
                    f"rank {self._rank} found no shared memory for its {size_bytes / 1e6:.1f} MB of the state ({error}): give the "
                    "machine or the container more memory, or pass run_dir=None to train without checkpoints"
                ) from error
        return self._map


class _Layout:
    """Where the tensors of a share are in its region; the same for as long as the training keeps its tensors.

    Args:
        signature: of all tensors of the state.
        common, own: the state.
        held: places of the tensors in ``common`` that this rank copies.
    """

    def __init__(self, signature: list[Any], common: _Tree, own: _Tree, held: list[int]) -> None:
        named = common.named()
        self.signature = signature
        self.held = held
        self.places, self.end = _places([*(named[index] for index in held), *own.named()])
        self.table = json.dumps(self.places)
        self.views: list[torch.Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A snapshot that only has to be copied.

    Attributes:
        layout: where to.
        tensors: what, in the order of the layout.
        head: the structure around them.
    """

    layout: _Layout
    tensors: list[torch.Tensor]
    head: bytes


def assemble(paths: Sequence[str], number: int) -> dict[str, Any]:
    """Puts the whole state together; its tensors are views of the regions.

    Args:
        paths: regions by rank.
        number: of the snapshot.

    Returns:
        ``shared``, and ``ranks``: a list by rank.

    Raises:
        SnapshotError: a region does not hold this snapshot.
    """
    tensors: dict[str, torch.Tensor] = {}
    structures: list[Any] = []
    ranks: list[Any] = []
    for rank, path in enumerate(paths):
        memory = _read_map(path)
        found, offset, size = _PROLOGUE.unpack_from(memory, 0)
        if found != number:
            raise SnapshotError(f"the region of rank {rank} holds snapshot {found}, not {number}")
        try:
            head = torch.load(io.BytesIO(memory[offset : offset + size]), weights_only=True)
        except pickle.UnpicklingError as error:
            raise SnapshotError(refused(error)) from error
        here = {name: _view(memory, place) for name, place in json.loads(head["table"]).items()}
        tensors.update(here)
        structures.append(head[SHARED])
        ranks.append(_filled(head[RANK], here))
    return {SHARED: _filled(structures[0], tensors), "ranks": ranks}


def gathered(shared: Any, ranks: Sequence[Any]) -> dict[str, Any]:
    """The same form, where the ranks' parts came together in another way."""
    return {SHARED: shared, "ranks": list(ranks)}


def deal(tensors: Sequence[torch.Tensor], movable: set[int], world_size: int) -> list[int]:
    """Says which rank copies which tensor: by size, so that all have about the same to do. Alike on all ranks.

    Args:
        tensors: of the shared state.
        movable: addresses of those that are equal on all ranks; the others are rank 0's.
        world_size: ranks.
    """
    owners = [0] * len(tensors)
    loads = [0] * world_size
    sizes = [tensor.nbytes for tensor in tensors]
    for index in sorted(range(len(tensors)), key=lambda one: -sizes[one]):
        if tensors[index].data_ptr() in movable:
            owners[index] = min(range(world_size), key=loads.__getitem__)
        loads[owners[index]] += sizes[index]
    return owners


class _Tree:
    """Nested containers with the tensors taken out.

    Attributes:
        structure: the containers, with a text in place of each tensor.
        tensors: in the order in which they were met.
    """

    def __init__(self, tree: Any, part: str) -> None:
        # No text of a user's begins like this; and what the parts call their tensors does not collide.
        self._token = f"\0torchtrainer {part} tensor "
        self.tensors: list[torch.Tensor] = []
        self.structure = self._take(tree)

    def named(self) -> list[tuple[str, torch.Tensor]]:
        """The tensors with the texts that stand for them."""
        return [(f"{self._token}{index}", tensor) for index, tensor in enumerate(self.tensors)]

    def _take(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return _rebuilt(value, self._take)
        if value.layout is not torch.strided or value.is_quantized or value.numel() == 0:
            return value.detach().to("cpu", copy=True)  # more than its elements: it travels in the structure
        self.tensors.append(value.detach())
        return f"{self._token}{len(self.tensors) - 1}"


def _rebuilt(value: Any, walk: Callable[[Any], Any]) -> Any:
    """A container with its members walked; anything else as it is."""
    if isinstance(value, OrderedDict):
        ordered = OrderedDict((key, walk(one)) for key, one in value.items())
        if hasattr(value, METADATA):
            setattr(ordered, METADATA, getattr(value, METADATA))
        return ordered
    if type(value) is dict:
        return {key: walk(one) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(walk(one) for one in value)
    return value


def _filled(structure: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    def walk(value: Any) -> Any:
        return tensors.get(value, value) if isinstance(value, str) else _rebuilt(value, walk)

    return walk(structure)


def _places(share: Sequence[tuple[str, torch.Tensor]]) -> tuple[dict[str, Place], int]:
    """Where each tensor of a share goes, and where the last one ends."""
    places: dict[str, Place] = {}
    offset = ALIGNMENT_BYTES
    for name, tensor in share:
        places[name] = (offset, str(tensor.dtype).removeprefix("torch."), list(tensor.shape))
        offset += math.ceil(tensor.nbytes / ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return places, offset


def _head(table: str, shared: Any, mine: Any) -> bytes:
    """The head of a region; whether it may go into a checkpoint is found out by whoever reads it."""
    buffer = io.BytesIO()
    try:
        torch.save({"table": table, SHARED: shared, RANK: mine}, buffer)
    except Exception as error:
        raise SnapshotError(refused(error)) from error
    return buffer.getvalue()


def refused(error: Exception) -> str:
    """Why a state cannot be kept, and what to do about it."""
    return (
        f"the state holds objects that a checkpoint cannot hold ({str(error).splitlines()[0]}): let state_dict() of "
        "the "
        "operator, of optimizers and of schedulers return tensors, numbers, text, and lists and dicts of them"
    )


def _view(memory: mmap.mmap, place: Place) -> torch.Tensor:
    offset, dtype, shape = place
    return torch.frombuffer(memory, dtype=getattr(torch, dtype), count=math.prod(shape), offset=offset).view(shape)


def _read_map(path: str) -> mmap.mmap:
    with Path(path).open("r+b") as file:  # writable: torch warns of tensors over memory that is not
        return mmap.mmap(file.fileno(), 0)
