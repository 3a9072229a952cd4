"""What the driver costs with very many ranks: its real code and a real socket, and workers that only talk.

    python benchmarks/control_plane.py [--ranks 16 128 1024 10000] [--json FILE] [--profile]

One other process speaks for all workers and their host (``programs/fleet.py``), so that what is measured is the driver alone, in
seconds of its processor time: to start all ranks; to run a call to all results; to take one heartbeat of every rank; to handle one
failure, which is a lost worker whose rank is carried by another, a new worker, and its joining at a boundary where all hold; and
what it takes to watch over a call in which nobody says anything. A cost per rank that grows with the number of ranks is a fault.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import os
import pstats
import statistics
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from compare import PROGRAMS
from counted import CountedConnection

from torchtrainer.config import Timeouts
from torchtrainer.control.channel import Dealer
from torchtrainer.control.messages import StartGroup
from torchtrainer.driver.controller import Controller, Listener
from torchtrainer.driver.events import Joined, Recovered
from torchtrainer.process.guard import open_pidfd
from torchtrainer.process.paths import EnginePaths

BEATS = 5
"""Heartbeats of each rank that are taken."""
CALLS = 3
"""Calls in which nothing else happens; the median is taken from what other calls cost."""
QUIET_S = 1.0
"""How long nobody says anything, for the cost of watching."""
PATIENCE_S = 3600.0
"""A driver that is slow is what is measured: no worker is given up for it."""
SHOWN_LINES = 25
TARGET_RANKS, TARGET_S = 1024, 2.0
"""So many ranks are to be started, and one failure handled, in so many seconds of driver time."""


class FleetConnection(CountedConnection):
    """The driver's connection, to a fleet instead of a host."""

    def __init__(self, timeouts: Timeouts) -> None:  # the host's process is started by the one that this replaces
        self._timeouts = timeouts
        self.paths = EnginePaths.create()
        command = [sys.executable, str(PROGRAMS / "fleet.py"), self.paths.endpoint]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        self._pidfd = open_pidfd(self._process.pid)
        self._dealer = Dealer(self.paths.endpoint, "driver")
        self._lock = threading.RLock()
        self._inboxes = {}
        self._lost = None
        self._closed = False
        self.write_s = 0.0
        self.owner_pid = os.getpid()


class Noticing(Listener):
    """Notes what became of the failure."""

    def __init__(self) -> None:
        self.seen: deque[Recovered | Joined] = deque()

    def on_recovered(self, record: Recovered) -> None:
        """The rank is carried."""
        self.seen.append(record)

    def on_joined(self, joined: Joined) -> None:
        """The new worker has it."""
        self.seen.append(joined)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds of the driver's processor time for so many ranks.

    Attributes:
        ranks: of the group.
        start_s: until all are built.
        call_s: for one call, to the results of all.
        beat_s: for one heartbeat of every rank.
        failure_s: for one failure.
        watching_s: for each second of a call.
        start_messages, failure_messages: received and sent for these.
    """

    ranks: int
    start_s: float
    call_s: float
    beat_s: float
    failure_s: float
    watching_s: float
    start_messages: int
    failure_messages: int


def taken(doing: Callable[[], object]) -> float:
    """Seconds of processor time of this process."""
    gc.collect()
    began = time.process_time()
    doing()
    return time.process_time() - began


@contextmanager
def controlled(ranks: int, listener: Listener):
    """A controller of so many ranks that are not started yet, and its connection."""
    timeouts = Timeouts(engine_start_s=PATIENCE_S, worker_connect_s=PATIENCE_S, pause_s=PATIENCE_S)
    connection = FleetConnection(timeouts)
    start = StartGroup(
        group="group-0",
        world_size=ranks,
        nodes=[list(range(ranks))],
        log_dir=str(connection.paths.root),
        environ={},
        cwd=".",
        sys_path=[],
        threads=1,
        backend="gloo",
        timeout_s=PATIENCE_S,
    )
    controller = Controller(
        connection, start, logs_stay=False, timeouts=timeouts, hang_timeout_s=PATIENCE_S, listener=listener
    )
    try:
        yield controller, connection
    finally:
        controller.end(force=True)
        connection.close()


def measure(ranks: int) -> Cost:
    """Starts so many ranks, and has everything happen to them once."""
    listener = Noticing()
    with controlled(ranks, listener) as (controller, connection):

        def train(**orders: object) -> float:
            blob = json.dumps(orders).encode()
            return taken(lambda: controller.call("train", blob))

        start_s = taken(controller.wait_until_ready)
        start_messages = connection.received + connection.sent
        call_s = statistics.median([train() for _ in range(CALLS)])
        beat_s = max(0.0, train(beats=BEATS) - call_s) / BEATS
        watching_s = max(0.0, train(quiet_s=QUIET_S) - call_s) / QUIET_S
        before = connection.received + connection.sent
        failure_s = max(0.0, train(kill=ranks - 1) - call_s)
        failure_messages = connection.received + connection.sent - before
        found = [type(record).__name__ for record in listener.seen]
        assert sorted(found) == ["Joined", "Recovered"], found
    return Cost(
        ranks=ranks,
        start_s=start_s,
        call_s=call_s,
        beat_s=beat_s,
        failure_s=failure_s,
        watching_s=watching_s,
        start_messages=start_messages,
        failure_messages=failure_messages,
    )


def report(costs: list[Cost]) -> None:
    """Prints the costs, whole and per rank."""
    names = ("start", "call", "beat", "failure", "watching")
    print("driver's processor time: seconds, and microseconds per rank")
    print(f"{'ranks':>6s} " + " ".join(f"{name:>20s}" for name in names))
    for cost in costs:
        cells = []
        for name in names:
            seconds = getattr(cost, f"{name}_s")
            cells.append(f"{seconds:9.4f} s {seconds / cost.ranks * 1e6:6.1f} us")
        print(f"{cost.ranks:6d} " + " ".join(f"{cell:>20s}" for cell in cells))
    for cost in costs:
        if cost.ranks == TARGET_RANKS:
            whole_s = cost.start_s + cost.failure_s
            verdict = "met" if whole_s <= TARGET_S else "not met"
            print(
                f"{cost.ranks} ranks started and one failure handled: {whole_s:.2f} s; target {TARGET_S} s: {verdict}"
            )


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 128, 1024, 10000])
    parser.add_argument("--profile", action="store_true", help="show where the time of the last number of ranks goes")
    parser.add_argument("--json", type=Path, help="also write the costs to this file")
    options = parser.parse_args()
    costs = []
    for ranks in options.ranks:
        profile = cProfile.Profile()
        if options.profile and ranks == options.ranks[-1]:
            profile.enable()
        costs.append(measure(ranks))
        profile.disable()
    report(costs)
    if options.profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(SHOWN_LINES)
    if options.json:
        options.json.write_text(json.dumps([asdict(cost) for cost in costs], indent=1) + "\n")


if __name__ == "__main__":
    main()
