"""The smallest distributed program: to be started by a launcher. Joins a group, does one all-reduce, leaves."""

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
one = torch.ones(1)
dist.all_reduce(one)
if dist.get_rank() == 0:
    print("SUM", one.item(), flush=True)
dist.destroy_process_group()
