"""The Lightning Trainer, without what would cost it time: no logger, progress bar, checkpoints or sanity check."""

import logging
import time
import warnings

import lightning
import torch
from torch.utils.data import DataLoader
from works import WORKERS, asked, tell_accuracy, tell_pace, tell_weights

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
work = asked()
torch.set_num_threads(1)


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = work.model()
        self.loss_function = torch.nn.CrossEntropyLoss()

    def training_step(self, batch, index):
        x, y = batch
        return self.loss_function(self.model(x), y)

    def validation_step(self, batch, index):
        x, y = batch
        right = (self.model(x).argmax(1) == y).float().mean()
        self.log("accuracy", right, sync_dist=True, on_epoch=True, batch_size=len(y))

    def configure_optimizers(self):
        return work.optimizer(self.model)

    def on_train_epoch_start(self):
        if self.current_epoch == work.warm_up:
            self.trainer.strategy.barrier()
            self.began, self.steps = time.perf_counter(), self.global_step

    def on_train_epoch_end(self):
        if work.validates and self.global_rank == 0:
            tell_accuracy(float(self.trainer.callback_metrics["accuracy"]))
        if self.current_epoch == work.warm_up + work.epochs - 1:
            self.trainer.strategy.barrier()
            if self.global_rank == 0:
                tell_pace(work, self.global_step - self.steps, time.perf_counter() - self.began)


module = Module()
loaders = [DataLoader(work.train_set(), batch_size=work.batch_size, shuffle=True)]
if work.validates:
    loaders.append(DataLoader(work.validation_set(), batch_size=work.batch_size))
trainer = lightning.Trainer(
    accelerator="cpu",
    devices=WORKERS,
    strategy="ddp",
    max_epochs=work.warm_up + work.epochs,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    num_sanity_val_steps=0,
)
trainer.fit(module, *loaders)
if trainer.is_global_zero:
    tell_weights(module.model)
