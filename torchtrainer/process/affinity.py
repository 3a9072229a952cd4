"""Which cores a process runs on. Threads that it starts later inherit them. Linux only; elsewhere nothing is bound."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

NODES = Path("/sys/devices/system/node")
"""Where Linux lists the memory nodes of a machine, and the cores that are near to each."""


@dataclass(frozen=True, kw_only=True)
class Binding:
    """The cores of a process.

    Attributes:
        shared_by: processes of the run that run on the same cores.
        refused: why it was not bound although it was to be; empty otherwise.
    """

    shared_by: int
    refused: str = ""


def bind(place: int, processes: int, threads: int, wanted: bool | Literal["auto"]) -> Binding:
    """Binds this process; to be called before it starts threads that compute.

    Args:
        place: of this process among those of the run on this machine.
        processes: of the run on this machine.
        threads: that compute, per process.
        wanted: True: each process to cores of its own; "auto": to those of one memory node, if there are several; False: not.
    """
    if wanted is False:
        return Binding(shared_by=processes)
    if not hasattr(os, "sched_setaffinity"):
        refused = "this system does not bind processes to cores" if wanted is True else ""
        return Binding(shared_by=processes, refused=refused)
    allowed = os.sched_getaffinity(0)
    if wanted is True and processes * threads > len(allowed):
        needed = f"{processes} processes with {threads} threads each need {processes * threads} cores"
        return Binding(shared_by=processes, refused=f"{needed}, but only {len(allowed)} are available")
    nodes = [node for node in (sorted(one & allowed) for one in memory_nodes()) if node] or [sorted(allowed)]
    alike = [cores_for(one, processes, threads, nodes, own=wanted is True) for one in range(processes)]
    chosen = alike[place]
    if chosen:
        os.sched_setaffinity(0, chosen)
    return Binding(shared_by=alike.count(chosen))


def cores_for(place: int, processes: int, threads: int, nodes: Sequence[Sequence[int]], *, own: bool) -> set[int]:
    """The cores of one process; empty: any.

    Args:
        place, processes, threads: as for `bind`.
        nodes: the cores that may be used, by memory node.
        own: as many of its own as come to each, next to each other; else all those of a memory node.
    """
    if own:
        cores = [core for node in nodes for core in node]
        first, last = (one * len(cores) // processes for one in (place, place + 1))
        return set(cores[first:last])
    if len(nodes) < 2 or processes < len(nodes):
        return set()
    node = place * len(nodes) // processes
    here = [one for one in range(processes) if one * len(nodes) // processes == node]
    return set(nodes[node]) if len(here) * threads <= len(nodes[node]) else set()


def memory_nodes(root: Path = NODES) -> list[set[int]]:
    """The cores of each memory node of this machine; empty where that is not known."""
    try:
        lists = sorted(root.glob("node[0-9]*/cpulist"), key=lambda path: int(path.parent.name.removeprefix("node")))
        return [_cores_in(path.read_text()) for path in lists]
    except (OSError, ValueError):
        return []


def _cores_in(text: str) -> set[int]:
    """The cores in a list such as ``0-3,8``."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.update(range(int(first), int(last or first) + 1))
    return found
