"""The same through TorchTrainer, twice in one process. ``--prestart``: call prestart() before the script's own imports."""

import os
import sys
import time

import torchtrainer

if "--prestart" in sys.argv:
    torchtrainer.prestart()

import torch
from torch.utils.data import DataLoader, TensorDataset


def model_creator(config):
    return torch.nn.Linear(20, 5)


def data_creator(config):
    return DataLoader(TensorDataset(torch.randn(64, 20), torch.randint(0, 5, (64,))), batch_size=4)


def optimizer_creator(model, config):
    return torch.optim.SGD(model.parameters(), lr=0.1)


for since in (float(os.environ["T0"]), None):
    began = time.time() if since is None else since
    trainer = torchtrainer.TorchTrainer(
        model_creator=model_creator,
        data_creator=data_creator,
        optimizer_creator=optimizer_creator,
        loss_creator=torch.nn.CrossEntropyLoss,
        num_workers=2,
        run_dir=None,
    )
    trainer.train(num_steps=1)
    print("FIRST" if since else "SECOND", time.time() - began, flush=True)
    trainer.shutdown()
