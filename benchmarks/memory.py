"""Memory of many workers on one machine: what they use together, and how much of it they share.

    python benchmarks/memory.py [--workers 16] [--json FILE]

Each worker is forked from a process that has imported torch, so that those pages exist once. Resident memory counts shared
pages in every process; proportional memory (PSS) divides them, so that the sum is what the machine really holds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch.utils.data import DataLoader, TensorDataset

from torchtrainer import TorchTrainer
from torchtrainer.observe.devices import proportional_memory, read_process_use

MIB = 1 << 20


def model_creator(config):
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))


def data_creator(config):
    return DataLoader(TensorDataset(torch.randn(6400, 64), torch.randint(0, 10, (6400,))), batch_size=32)


def optimizer_creator(model, config):
    return torch.optim.SGD(model.parameters(), lr=0.01)


def main() -> None:
    """Starts the workers, trains an epoch, and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--json", type=Path, help="also write the sums to this file")
    options = parser.parse_args()
    workers = options.workers
    began = time.perf_counter()
    with TorchTrainer(
        model_creator=model_creator,
        data_creator=data_creator,
        optimizer_creator=optimizer_creator,
        loss_creator=torch.nn.CrossEntropyLoss,
        num_workers=workers,
        run_dir=None,
    ) as trainer:
        started = time.perf_counter()
        stats = trainer.train()
        trained = time.perf_counter()
        pids = [process.pid for process in trainer.status().processes]
        resident = [use.rss_bytes or 0 for use in map(read_process_use, pids) if use is not None]
        proportional = [proportional_memory(pid) or 0 for pid in pids]
    print(
        f"{workers} workers: started in {started - began:.1f} s, {stats['batch_count']} steps in {trained - started:.1f} s"
    )
    print(f"resident     {sum(resident) / MIB:8.0f} MiB together, {sum(resident) / workers / MIB:6.0f} MiB each")
    print(
        f"proportional {sum(proportional) / MIB:8.0f} MiB together, {sum(proportional) / workers / MIB:6.0f} MiB each"
    )
    if options.json:
        sums = {"workers": workers, "resident_bytes": sum(resident), "proportional_bytes": sum(proportional)}
        options.json.write_text(json.dumps(sums, indent=1) + "\n")


if __name__ == "__main__":
    main()
