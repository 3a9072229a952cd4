"""Where the ranks of a launch meet: a store, and a name in it that is theirs alone.

What an earlier start of the ranks wrote may still be there: torchrun 2.14 keeps one store for all starts. No process can tell by
itself which start it belongs to: each machine counts its restarts for itself, and one that joined later has counted none. So
the ranks agree on a name through the store.
"""

from __future__ import annotations

import json
import secrets
import socket
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # torch's stubs leave them out

from torchtrainer.errors import EngineError
from torchtrainer.topology import LOOPBACK, Topology

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

LOOK_S = 0.05
"""How long a rank waits for an answer before it checks for a newer offer."""


class Rendezvous:
    """The store in which the ranks of a launch meet, for one process group after another.

    Under a launcher that hosts the store (torchrun's agent store) it is that one. Otherwise rank 0 hosts it: on loopback
    only when all ranks are on this machine. It is kept until the process ends: a store that went with its group could
    still be found, and its addresses taken for new ones, by a rank that is quicker than rank 0 to form the next group.

    Args:
        topology: what the launcher said, the same on all ranks except for the rank.
    """

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self._store: Store | None = None
        self._groups = 0

    def next_store(self, timeout: timedelta) -> Store:
        """A store for a new group, apart from those of the groups before it; every rank must call it the same number of times.

        Raises:
            EngineError: a rank did not come within the timeout, or the port is in use.
        """
        if self._store is None:
            self._store = self._open(timeout)
        self._groups += 1
        store: Store = PrefixStore(str(self._groups), self._store)
        store.set_timeout(timeout)
        return store

    def _open(self, timeout: timedelta) -> Store:
        at = self.topology
        store = _agent_store(at, timeout) if at.agent_store else _own_store(at, timeout)
        return private_store(store, rank=at.rank, world_size=at.world_size, timeout=timeout)


def private_store(store: Store, *, rank: int, world_size: int, timeout: timedelta) -> Store:
    """The part of a store that only these processes share, and nobody who used it before. Each of them calls this once.

    Rank 0 offers a name that it has drawn, the others sign below it, and rank 0 shows the signatures. A name that somebody left
    behind never shows the signature that was drawn just now, so whoever finds one waits for the next.

    Args:
        store: that all reach.
        rank, world_size: of this process.
        timeout: for all to come.

    Raises:
        EngineError: they did not; it names those who are missing, as far as this process can know.
    """
    meeting = PrefixStore("torchtrainer/meeting", store)
    name = _gather(meeting, world_size, timeout) if rank == 0 else _follow(meeting, rank, timeout)
    return PrefixStore(f"torchtrainer/{name}", store)


def met_before(store: Store) -> bool:
    """Whether any processes have met in a store."""
    return bool(PrefixStore("torchtrainer/meeting", store).check(["offer"]))


def _gather(meeting: Any, world_size: int, timeout: timedelta) -> str:
    name = secrets.token_hex(8)
    signatures = [f"{name}/{rank}" for rank in range(1, world_size)]
    meeting.set("offer", name)
    try:
        meeting.wait(signatures, timeout)
    except dist.DistStoreError as error:
        missing = [rank for rank, key in enumerate(signatures, start=1) if not meeting.check([key])]
        raise EngineError(
            _late(f"rank 0 waited for rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}", timeout)
        ) from error
    meeting.set(f"{name}/signed", json.dumps([meeting.get(key).decode() for key in signatures]))
    return name


def _follow(meeting: Any, rank: int, timeout: timedelta) -> str:
    mine, name = secrets.token_hex(8), ""
    deadline = time.monotonic() + timeout.total_seconds()
    while (left_s := deadline - time.monotonic()) > 0:
        if not _comes(meeting, "offer", left_s):
            break
        offered = meeting.get("offer").decode()
        if offered != name:
            name = offered
            meeting.set(f"{name}/{rank}", mine)
        signed = f"{name}/signed"
        if not _comes(meeting, signed, LOOK_S) and not meeting.check([signed]):  # an answer may take longer than that
            continue
        if mine in json.loads(meeting.get(f"{name}/signed")):
            return name
        time.sleep(LOOK_S)  # of processes that are gone
    raise EngineError(_late(f"rank {rank} waited for rank 0", timeout))


def _late(who_waited: str, timeout: timedelta) -> str:
    return (
        f"{who_waited} to form the process group, for {timeout.total_seconds():g} s: all ranks must arrive within "
        "timeout_s. "
        "Look for a rank that ended or hangs, and for an address that a machine cannot reach"
    )


def _comes(meeting: Any, key: str, timeout_s: float) -> bool:
    try:
        meeting.wait([key], timedelta(seconds=timeout_s))
    except dist.DistStoreError:
        return False
    return True


def _agent_store(topology: Topology, timeout: timedelta) -> Store:
    """The store that the launcher hosts. torch's own way there would wait for all ranks of a start that may not be theirs."""
    store: Store = TCPStore(
        topology.master_addr,
        topology.master_port,
        topology.world_size,
        is_master=False,
        timeout=timeout,
        wait_for_workers=False,
    )
    return store


def _own_store(topology: Topology, timeout: timedelta) -> Store:
    """Rank 0 hosts the store, the others connect to it; on loopback if no rank is on another machine."""
    hosts = topology.rank == 0
    host = LOOPBACK if topology.one_machine else topology.master_addr
    try:
        if hosts and topology.one_machine:
            return loopback_store(host, topology.master_port, timeout)
        store: Store = TCPStore(
            host,
            topology.master_port,
            topology.world_size,
            is_master=hosts,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (OSError, RuntimeError) as error:  # which torch's own is, up to 2.6 without a name
        if not hosts:
            raise
        raise EngineError(
            f"rank 0 cannot listen on port {topology.master_port} of {host}: {error}. Another program, or another run "
            f"on this machine, may be using it: set the environment variable MASTER_PORT (now {topology.master_port}) "
            "to a free port, for all ranks"
        ) from error
    return store


def loopback_store(host: str, port: int, timeout: timedelta) -> TCPStore:
    """Hosts a store that listens at one address: given only a name, torch would listen on every interface.

    Args:
        host: a name of loopback.
        port: 0: a free one, which the store knows.
        timeout: of its operations.

    Raises:
        OSError: the port is in use.
    """
    listener = socket.create_server((host, port), backlog=1024)
    libuv = torch.__version__ >= (2, 8)  # type: ignore[operator]  # it took no socket before; the stubs know no tuples
    return TCPStore(
        host,
        listener.getsockname()[1],
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=True,
        master_listen_fd=listener.detach(),  # torch closes it with the store
        use_libuv=libuv,
    )
