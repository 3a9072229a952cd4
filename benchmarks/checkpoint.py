"""What checkpoints cost: how long training stands still for one, beside plain ways to save the same state, and what stays.

    python benchmarks/checkpoint.py [--checkpoints 100] [--json FILE]

The state is that of ResNet-18 with momentum (89 MB), on two workers. In the same run, in the same worker processes: a plain copy
of each process's share into memory that is there already, ``torch.save`` with fsync by rank 0, and
``torch.distributed.checkpoint.async_save``. Then a run is told to stop by SIGTERM, and the time until its state is durable and
verified is taken.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from torchtrainer import CheckpointConfig, TorchTrainer
from torchtrainer.checkpoint.verified import verify
from torchtrainer.observe.devices import proportional_memory
from torchtrainer.resnet import ResNet18

WORKERS = 2
IMAGES = 4
REPEATS = 9
MIB = 1 << 20


def data_creator(config):
    images = torch.randn(IMAGES * 1000, 3, 32, 32)
    return DataLoader(TensorDataset(images, torch.randint(0, 10, (len(images),))), batch_size=IMAGES)


def optimizer_creator(model, config):
    return torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)


def make_trainer(run_dir: str, checkpoint: CheckpointConfig, callbacks: tuple[object, ...] = ()) -> TorchTrainer:
    return TorchTrainer(
        model_creator=ResNet18,
        data_creator=data_creator,
        optimizer_creator=optimizer_creator,
        loss_creator=torch.nn.CrossEntropyLoss,
        num_workers=WORKERS,
        run_dir=run_dir,
        checkpoint=checkpoint,
        callbacks=callbacks,
    )


def tensors_of(operator) -> list[torch.Tensor]:
    momenta = [state["momentum_buffer"] for state in operator.optimizer.state.values()]
    return [*operator.model.state_dict().values(), *momenta]


def plain_copy(operator) -> list[float]:
    """Seconds for copying this process's share of the state after a step, all processes at once."""
    tensors = tensors_of(operator)
    share = tensors[operator.world_rank :: WORKERS]
    there = [torch.zeros_like(one) for one in share]
    images = torch.randn(IMAGES // WORKERS, 3, 32, 32)
    found = []
    for _ in range(REPEATS):
        operator.model(images).sum().backward()  # as in a run, the state is not where the last copy left it
        torch.distributed.barrier()
        began = time.perf_counter()
        for target, source in zip(there, share, strict=True):
            target.copy_(source)
        found.append(time.perf_counter() - began)
    return found


def torch_save(operator) -> list[float]:
    """Seconds for which training stands still if rank 0 saves the state and the others wait."""
    found = []
    with tempfile.TemporaryDirectory(dir=".") as directory:
        for _ in range(REPEATS):
            torch.distributed.barrier()
            began = time.perf_counter()
            if operator.world_rank == 0:
                state = {"model": operator.model.state_dict(), "optimizer": operator.optimizer.state_dict()}
                with Path(directory, "state.pt").open("wb") as file:
                    torch.save(state, file)
                    file.flush()
                    os.fsync(file.fileno())
            torch.distributed.barrier()
            found.append(time.perf_counter() - began)
    return found


def async_save(operator) -> list[float]:
    """Seconds for which training stands still for torch's own asynchronous checkpoint."""
    from torch.distributed.checkpoint import async_save as save

    found = []
    with tempfile.TemporaryDirectory(dir=".") as directory:
        for number in range(REPEATS):
            torch.distributed.barrier()
            began = time.perf_counter()
            model = {f"model.{name}": one for name, one in operator.model.state_dict().items()}
            momenta = {f"momentum.{place}": one for place, one in enumerate(tensors_of(operator)[len(model) :])}
            future = save({**model, **momenta}, checkpoint_id=f"{directory}/{number}")
            found.append(time.perf_counter() - began)
            future.result()
        torch.distributed.barrier()
    return found


class Ledger:
    """Remembers every checkpoint, and the memory of all processes of the run after the tenth and the last."""

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.stalls: list[float] = []
        self.seconds: list[float] = []
        self.memory: dict[int, int] = {}

    def on_checkpoint(self, event) -> None:
        """Takes what an event says."""
        self.stalls.append(event.stall_s)
        self.seconds.append(event.seconds)
        if len(self.stalls) in (10, self.wanted):
            self.memory[len(self.stalls)] = sum(proportional_memory(pid) or 0 for pid in family(os.getpid()))


def family(pid: int) -> list[int]:
    """A process and all that descend from it."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(one for child in children for one in family(int(child)))]


def shown(name: str, seconds: list[float], base: float | None = None) -> str:
    ratio = "" if base is None else f"   {statistics.median(seconds) / base:6.2f} x the plain copy"
    return f"{name:34s} {statistics.median(seconds) * 1e3:8.1f} ms (to {max(seconds) * 1e3:7.1f}){ratio}"


def until_durable(directory: str) -> tuple[float, float, int]:
    """Tells a run to stop; returns seconds to the durable state, to the end of the process, and the exit code."""
    command = [sys.executable, __file__, "--train-in", directory]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        while "step" not in run.stdout.readline():
            pass
        told = time.time()
        run.send_signal(signal.SIGTERM)
        run.stdout.read()
        ended = time.time()
    newest = max(Path(directory, "checkpoints").glob("step-*"))
    verify(newest)
    return (newest / "manifest.json").stat().st_mtime - told, ended - told, run.returncode


class Shower:
    """Says that steps are being made."""

    def on_step(self, event) -> None:
        """Prints, once the run is going on."""
        if event.batch > 2:
            print("step", event.step, flush=True)


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=100)
    parser.add_argument("--json", type=Path, help="also write all samples to this file")
    parser.add_argument("--train-in", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train_in is not None:
        make_trainer(options.train_in, CheckpointConfig(), (Shower(),)).train()
        return
    with tempfile.TemporaryDirectory(dir=".") as directory:
        ledger = Ledger(options.checkpoints)
        with make_trainer(f"{directory}/run", CheckpointConfig(every_steps=1), (ledger,)) as trainer:
            while len(ledger.stalls) < options.checkpoints:
                trainer.train(num_steps=20)
            copies = [max(pair) for pair in zip(*trainer.apply_all_operators(plain_copy), strict=True)]
            saves = trainer.apply_all_operators(torch_save)[0]
            asynchronous = [max(pair) for pair in zip(*trainer.apply_all_operators(async_save), strict=True)]
        stalls = {
            "plain copy of a process's share": copies,
            "torchtrainer": ledger.stalls,
            "torch.save and fsync": saves,
            "distributed.checkpoint.async_save": asynchronous,
        }
        base = statistics.median(copies)
        print(f"training stands still, ResNet-18 with momentum, {WORKERS} workers:")
        for name, seconds in stalls.items():
            print(shown(name, seconds, base))
        print(shown("until verified on disk", ledger.seconds))
        first, last = (ledger.memory.get(count, 0) / MIB for count in (10, options.checkpoints))
        print(f"memory of all processes after 10 and {options.checkpoints} checkpoints: {first:.0f} and {last:.0f} MiB")
        durable_s, ended_s, code = until_durable(f"{directory}/told")
        print(f"SIGTERM to durable, verified state: {durable_s:.2f} s; to the end (exit code {code}): {ended_s:.2f} s")
    if options.json:
        samples = {"stall_s": stalls, "written_s": ledger.seconds, "durable_s": durable_s, "ended_s": ended_s}
        options.json.write_text(json.dumps(samples, indent=1) + "\n")


if __name__ == "__main__":
    main()
