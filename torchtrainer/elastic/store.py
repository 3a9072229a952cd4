"""The store in which workers meet: a new or emptied one for every start, which torch's agents leave as it was.

torch 2.14 keeps the store for all attempts, and with it the addresses of dead workers, which new ones may read: process groups
then do not form, or fail at once. It also tells its address only once, so that a machine that joins later never learns it.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousHandler

from torchtrainer.comm.rendezvous import met_before, private_store
from torchtrainer.errors import EngineError

STATIC_MEETING_S = 60.0
"""How long machines of a static rendezvous wait for each other before a restart; then each goes on alone, as with torchrun."""


def renew_store(handler: RendezvousHandler) -> None:
    """Has the next round of a dynamic rendezvous make a new store for workers, and tell all machines where it is."""
    for name in ("_bootstrap_store_info", "_shared_tcp_store_server"):
        if hasattr(handler, name):
            setattr(handler, name, None)


def static_store(
    handler: RendezvousHandler, store: Any, rank: int, world_size: int, *, again: bool, say: Callable[[str], None]
) -> Any:
    """Waits until all machines of a static rendezvous are about to start again, and empties the store of their workers.

    A machine says so by meeting the others: none can know how often the others have started. One whose launcher was
    started again in the middle of a launch finds that there was a meeting, and comes to the next.

    Args:
        handler: of torch, static.
        store: of the agents.
        rank, world_size: this machine, and how many there are.
        again: this launcher has started workers before.
        say: tells the user that a machine did not come.

    Returns:
        A store in which the agents' keys of earlier starts are not found; the same one at the first start, and if the others
        did not come.
    """
    if not again and not met_before(store):
        return store
    limit = timedelta(seconds=STATIC_MEETING_S)
    try:
        fresh: Any = private_store(store, rank=rank, world_size=world_size, timeout=limit)
        if rank == 0:
            _forget_workers(handler)
            fresh.set("emptied", "")
        fresh.wait(["emptied"], limit)
    except (EngineError, dist.DistStoreError):  # nothing may be wrong with the workers of those who did not come
        say(
            f"not all of the {world_size} machines were ready to restart within {STATIC_MEETING_S:g} s: workers start "
            "here and wait for those of the others"
        )
        return store
    return fresh


def _forget_workers(handler: RendezvousHandler) -> None:
    """Removes all keys but those of the agents; older torch cannot list them."""
    store: Any = getattr(handler, "_store", None)
    if store is None or not hasattr(store, "list_keys"):
        return
    for key in store.list_keys():
        if not key.startswith(f"{handler.get_run_id()}/"):
            store.delete_key(key)
