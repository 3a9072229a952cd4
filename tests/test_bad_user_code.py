"""User code that fails while it trains: its own exception comes back, or an error that tells how the process ended."""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
import threading

import pytest
import torch
from failing import CREATORS, HANG_S, At, MyError, failure_of, samples, story, workers
from torch.utils.data import DataLoader, Dataset

from torchtrainer import (
    FailureConfig,
    InvalidArgumentTypeError,
    NotSerializableError,
    RemoteTraceback,
    TorchTrainer,
    TrainerClosedError,
    TrainingOperator,
    WorkerDiedError,
    WorkerError,
    WorkerHungError,
)

AT_37 = "in train(), phase train, at step 37"


def fails():
    raise MyError("mine")


class Unmakeable(Exception):
    def __init__(self, code, extra):
        super().__init__(f"code {code}")


class Unprintable(Exception):
    def __str__(self):
        raise ValueError("no text")


def at_37(expected, do, **arguments):
    return failure_of(expected, training_operator_cls=At, **{"config": {"do": do}, **arguments})


def test_an_exception_on_one_rank_in_step_37(tmp_path) -> None:
    error = at_37(MyError, fails, run_dir=tmp_path / "run")
    assert error.args == ("mine",)
    assert isinstance(error.__cause__, RemoteTraceback)
    text = str(error.__cause__)
    assert re.search(
        rf"raised on rank 1 \(pid \d+, .+\) {re.escape(AT_37)} \(37 optimizer steps were completed\):", text
    )
    assert ', in fails\n    raise MyError("mine")' in text
    log = tmp_path / "run" / "logs" / "rank_1"
    assert f"Log: {log / 'stderr.log'} (stdout.log and error.json are beside it)" in text
    assert "MyError: mine" in json.dumps(json.loads((log / "error.json").read_text()))


def test_equal_errors_on_all_ranks_are_told_once() -> None:
    error = at_37(MyError, None, config={"do": fails, "ranks": [0, 1]})
    text = str(error.__cause__)
    assert "raised on ranks 0, 1 (equal errors; pids " in text
    assert text.count("Traceback") == 1


def unmakeable():
    raise Unmakeable(3, "x")


def holds_a_lock():
    raise MyError(threading.Lock())


def unprintable():
    raise Unprintable


@pytest.mark.parametrize(
    ("do", "text"),
    [
        (unmakeable, "Unmakeable in user code: code 3"),
        (holds_a_lock, "MyError in user code: <unlocked _thread.lock"),
    ],
)
def test_an_exception_that_does_not_travel(do, text) -> None:
    error = at_37(WorkerError, do)
    assert text in str(error)
    assert f", in {do.__name__}\n" in str(error.__cause__)


def test_an_exception_whose_text_fails() -> None:
    error = at_37(Unprintable, unprintable)
    assert "Unprintable" in str(error.__cause__)
    assert ", in unprintable\n" in str(error.__cause__)


def long():
    raise MyError("é" * 100_000)


def strange():
    raise MyError("漢字 \ud800 \x00")


def test_long_and_strange_texts_arrive_whole_and_are_shown_cut() -> None:
    error = at_37(MyError, long)
    assert error.args == ("é" * 100_000,)
    assert len(str(error.__cause__)) < 20_000
    assert "more characters)" in str(error.__cause__)
    assert at_37(MyError, strange).args == ("漢字 \ud800 \x00",)


def says_bye():
    sys.exit("bye")


def leaves():
    sys.exit(3)


def goes():
    os._exit(7)


def is_killed():
    os.kill(os.getpid(), 9)


def crashes():
    ctypes.string_at(0)


@pytest.mark.parametrize(
    ("do", "code", "text"),
    [
        (leaves, 3, f"called sys.exit(3) {AT_37} (37 optimizer steps were completed)"),
        (says_bye, 1, "called sys.exit('bye')"),
        (goes, 7, f"exited with code 7 {AT_37} or later (37 optimizer steps were completed)"),
        (is_killed, -9, f"was killed by SIGKILL {AT_37} or later"),
        (crashes, -11, f"was killed by SIGSEGV {AT_37} or later"),
    ],
)
def test_a_process_that_ends_in_step_37(do, code, text, tmp_path) -> None:
    error = at_37(WorkerDiedError, do, run_dir=tmp_path / "run", failure=FailureConfig(max_failures=0))
    assert str(error).startswith("rank 1 (pid ")
    assert text in str(error)
    assert (error.rank, error.exit_code) == (1, code)
    assert "start again with a new TorchTrainer" in str(error)
    assert f"Log: {tmp_path / 'run' / 'logs' / 'rank_1' / 'stderr.log'}" in str(error)
    if do in (leaves, says_bye, crashes):
        assert f"in {do.__name__}" in str(error), "the stack shows the user's function"
    if do is crashes:
        assert "Fatal Python error: Segmentation fault" in str(error)
        assert "Extension modules" not in str(error)
    if do is is_killed:
        assert "out-of-memory killer; its peak was" in str(error)


def sleeps():
    threading.Event().wait()


def test_a_rank_that_hangs_in_step_37() -> None:
    error = at_37(WorkerHungError, sleeps, failure=FailureConfig(hang_timeout_s=HANG_S, max_failures=0))
    text = str(error)
    assert text.startswith("rank 1 (pid ")
    assert f"{AT_37} (37 optimizer steps were completed); all workers were stopped" in text
    assert f"The limit was {HANG_S} s: pass failure=FailureConfig(hang_timeout_s=...)" in text
    assert "in sleeps" in text
    assert error.rank == 1


class Broken(Dataset):
    """Sample 33, which is rank 1's, is broken."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        if index == 33:
            raise MyError("sample 33")
        return torch.randn(20), torch.tensor(1)


def bad_collate(batch):
    raise MyError("collate")


@pytest.mark.parametrize("loader_workers", [0, 1])
@pytest.mark.parametrize(
    ("dataset", "collate", "text"), [(Broken(), None, "sample 33"), (samples(64), bad_collate, "collate")]
)
def test_data_that_cannot_be_read(dataset, collate, text, loader_workers) -> None:
    error = failure_of(
        MyError,
        data_creator=lambda config: DataLoader(dataset, batch_size=4, num_workers=loader_workers, collate_fn=collate),
    )
    assert text in str(error)
    assert "in train(), phase data, at step " in str(error.__cause__)
    assert "in __getitem__" in story(error) if collate is None else "in bad_collate" in story(error)


class Vanishing(Broken):
    def __getitem__(self, index):
        os._exit(9)


def test_a_loader_worker_that_dies() -> None:
    error = failure_of(
        WorkerDiedError, data_creator=lambda config: DataLoader(Vanishing(), batch_size=4, num_workers=1)
    )
    assert "of the train loader exited with code 9, as 4 in a row did before a batch was read" in str(error)
    assert "max_failures=3" in str(error)


class InValidation(TrainingOperator):
    def validate(self, iterator, info):
        if self.world_rank == 1:
            fails()
        return super().validate(iterator, info)

    def train_epoch(self, iterator, info):
        return [1]


def test_an_exception_in_validate_leaves_the_trained_weights_within_reach() -> None:
    with TorchTrainer(**CREATORS, training_operator_cls=InValidation) as trainer:
        for _ in range(2):
            with pytest.raises(MyError) as caught:
                trainer.validate()
            assert "raised on rank 1 (pid " in story(caught.value)
            assert "in validate(), phase validate, at step 0" in story(caught.value)
        assert set(trainer.get_model().state_dict()) == {"weight", "bias"}


def test_a_train_epoch_that_returns_no_dict() -> None:
    error = failure_of(InvalidArgumentTypeError, training_operator_cls=InValidation)
    assert str(error) == "InValidation.train_epoch must return a dict of metrics, got list: [1]"


class NoDict(TrainingOperator):
    def train_batch(self, batch, batch_info):
        return 3


def test_a_train_batch_that_returns_no_dict() -> None:
    error = failure_of(InvalidArgumentTypeError, training_operator_cls=NoDict)
    assert str(error) == "NoDict.train_batch must return a dict of metrics, got int: 3"


def test_a_failed_trainer_takes_no_more_calls() -> None:
    trainer = TorchTrainer(**{**CREATORS, "training_operator_cls": At, "config": {"do": fails}})
    with pytest.raises(MyError):
        trainer.train()
    with pytest.raises(TrainerClosedError, match=r"ended after an earlier failure.*create a new TorchTrainer"):
        trainer.train()
    assert [(f.rank, f.cause) for f in trainer.status().failures] == [(1, "MyError in user code")]
    trainer.shutdown()


class Seen:
    def __init__(self):
        self.failures = []

    def on_failure(self, event):
        self.failures.append(event.cause)


def test_an_exception_that_leaves_the_trainer_usable_is_no_failure_of_the_run() -> None:
    seen = Seen()

    def raises(*_):
        raise MyError("mine")

    def scheduler_creator(optimizer, config):
        return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)

    creators = {**CREATORS, "scheduler_creator": scheduler_creator, "scheduler_step_freq": "manual"}
    with TorchTrainer(**creators, callbacks=[seen]) as trainer:
        for call, kind in (
            (lambda: trainer.update_scheduler("no metric"), ValueError),
            (lambda: trainer.apply_all_operators(raises), MyError),
            (lambda: trainer.apply_all_workers(raises), MyError),
        ):
            with pytest.raises(kind):
                call()
            assert trainer.status().failures == ()
        assert trainer.train(num_steps=1)["batch_count"] == 1
        assert "no failures" in repr(trainer.status())
    assert seen.failures == []


def on_rank_1(operator):
    if operator.world_rank == 1:
        fails()
    return operator.world_rank


def test_a_function_that_fails_leaves_the_trainer_usable() -> None:
    with TorchTrainer(**CREATORS) as trainer:
        with pytest.raises(MyError) as caught:
            trainer.apply_all_operators(on_rank_1)
        assert "raised on rank 1 (pid " in story(caught.value)
        assert "in apply_all_operators(), at step 0" in story(caught.value)
        with pytest.raises(NotSerializableError) as unsent:
            trainer.apply_all_workers(threading.Lock)
        assert "what the function of apply_all_workers returned, a lock, cannot be sent" in str(unsent.value)
        assert trainer.apply_all_operators(lambda operator: operator.world_rank) == [0, 1]
        assert trainer.train(num_steps=1)["batch_count"] == 1


def test_a_function_that_leaves_ends_the_trainer() -> None:
    error = failure_of(WorkerDiedError, lambda trainer: trainer.apply_all_workers(leaves))
    assert "called sys.exit(3) in apply_all_workers(), at step 0" in str(error)


class Refusing:
    def on_epoch_end(self, event):
        raise MyError("callback")


def test_a_callback_that_raises() -> None:
    before = workers()
    with (
        pytest.raises(MyError, match="callback"),
        TorchTrainer(**CREATORS, callbacks=[Refusing()]) as trainer,
    ):
        trainer.train()
    assert workers() == before
