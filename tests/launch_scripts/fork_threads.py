"""Says how many threads torch takes for each kind of work; an argument is a module to import by name before torch."""

import importlib
import os
import sys
import threading

for name in sys.argv[1:]:
    importlib.import_module(name)  # not an import statement, which would be found in the source

import torch


def seen() -> str:
    lines = torch.__config__.parallel_info().splitlines()
    return " ".join(line.strip() for line in lines if "()" in line or "_THREADS" in line)


sys.stdout.write(f"worker> {seen()}\n")
x = torch.randn(300, 300)
sys.stdout.write(f"worker> {bool((x @ x).sum() == (x @ x).sum())} {seen()}\n")
other = threading.Thread(target=lambda: sys.stdout.write(f"worker> other {seen()}\n"))
other.start()
other.join()
sys.stdout.write(f"worker> {os.environ.get('OMP_NUM_THREADS')}\n")
