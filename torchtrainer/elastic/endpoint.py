"""Waits for the machine that hosts a rendezvous, in Python: torch waits inside C++, deaf to signals, and prints its retries."""

from __future__ import annotations

import argparse
import socket
import time
from typing import Any

from torch.distributed.elastic.rendezvous.utils import _matches_machine_hostname, parse_rendezvous_endpoint

from torchtrainer.errors import EngineError

DEFAULT_C10D_PORT = 29400
"""Where torch's c10d rendezvous listens if the endpoint names no port."""
DEFAULT_CONNECT_TIMEOUT_S = 60.0
"""torch's default of ``read_timeout``: how long a machine tries to reach the one that hosts the rendezvous."""
RETRY_S = 0.2
"""Between two tries."""


def await_endpoint(args: argparse.Namespace, rendezvous: dict[str, Any]) -> None:
    """Returns when the rendezvous can be connected to, or if this machine is to host it.

    A name may become known, and the port open, while we wait: machines of a cluster start in any order.

    Args:
        args: the command line, with the rendezvous filled in.
        rendezvous: its configuration: ``is_host``, ``read_timeout``, ``store_type``, ``rank``.

    Raises:
        EngineError: not within ``read_timeout`` seconds.
    """
    if args.rdzv_backend not in ("c10d", "static") or rendezvous.get("store_type", "tcp") != "tcp":
        return
    endpoint = args.rdzv_endpoint or f"{args.master_addr}:{args.master_port}"
    host, port = parse_rendezvous_endpoint(endpoint, default_port=DEFAULT_C10D_PORT)
    limit_s = float(rendezvous.get("read_timeout", DEFAULT_CONNECT_TIMEOUT_S))
    if args.rdzv_backend == "static":
        limit_s = float(rendezvous.get("timeout", limit_s))
    deadline_s = time.monotonic() + limit_s
    while True:
        try:
            if _hosts(args, rendezvous, host):
                socket.getaddrinfo(host, port)
                return
            socket.create_connection((host, port), timeout=max(RETRY_S, deadline_s - time.monotonic())).close()
        except OSError as error:
            if time.monotonic() >= deadline_s:
                what = "cannot be resolved" if isinstance(error, socket.gaierror) else "cannot be reached"
                raise EngineError(
                    f"rendezvous {args.rdzv_backend}: {host}:{port} {what} within {limit_s:g} s ({error.strerror or error}): "
                    "is the address right, and the launcher that hosts it running? --rdzv-conf read_timeout=SECONDS waits longer"
                ) from error
            time.sleep(RETRY_S)
        else:
            return


def _hosts(args: argparse.Namespace, rendezvous: dict[str, Any], host: str) -> bool:
    """Whether this machine listens at the endpoint, by torch's rules."""
    if args.rdzv_backend == "static":
        return int(rendezvous.get("rank", args.node_rank)) == 0
    said = rendezvous.get("is_host")
    if said is not None:
        return str(said).lower() in ("1", "true", "t", "yes", "y")
    # Several launchers on one machine: the first one listens, and each may be the first.
    return bool(_matches_machine_hostname(host))
