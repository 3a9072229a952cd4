"""Waits for the machine that hosts a rendezvous, in Python: torch waits inside C++, deaf to signals, and prints its retries."""

from __future__ import annotations

import argparse
import contextlib
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
DEFAULT_JOIN_TIMEOUT_S = {"c10d": 600.0, "static": 900.0}
"""torch's defaults of ``join_timeout``, and of what stands for it in a static rendezvous."""
UNREACHABLE_S = 5.0
"""How long a machine whose workers are gone tries to reach the rendezvous before its launch ends."""


class UnreachableError(EngineError):
    """The machine that hosts the rendezvous cannot be reached any more."""


def await_endpoint(args: argparse.Namespace, rendezvous: dict[str, Any]) -> None:
    """Returns when the rendezvous can be connected to, or if this machine is to host it.

    A name may become known, and the port open, while we wait: machines of a cluster start in any order.

    Args:
        args: the command line, with the rendezvous filled in.
        rendezvous: its configuration: ``is_host``, ``read_timeout``, ``store_type``, ``rank``.

    Raises:
        EngineError: not within ``read_timeout`` seconds.
    """
    at = _address(args, rendezvous)
    if at is None:
        return
    host, port = at
    limit_s = connect_timeout_s(args, rendezvous)
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


def connect_timeout_s(args: argparse.Namespace, rendezvous: dict[str, Any]) -> float:
    """How long to try to reach the machine that hosts the rendezvous."""
    limit_s = float(rendezvous.get("read_timeout", DEFAULT_CONNECT_TIMEOUT_S))
    return float(rendezvous.get("timeout", limit_s)) if args.rdzv_backend == "static" else limit_s


def join_limit(args: argparse.Namespace, rendezvous: dict[str, Any]) -> str:
    """How long the wait for other machines lasts, in words."""
    name = "timeout" if args.rdzv_backend == "static" else "join_timeout"
    limit_s = rendezvous.get(name, DEFAULT_JOIN_TIMEOUT_S.get(args.rdzv_backend))
    if limit_s is None:  # a kind of its own
        return "within the time-outs of --rdzv-conf"
    return f"for up to {float(limit_s):g} s ({name} of --rdzv-conf)"


class Reach:
    """Whether the machine that hosts the rendezvous can be reached, looked at while torch waits for its answer.

    torch waits for it inside C++, up to ``read_timeout`` and longer, and then says that an operation failed.

    Args:
        args, rendezvous: as for `await_endpoint`.
    """

    def __init__(self, args: argparse.Namespace, rendezvous: dict[str, Any]) -> None:
        self._at = _address(args, rendezvous)
        self._found: list[Any] = []
        if self._at is not None and not _hosts(args, rendezvous, self._at[0]):
            with contextlib.suppress(socket.gaierror):  # torch has its own word for that
                self._found = socket.getaddrinfo(*self._at, type=socket.SOCK_STREAM)
        self._socket: socket.socket | None = None
        self._silent_since_s: float | None = None

    def look(self) -> None:
        """Looks whether a connection is there, and tries the next one; to be called about once a second.

        Raises:
            UnreachableError: none was, for `UNREACHABLE_S`.
        """
        if self._at is None or not self._found:
            return
        now_s = time.monotonic()
        tried, self._socket = self._socket, None
        if tried is None or _is_connected(tried):
            self._silent_since_s = now_s
        if tried is not None:
            tried.close()
        silent_s = now_s - (self._silent_since_s or now_s)
        if silent_s >= UNREACHABLE_S:
            host, port = self._at
            raise UnreachableError(
                f"the rendezvous at {host}:{port} has not been reachable for {silent_s:.0f} s: the machine that hosts it is "
                "gone, its launcher has ended, or the network between is cut. This machine cannot continue without it; "
                "start "
                "its launcher again when it can be reached"
            )
        family, kind, protocol, _, address = self._found[0]
        self._socket = socket.socket(family, kind, protocol)
        self._socket.settimeout(0)
        self._socket.connect_ex(address)


def _is_connected(trying: socket.socket) -> bool:
    try:
        trying.getpeername()
    except OSError:
        return False
    return True


def _address(args: argparse.Namespace, rendezvous: dict[str, Any]) -> tuple[str, int] | None:
    """Host and port of the rendezvous; None if its kind has none that could be asked."""
    if args.rdzv_backend not in ("c10d", "static") or rendezvous.get("store_type", "tcp") != "tcp":
        return None
    endpoint = args.rdzv_endpoint or f"{args.master_addr}:{args.master_port}"
    host, port = parse_rendezvous_endpoint(endpoint, default_port=DEFAULT_C10D_PORT)
    return host, port


def _hosts(args: argparse.Namespace, rendezvous: dict[str, Any], host: str) -> bool:
    """Whether this machine listens at the endpoint, by torch's rules."""
    if args.rdzv_backend == "static":
        return int(rendezvous.get("rank", args.node_rank)) == 0
    said = rendezvous.get("is_host")
    if said is not None:
        return str(said).lower() in ("1", "true", "t", "yes", "y")
    # Several launchers on one machine: the first one listens, and each may be the first.
    return bool(_matches_machine_hostname(host))
