"""Starts processes of its own by every start method, with a function and a class of the script itself."""

from __future__ import annotations

import multiprocessing
import pickle
import subprocess
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    value: int


def double(item: Item) -> Item:
    return Item(item.value * 2)


if __name__ == "__main__":
    for method in ("spawn", "fork", "forkserver"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            sys.stdout.write(f"worker> {method} {pool.map(double, [Item(1), Item(2)])}\n")
    sys.stdout.write(f"worker> {pickle.loads(pickle.dumps(Item(3)))} {Item.__module__}\n")
    subprocess.run([sys.executable, "-c", "print('worker> subprocess')"], check=True)
