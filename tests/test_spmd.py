"""One script, whoever starts its processes: torchrun, a shell, srun or mpirun."""

from __future__ import annotations

import secrets
import shutil
import socket
import sys
from pathlib import Path

import pytest
from programs import CREATORS, Program, run_program, start_program

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LAUNCHERS = ["torchrun", "by hand", "srun", "mpirun"]
TWO_WAYS = pytest.mark.parametrize("launcher", [pytest.param("torchrun", marks=pytest.mark.soak), "by hand"])


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def variables(launcher: str, rank: int, job: str) -> dict[str, str]:
    """What a launcher of two processes on one machine tells one of them."""
    if launcher == "by hand":
        return {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": job,
        }
    if launcher == "srun":
        return {
            "SLURM_JOB_ID": job,
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank),
            "SLURM_NODEID": "0",
            "SLURM_STEP_NODELIST": "node07",
            "SLURM_STEP_TASKS_PER_NODE": "2",
        }
    return {
        "PMIX_NAMESPACE": job,
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    }


def launch(launcher: str, tmp_path, text: str) -> list[Program]:
    """Runs a script on two ranks to its end; a program per process that was started here."""
    if launcher == "torchrun":
        programs = [start_program(tmp_path, text, python=TORCHRUN)]
    else:
        job = free_port() if launcher == "by hand" else secrets.token_hex(8)
        programs = [start_program(tmp_path, text, **variables(launcher, rank, job)) for rank in (0, 1)]
    for program in programs:
        program.finish()
    return programs


def assert_nothing_left(programs: list[Program]) -> None:
    """As ``Program.assert_nothing_left``, but for the logs that torchrun leaves of itself."""
    for program in programs:
        for logs in program.temporary.glob("torchelastic_*"):
            shutil.rmtree(logs)
        program.assert_nothing_left()


def output_of(launcher: str, tmp_path, text: str) -> str:
    """What a script prints that must come to a good end and leave nothing."""
    programs = launch(launcher, tmp_path, text)
    everything = "".join(program.output + program.errors for program in programs)
    assert all(program.ended_well() for program in programs), everything
    assert_nothing_left(programs)
    return "".join(program.output for program in programs)


SCRIPT = (
    CREATORS
    + """
import hashlib

def data_creator(config):  # 61 and 21 samples: neither is a multiple of anything
    return DataLoader(dataset(61, 0), batch_size=4, shuffle=True), DataLoader(dataset(21, 1), batch_size=4)

def digest(model):
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.state_dict().values())).hexdigest()

def exact(model):
    x, y = dataset(21, 1).tensors
    with torch.no_grad():
        return torch.nn.functional.cross_entropy(model(x), y).item()

CREATORS["data_creator"] = data_creator
trainer = TorchTrainer(**CREATORS)
print("train", trainer.train(num_steps=3), trainer.train(), digest(trainer.get_model()))
found = trainer.validate()
print("validate", found, abs(found["val_loss"] - exact(trainer.get_model())) < 1e-6)
status = trainer.status()
pids = trainer.apply_all_workers(os.getpid)
seen = [(p.ranks, p.step, p.machine == os.uname().nodename, p.device) for p in status.processes]
print("status", status.step, status.epoch, [p.pid for p in status.processes] == pids, seen)
print("workers", len(set(trainer.apply_all_workers(os.getpid))))
print("operators", trainer.apply_all_operators(lambda operator: [operator.world_rank, operator.world_size]))
trainer.save("saved.pt")
print("fit", trainer.fit(2, validate_every=2))
trainer.load("saved.pt")
print("load", digest(trainer.get_model()), trainer.train())
trainer.shutdown()
try:
    trainer.train()
except RuntimeError as error:
    if os.environ.get("RANK", "0") == "0":  # the others print again, too
        print("shut down:", error)
"""
)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[str]:
    """What the script prints when it starts two workers itself."""
    program = run_program(tmp_path_factory.mktemp("alone"), SCRIPT)
    assert program.process.returncode == 0, program.errors
    return [line for line in program.output.splitlines() if not line.startswith("status")]


@pytest.mark.parametrize(
    "launcher", [LAUNCHERS[0], *(pytest.param(one, marks=pytest.mark.soak) for one in LAUNCHERS[1:])]
)
def test_the_same_script_is_the_same_run_to_the_last_bit(tmp_path, alone, launcher) -> None:
    lines = output_of(launcher, tmp_path, SCRIPT).splitlines()
    status = [line for line in lines if line.startswith("status")]
    ranks = [((0,), 8, True, "cpu"), ((1,), 8, True, "cpu")]
    assert status == [f"status 8 1 True {ranks}"], "61 samples on 2 ranks in batches of 4 are 8 steps"
    assert [line for line in lines if not line.startswith("status")] == alone
    (run,) = (tmp_path / "runs" / "program").iterdir()
    assert lines[-1].startswith("shut down:")
    assert (run / "logs" / "rank_1" / "stdout.log").read_text().splitlines() == lines[:-1], (
        "ranks agree on every result"
    )
    assert len((run / "history.jsonl").read_text().splitlines()) == 7
    here = {entry.name for entry in tmp_path.iterdir()}
    assert here == {"program.py", "runs", "saved.pt"}


@TWO_WAYS
def test_every_rank_prints_again_when_its_trainer_is_shut_down(tmp_path, launcher) -> None:
    text = output_of(
        launcher,
        tmp_path,
        CREATORS
        + """
before = sys.stdout
for number in range(2):
    trainer = TorchTrainer(**CREATORS)
    sys.stdout.write(f"during {number}\\n")
    for _ in range(2):
        trainer.shutdown()
    assert sys.stdout is before
    sys.stdout.write(f"after {number}\\n")
with TorchTrainer(**CREATORS):
    sys.stdout = sys.stderr
assert sys.stdout is sys.stderr, "what the script puts there stays"
""",
    )
    assert sorted(text.splitlines()) == ["after 0", "after 0", "after 1", "after 1", "during 0", "during 1"]


@TWO_WAYS
@pytest.mark.soak
def test_ranks_meet_again_for_a_second_trainer(tmp_path, launcher) -> None:
    text = output_of(
        launcher,
        tmp_path,
        CREATORS
        + """
for number in range(4):
    with TorchTrainer(**CREATORS) as trainer:
        print(number, trainer.train()["num_samples"], trainer.apply_all_operators(lambda operator: operator.world_rank))
""",
    )
    assert text.splitlines() == [f"{number} 64 [0, 1]" for number in range(4)]
    runs = list((tmp_path / "runs" / "program").iterdir())
    assert len(runs) == 4
    assert all((run / "logs" / "rank_1" / "stdout.log").exists() for run in runs)


def test_a_group_of_the_script_is_used_and_left_alone(tmp_path) -> None:
    text = output_of(
        "torchrun",
        tmp_path,
        CREATORS
        + """
import torch.distributed as dist
dist.init_process_group("gloo")
for _ in range(2):
    with TorchTrainer(**CREATORS) as trainer:
        print(trainer.train()["num_samples"])
total = torch.ones(1)
dist.all_reduce(total)
sys.stdout.write(f"still there {total.item()}\\n")  # whole: both write into one pipe
dist.destroy_process_group()
""",
    )
    assert sorted(text.split()) == sorted(["64", "64", *["still", "there", "2.0"] * 2]), "both print afterwards"


@TWO_WAYS
@pytest.mark.soak
def test_a_script_can_form_a_group_of_its_own_afterwards(tmp_path, launcher) -> None:
    text = output_of(
        launcher,
        tmp_path,
        CREATORS
        + """
import torch.distributed as dist
with TorchTrainer(**CREATORS) as trainer:
    trainer.train(num_steps=1)
assert not dist.is_initialized()
assert "GLOO_SOCKET_IFNAME" not in os.environ
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
print("mine", total.item())
dist.destroy_process_group()
with TorchTrainer(**CREATORS) as trainer:
    print("again", trainer.train()["num_samples"])
""",
    )
    assert text.split("\n") == ["mine 2.0", "again 64", ""]


LISTENING = """
def listening():
    mine = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}
    found = []
    for name in ("tcp", "tcp6"):
        for line in open(f"/proc/net/{name}").readlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in mine:
                found.append(fields[1].split(":")[0])
    return found
"""


@TWO_WAYS
def test_nothing_listens_outside_loopback(tmp_path, launcher) -> None:
    text = output_of(
        launcher,
        tmp_path,
        CREATORS
        + LISTENING
        + """
trainer = TorchTrainer(**CREATORS)
trainer.train(num_steps=2)
print("listening", sorted({address for found in trainer.apply_all_workers(listening) for address in found}))
""",
    )
    assert text == "listening ['0100007F']\n", "127.0.0.1, the other way round"


FAILURES = {
    "batch": "TorchTrainer(training_operator_cls=Fails, **CREATORS).train()",
    "batch, caught by with": """
with TorchTrainer(training_operator_cls=Fails, **CREATORS) as trainer:
    trainer.train()
""",
    "setup": "TorchTrainer(training_operator_cls=FailsInSetup, **CREATORS)",
}


@TWO_WAYS
@pytest.mark.parametrize(
    "where", ["batch, caught by with", *(pytest.param(one, marks=pytest.mark.soak) for one in ("batch", "setup"))]
)
def test_an_error_on_one_rank_ends_the_run_and_is_shown(tmp_path, launcher, where) -> None:
    programs = launch(
        launcher,
        tmp_path,
        CREATORS
        + """
class Fails(TrainingOperator):
    def train_batch(self, batch, batch_info):
        if self.world_rank == 1 and batch_info["batch_idx"] == 2:
            raise ValueError("what rank 1 alone has")
        return super().train_batch(batch, batch_info)

class FailsInSetup(TrainingOperator):
    def setup(self, config):
        if self.world_rank == 1:
            raise ValueError("what rank 1 alone has")
        super().setup(config)
"""
        + FAILURES[where],
    )
    assert all(program.process.returncode != 0 for program in programs)
    errors = programs[-1].errors
    assert "ValueError: what rank 1 alone has" in errors, errors
    assert_nothing_left(programs)


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", pytest.param("os._exit(0)", marks=pytest.mark.soak)])
def test_a_rank_that_ended_and_that_nobody_reaps_is_not_waited_for(tmp_path, end) -> None:
    job = free_port()
    text = (
        CREATORS
        + f"""
class Ends(TrainingOperator):
    def train_batch(self, batch, batch_info):
        if self.world_rank == 1 and batch_info["batch_idx"] == 2:
            {end}
        return super().train_batch(batch, batch_info)

TorchTrainer(training_operator_cls=Ends, **CREATORS).train()
"""
    )
    waits, ends = (start_program(tmp_path, text, whole=True, **variables("by hand", rank, job)) for rank in (0, 1))
    waits.finish()
    assert Path(f"/proc/{ends.process.pid}/stat").read_text().split()[2] == "Z", "it was to be there until now"
    assert waits.process.returncode == 1
    assert f"rank 1 (pid {ends.process.pid}) is gone" in waits.errors, waits.errors
    ends.finish()
    assert_nothing_left([waits, ends])


@pytest.mark.soak
def test_an_error_on_every_rank_can_be_caught_and_the_next_trainer_works(tmp_path) -> None:
    text = output_of(
        "by hand",
        tmp_path,
        CREATORS
        + """
def broken(config):
    raise ValueError("no data")
for creator in (broken, data_creator):
    try:
        print(TorchTrainer(**{**CREATORS, "data_creator": creator}).train()["num_samples"])
    except ValueError as error:
        print("caught", error)
""",
    )
    assert text == "caught no data\n64\n"


def test_a_run_directory_that_rank_0_cannot_use_is_an_error_on_all_ranks(tmp_path) -> None:
    programs = launch("by hand", tmp_path, CREATORS + "TorchTrainer(run_dir=__file__, **CREATORS)")
    for program in programs:
        assert program.process.returncode == 1
        assert "RunDirectoryError" in program.errors
        assert "program.py cannot be used" in program.errors
        program.assert_nothing_left()


@TWO_WAYS
@pytest.mark.soak
def test_run_dir_none_writes_nothing_anywhere(tmp_path, launcher) -> None:
    text = output_of(
        launcher,
        tmp_path,
        CREATORS
        + """
trainer = TorchTrainer(run_dir=None, **CREATORS)
print(trainer.train()["num_samples"], trainer.status().run_dir, os.listdir(os.environ["TMPDIR"]))
""",
    )
    assert text.startswith("64 None ")
    assert "torchtrainer" not in text
    assert {entry.name for entry in tmp_path.iterdir()} == {"program.py"}


def test_a_number_of_threads_that_the_script_sets_stays(tmp_path) -> None:
    text = output_of(
        "by hand",
        tmp_path,
        CREATORS
        + """
with TorchTrainer(**CREATORS) as trainer:
    torch.set_num_threads(3)
    trainer.train()
    print(trainer.apply_all_workers(torch.get_num_threads))
""",
    )
    assert text == "[3, 3]\n"


@pytest.mark.soak
def test_callbacks_and_the_progress_bar_are_rank_0s(tmp_path) -> None:
    (program,) = launch(
        "torchrun",
        tmp_path,
        CREATORS
        + """
class Tell:
    def on_step(self, event):
        print("step", event.step, file=sys.stderr)
    def on_epoch_end(self, event):
        print("epoch", event.epoch, file=sys.stderr)
        print("processes", [p.ranks for p in trainer.status().processes], file=sys.stderr)  # on rank 0 alone
with TorchTrainer(use_tqdm=True, callbacks=[Tell()], **CREATORS) as trainer:
    trainer.train()
""",
    )
    assert program.ended_well(), program.errors
    assert program.errors.count("epoch 1\n") == 1
    assert program.errors.count("step 8\n") == 1
    assert program.errors.count("processes [(0,), (1,)]\n") == 1
    assert "train epoch 1" in program.errors
    assert "8/8" in program.errors


@pytest.mark.soak
def test_prestart_leaves_the_launchers_processes_alone(tmp_path) -> None:
    text = output_of(
        "by hand",
        tmp_path,
        "import torchtrainer\ntorchtrainer.prestart()\n"
        + CREATORS
        + """
from pathlib import Path
with TorchTrainer(**CREATORS) as trainer:
    print(trainer.train()["num_samples"], Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())
""",
    )
    assert text == "64 []\n"
