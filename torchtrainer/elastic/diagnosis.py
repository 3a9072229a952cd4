"""Turns what torch raises when machines do not come together into one clear line."""

from __future__ import annotations

import argparse
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousTimeoutError,
)


def explain(error: BaseException, handler: Any, args: argparse.Namespace) -> str | None:
    """What a failed rendezvous means and what to change; None for any other error.

    Args:
        error: as torch raised it.
        handler: torch's rendezvous handler, None if it could not be made.
        args: the command line.
    """
    endpoint = args.rdzv_endpoint or f"{args.master_addr}:{args.master_port}"
    said = str(error).strip().partition("\n")[0]
    if isinstance(error, RendezvousTimeoutError) or _is_time_out(error):
        return (
            f"the machines did not come together: wanted {args.nnodes}, {_joined(handler, said)}; rendezvous "
            f"{args.rdzv_backend} at {endpoint}, id {args.rdzv_id!r}, {_limits(args)}. Start the missing ones with the same "
            "endpoint and id, or give them more time with --rdzv-conf"
        )
    if isinstance(error, RendezvousConnectionError | dist.DistNetworkError | dist.DistStoreError):
        cause = error.__cause__ or error
        detail = str(cause).strip().partition("\n")[0] or said
        return (
            f"no rendezvous at {endpoint} ({args.rdzv_backend}): {detail}. Is the address right and reachable from here, "
            "and the port free on the machine that hosts it?"
        )
    if isinstance(error, RendezvousClosedError):
        return (
            f"the rendezvous {args.rdzv_backend} at {endpoint}, id {args.rdzv_id!r}, is closed: another machine's launcher gave "
            "up or has finished, and its own output says why. Start all machines again, with another --rdzv-id if the "
            "rendezvous is still served"
        )
    if isinstance(error, RendezvousError):
        return f"rendezvous {args.rdzv_backend} at {endpoint}: {said or type(error).__name__}"
    return None


def _is_time_out(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) and "Timed out" in str(error) and "clients joined" in str(error)


def _joined(handler: Any, said: str) -> str:
    """Who is there: torch keeps it in the state of the handler that it does not publish."""
    state = getattr(getattr(handler, "_state_holder", None), "state", None)
    participants = getattr(state, "participants", None)
    if participants is None:
        return said
    nodes = {*participants, *filter(None, [getattr(handler, "_this_node", None)])}  # which has left when it gave up
    return f"{len(nodes)} joined: {', '.join(sorted(f'{node.addr} (pid {node.pid})' for node in nodes))}"


def _limits(args: argparse.Namespace) -> str:
    given = f" ({args.rdzv_conf})" if args.rdzv_conf else ""
    return f"within the time-outs of --rdzv-conf{given}"
