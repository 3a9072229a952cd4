"""What a container allows: cores and memory of the control groups, real ones where they can be made and such as tests write down."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from programs import CREATORS, Program, start_program

from torchtrainer.process.cgroups import (
    Mounts,
    cgroup_limit,
    cgroup_memory_left,
    cgroup_values,
    cores_by_affinity,
    cpu_quota,
    usable_cores,
)
from torchtrainer.process.oom import SPAWNER_MORE, WORKER_MORE, be_killed_first

RUN = (sys.executable, "-m", "torchtrainer.run")
MIB = 1024**2
PERIOD_US = 100_000


def written_down(tmp_path: Path, groups: str, files: dict[str, str]) -> Mounts:
    """Control groups as ``/proc`` and ``/sys`` of another machine would show them."""
    at = Mounts(proc=tmp_path / "proc", root=tmp_path / "sys")
    (at.proc / "self").mkdir(parents=True)
    (at.proc / "self" / "cgroup").write_text(groups)
    for name, text in files.items():
        path = at.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return at


@contextlib.contextmanager
def control_group(controller: str, limits: dict[str, str]) -> Iterator[Path]:
    """A control group of the older kind below our own, with these limits."""
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    own = [path for _, controllers, path in lines if controller in controllers.split(",")]
    group = Path(f"/sys/fs/cgroup/{controller}{own[0] if own else ''}") / f"torchtrainer-test-{secrets.token_hex(4)}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group for {controller} can be made here: {error}")
    try:
        for name, text in limits.items():
            (group / name).write_text(text)
        yield group
    finally:
        group.rmdir()


def run_in(group: Path, tmp_path: Path, text: str, *arguments: str, launcher: tuple[str, ...] = ()) -> Program:
    """Runs a program in a control group to its end."""
    enter = ("sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs"))
    program = start_program(tmp_path, text, *arguments, python=(*enter, *(launcher or (sys.executable,))))
    program.finish()
    program.assert_nothing_left()
    return program


# How many cores there are


UNIFIED = {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "{} 100000\n"}
OLDER = {"cpu,cpuacct/cpu.cfs_quota_us": "{}\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize(
    ("quota_us", "quota", "cores"),
    [
        ("max", None, None),
        ("-1", None, None),
        ("5000", 0.05, 1),
        ("100000", 1.0, 1),
        ("150000", 1.5, 1),
        ("6400000", 64.0, None),
    ],
)
@pytest.mark.parametrize("kind", ["unified", "older", "older, in a container"])
def test_a_quota_leaves_whole_cores_and_at_least_one(tmp_path, kind, quota_us, quota, cores) -> None:
    if kind == "unified":
        groups, files = "0::/a/b\n", UNIFIED
    else:
        groups = "3:cpu,cpuacct:/docker/gone\n" if kind == "older, in a container" else "3:cpu,cpuacct:/\n"
        files = OLDER
    at = written_down(tmp_path, groups, {name: text.format(quota_us) for name, text in files.items()})
    (at.root / "cpu").exists() or (at.root / "cpu").symlink_to("cpu,cpuacct")  # as distributions have it
    assert cpu_quota(at=at) == quota
    assert usable_cores(at=at) == (cores or cores_by_affinity())


def test_the_least_of_the_limits_on_the_way_up_counts(tmp_path) -> None:
    files = {
        "a/b/cpu.max": "150000 100000\n",
        "a/cpu.max": "50000 100000\n",
        "a/b/memory.max": "4096\n",
        "a/memory.max": "max\n",
    }
    at = written_down(tmp_path, "0::/a/b\n", files)
    assert cpu_quota(at=at) == 0.5
    assert cgroup_limit("memory.max", at=at) == 4096
    assert cgroup_limit("pids.max", at=at) is None


def test_memory_that_is_left_leaves_out_files_that_can_be_let_go(tmp_path) -> None:
    files = {
        "memory/x/memory.limit_in_bytes": str(100 * MIB),
        "memory/x/memory.usage_in_bytes": str(90 * MIB),
        "memory/x/memory.stat": f"cache 1\ninactive_file 1\ntotal_inactive_file {30 * MIB}\n",
        "memory/memory.limit_in_bytes": "9223372036854771712",
        "memory/memory.usage_in_bytes": str(95 * MIB),
        "memory/memory.stat": "total_inactive_file 0\n",
    }
    at = written_down(tmp_path, "4:memory:/x\n1:name=systemd:/\n", files)
    assert cgroup_limit("memory.max", "memory/memory.limit_in_bytes", at=at) == 100 * MIB
    assert cgroup_memory_left(at=at) == 40 * MIB


def test_without_control_groups_nothing_is_limited(tmp_path) -> None:
    at = Mounts(proc=tmp_path, root=tmp_path)
    assert list(cgroup_values("cpu.max", at=at)) == []
    assert (cpu_quota(at=at), cgroup_memory_left(at=at), usable_cores(at=at)) == (None, None, cores_by_affinity())


def test_a_real_quota_is_what_threads_and_ranks_go_by(tmp_path) -> None:
    """One core's worth of time, however many cores there are: for the launcher, for a trainer and for doctor."""
    script = """
from torchtrainer.launcher.doctor_checks import check_processors
with TorchTrainer(run_dir=None, **{**CREATORS, "num_workers": 1}) as trainer:
    print("ranks", os.environ["WORLD_SIZE"], "threads", torch.get_num_threads(), check_processors())
"""
    with control_group("cpu", {"cpu.cfs_period_us": str(PERIOD_US), "cpu.cfs_quota_us": str(PERIOD_US)}) as group:
        program = run_in(group, tmp_path, CREATORS + script, launcher=(*RUN, "--nproc-per-node", "auto"))
    assert program.ended_well(), program.errors
    (line,) = program.output.splitlines()
    assert line.startswith("ranks 1 threads 1"), line
    assert "quota 1" in line
    if cores_by_affinity() > 1:
        assert "use at most 1 rank'" in line


@pytest.mark.skipif(cores_by_affinity() < 2, reason="one core cannot be made less")
def test_affinity_is_what_ranks_go_by(tmp_path) -> None:
    program = start_program(
        tmp_path,
        "import os; print('ranks', os.environ['WORLD_SIZE'])",
        python=("taskset", "-c", str(min(os.sched_getaffinity(0))), *RUN, "--nproc-per-node", "cpu"),
    )
    program.finish()
    assert program.output == "ranks 1\n", program.errors


# Memory


@pytest.mark.parametrize(("before", "after"), [(0, WORKER_MORE), (-500, WORKER_MORE - 500), (900, 1000), (1000, 1000)])
def test_a_worker_is_killed_before_those_that_others_need(tmp_path, before, after) -> None:
    own = tmp_path / "oom_score_adj"
    own.write_text(f"{before}\n")
    be_killed_first(WORKER_MORE, own=own)
    assert int(own.read_text()) == after
    be_killed_first(WORKER_MORE, own=tmp_path / "nothing")


def test_workers_and_their_loaders_are_killed_before_host_and_driver(tmp_path) -> None:
    text = """
from pathlib import Path

def score(pid="self"):
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())

class Scores(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, i):
        return torch.full((20,), float(score())), torch.tensor(0)

class Shows(TrainingOperator):
    def train_batch(self, batch, batch_info):
        self.seen = batch[0].min().item()
        return super().train_batch(batch, batch_info)

CREATORS["data_creator"] = lambda config: DataLoader(Scores(), batch_size=4, num_workers=1)
trainer = TorchTrainer(run_dir=None, training_operator_cls=Shows, **CREATORS)
trainer.train()
workers = trainer.apply_all_operators(lambda operator: [score(), operator.seen])
served = [score(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
print(score(), served, workers)
"""
    program = start_program(tmp_path, CREATORS + text, whole=True)
    program.finish()
    own = int(Path("/proc/self/oom_score_adj").read_text())
    more = min(1000, own + SPAWNER_MORE + WORKER_MORE)
    assert program.output == f"{own} [{own}] {[[more, float(more)]] * 2}\n", program.errors


def test_too_little_memory_for_the_spawner_is_called_so(tmp_path) -> None:
    """The driver is outside of the control group in which its host and its spawner start, as in a pod with side containers."""
    with control_group("memory", {"memory.limit_in_bytes": str(64 * MIB)}) as group:
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\necho $$ > "{group}/cgroup.procs" && exec "{sys.executable}" "$@"\n')
        python.chmod(0o700)
        inside = f"sys.executable = {str(python)!r}\n"
        program = start_program(tmp_path, CREATORS + inside + "TorchTrainer(run_dir=None, **CREATORS)\n")
        program.finish()
        program.assert_nothing_left()
    assert program.process.returncode == 1, program.output
    assert "was killed by SIGKILL: the system was out of memory and killed it. Use a smaller batch" in program.errors
    assert "code -9" not in program.errors


@pytest.mark.soak  # which process the system kills first, and whether it kills another one too, is up to it
def test_a_script_that_is_killed_for_memory_does_not_go_without_a_word(tmp_path) -> None:
    """Its own process is the largest, and has no time to say anything."""
    with control_group("memory", {"memory.limit_in_bytes": str(500 * MIB)}) as group:
        program = run_in(
            group, tmp_path, CREATORS + "TorchTrainer(run_dir=None, **CREATORS).train(); print('trained')\n"
        )
    assert ("trained" in program.output) != ("the system was out of memory" in program.errors), program.errors
