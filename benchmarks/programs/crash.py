"""Crashes once: to be started by a launcher with ``--max-restarts 1``.

Prints the seconds from the crash to the end of the first all-reduce of the next attempt.

Usage: crash.py KIND FILE. KIND is exit, kill or raise; FILE takes the time of the crash from one attempt to the next.
"""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

kind, file = sys.argv[1], Path(sys.argv[2])
dist.init_process_group("gloo")
one = torch.ones(1)
dist.all_reduce(one)
done = time.time()
rank = dist.get_rank()
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    if rank == 1:
        file.write_text(str(time.time()))
        if kind == "exit":
            os._exit(3)
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise RuntimeError("crashes by intent")
    dist.all_reduce(one)  # never done: the other worker is gone
elif rank == 0:
    print("RESTART", done - float(file.read_text()), flush=True)
dist.destroy_process_group()
