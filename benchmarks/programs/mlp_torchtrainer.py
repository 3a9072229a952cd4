"""The same training through TorchTrainer. ``--same-loader``: with the peer's own loader and sampler, as they are, so that only
supervision differs. Prints milliseconds per step."""

import sys
import time

import torch
from mlp import EPOCHS, WARM_UP, build, samples
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from torchtrainer import TorchTrainer

SAME_LOADER = "--same-loader" in sys.argv


def model_creator(config):
    return build()[0]


def data_creator(config):
    data = samples()
    return DataLoader(
        data, batch_size=32, sampler=DistributedSampler(data) if SAME_LOADER else None, shuffle=not SAME_LOADER
    )


def optimizer_creator(model, config):
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


with TorchTrainer(
    model_creator=model_creator,
    data_creator=data_creator,
    optimizer_creator=optimizer_creator,
    loss_creator=torch.nn.CrossEntropyLoss,
    num_workers=2,
    num_cpus_per_worker=1,
    add_dist_sampler=not SAME_LOADER,
    run_dir=None,
) as trainer:
    for _ in range(WARM_UP):
        trainer.train()
    began = time.perf_counter()
    steps = sum(trainer.train()["batch_count"] for _ in range(EPOCHS))
    print("MS_PER_STEP", (time.perf_counter() - began) / steps * 1e3, flush=True)
