"""What it costs to average gradients between processes: through shared memory, beside Gloo's all-reduce in the same processes.

    python benchmarks/exchange.py [--processes 2 4] [--json FILE]

Per size, the median over the rounds, each as long as its slowest process. The two ways take turns, each with many rounds without
a pause. Ours divides by the number of processes too, Gloo only adds up. Linux on x86-64 only.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from torchtrainer.comm.shared_memory import SharedMemoryExchange

SIZES_BYTES = [4, 1 << 10, 38 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20]
TURNS = 3
BYTES_PER_TURN = 256 << 20
MOST_ROUNDS = 400
FEWEST_ROUNDS = 5
TIMEOUT_S = 60.0


def timed(once: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of each call, after some that do not count."""
    for _ in range(max(2, rounds // 10)):
        once()
    dist.barrier()
    found = []
    for _ in range(rounds):
        began = time.perf_counter()
        once()
        found.append(time.perf_counter() - began)
    return found


def by_exchange(path: str, rank: int, world_size: int, gradient: torch.Tensor) -> Callable[[], object]:
    """One exchange through shared memory per call."""
    exchange = SharedMemoryExchange(
        path, world_size=world_size, parameters=[gradient], timeout_s=TIMEOUT_S, processes=world_size
    )

    def once() -> None:
        number = exchange.number + 1
        exchange.put(rank, number, [gradient])
        exchange.publish(rank, number)
        exchange.finish(carried=lambda: (rank,), on_wait=lambda: None)

    return once


def measure(rank: int, world_size: int, directory: str, paths: list[str]) -> None:
    """Runs in each process; writes seconds by size and way to a file."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
    store = dist.FileStore(f"{directory}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=TIMEOUT_S))
    found: dict[int, dict[str, list[float]]] = {}
    for size_bytes, path in zip(SIZES_BYTES, paths, strict=True):
        gradient = torch.randn(size_bytes // 4)
        reduced = gradient.clone()
        ways = {
            "shared": by_exchange(path, rank, world_size, gradient),
            "gloo": lambda reduced=reduced: dist.all_reduce(reduced),
        }
        rounds = min(MOST_ROUNDS, max(FEWEST_ROUNDS, BYTES_PER_TURN // size_bytes))
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(TURNS):
            for way, once in ways.items():
                times[way] += timed(once, rounds)
            reduced.copy_(gradient)
        found[size_bytes] = times
    dist.destroy_process_group()
    Path(directory, f"{rank}.json").write_text(json.dumps(found))


def run(processes: int) -> dict[int, dict[str, float]]:
    """Seconds by size and way: the median over the rounds, each as long as its slowest process."""
    files = [os.memfd_create(f"exchange-{size_bytes}") for size_bytes in SIZES_BYTES]
    paths = [f"/proc/{os.getpid()}/fd/{file}" for file in files]
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(measure, args=(processes, directory, paths), nprocs=processes)
        ranks = [json.loads(Path(directory, f"{rank}.json").read_text()) for rank in range(processes)]
    for file in files:
        os.close(file)
    return {
        size_bytes: {
            way: statistics.median(map(max, zip(*(rank[str(size_bytes)][way] for rank in ranks), strict=True)))
            for way in ("shared", "gloo")
        }
        for size_bytes in SIZES_BYTES
    }


def shown(size_bytes: int) -> str:
    for unit, factor in (("MB", 1 << 20), ("kB", 1 << 10)):
        if size_bytes >= factor:
            return f"{size_bytes // factor} {unit}"
    return f"{size_bytes} B"


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args()
    figures = {processes: run(processes) for processes in options.processes}
    for processes, sizes in figures.items():
        print(
            f"{processes} processes on {os.cpu_count()} cores\n{'size':>8s} {'shared':>12s} {'Gloo':>12s} {'ratio':>8s}"
        )
        for size_bytes, seconds in sizes.items():
            ratio = seconds["gloo"] / seconds["shared"]
            print(
                f"{shown(size_bytes):>8s} {seconds['shared'] * 1e3:9.3f} ms {seconds['gloo'] * 1e3:9.3f} ms {ratio:6.1f} x"
            )
    if options.json is not None:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
