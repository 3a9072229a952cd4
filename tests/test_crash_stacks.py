"""A process that crashes tells where, whatever its standard error is by then, and however many threads it has."""

from __future__ import annotations

import ctypes
import os
import signal
import threading

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from torchtrainer import FailureConfig, TorchTrainer, TrainingOperator, WorkerDiedError

THREADS = 150


def crash_by_null() -> None:
    ctypes.string_at(0)


def crash_by_abort() -> None:
    os.abort()


def crash_in_native_thread() -> None:
    libc = ctypes.CDLL(None)
    libc.pthread_create(ctypes.byref(ctypes.c_ulong()), None, ctypes.cast(libc.strlen, ctypes.c_void_p), None)
    threading.Event().wait()


def crash_in_python_thread() -> None:
    threading.Thread(target=crash_by_null).start()
    threading.Event().wait()


def among_threads(crash):
    for _ in range(THREADS):
        threading.Thread(target=threading.Event().wait, daemon=True).start()
    crash()


class Crashing(TrainingOperator):
    def train_batch(self, batch, batch_info):
        if self.world_rank == 1 and self.global_step == 1:
            if self.config["quiet"]:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 2)
                os.close(null)
            if self.config["threads"]:
                among_threads(self.config["crash"])
            self.config["crash"]()
        return super().train_batch(batch, batch_info)


class Data(Dataset):
    def __init__(self, config):
        self.config = config

    def __len__(self):
        return 24

    def __getitem__(self, index):
        if self.config.get("processes") and index == 13:
            if self.config["quiet"]:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            if self.config["threads"]:
                among_threads(self.config["crash"])
            self.config["crash"]()
        return torch.randn(4), torch.randn(2)


def model_creator(config):
    return nn.Linear(4, 2)


def data_creator(config):
    return DataLoader(Data(config), batch_size=4, num_workers=config.get("processes", 0))


def optimizer_creator(model, config):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def error_of(operator: type[TrainingOperator], **config) -> WorkerDiedError:
    trainer = TorchTrainer(
        model_creator=model_creator,
        data_creator=data_creator,
        optimizer_creator=optimizer_creator,
        loss_creator=nn.MSELoss,
        training_operator_cls=operator,
        config=config,
        failure=FailureConfig(max_failures=0),
        num_workers=2,
        run_dir=None,
    )
    with trainer, pytest.raises(WorkerDiedError) as raised:
        trainer.train()
    return raised.value


CRASHES = {
    "in a hook": ("SIGSEGV", crash_by_null, False, False, "in crash_by_null"),
    "in one of many threads, quietly": ("SIGSEGV", crash_by_null, True, True, "in crash_by_null"),
    "by abort": ("SIGABRT", crash_by_abort, True, False, "in crash_by_abort"),
    "in a python thread": ("SIGSEGV", crash_in_python_thread, True, True, "in crash_by_null"),
    "in a native thread": ("SIGSEGV", crash_in_native_thread, True, True, "in a native thread"),
}


@pytest.mark.parametrize(("name", "crash", "quiet", "threads", "where"), CRASHES.values(), ids=CRASHES)
@pytest.mark.parametrize("place", ["rank", "loader"])
def test_the_stack_of_the_thread_that_crashed_is_in_the_error(place, name, crash, quiet, threads, where) -> None:
    if place == "rank":
        error = error_of(Crashing, crash=crash, quiet=quiet, threads=threads)
        hook = "in train_batch"
    else:
        error = error_of(TrainingOperator, crash=crash, quiet=quiet, threads=threads, processes=1)
        hook = "in __getitem__"
    text = str(error)
    assert f"was killed by {name}" in text
    assert "It crashed here" in text
    assert where in text
    assert (hook in text) == ("thread" not in getattr(crash, "__name__", ""))
    assert text.count("most recent call first") <= 2, "only the stack of the thread that crashed"
    assert error.exit_code == -getattr(signal, name)
