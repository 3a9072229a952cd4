"""What users and systems do at awkward moments, each found by trying: callbacks, threads, forks, kills, odd directories."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
from failing import CREATORS as CREATORS_HERE
from programs import CREATORS, run_program, start_program

from torchtrainer import (
    FailureConfig,
    TorchTrainer,
    TrainerBusyError,
    TrainerClosedError,
    TrainingOperator,
    WorkerDiedError,
)

DEADLINE_S = 30.0


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_worker_killed_between_calls_is_an_error_of_the_next_call() -> None:
    with TorchTrainer(**CREATORS_HERE, failure=FailureConfig(max_failures=0)) as trainer:
        pid = trainer.apply_all_workers(os.getpid)[1]
        os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + DEADLINE_S
        while alive(pid) and time.monotonic() < deadline:
            os.sched_yield()
        with pytest.raises(WorkerDiedError, match="was killed by SIGKILL") as caught:
            trainer.train()
        assert (caught.value.rank, caught.value.exit_code) == (1, -signal.SIGKILL)
        with pytest.raises(TrainerClosedError, match="killed by SIGKILL"):
            trainer.train()


class Endless(TrainingOperator):
    def train_epoch(self, iterator, info):
        for _ in iterator:
            pass
        return {}


def forever(config):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield torch.randn(20), torch.tensor(1)

    return torch.utils.data.DataLoader(Stream(), batch_size=4)


ENDLESS = {**CREATORS_HERE, "data_creator": forever, "training_operator_cls": Endless}


class CallsBack:
    """Does something with the trainer at the first step that it sees."""

    def __init__(self, do):
        self.do, self.trainer = do, None

    def on_step(self, event):
        do, self.do = self.do, lambda trainer: None
        do(self.trainer)


def test_a_callback_that_calls_the_trainer_is_told_why_it_cannot() -> None:
    callback = CallsBack(lambda trainer: trainer.state_dict())
    with TorchTrainer(**ENDLESS, callbacks=[callback]) as trainer:
        callback.trainer = trainer
        with pytest.raises(TrainerBusyError, match=r"state_dict\(\) was called while train\(\) is running"):
            trainer.train()
        assert len(trainer.apply_all_workers(os.getpid)) == 2, "the pass was ended, the workers live"


def test_a_callback_can_shut_the_trainer_down() -> None:
    callback = CallsBack(lambda trainer: trainer.shutdown())
    trainer = TorchTrainer(**ENDLESS, callbacks=[callback])
    callback.trainer = trainer
    with pytest.raises(TrainerClosedError):
        trainer.train()


def test_a_callback_that_raises_ends_the_pass_and_keeps_the_workers() -> None:
    def fail(trainer):
        raise LookupError("mine")

    with TorchTrainer(**ENDLESS, callbacks=[CallsBack(fail)]) as trainer:
        with pytest.raises(LookupError, match="mine"):
            trainer.train()
        assert len(trainer.apply_all_workers(os.getpid)) == 2


def test_the_status_can_be_watched_from_another_thread() -> None:
    seen, errors = [], []
    done = threading.Event()

    def watch(trainer):
        while not done.is_set():
            try:
                seen.append(len(trainer.status().processes))
            except Exception as error:
                errors.append(error)

    with TorchTrainer(**CREATORS_HERE) as trainer:
        handler = signal.getsignal(signal.SIGINT)
        watcher = threading.Thread(target=watch, args=(trainer,))
        watcher.start()
        for _ in range(3):
            assert trainer.train()["num_samples"]
        done.set()
        watcher.join(DEADLINE_S)
        assert signal.getsignal(signal.SIGINT) is handler
    assert not errors
    assert set(seen) == {2}


class OddLoss(TrainingOperator):
    def train_batch(self, batch, batch_info):
        return {**super().train_batch(batch, batch_info), "loss": self.config["loss"]}


@pytest.mark.parametrize("loss", [torch.ones(2), "high", None])
def test_a_loss_that_is_no_number_does_not_silence_a_worker(loss) -> None:
    with TorchTrainer(**CREATORS_HERE, training_operator_cls=OddLoss, config={"loss": loss}) as trainer:
        for _ in range(2):
            assert trainer.train()["num_samples"]


def test_nothing_is_kept_of_a_run_that_keeps_nothing_even_when_the_driver_is_killed(tmp_path) -> None:
    program = start_program(
        tmp_path,
        CREATORS
        + """
trainer = TorchTrainer(run_dir=None, **CREATORS)
trainer.train()
print("trained")
import signal
signal.pause()
""",
    )
    program.wait_for("trained")
    program.process.kill()
    program.finish()
    program.assert_nothing_left()
    assert not (tmp_path / "runs").exists()


def test_a_file_in_the_current_directory_is_not_taken_for_a_module(tmp_path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "queue.py").write_text("raise SystemExit('the wrong queue')\n")
    program = run_program(
        tmp_path,
        f"import os\nos.chdir({str(elsewhere)!r})\n" + CREATORS + "print(TorchTrainer(**CREATORS).train())\n",
        whole=True,
    )
    assert program.process.returncode == 0, program.errors
    assert "num_samples" in program.output
    program.assert_nothing_left()


def test_ctrl_c_while_workers_start_leaves_nothing(tmp_path) -> None:
    program = start_program(
        tmp_path,
        CREATORS
        + """
def model_creator(config):
    print("creating", flush=True)
    time.sleep(1000)
CREATORS["model_creator"] = model_creator
trainer = TorchTrainer(run_dir=None, **CREATORS)
""",
    )
    program.wait_for("creating")
    program.process.send_signal(signal.SIGINT)
    assert program.finish() == -signal.SIGINT
    program.assert_nothing_left()


FORK = """
trainer = TorchTrainer(run_dir=None, **CREATORS)
trainer.train(num_steps=1)
pid = os.fork()
if pid == 0:
    try:
        trainer.train()
    except RuntimeError as error:
        print(type(error).__name__, error, flush=True)
    sys.exit(0)
os.waitpid(pid, 0)
print("parent", trainer.train()["num_samples"], flush=True)
"""


def test_a_forked_copy_of_the_driver_neither_uses_nor_ends_the_workers(tmp_path) -> None:
    program = run_program(tmp_path, CREATORS + FORK)
    assert "TrainerClosedError" in program.output
    assert "forked copy" in program.output
    assert "parent 56" in program.output, program.output + program.errors
    program.assert_nothing_left()


def test_output_that_this_terminal_cannot_show_is_shown_as_it_can(tmp_path) -> None:
    program = run_program(
        tmp_path,
        CREATORS + "TorchTrainer(**CREATORS).apply_all_workers(lambda: print('\\u2713 done'))\n",
        PYTHONIOENCODING="ascii",
    )
    assert "\\u2713 done" in program.output, program.errors


@pytest.mark.soak
def test_a_flood_of_output_arrives_whole(tmp_path) -> None:
    lines = 200_000
    program = run_program(
        tmp_path,
        CREATORS
        + f"""
def flood():
    for number in range({lines}):
        print("line", number)
TorchTrainer(**CREATORS).apply_all_workers(flood)
""",
    )
    shown = program.output.splitlines()
    assert len(shown) == lines
    assert shown[-1] == f"[rank 0] line {lines - 1}"


def test_a_signal_mask_of_the_driver_does_not_hide_deaths(tmp_path) -> None:
    program = run_program(
        tmp_path,
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])\n"
        + CREATORS
        + "TorchTrainer(**CREATORS).apply_all_workers(lambda: os._exit(5))\n",
        whole=True,  # the host inherits the mask
    )
    assert program.process.returncode == 1
    assert "exited with code 5" in program.errors
    program.assert_nothing_left()
