"""The seam of the engines: found by name, with their own deadlines, and nothing taken from the driver that is the workers' machine's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from failing import CREATORS
from programs import CREATORS as SCRIPT
from programs import run_program

from torchtrainer import InvalidArgumentError, LocalEngine, NotAvailableError, TorchTrainer, WorkerStartError
from torchtrainer.arguments import ENGINE_PARTS
from torchtrainer.config import Timeouts
from torchtrainer.control.messages import StartGroup
from torchtrainer.engines.base import Engine
from torchtrainer.engines.groups import child_spec, new_group
from torchtrainer.engines.registry import ENTRY_POINTS, OURS, engine_called
from torchtrainer.process.paths import EnginePaths

ROOT = Path(__file__).parents[1]

# Engines by name

PLUGIN = """
from torchtrainer.config import Timeouts
from torchtrainer.engines.local import LocalEngine

class Sturdy(LocalEngine):
    name = "sturdy"

    def __init__(self):
        super().__init__(timeouts=Timeouts(pause_s=77.0, write_s=88.0))

    def start_group(self, plan, listener):
        print("plan", plan.timeouts.pause_s, plan.checkpoint.write_s)
        return super().start_group(plan, listener)
"""


@pytest.fixture
def plugin(tmp_path) -> Path:
    """A directory as installers make it, with a package that brings an engine, and another whose engine is broken."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sturdy_engine.py").write_text(PLUGIN)
    for name, value in (("sturdy", "sturdy_engine:Sturdy"), ("broken", "sturdy_engine:Missing")):
        info = site / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\n{name} = {value}\n")
    return site


def test_a_package_brings_an_engine_with_its_own_deadlines(tmp_path, plugin) -> None:
    script = """
CREATORS["run_dir"] = "run"
with TorchTrainer(engine="sturdy", **CREATORS) as trainer:
    trainer.train()
    print("calls", trainer._calls._timeouts.write_s, [p.machine for p in trainer.status().processes] == [os.uname().nodename] * 2)
for wrong in ("broken", "sturdier"):
    try:
        TorchTrainer(engine=wrong, **CREATORS)
    except ValueError as error:
        print(type(error).__name__, error)
"""
    path = os.pathsep.join([str(plugin), os.environ.get("PYTHONPATH", "")])
    program = run_program(tmp_path, SCRIPT + script, PYTHONPATH=path)
    assert program.process.returncode == 0, program.errors
    assert "plan 77.0 88.0" in program.output
    assert "calls 88.0 True" in program.output
    assert "engine='broken' is sturdy_engine:Missing, which cannot be imported" in program.output
    assert (
        "engine must be one of auto, local, spmd, broken, sturdy, or an engine object; got 'sturdier'" in program.output
    )


def test_our_engines_are_entry_points_and_need_no_installation() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    section = text.partition(f'[project.entry-points."{ENTRY_POINTS}"]')[2].partition("\n[")[0]
    assert dict(line.replace('"', "").split(" = ") for line in section.split("\n") if line) == OURS
    assert engine_called("local").name == "local"
    with pytest.raises(InvalidArgumentError, match="needs a launcher"):
        engine_called("spmd")


def test_an_engine_that_is_planned_says_what_would_bring_it() -> None:
    assert "ray" not in {one.name for one in entry_points(group=ENTRY_POINTS)}
    with pytest.raises(
        NotAvailableError, match=rf'an entry point "ray" in the group {ENTRY_POINTS}; none is installed'
    ):
        TorchTrainer(**CREATORS, engine="ray")


def test_an_object_that_is_no_engine_is_told_what_it_lacks() -> None:
    class Half:
        name = "half"
        timeouts = Timeouts()

        def start_group(self, plan, listener):
            raise AssertionError

    with pytest.raises(TypeError, match="which has no topology, open_run"):
        TorchTrainer(**CREATORS, engine=Half())
    assert set(ENGINE_PARTS) == {name for name in {*Engine.__annotations__, *vars(Engine)} if not name.startswith("_")}


@pytest.mark.parametrize("start_method", ["fork", "exec"])
def test_deadlines_of_an_engine_hold_for_its_workers(start_method) -> None:
    engine = LocalEngine(start_method=start_method, timeouts=Timeouts(engine_start_s=0.001, worker_connect_s=0.001))
    try:
        with pytest.raises(WorkerStartError, match=r"within 0\.001 s \(Timeouts\.\w+_s\)"):
            TorchTrainer(**{**CREATORS, "engine": engine})
    finally:
        engine.close()


# More machines than one


def started_on(node_rank: int, nodes: list[list[int]], gpus: list[int]) -> dict[int, dict]:
    """What the host of a machine starts its ranks with, by rank."""
    paths = EnginePaths.create()
    message = StartGroup(
        group="g",
        world_size=sum(map(len, nodes)),
        nodes=nodes,
        node_rank=node_rank,
        log_dir="logs",
        environ={},
        cwd=".",
        sys_path=[],
        threads=1,
        backend="gloo",
        timeout_s=1.0,
        gpus=gpus,
    )
    group = new_group(message, paths)
    try:
        return {rank: dict(child_spec(group, rank, paths)) for rank in sorted(group.unborn)}
    finally:
        group.close()
        paths.remove()


@pytest.mark.parametrize(
    ("nodes", "node_rank"), [([[0, 1, 2]], 0), ([[0, 1], [2, 3]], 1), ([[0], [1, 2]], 1), ([[0, 2], [1]], 0)]
)
def test_a_host_starts_the_ranks_of_its_machine(nodes, node_rank) -> None:
    gpus = [5, 6, 7][: len(nodes[node_rank])]
    specs = started_on(node_rank, nodes, gpus)
    assert list(specs) == nodes[node_rank]
    for local_rank, rank in enumerate(nodes[node_rank]):
        environ, arguments = specs[rank]["environ"], specs[rank]["arguments"]
        told = {name: int(environ[name]) for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")}
        assert told == {
            "RANK": rank,
            "LOCAL_RANK": local_rank,
            "LOCAL_WORLD_SIZE": len(nodes[node_rank]),
            "GROUP_RANK": node_rank,
        }
        assert int(environ["WORLD_SIZE"]) == sum(map(len, nodes))
        assert int(environ["GROUP_WORLD_SIZE"]) == len(nodes)
        assert ("GLOO_SOCKET_IFNAME" in environ) == (len(nodes) == 1), "loopback leads to no other machine"
        assert (arguments["local_rank"], arguments["gpu"]) == (local_rank, gpus[local_rank])
        assert "://" in arguments["endpoint"]


MOVED = """
import ctypes, signal, socket
import torchtrainer
from torchtrainer import FailureConfig, WorkerDiedError

torchtrainer.prestart()  # the host process is there, under the name that the machine has now
workers = socket.gethostname()
CLONE_NEWUTS = 0x04000000
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(CLONE_NEWUTS) or libc.sethostname(b"the-driver", 10):
    sys.exit("no namespace")
assert socket.gethostname() == "the-driver"

class Own(TrainingOperator):
    def train_batch(self, batch, info):
        if self.config.get("raise") and self.world_rank == 1:
            raise ValueError("mine")
        return super().train_batch(batch, info)

def told(error):
    text = f"{error} {error.__cause__ or ''}"
    return workers in text, "the-driver" in text

CREATORS.update(training_operator_cls=Own, failure=FailureConfig(max_failures=0, replace=False))
with TorchTrainer(**CREATORS) as trainer:
    trainer.train()
    print("status", {p.machine for p in trainer.status().processes} == {workers}, "the-driver" in repr(trainer.status()))
    os.kill(trainer.status().processes[1].pid, signal.SIGKILL)
    try:
        for _ in range(100):
            trainer.train()
    except WorkerDiedError as error:
        print("died", *told(error))
with TorchTrainer(config={"raise": True}, **CREATORS) as trainer:
    try:
        trainer.train()
    except ValueError as error:
        print("raised", *told(error))
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare to give a process another host name")
def test_a_worker_is_said_to_be_where_it_is_and_not_where_the_driver_is(tmp_path) -> None:
    before = () if os.geteuid() == 0 else ("unshare", "--map-root-user")
    if subprocess.run([*before, "unshare", "--uts", "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system gives no namespaces to its users")
    program = run_program(tmp_path, SCRIPT + MOVED, python=(*before, sys.executable))
    assert program.process.returncode == 0, program.errors
    assert "status True False\n" in program.output
    assert "died True False\n" in program.output
    assert "raised True False\n" in program.output
