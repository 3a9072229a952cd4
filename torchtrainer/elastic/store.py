"""The store in which workers meet: a new or emptied one for every start, which torch's agents leave as it was.

torch 2.14 keeps the store for all attempts, and with it the addresses of dead workers, which new ones may read: process groups
then do not form, or fail at once. It also tells its address only once, so that a machine that joins later never learns it.
"""

from __future__ import annotations

import contextlib
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.elastic.rendezvous import RendezvousHandler

STATIC_MEETING_S = 60.0
"""How long machines of a static rendezvous wait for each other before a restart; then each goes on alone, as with torchrun."""


def renew_store(handler: RendezvousHandler) -> None:
    """Has the next round of a dynamic rendezvous make a new store for workers, and tell all machines where it is."""
    for name in ("_bootstrap_store_info", "_shared_tcp_store_server"):
        if hasattr(handler, name):
            setattr(handler, name, None)


def store_of_restart(handler: RendezvousHandler, store: Any, attempt: int, rank: int, world_size: int) -> Any:
    """Waits until all machines of a static rendezvous are about to start again, and empties the store of their workers.

    Args:
        handler: of torch, static.
        store: of the agents.
        attempt: restarts before.
        rank, world_size: this machine, and how many there are.

    Returns:
        A store in which the agents' keys of earlier attempts are not found; the same one if the others did not come.
    """
    fresh: Any = PrefixStore(f"torchtrainer/restart_{attempt}", store)
    limit = timedelta(seconds=STATIC_MEETING_S)
    fresh.set(f"ready/{rank}", "")
    # Somebody's workers may go on without the others: nothing was wrong with them.
    with contextlib.suppress(dist.DistStoreError):
        if rank == 0:
            fresh.wait([f"ready/{other}" for other in range(world_size)], limit)
            _forget_workers(handler)
            fresh.set("emptied", "")
        fresh.wait(["emptied"], limit)
        return fresh
    return store


def _forget_workers(handler: RendezvousHandler) -> None:
    """Removes all keys but those of the agents; older torch cannot list them."""
    store: Any = getattr(handler, "_store", None)
    if store is None or not hasattr(store, "list_keys"):
        return
    for key in store.list_keys():
        if not key.startswith(f"{handler.get_run_id()}/"):
            store.delete_key(key)
