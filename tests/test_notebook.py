"""Trainers in a real Jupyter kernel: classes from cells, cells that run again, interrupts, restarts and kills."""

from __future__ import annotations

import os
import queue
import secrets
import shutil
import signal
import tempfile
import time
from pathlib import Path

import pytest
from jupyter_client.manager import KernelManager
from programs import DEADLINE_S, GONE_S, MARK, marked_processes

pytestmark = [pytest.mark.slow, pytest.mark.kernel, pytest.mark.timeout(180)]


class Kernel:
    """A Jupyter kernel that runs cells, in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.mark = secrets.token_hex(8)
        self.temporary = Path(tempfile.mkdtemp(prefix="tt-"))
        self.manager = KernelManager(kernel_name="python3")
        environ = {k: v for k, v in os.environ.items() if k != "XDG_RUNTIME_DIR"}
        self.manager.start_kernel(cwd=str(directory), env={**environ, MARK: self.mark, "TMPDIR": str(self.temporary)})
        self.connect()

    def connect(self) -> None:
        """Talks to the kernel, which was just started."""
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=DEADLINE_S)

    def begin(self, cell: str, until: str) -> None:
        """Runs a cell, and returns when it has printed a text."""
        self.client.execute(cell)
        printed = ""
        while until not in printed:
            content = self.message()["content"]
            printed += content.get("text", "")
            assert "traceback" not in content, content

    def end(self) -> tuple[str, str | None]:
        """Waits for the end of a cell; what it printed, and the name of the exception that ended it."""
        printed, error = "", None
        while True:
            message = self.message()
            content = message["content"]
            printed += content.get("text", "")
            if message["msg_type"] == "error":
                error = content["ename"]
                self.traceback = "\n".join(content["traceback"])
            elif message["msg_type"] == "status" and content["execution_state"] == "idle":
                return printed, error

    def run(self, cell: str) -> str:
        """Runs a cell that must succeed; what it printed."""
        self.client.execute(cell)
        printed, error = self.end()
        assert error is None, self.traceback[-2000:]
        return printed

    def message(self) -> dict:
        try:
            return self.client.get_iopub_msg(timeout=DEADLINE_S)
        except queue.Empty:
            raise AssertionError(f"the kernel said nothing for {DEADLINE_S} s") from None

    def interrupt(self) -> None:
        self.manager.interrupt_kernel()

    def close(self) -> None:
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        shutil.rmtree(self.temporary, ignore_errors=True)


@pytest.fixture
def kernel(tmp_path):
    kernel = Kernel(tmp_path)
    yield kernel
    kernel.close()


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    kernel = Kernel(tmp_path_factory.mktemp("used"))
    yield kernel
    kernel.close()


@pytest.fixture
def used_kernel(used):
    """A kernel in which other tests have been before, whose trainers are shut down: no cell depends on what they did."""
    yield used
    used.run("'trainer' in globals() and trainer.shutdown()")


def wait_until_left(kernel: Kernel, processes: int) -> None:
    """Fails unless so many processes of the kernel, itself included, are left after the time that they are given."""
    deadline = time.monotonic() + GONE_S
    while len(left := marked_processes(kernel.mark)) > processes and time.monotonic() < deadline:
        os.sched_yield()
    assert len(left) == processes, left


DEFINITIONS = """
import hashlib, os, time, torch
from torch.utils.data import DataLoader, TensorDataset
from torchtrainer import TorchTrainer, TrainingOperator

N = 403
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(20, 5)
    def forward(self, x):
        return self.linear(x)

class Operator(TrainingOperator):
    def setup(self, config):
        g = torch.Generator().manual_seed(0)
        data = TensorDataset(torch.randn(N, 20, generator=g), torch.arange(N), torch.randint(0, 5, (N,), generator=g))
        model = Net()
        self.model, self.optimizer, self.criterion = self.register(
            models=model, optimizers=torch.optim.SGD(model.parameters(), lr=0.1), criterion=torch.nn.CrossEntropyLoss())
        self.register_data(train_loader=DataLoader(data, batch_size=4, shuffle=True))
        self.seen, self.slow = [], False
    def train_batch(self, batch, batch_info):
        x, numbers, y = batch
        if self.slow:
            time.sleep(0.05)
        stats = super().train_batch((x, y), batch_info)
        self.seen += numbers.tolist()
        if self.world_rank == 0 and batch_info["batch_idx"] == 2:
            print("this is rank 0")
        return stats

def digest(trainer):
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in trainer.get_model().state_dict().values())).hexdigest()
def pids():
    return trainer.apply_all_workers(os.getpid)
"""
MAKE = "trainer = TorchTrainer(training_operator_cls=Operator, num_workers=2)"
KERNEL_HOST_SPAWNER = 3


def test_a_cell_that_makes_a_trainer_runs_again(kernel, tmp_path) -> None:
    kernel.run(DEFINITIONS)
    for width in range(3):
        kernel.run(DEFINITIONS.replace("20, 5)", f"20, 5, bias={width % 2 == 0})"))
        kernel.run(MAKE)
        assert kernel.run("print(trainer.train()['num_samples'])").endswith("403\n")
        wait_until_left(kernel, KERNEL_HOST_SPAWNER + 2)
    kernel.run("trainer.shutdown()")
    wait_until_left(kernel, KERNEL_HOST_SPAWNER)
    assert len(list((tmp_path / "runs" / "notebook").iterdir())) == 3


def test_an_interrupted_cell_leaves_workers_and_kernel_usable(used_kernel) -> None:
    used_kernel.run(DEFINITIONS)
    used_kernel.run(MAKE + "\nbefore = pids()")
    for number in range(1, 4):
        used_kernel.run("trainer.apply_all_operators(lambda operator: operator.__dict__.update(slow=True, seen=[]))")
        used_kernel.begin("trainer.train()", until="this is rank 0")
        used_kernel.interrupt()
        assert used_kernel.end()[1] == "KeyboardInterrupt"
        assert used_kernel.run("print(pids() == before)") == "True\n"
        used_kernel.run("trainer.apply_all_operators(lambda operator: operator.__dict__.update(slow=False))")
        assert used_kernel.run("print(trainer.train()['epoch'])").endswith(f"{number}\n")
        seen = "sorted(sum(trainer.apply_all_operators(lambda operator: operator.seen), []))"
        assert used_kernel.run(f"print({seen} == list(range(N)))") == "True\n"


def test_after_an_interrupt_a_new_trainer_takes_the_place_of_the_old_one(used_kernel) -> None:
    used_kernel.run(DEFINITIONS)
    for _ in range(3):
        used_kernel.run(MAKE)
        wait_until_left(used_kernel, KERNEL_HOST_SPAWNER + 2)
        used_kernel.run("trainer.apply_all_operators(lambda operator: operator.__dict__.update(slow=True))")
        used_kernel.begin("for epoch in range(100):\n    trainer.train()", until="this is rank 0")
        used_kernel.interrupt()
        assert used_kernel.end()[1] == "KeyboardInterrupt"


def test_an_interrupt_while_workers_are_built_leaves_none(used_kernel) -> None:
    used_kernel.run(DEFINITIONS)
    used_kernel.run("""
class Stuck(Operator):
    def setup(self, config):
        print("building")
        time.sleep(600)
""")
    used_kernel.begin(MAKE.replace("=Operator", "=Stuck"), until="building")
    used_kernel.interrupt()
    assert used_kernel.end()[1] == "KeyboardInterrupt"
    wait_until_left(used_kernel, KERNEL_HOST_SPAWNER)
    used_kernel.run(MAKE)
    assert used_kernel.run("print(trainer.train()['num_samples'])").endswith("403\n")


def test_an_error_in_a_cell_is_the_users_own(used_kernel) -> None:
    used_kernel.run(DEFINITIONS)
    used_kernel.run("""
class Wrong(Operator):
    def train_batch(self, batch, batch_info):
        raise ValueError("from a cell")
""")
    used_kernel.run(MAKE.replace("=Operator", "=Wrong"))
    used_kernel.client.execute("trainer.train()")
    assert used_kernel.end()[1] == "ValueError"
    assert "from a cell" in used_kernel.traceback
    assert "in train_batch" in used_kernel.traceback, "the line of the user's code"
    used_kernel.run(MAKE)
    assert used_kernel.run("print(trainer.train()['num_samples'])").endswith("403\n")


@pytest.mark.parametrize(
    ("how", "when"),
    [
        ("restart", "in a pass"),
        pytest.param("hard restart", "idle", marks=pytest.mark.soak),
        pytest.param("kill", "in a pass", marks=pytest.mark.soak),
        pytest.param("kill", "idle", marks=pytest.mark.soak),
    ],
)
def test_a_kernel_that_ends_takes_everything_with_it(kernel, how, when) -> None:
    kernel.run(DEFINITIONS)
    kernel.run(MAKE)
    if when == "in a pass":
        kernel.run("trainer.apply_all_operators(lambda operator: operator.__dict__.update(slow=True))")
        kernel.begin("for epoch in range(100):\n    trainer.train()", until="this is rank 0")
    if how == "kill":
        (pid,) = [int(line.split()[0]) for line in marked_processes(kernel.mark) if "ipykernel" in line]
        os.kill(pid, signal.SIGKILL)
        wait_until_left(kernel, 0)
    else:
        kernel.client.stop_channels()
        kernel.manager.restart_kernel(now=how == "hard restart")
        wait_until_left(kernel, 1)
        kernel.connect()
        kernel.run(DEFINITIONS + MAKE)
        assert kernel.run("print(trainer.train()['num_samples'])").endswith("403\n")
        kernel.manager.shutdown_kernel(now=False)
        wait_until_left(kernel, 0)
    left = [entry.name for entry in kernel.temporary.iterdir() if entry.name.startswith("torchtrainer")]
    assert left == []


def test_output_of_rank_0_and_the_progress_bar_come_to_the_cell(used_kernel) -> None:
    used_kernel.run(DEFINITIONS)
    printed = used_kernel.run(MAKE.replace(")", ", use_tqdm=True)") + "\nresult = trainer.train()")
    assert printed.count("[rank 0] this is rank 0\n") == 1
    assert "train epoch 1" in printed
    assert "51/51" in printed
    assert "Warning" not in printed.replace("TqdmWarning: IProgress not found", ""), printed


BUSY = """
import threading, torch, numpy
torch.set_num_threads(2)
stop = threading.Event()
def work():
    x = torch.randn(200, 200)
    while not stop.is_set():
        x = torch.nn.functional.normalize(x @ x)
threads = [threading.Thread(target=work, daemon=True) for _ in range(2)]
for thread in threads:
    thread.start()
m = torch.nn.Linear(200, 200)
m(torch.randn(500, 200)).sum().backward()  # autograd's threads and the OpenMP pool are there
numpy.random.rand(300, 300) @ numpy.random.rand(300, 300)
loader = torch.utils.data.DataLoader(torch.arange(10), num_workers=1, persistent_workers=True)
print(len(list(loader)), torch.get_num_threads())
"""


@pytest.mark.soak
def test_a_kernel_that_used_torch_before_trains_the_same(kernel) -> None:
    kernel.run(DEFINITIONS)
    kernel.run(MAKE)
    kernel.run("trainer.train()\nexpected = digest(trainer)\ntrainer.shutdown()")
    assert kernel.run(BUSY) == "10 2\n"
    kernel.run(MAKE)
    assert kernel.run("result = trainer.train(); print(digest(trainer) == expected)").endswith("True\n")
    assert kernel.run("print(torch.get_num_threads(), all(thread.is_alive() for thread in threads))") == "2 True\n"
    kernel.run("stop.set()")
