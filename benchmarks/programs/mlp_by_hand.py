"""The peer: a data-parallel loop as people write it, to be started by torchrun. Prints milliseconds per step."""

import time

import torch
import torch.distributed as dist
from mlp import EPOCHS, WARM_UP, build, samples
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

torch.set_num_threads(1)
dist.init_process_group("gloo")
data = samples()
sampler = DistributedSampler(data)
loader = DataLoader(data, batch_size=32, sampler=sampler)
model, optimizer, loss_function = build()
model = DistributedDataParallel(model)


def train(epoch: int) -> int:
    """One epoch; returns its steps."""
    sampler.set_epoch(epoch)
    steps, total = 0, 0.0
    for x, y in loader:
        loss = loss_function(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item()
        steps += 1
    return steps


for epoch in range(WARM_UP):
    train(epoch)
dist.barrier()
began = time.perf_counter()
steps = sum(train(WARM_UP + epoch) for epoch in range(EPOCHS))
dist.barrier()
if dist.get_rank() == 0:
    print("MS_PER_STEP", (time.perf_counter() - began) / steps * 1e3, flush=True)
dist.destroy_process_group()
