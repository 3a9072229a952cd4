"""The same training through TorchTrainer. ``--precision bf16`` and ``--memory-format auto`` are handed on."""

import torchtrainer

torchtrainer.prestart()

import argparse

import torch
from torch.utils.data import DataLoader
from works import SEED, WORKERS, asked, run, tell_weights

parser = argparse.ArgumentParser()
parser.add_argument("--precision", default="fp32")
parser.add_argument("--memory-format")
options, _ = parser.parse_known_args()
work = asked()


def model_creator(config):
    return work.model()


def data_creator(config):
    loader = DataLoader(work.train_set(), batch_size=work.batch_size, shuffle=True)
    if work.validates:
        return loader, DataLoader(work.validation_set(), batch_size=work.batch_size)
    return loader


def optimizer_creator(model, config):
    return work.optimizer(model)


with torchtrainer.TorchTrainer(
    model_creator=model_creator,
    data_creator=data_creator,
    optimizer_creator=optimizer_creator,
    loss_creator=torch.nn.CrossEntropyLoss,
    num_workers=WORKERS,
    num_cpus_per_worker=1,
    seed=SEED,
    precision=options.precision,
    memory_format=options.memory_format,
    run_dir=None,
) as trainer:
    run(
        work,
        train=lambda _: trainer.train()["batch_count"],
        validate=lambda: trainer.validate()["val_accuracy"],
        barrier=lambda: None,
        says=True,
    )
    tell_weights(trainer.get_model())
