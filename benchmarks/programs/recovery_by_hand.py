"""A DDP loop by hand that saves a checkpoint per epoch, and whose ranks kill themselves: to be started by torchrun.

Usage: recovery_by_hand.py DIRECTORY SEED KILLS. Prints a line per restart: seconds from the kill to the end of the first step after
it, and the steps that are taken again.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from recovery_training import BATCH, STEPS, Loss, Model, Optimizer, Samples, Schedule
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

directory, seed, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
saved, killed = directory / "checkpoint.pt", directory / "killed"
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
draw = random.Random(seed + attempt)
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(seed)
data = Samples(world_size * BATCH * STEPS)
raw = Model(len(data))
model, optimizer, loss = DistributedDataParallel(raw), Optimizer(raw), Loss()
schedule = Schedule(optimizer)
done_epochs = 0
if saved.exists():
    state = torch.load(saved, weights_only=True)
    raw.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    done_epochs = state["epochs"]
sampler = DistributedSampler(data, shuffle=True, seed=seed)
victim, at = draw.randrange(world_size), draw.randint(1, STEPS - 1)
restarted = attempt > 0
for epoch in range(done_epochs, done_epochs + 2):
    sampler.set_epoch(epoch)
    killing = attempt < kills and epoch == done_epochs + 1  # after an epoch that was saved
    for step, (x, index, y) in enumerate(DataLoader(data, batch_size=BATCH, sampler=sampler)):
        if killing and step == at and rank == victim:
            killed.write_text(f"{time.monotonic_ns()} {step}")
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        loss(model(x, index), y).backward()
        optimizer.step()
        schedule.step()
        if restarted and rank == 0:
            then, again = killed.read_text().split()
            print("RESTARTED", (time.monotonic_ns() - int(then)) / 1e9, again, flush=True)
        restarted = False
    if rank == 0:
        state = {"model": raw.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
        torch.save({**state, "epochs": epoch + 1}, saved)
    dist.barrier()
dist.destroy_process_group()
