"""Short messages between rank 0 and the others beside the collectives, from a thread other than the training thread.

A store carries them, so that nothing is paid while nobody has anything to say but one question per look. JSON data only.
"""

from __future__ import annotations

import json
import secrets
from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # torch's stubs leave it out
from torch.distributed.distributed_c10d import _get_default_store

from torchtrainer.comm.group import Collective, GroupCollective, SingleCollective
from torchtrainer.errors import EngineError
from torchtrainer.topology import current

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

GATHER_CHUNK_BYTES = 64 * 1024**2
"""Bytes of each rank that travel at a time: with NCCL, rank 0's GPU holds as many for every rank."""


class RankChannel(Protocol):
    """Messages from ranks to rank 0, and from rank 0 to all. One thread per rank uses it at a time."""

    def tell(self, message: dict[str, Any]) -> None:
        """Tells rank 0."""

    def told(self) -> list[dict[str, Any]]:
        """Messages to rank 0 since its last call, in order."""

    def order(self, message: dict[str, Any]) -> None:
        """From rank 0: tells every rank, itself included."""

    def orders(self) -> list[dict[str, Any]]:
        """Orders of rank 0 since this rank's last call, in order."""


class LoneChannel:
    """The channel of a single rank with itself."""

    def __init__(self) -> None:
        self._told: deque[dict[str, Any]] = deque()
        self._orders: deque[dict[str, Any]] = deque()

    def tell(self, message: dict[str, Any]) -> None:
        """See `RankChannel`."""
        self._told.append(message)

    def told(self) -> list[dict[str, Any]]:
        """See `RankChannel`."""
        return _emptied(self._told)

    def order(self, message: dict[str, Any]) -> None:
        """See `RankChannel`."""
        self._orders.append(message)

    def orders(self) -> list[dict[str, Any]]:
        """See `RankChannel`."""
        return _emptied(self._orders)


class StoreChannel:
    """The channel of several ranks through a store. Its calls raise a ``RuntimeError`` when the store is gone.

    Args:
        store: for this channel alone.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._heard = 0
        self._followed = 0

    def tell(self, message: dict[str, Any]) -> None:
        """See `RankChannel`."""
        number = self._store.add("told", 1)
        self._store.set(f"told/{number}", json.dumps(message))

    def told(self) -> list[dict[str, Any]]:
        """See `RankChannel`."""
        found = []
        while self._store.check([key := f"told/{self._heard + 1}"]):
            self._heard += 1
            found.append(json.loads(self._store.get(key)))
            self._store.delete_key(key)
        return found

    def order(self, message: dict[str, Any]) -> None:
        """See `RankChannel`."""
        number = self._store.add("orders", 1)
        self._store.set(f"orders/{number}", json.dumps(message))

    def orders(self) -> list[dict[str, Any]]:
        """See `RankChannel`."""
        found = []
        while self._store.check([key := f"orders/{self._followed + 1}"]):
            self._followed += 1
            found.append(json.loads(self._store.get(key)))
        return found


def open_channel(collective: Collective) -> RankChannel:
    """A channel between the ranks of a collective, over the store in which its group met. A collective call.

    Rank 0 names it: a script may have formed the group itself, in a store that holds what earlier ranks said.
    """
    if not isinstance(collective, GroupCollective):
        return LoneChannel()
    name = collective.all_gather(secrets.token_hex(8))[0]
    return StoreChannel(PrefixStore(f"torchtrainer/channel/{name}", _get_default_store()))


def attached() -> Collective:
    """The ranks of a script with a loop of its own: those of the process group that it formed, or this one alone.

    Raises:
        EngineError: a launcher started several ranks, which have not formed a group.
    """
    if dist.is_available() and dist.is_initialized():
        return GroupCollective(device=_exchange_device(), owned=False)
    launched = current()
    if launched is not None and launched.world_size > 1:
        raise EngineError(
            f"{launched.launcher} started {launched.world_size} ranks, but they have not formed a process group: call "
            "torch.distributed.init_process_group before using torchtrainer.session for more than rank and world size"
        )
    return SingleCollective()


def gather_to_first(collective: Collective, mine: bytes) -> list[bytes]:
    """Every rank's bytes on rank 0, in rank order; nothing on the others. A collective call.

    Args:
        collective: the ranks.
        mine: of this rank; lengths may differ.
    """
    if collective.world_size == 1:
        return [mine]
    lengths: list[int] = collective.all_gather(len(mine))
    device, first = _exchange_device(), collective.rank == 0
    parts: list[list[bytes]] = [[] for _ in lengths]
    for start in range(0, max(lengths), GATHER_CHUNK_BYTES):
        size = min(GATHER_CHUNK_BYTES, max(lengths) - start)
        chunk = bytearray(mine[start : start + size].ljust(size, b"\0"))
        sent = torch.frombuffer(chunk, dtype=torch.uint8).to(device)
        rows = [torch.empty_like(sent) for _ in lengths] if first else None
        dist.gather(sent, rows, dst=0)
        for part, row, length in zip(parts, rows or (), lengths, strict=False):
            part.append(row[: max(0, length - start)].cpu().numpy().tobytes())
    return [b"".join(part) for part in parts] if first else []


def _exchange_device() -> torch.device:
    if "nccl" in dist.get_backend() and "gloo" not in dist.get_backend():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _emptied(messages: deque[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    while messages:
        found.append(messages.popleft())
    return found
