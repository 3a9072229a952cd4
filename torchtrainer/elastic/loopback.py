"""A launch on one machine listens on loopback only.

torch would listen on every interface, on two ports, and unpickles what its rendezvous finds there.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from torchtrainer.comm.rendezvous import loopback_store
from torchtrainer.errors import EngineError
from torchtrainer.topology import LOOPBACK

LOOPBACK_NAMES = (LOOPBACK, "localhost")


def dynamic_handler(params: RendezvousParameters) -> RendezvousHandler:
    """Torch's handler of a launch that no other machine can join, at a free port.

    Args:
        params: with ``local_addr``, where workers are to find each other.
    """
    store = _listening_store(params.local_addr or LOOPBACK, 0)
    handler = create_handler(store, C10dRendezvousBackend(store, params.run_id), params)
    handler._create_tcp_store_server = _listening_store  # type: ignore[assignment,method-assign]  # of the workers
    return handler


def listen_here(handler: RendezvousHandler, params: RendezvousParameters) -> None:
    """Has a static rendezvous of one machine, at a loopback address, listen there."""
    if isinstance(handler, StaticTCPRendezvous) and params.max_nodes == 1 and handler.master_addr in LOOPBACK_NAMES:
        handler._store = _listening_store(handler.master_addr, handler.master_port, handler.timeout)


def _listening_store(host: str, port: int, timeout: timedelta = dist.default_pg_timeout) -> Any:
    try:
        return loopback_store(host, port, timeout)
    except OSError as error:
        raise EngineError(f"cannot listen at {host}:{port}: {error.strerror} (is the port in use?)") from error
