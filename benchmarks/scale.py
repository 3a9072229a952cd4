"""What more worker processes on this machine cost: their start, their steps, those who look after them, memory.

    python benchmarks/scale.py [--workers 2 4 8 16 32 64] [--seconds 4] [--json FILE] [--plot FILE]

The model is tiny, each worker has one thread, and there are more workers than cores: a step takes as long as all workers' work takes
on the cores that there are. What is looked for is what comes on top. Supervision is driver, host and spawner together: their
processor time (user and system) while ``train()`` runs, per second and per step, and the messages that the driver gets and sends.
Workers send heartbeats by the clock, so that there are as many per second and worker however many steps are made.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from counted import CountedEngine
from torch.utils.data import DataLoader, TensorDataset

from torchtrainer import TorchTrainer
from torchtrainer.observe.devices import proportional_memory, read_process_use

MIB = 1 << 20
WARM_UP_STEPS = 20
DRIVER_TARGET = 0.05
TARGET_WORKERS = 64


@dataclass(frozen=True, kw_only=True)
class Scale:
    """So many workers.

    Attributes:
        workers: processes.
        start_s: from the constructor's call to its return; torch was imported before.
        steps, ms_per_step: of the measured pass.
        driver_share, supervision_share: processor time per second; 1.0 is one core.
        supervision_us_per_step: processor time per step.
        messages_per_s, messages_per_step: that the driver receives and sends.
        worker_bytes, supervision_bytes: proportional memory of a worker, and of host and spawner together.
    """

    workers: int
    start_s: float
    steps: int
    ms_per_step: float
    driver_share: float
    supervision_share: float
    supervision_us_per_step: float
    messages_per_s: float
    messages_per_step: float
    worker_bytes: float
    supervision_bytes: float


def model_creator(config):
    return torch.nn.Linear(16, 4)


def data_creator(config):
    return DataLoader(TensorDataset(torch.randn(4096, 16), torch.randint(0, 4, (4096,))), batch_size=4, shuffle=True)


def optimizer_creator(model, config):
    return torch.optim.SGD(model.parameters(), lr=0.01)


def make_trainer(workers: int, engine: CountedEngine) -> TorchTrainer:
    return TorchTrainer(
        model_creator=model_creator,
        data_creator=data_creator,
        optimizer_creator=optimizer_creator,
        loss_creator=torch.nn.CrossEntropyLoss,
        num_workers=workers,
        num_cpus_per_worker=1,
        run_dir=None,
        engine=engine,
    )


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def cpu_s(pids: list[int]) -> float:
    uses = [read_process_use(pid) for pid in pids]
    return sum(use.cpu_s for use in uses if use is not None)


def measure(workers: int, engine: CountedEngine, seconds: float) -> Scale:
    """Starts so many workers and trains for about so many seconds."""
    connection = engine.connect()
    began = time.perf_counter()
    with make_trainer(workers, engine) as trainer:
        start_s = time.perf_counter() - began
        trainer.train(num_steps=WARM_UP_STEPS)
        began = time.perf_counter()
        trainer.train(num_steps=WARM_UP_STEPS)
        steps = max(WARM_UP_STEPS, int(WARM_UP_STEPS * seconds / (time.perf_counter() - began)))
        host = children(os.getpid())
        others = [*host, *(spawner for one in host for spawner in children(one))]
        messages = connection.received + connection.sent
        theirs_s, own_s, began = cpu_s(others), time.process_time(), time.perf_counter()
        trainer.train(num_steps=steps)
        took_s = time.perf_counter() - began
        own_s, theirs_s = time.process_time() - own_s, cpu_s(others) - theirs_s
        messages = connection.received + connection.sent - messages
        pids = [process.pid for process in trainer.status().processes]
        memory = [proportional_memory(pid) or 0 for pid in pids]
        supervision_bytes = sum(proportional_memory(pid) or 0 for pid in others)
    return Scale(
        workers=workers,
        start_s=start_s,
        steps=steps,
        ms_per_step=took_s / steps * 1e3,
        driver_share=own_s / took_s,
        supervision_share=(own_s + theirs_s) / took_s,
        supervision_us_per_step=(own_s + theirs_s) / steps * 1e6,
        messages_per_s=messages / took_s,
        messages_per_step=messages / steps,
        worker_bytes=sum(memory) / len(memory),
        supervision_bytes=supervision_bytes,
    )


def report(found: list[Scale]) -> None:
    """Prints the table."""
    print(
        f"{'':>7s} {'start':>8s} {'ms per':>8s} {'driver':>8s} {'supervision':>24s} {'messages':>18s} {'MiB per':>8s}"
    )
    print(
        f"{'workers':>7s} {'s':>8s} {'step':>8s} {'% core':>8s} {'% core':>8s} {'us per step':>15s} "
        f"{'per s':>8s} {'per step':>9s} {'worker':>8s}"
    )
    for one in found:
        print(
            f"{one.workers:7d} {one.start_s:8.2f} {one.ms_per_step:8.2f} {one.driver_share:8.1%} {one.supervision_share:8.1%} "
            f"{one.supervision_us_per_step:15.1f} {one.messages_per_s:8.1f} {one.messages_per_step:9.3f} "
            f"{one.worker_bytes / MIB:8.1f}"
        )
        if one.workers == TARGET_WORKERS:
            verdict = "met" if one.driver_share < DRIVER_TARGET else "not met"
            print(f"driver below {DRIVER_TARGET:.0%} of a core at {one.workers} workers: {verdict}")


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    parser.add_argument("--seconds", type=float, default=4.0, help="of training for each (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--plot", type=Path, help="also draw them; needs matplotlib")
    options = parser.parse_args()
    engine = CountedEngine()
    make_trainer(1, engine).shutdown()  # torch is imported, and the spawner is there
    found = [measure(workers, engine, options.seconds) for workers in options.workers]
    engine.close()
    report(found)
    if options.json:
        options.json.write_text(json.dumps([asdict(one) for one in found], indent=1) + "\n")
    if options.plot:
        from plots import draw_scale

        draw_scale([asdict(one) for one in found], options.plot)


if __name__ == "__main__":
    main()
