"""What ``train.py`` imports from its own directory, by the names that torchvision's reference scripts use."""

from __future__ import annotations

import builtins
import os
import time
from collections import defaultdict

import torch
import torch.distributed as dist


class Meter:
    """A sum over the samples of all batches."""

    def __init__(self):
        self.total = 0.0
        self.count = 0

    def update(self, value, n):
        self.total += value * n
        self.count += n

    def synchronize_between_processes(self):
        if not is_dist_avail_and_initialized():
            return
        both = torch.tensor([self.count, self.total], dtype=torch.float64)
        dist.barrier()
        dist.all_reduce(both)
        self.count, self.total = int(both[0]), both[1].item()

    @property
    def global_avg(self):
        return self.total / self.count


class MetricLogger:
    """Meters by name, printed while a loader is read."""

    def __init__(self, delimiter):
        self.meters = defaultdict(Meter)
        self.delimiter = delimiter

    def update(self, n, **values):
        for name, value in values.items():
            self.meters[name].update(value, n)

    def __getattr__(self, name):
        if name in self.__dict__.get("meters", {}):
            return self.meters[name]
        raise AttributeError(name)

    def synchronize_between_processes(self):
        for meter in self.meters.values():
            meter.synchronize_between_processes()

    def log_every(self, iterable, print_freq, header):
        start = time.time()
        for i, item in enumerate(iterable):
            yield item
            if i % print_freq == 0:
                meters = self.delimiter.join(f"{name}: {meter.global_avg!r}" for name, meter in self.meters.items())
                print(f"{header} [{i}/{len(iterable)}]{self.delimiter}{meters}")
        print(f"{header} Total time: {time.time() - start:.1f} s")


def accuracy(output, target):
    """Percent of samples whose class is the likeliest, in a list of one as for other values of k."""
    return [100.0 * (output.argmax(1) == target).sum().item() / len(target)]


def is_dist_avail_and_initialized():
    return dist.is_available() and dist.is_initialized()


def is_main_process():
    return not is_dist_avail_and_initialized() or dist.get_rank() == 0


def save_on_master(*args, **kwargs):
    if is_main_process():
        torch.save(*args, **kwargs)


def setup_for_distributed(is_master):
    """Lets only one process print, unless it says ``force=True``."""
    builtin_print = builtins.print

    def print_(*args, force=False, **kwargs):
        if is_master or force:
            builtin_print(*args, **kwargs)

    builtins.print = print_


def init_distributed_mode(args):
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        print("Not using distributed mode")
        args.distributed = False
        return
    args.rank = int(os.environ["RANK"])
    args.world_size = int(os.environ["WORLD_SIZE"])
    args.gpu = int(os.environ["LOCAL_RANK"])
    args.distributed = True
    args.dist_backend = "gloo"
    print(f"| distributed init (rank {args.rank}): {args.dist_url}", flush=True)
    dist.init_process_group(args.dist_backend, args.dist_url, world_size=args.world_size, rank=args.rank)
    dist.barrier()
    setup_for_distributed(args.rank == 0)


def end_distributed_mode(args):
    if args.distributed:
        dist.destroy_process_group()
