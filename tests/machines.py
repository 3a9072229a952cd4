"""Launches of a TorchTrainer script on several nodes, step by step: what the tests of faults on several machines have in common."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nodes import Desk, Lan, Launcher, Node, Worker, lan_and_desk

OURS = (sys.executable, "-m", "torchtrainer", "run")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
PORT = 29400
QUICK = "last_call_timeout=2,keep_alive_interval=1,keep_alive_max_attempt=4,join_timeout=60,read_timeout=30"
"""A rendezvous that waits no longer than a busy machine needs; the keys take whole seconds."""
HELD_STEP = 8
"""Every rank asks the desk before it goes on from there."""
TIMEOUT_S = 20.0
"""Longer than a busy machine takes to start a rank."""

TRAINS = f"""
import hashlib
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchtrainer import CheckpointConfig, TorchTrainer, TrainingOperator

signal.signal(signal.SIGTERM, signal.SIG_DFL)
orders = desk.makefile()

class Reporting(TrainingOperator):
    def train_batch(self, batch, batch_info):
        say(step=self.global_step)
        if self.global_step == {HELD_STEP}:
            obey(orders.readline() or "exit 1")
        return super().train_batch(batch, batch_info)

def model_creator(config):
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.3), torch.nn.Linear(16, 2))

def data_creator(config):
    x = torch.randn(96, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=4, shuffle=True)

trainer = TorchTrainer(
    model_creator=model_creator, data_creator=data_creator, loss_creator=torch.nn.CrossEntropyLoss,
    optimizer_creator=lambda model, config: torch.optim.AdamW(model.parameters(), lr=0.01),
    training_operator_cls=Reporting, num_workers=int(os.environ["WORLD_SIZE"]), seed=3,
    run_dir=os.environ["RUN"], timeout_s=float(os.environ["TIMEOUT_S"]), checkpoint=CheckpointConfig(every_steps=3),
)
for _ in range(2):
    trainer.train()
models = trainer.state_dict()["models"][0].values()
say(digest=hashlib.sha256(b"".join(one.numpy().tobytes() for one in models)).hexdigest(), step=trainer.status().step)
trainer.shutdown()
"""
"""Two passes of 12 steps on 2 ranks, a checkpoint after every third step."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What happens to a machine, and what becomes of the training.

    Attributes:
        happens: in words.
        says: what the launcher of that machine writes.
        others: what those of the other machines write.
        outcome: of the training, in words.
    """

    happens: str
    says: str = ""
    others: str = ""
    outcome: str

    def row(self) -> str:
        """The line of the table."""
        said = (f"`{text}`" if text else "nothing" for text in (self.says, self.others))
        return f"| {self.happens} | {' | '.join(said)} | {self.outcome} |"


AGAIN = "all ranks start again from the newest checkpoint: the same bits"
CUT = {"says": "has not been reachable for", "others": "waiting for other machines: wanted 2"}
BACK = "its launch ends with exit code 1 after `timeout_s`; the others wait, and go on when a launcher is started there again: the same bits"
FAULTS = {
    "killed": Fault(happens="a worker is killed", says="was killed by SIGKILL", others="all workers", outcome=AGAIN),
    "launcher": Fault(happens="its launcher is killed, and started again", others="all workers", outcome=AGAIN),
    "short": Fault(happens="its link is cut for less than `timeout_s`", outcome="goes on, without a restart"),
    "cut": Fault(happens="its link is cut for longer", **CUT, outcome=BACK),
    "cut one way": Fault(happens="what it sends is lost", **CUT, outcome=BACK),
    "cut the other way": Fault(happens="what is sent to it is lost", **CUT, outcome=BACK),
    "power": Fault(
        happens="it loses its power, `--nnodes 2`",
        others="waiting for other machines: wanted 2",
        outcome="the others wait after `timeout_s`, and go on when it is back: the same bits",
    ),
    "power, elastic": Fault(
        happens="it loses its power, `--nnodes 1:2`",
        others="all workers",
        outcome="the others go on without it after `timeout_s`, with fewer ranks; with it when it is back",
    ),
    "slow": Fault(happens="200 ms of delay, 5 % of packets lost", outcome="goes on, slowly"),
    "not shared": Fault(
        happens="a worker is killed, and the run directory is not shared",
        says="must be on a file system that all",
        others="must be on a file system that all",
        outcome="all launches end with exit code 1",
    ),
}
"""What is shown in the page on how launches end; every row is a test of ``test_launch_machines.py``."""


def faults_table() -> str:
    """The table in Markdown."""
    header = "| what happens to a machine | its launcher says | the others say | the training |"
    return "\n".join([header, "|--|--|--|--|", *(fault.row() for fault in FAULTS.values())]) + "\n"


@dataclass(frozen=True, kw_only=True)
class Machines:
    """Nodes, and the launch of a training script on them."""

    lan: Lan
    desk: Desk
    command: Sequence[str]
    script: str
    shared: bool

    @property
    def nodes(self) -> list[Node]:
        return self.lan.nodes

    def launch(self, node: Node, *, host: int = 0, nnodes: str = "2", static: bool = False) -> Launcher:
        """Starts a launcher that meets the others at the address of the hosting node."""
        address = self.nodes[host].address
        where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{address}:{PORT}", "--rdzv-conf", QUICK]
        if static:
            where = ["--master-addr", address, "--master-port", str(PORT), "--node-rank", str(node.number - 1)]
        common = ("--local-addr", node.address, "--rdzv-id", "machines", "--max-restarts", "3", "--nnodes", nnodes)
        before = [] if self.shared else ["sh", "-c", 'mount -t tmpfs none "$RUN" && exec "$@"', "sh"]
        return node.start([*before, *self.command, *where, *common, self.script], self.desk.environ)

    def launch_all(self, **how: Any) -> list[Launcher]:
        return [self.launch(node, **how) for node in self.nodes]

    def finish(self, launchers: Sequence[Launcher], workers: Sequence[Worker]) -> set[str]:
        """Lets the workers go on to a good end, with nothing left; returns the digests of their models."""
        for worker in workers:
            worker.tell("go")
        said = [last_word(worker) for worker in workers]
        assert [launcher.finish() for launcher in launchers] == [0] * len(launchers), texts(launchers)
        for node in self.nodes:
            node.assert_empty()
        return {one["digest"] for one in said}

    def held(self, launchers: Sequence[Launcher], nodes: int = 2) -> list[Worker]:
        """The workers of a world, by rank, all of them held at their step."""
        workers = self.desk.world(nodes=nodes, launchers=launchers)
        for worker in workers:
            while (said := worker.next()).get("step") != HELD_STEP:
                assert "step" in said, f"rank {worker['RANK']} ended\n{texts(launchers)}"
        return workers


def texts(launchers: Sequence[Launcher]) -> str:
    """What launchers wrote, for messages of tests."""
    return "\n".join(f"--- {one.node.name}\n{one.text}" for one in launchers)


def last_word(worker: Worker) -> dict[str, Any]:
    """Reads what a worker says to its end; returns the last of it."""
    last: dict[str, Any] = {}
    while said := worker.next():
        last = said
    return last


@contextlib.contextmanager
def machines(
    directory: Path, count: int = 2, *, command: Sequence[str] = OURS, shared: bool = True, rest: str = TRAINS
) -> Iterator[Machines]:
    """Nodes with a training script; the run directory is one for all of them, or one for each, as long as its launcher lives."""
    with lan_and_desk(directory, count) as (lan, desk):
        (directory / "run").mkdir()
        desk.environ.update(
            RUN=str(directory / "run"), TIMEOUT_S=str(TIMEOUT_S), OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1"
        )
        desk.environ.setdefault("PYTHONPATH", os.pathsep.join(sys.path))
        yield Machines(lan=lan, desk=desk, command=command, script=desk.script(directory, rest), shared=shared)
