"""The same training through TorchTrainer. ``--same-loop``: the peer's own loop and loader, inside our worker processes, so that
only supervision differs. Prints milliseconds per step."""

import sys
import time

import torch
from mlp import EPOCHS, WARM_UP, build, samples
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from torchtrainer import TorchTrainer, TrainingOperator


class SameLoop(TrainingOperator):
    """The loop of ``mlp_by_hand.py``, word for word, in ``train_epoch``."""

    def setup(self, config):
        model, optimizer, self.loss_function = build()
        self.model, self.optimizer = self.register(models=model, optimizers=optimizer)
        data = samples()
        self.sampler = DistributedSampler(data)
        self.loader = DataLoader(data, batch_size=32, sampler=self.sampler)
        self.epoch = 0

    def train_epoch(self, iterator, info):
        self.sampler.set_epoch(self.epoch)
        self.epoch += 1
        steps, total = 0, 0.0
        for x, y in self.loader:
            loss = self.loss_function(self.model(x), y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.item()
            steps += 1
        return {"batch_count": steps}


def model_creator(config):
    return build()[0]


def data_creator(config):
    return DataLoader(samples(), batch_size=32, shuffle=True)


def optimizer_creator(model, config):
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


BUILT_IN = {
    "model_creator": model_creator,
    "data_creator": data_creator,
    "optimizer_creator": optimizer_creator,
    "loss_creator": torch.nn.CrossEntropyLoss,
}
what = {"training_operator_cls": SameLoop} if "--same-loop" in sys.argv else BUILT_IN
with TorchTrainer(**what, num_workers=2, num_cpus_per_worker=1, run_dir=None) as trainer:
    for _ in range(WARM_UP):
        trainer.train()
    began = time.perf_counter()
    steps = sum(trainer.train()["batch_count"] for _ in range(EPOCHS))
    print("MS_PER_STEP", (time.perf_counter() - began) / steps * 1e3, flush=True)
