"""The process group of a run: form it, exchange small values over it, end it.

Only this package calls ``torch.distributed``. Values between ranks travel as JSON in tensors, never as pickles. One
thread per process may use a collective, and every rank has to make the same calls in the same order.
"""

from __future__ import annotations

import inspect
import json
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import FileStore  # type: ignore[attr-defined]  # torch's stubs leave it out

from torchtrainer.comm.flat import broadcast_tensors
from torchtrainer.comm.rendezvous import Rendezvous
from torchtrainer.errors import EngineError, InvalidArgumentError
from torchtrainer.topology import Topology

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch.distributed.distributed_c10d import Store


class Collective(Protocol):
    """Communication between the ranks of one run, besides gradients. Every rank makes every call."""

    @property
    def rank(self) -> int:
        """This rank, from 0."""

    @property
    def world_size(self) -> int:
        """The number of ranks."""

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value (JSON data), in rank order."""

    def gather_tensors(self, state: bytes) -> list[bytes]:
        """Every rank's bytes, in rank order."""

    def sum(self, values: Sequence[float]) -> list[float]:
        """The ranks' sums of the values, place by place."""

    def broadcast_buffers(self, modules: Iterable[nn.Module], src: int = 0) -> None:
        """Give every rank the buffers of rank ``src``."""

    def barrier(self) -> None:
        """Wait until every rank is here."""

    def close(self) -> None:
        """End the process group, if this collective formed it."""


@dataclass(frozen=True)
class SingleCollective:
    """The collective of a run with one rank and no process group: every call answers at once, with its own value."""

    rank: int = field(default=0, init=False)
    world_size: int = field(default=1, init=False)

    def all_gather(self, value: Any) -> list[Any]:
        """Return ``[value]`` as JSON brings it back (tuples become lists), so that one rank behaves like several."""
        return [json.loads(json.dumps(value))]

    def gather_tensors(self, state: bytes) -> list[bytes]:
        """Return ``[state]``."""
        return [bytes(state)]

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the values as floats."""
        return [float(value) for value in values]

    def broadcast_buffers(self, modules: Iterable[nn.Module], src: int = 0) -> None:
        """Leave the buffers as they are."""

    def barrier(self) -> None:
        """Return at once."""

    def close(self) -> None:
        """Release nothing: there is no process group."""


class GroupCollective:
    """The collective over the default process group of this process.

    Args:
        device: where the tensors of an exchange live: the rank's GPU with NCCL, else the CPU.
        owned: whether this object formed the group, and so ends it in `close`.
    """

    def __init__(self, *, device: torch.device, owned: bool) -> None:
        self._device = device
        self._owned = owned
        self.rank: int = dist.get_rank()
        self.world_size: int = dist.get_world_size()

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order.

        Args:
            value: JSON data; NaN and infinities are kept, floats keep their bits, tuples come back as lists.

        Returns:
            One value per rank.

        Raises:
            TypeError: the value is not JSON data (raised before anything is exchanged).
        """
        return [json.loads(text) for text in self.gather_tensors(json.dumps(value).encode())]

    def gather_tensors(self, state: bytes) -> list[bytes]:
        """Every rank's bytes, in rank order; for what ``torch.save`` wrote, to be loaded with ``weights_only=True``.

        Lengths may differ between ranks. Two collectives: the lengths, then the bytes padded to the longest.
        """
        mine = torch.tensor([len(state)], dtype=torch.int64, device=self._device)
        lengths = [int(length) for length in self._gather(mine)]
        longest = max(lengths)
        if longest == 0:
            return [b""] * self.world_size
        padded = torch.frombuffer(bytearray(state.ljust(longest, b"\0")), dtype=torch.uint8).to(self._device)
        rows = self._gather(padded)
        return [row[:length].cpu().numpy().tobytes() for row, length in zip(rows, lengths, strict=True)]

    def sum(self, values: Sequence[float]) -> list[float]:
        """The ranks' sums of the values, place by place, in float64 and added in rank order: equal bits on every rank.

        Args:
            values: the same number of values on every rank.
        """
        if len(values) == 0:
            return []
        rows = self._gather(torch.tensor(values, dtype=torch.float64, device=self._device))
        total = torch.zeros_like(rows[0])
        for row in rows:
            total += row
        return [float(value) for value in total.tolist()]

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """The ranks' sum of a number, on its device, which nobody waits for."""
        whole = value.to(self._device, copy=True)
        dist.all_reduce(whole)
        return whole.to(value.device)

    def broadcast_buffers(self, modules: Iterable[nn.Module], src: int = 0) -> None:
        """Give every rank the buffers (running means and the like) of rank ``src``: one broadcast per dtype.

        Args:
            modules: the same modules on every rank; wrapped or not; buffers may have any dtype and device.
            src: the rank whose values win.
        """
        self.broadcast((buffer for module in modules for buffer in module.buffers()), src)

    def broadcast(self, tensors: Iterable[torch.Tensor], src: int = 0) -> None:
        """Give every rank the values of rank ``src``: the same tensors on every rank, of any dtype and device."""
        broadcast_tensors(tensors, src=src, device=self._device)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        dist.barrier(device_ids=[self._device.index] if self._device.type == "cuda" else None)

    def close(self) -> None:
        """End the process group if this object formed it; a group that was there before stays as it is."""
        if self._owned:
            close_group()
        self._owned = False

    def _gather(self, mine: torch.Tensor) -> list[torch.Tensor]:
        rows = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(rows, mine)
        return rows


def open_group(
    *,
    backend: str,
    rank: int,
    world_size: int,
    timeout_s: float,
    store_path: str,
    device: torch.device | None = None,
) -> GroupCollective:
    """Form the process group of the processes of one machine, which meet in a file.

    A file in a 0700 directory needs no port and no process, is out of reach for other users, and forms a group as fast
    as a TCP store does. Gloo's own sockets follow ``GLOO_SOCKET_IFNAME`` in this process's environment.

    Args:
        backend: ``gloo`` or ``nccl``.
        rank: this process's rank.
        world_size: number of ranks.
        timeout_s: longest wait in seconds, for the others to come and for every collective.
        store_path: a path in a private directory, the same for all ranks and new for each group.
        device: this rank's GPU, for ``nccl``.

    Raises:
        EngineError: the group was not formed, for instance because a rank did not come within ``timeout_s``.
    """

    def make_store() -> Store:
        store: Store = FileStore(store_path, world_size)
        store.set_timeout(timedelta(seconds=timeout_s))
        return store

    where = f"through the file {store_path}"
    return _form(backend, rank, world_size, timeout_s, device, where, make_store)


def join_group(
    topology: Topology,
    *,
    backend: str,
    timeout_s: float,
    device: torch.device | None = None,
    place: Rendezvous | None = None,
) -> GroupCollective:
    """Join the processes that a launcher (torchrun, srun, mpirun) started, this process being one of them.

    A default process group that the script has formed itself is used as it is, and stays when the collective is closed.

    Args:
        topology: what the launcher said, from `torchtrainer.topology.detect`.
        backend: ``gloo`` or ``nccl``; not used for a group that is already there.
        timeout_s: longest wait in seconds, for the others to come and for every collective; of a new group.
        device: this rank's GPU, for ``nccl``.
        place: where the ranks met before; None: they never did in this process.

    Raises:
        EngineError: the port is in use, rank 0 cannot be reached, or a rank did not come within ``timeout_s``.
        InvalidArgumentError: the group that is there has another rank or size than the launcher said.
    """
    if dist.is_initialized():
        return _attach(topology, device)
    where = f"at MASTER_ADDR={topology.master_addr} MASTER_PORT={topology.master_port}"
    meeting = place or Rendezvous(topology)

    def make_store() -> Store:
        return meeting.next_store(timedelta(seconds=timeout_s))

    return _form(backend, topology.rank, topology.world_size, timeout_s, device, where, make_store)


def close_group() -> None:
    """End this process's group, whoever formed it; for worker processes, whose group is ours. Safe without a group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _form(
    backend: str,
    rank: int,
    world_size: int,
    timeout_s: float,
    device: torch.device | None,
    where: str,
    make_store: Callable[[], Store],
) -> GroupCollective:
    options: dict[str, Any] = {}
    if (
        backend == "nccl"
        and device is not None
        and "device_id" in inspect.signature(dist.init_process_group).parameters
    ):
        options["device_id"] = device
    excepthook = sys.excepthook
    try:
        dist.init_process_group(
            backend,
            store=make_store(),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
            **options,
        )
    except EngineError:
        raise
    except RuntimeError as error:  # DistError is one; Gloo's own are plain
        raise EngineError(
            f"rank {rank} of {world_size} could not form the process group {where} with backend {backend!r}. All "
            f"{world_size} ranks must arrive within timeout_s={timeout_s:g} s; look for a rank that ended or hangs, "
            f"and for an address that this machine cannot reach. torch says: {error}"
        ) from error
    finally:
        sys.excepthook = excepthook  # torch puts one more wrapper around it each time
    return GroupCollective(device=_exchange_device(backend, device), owned=True)


def _attach(topology: Topology, device: torch.device | None) -> GroupCollective:
    there = (dist.get_rank(), dist.get_world_size())
    if there != (topology.rank, topology.world_size):
        raise InvalidArgumentError(
            f"the process group that the script formed has rank {there[0]} of {there[1]}, but {topology.launcher} "
            f"started this process as rank {topology.rank} of {topology.world_size}: form the group over all ranks, or "
            "let the trainer do it"
        )
    return GroupCollective(device=_exchange_device(dist.get_backend(), device), owned=False)


def _exchange_device(backend: str, device: torch.device | None) -> torch.device:
    if any(name in backend for name in ("gloo", "mpi", "ucc", "cpu:", "undefined")):
        return torch.device("cpu")
    if device is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device())
