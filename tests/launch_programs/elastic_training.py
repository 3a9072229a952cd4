"""Trains through the loss of a worker, as torchrun's documentation says that an elastic script does.

Written here, after the sketch in the documentation of ``torch.distributed.run``: the script begins by loading the snapshot, trains
from there, saves one after each epoch, and counts on being started again as a whole when a worker fails.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.parallel import DistributedDataParallel


def parse_args():
    parser = argparse.ArgumentParser()
    parser.add_argument("--snapshot", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--fail-in-epoch", type=int, default=2)
    return parser.parse_args()


def batches(rank, epoch):
    generator = torch.Generator().manual_seed(100 * epoch + rank)
    for _ in range(4):
        yield torch.randn(8, 10, generator=generator), torch.randn(8, 1, generator=generator)


def save(path, **state):
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


@record
def main():
    args = parse_args()
    dist.init_process_group("gloo")
    rank, attempt = dist.get_rank(), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(10, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    start = 0
    if args.snapshot.exists():
        state = torch.load(args.snapshot, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["epoch"] + 1
    print(f"attempt {attempt} of at most {os.environ['TORCHELASTIC_MAX_RESTARTS']} restarts, from epoch {start}")
    model = DistributedDataParallel(model)
    for epoch in range(start, args.epochs):
        if epoch == args.fail_in_epoch and rank == 1 and attempt == 0:
            raise RuntimeError(f"rank {rank} fails in epoch {epoch}")
        for data, target in batches(rank, epoch):
            loss = torch.nn.functional.mse_loss(model(data), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if rank == 0:
            save(args.snapshot, model=model.module.state_dict(), optimizer=optimizer.state_dict(), epoch=epoch)
        print(f"epoch {epoch} loss {loss.item()!r}")
        dist.barrier()
    print(f"final weights {[p.double().sum().item() for p in model.parameters()]!r}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
