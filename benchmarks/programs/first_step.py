"""Up to the first optimizer step: to be started by a launcher. Joins a group, wraps a model, does one step, leaves."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
model = DistributedDataParallel(torch.nn.Linear(20, 5))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(torch.randn(4, 20)).sum().backward()
optimizer.step()
if dist.get_rank() == 0:
    print("STEPS", 1, flush=True)
dist.destroy_process_group()
