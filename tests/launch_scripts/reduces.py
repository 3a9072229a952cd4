"""A process group by ``env://`` and one all-reduce."""

import sys

import torch
import torch.distributed as dist

dist.init_process_group("gloo")
value = torch.tensor([dist.get_rank() + 1.0])
dist.all_reduce(value)
launched = dist.is_torchelastic_launched()
sys.stdout.write(f"worker> {dist.get_rank()} of {dist.get_world_size()} {value.item()} {launched}\n")
dist.destroy_process_group()
