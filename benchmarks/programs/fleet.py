"""A host and any number of workers in one process: says over the real socket what the real ones would say, and computes nothing.

    python fleet.py SOCKET

What a call is to do is in its blob, as JSON: ``heartbeats``: heartbeats per worker before it returns; ``quiet_s``: how long nobody says
anything; ``kill``: a rank whose worker is lost. Its ranks are carried, a new worker is built, all hold, it joins, and then the call
returns.
"""

import json
import os
import sys
import time
from collections.abc import Iterable

from torchtrainer.control.channel import Router
from torchtrainer.control.messages import (
    AdoptRanks,
    Boundary,
    Call,
    EndWorker,
    GroupGone,
    Heartbeat,
    Join,
    KillGroup,
    Paused,
    PrepareStop,
    Quit,
    RanksAdopted,
    Reply,
    SendState,
    StartGroup,
    StartWorker,
    StateSent,
    StopAt,
    WorkerExited,
    WorkerReady,
    WorkerStarted,
)
from torchtrainer.control.wire import Message

WAIT_S = 0.5
"""Longest single wait; between two of them the parent is looked for."""
SPENT_S = {"data": 1.25, "copy": 0.25, "forward": 2.5, "backward": 4.75, "exchange": 0.5, "step": 0.75}
KILLED = -9


class Fleet:
    """All workers of one group, and their host."""

    def __init__(self, endpoint: str) -> None:
        self.router = Router(endpoint)
        self.group = ""
        self.carriers: dict[int, list[int]] = {}
        self.called: set[int] = set()
        self.call = self.step = 0
        self.orders: dict = {}
        self.sent = 0

    def serve(self) -> None:
        """Answers until the driver says `Quit`, or is gone."""
        parent = os.getppid()
        while os.getppid() == parent:
            self.router.wait([], WAIT_S)
            while (received := self.router.receive()) is not None:
                if isinstance(received[1], Quit):
                    self.router.close()
                    return
                self.take(received[1])

    def say(self, message: type[Message], /, **fields) -> None:
        self.router.send(b"driver", message(group=self.group, **fields))
        self.sent += 1

    def take(self, message: Message) -> None:
        answer = ANSWERS.get(type(message))
        if answer is not None:
            answer(self, message)

    # The start and the end

    def on_start_group(self, message: StartGroup) -> None:
        self.group = message.group
        self.carriers = {rank: [rank] for rank in range(message.world_size)}
        for worker in self.carriers:
            self.come(worker)

    def on_start_worker(self, message: StartWorker) -> None:
        self.come(message.worker)

    def come(self, worker: int) -> None:
        self.say(WorkerStarted, worker=worker, pid=1 + worker)
        self.say(WorkerReady, worker=worker, device="cpu", facts={"bound": "", "recovers": True}, modules=[])

    def on_end_worker(self, message: EndWorker) -> None:
        for worker in self.carriers:
            self.say(WorkerExited, worker=worker, pid=1 + worker, exit_code=0)
        self.say(GroupGone)

    def on_kill_group(self, message: KillGroup) -> None:
        self.say(GroupGone)

    # A call

    def on_call(self, message: Call) -> None:
        self.called.add(message.worker)
        if len(self.called) < len(self.carriers):
            return
        self.called = set()
        self.call, self.orders = message.call, json.loads(message.blob)
        for _ in range(self.orders.get("heartbeats", 0)):
            self.step += 1
            self.heartbeat()
        time.sleep(self.orders.get("quiet_s", 0.0))
        lost = self.orders.get("kill")
        if lost is None:
            self.reply(self.carriers)
        else:
            worker = next(worker for worker, ranks in self.carriers.items() if lost in ranks)
            del self.carriers[worker]
            self.say(WorkerExited, worker=worker, pid=1 + worker, exit_code=KILLED, step=self.step)

    def heartbeat(self) -> None:
        for worker, ranks in self.carriers.items():
            self.say(
                Heartbeat,
                worker=worker,
                call=self.call,
                phase="forward",
                phase_age_s=0.01,
                epoch=1,
                step=self.step,
                batch=self.step,
                batches=None,
                samples=32 * self.step,
                loss=0.5,
                rss_bytes=1 << 28,
                cpu_s=12.5,
                longest_s=0.25,
                spent_s={name: seconds * self.step for name, seconds in SPENT_S.items()},
                ranks=ranks,
            )

    def reply(self, workers: Iterable[int]) -> None:
        for worker in workers:
            for rank in self.carriers[worker]:
                self.say(Reply, worker=worker, rank=rank, call=self.call, form="json", step=self.step, blob=b"{}")

    # A loss

    def on_adopt_ranks(self, message: AdoptRanks) -> None:
        self.carriers[message.worker] += message.ranks
        self.say(
            RanksAdopted,
            worker=message.worker,
            ranks=message.ranks,
            call=self.call,
            step=self.step,
            redone=len(message.ranks),
        )

    def on_prepare_stop(self, message: PrepareStop) -> None:
        for worker in self.carriers:
            self.say(Boundary, worker=worker, call=self.call, round=message.round, boundary=self.step)

    def on_stop_at(self, message: StopAt) -> None:
        for worker in self.carriers if message.pause else ():
            self.say(Paused, worker=worker, call=self.call, boundary=message.boundary)

    def on_send_state(self, message: SendState) -> None:
        at = {"batch": self.step}
        self.say(StateSent, worker=message.worker, number=message.number, call=self.call, at=at, step=self.step)

    def on_join(self, message: Join) -> None:
        for ranks in self.carriers.values():
            ranks[:] = [rank for rank in ranks if rank not in message.ranks]
        self.carriers[message.worker] = message.ranks
        self.say(RanksAdopted, worker=message.worker, ranks=message.ranks, call=self.call, step=self.step, redone=0)
        self.reply(self.carriers)


ANSWERS = {
    StartGroup: Fleet.on_start_group,
    StartWorker: Fleet.on_start_worker,
    EndWorker: Fleet.on_end_worker,
    KillGroup: Fleet.on_kill_group,
    Call: Fleet.on_call,
    AdoptRanks: Fleet.on_adopt_ranks,
    PrepareStop: Fleet.on_prepare_stop,
    StopAt: Fleet.on_stop_at,
    SendState: Fleet.on_send_state,
    Join: Fleet.on_join,
}
"""What is answered; the rest asks for nothing."""

if __name__ == "__main__":
    Fleet(sys.argv[1]).serve()
