"""Ranks have one model, and say so when they do not; what happens where there is no shared memory, or no memory at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from programs import CREATORS, run_program
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchtrainer import TorchTrainer, TrainingOperator


def data_creator(config):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(64, 6, generator=generator)
    return DataLoader(TensorDataset(x, x.sum(dim=1, keepdim=True)), batch_size=4)


def another_on_each_rank(config):
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight += float(os.environ["RANK"])
        model[1].running_mean += float(os.environ["RANK"])
    return model


class Own(TrainingOperator):
    def train_batch(self, batch, batch_info):
        return super().train_batch(batch, batch_info)


HERE = {
    "model_creator": another_on_each_rank,
    "data_creator": data_creator,
    "optimizer_creator": lambda model, config: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
    "loss_creator": nn.MSELoss,
    "num_workers": 2,
    "num_cpus_per_worker": 1,
    "run_dir": None,
    "use_gpu": False,
}


def state_of(operator):
    return {name: value.clone() for name, value in operator.model.module.state_dict().items()}


def nudge_rank_1(operator):
    if operator.world_rank == 1:
        with torch.no_grad():
            operator.model.module[2].bias += 1e-6


@pytest.mark.parametrize("operator", [None, Own])
def test_ranks_begin_with_the_model_of_rank_0_and_keep_it(operator) -> None:
    with TorchTrainer(**HERE, training_operator_cls=operator) as trainer:
        for _ in range(2):
            first, second = trainer.apply_all_operators(state_of)
            assert all(torch.equal(first[name], second[name]) for name in first if "running" not in name)
            trainer.train()


@pytest.mark.parametrize("operator", [None, Own])
def test_a_model_that_one_rank_has_changed_is_an_error_that_names_the_parameter(operator) -> None:
    with TorchTrainer(**HERE, training_operator_cls=operator) as trainer:
        trainer.train()
        trainer.apply_all_operators(nudge_rank_1)
        with pytest.raises(RuntimeError, match=r"the ranks have different models: ranks \d and \d differ in 2\.bias"):
            trainer.train()


def no_memory_left() -> None:
    """Runs in each worker before anything else: the system says that nothing is free."""
    import torchtrainer.comm.shared_memory

    torchtrainer.comm.shared_memory.available_bytes = lambda: 0


def test_without_room_in_shared_memory_gradients_go_through_gloo_with_one_notice(capfd) -> None:
    with TorchTrainer(**HERE) as trainer:
        expected = trainer.train(), trainer.state_dict()["models"][0]
    capfd.readouterr()
    with TorchTrainer(**HERE, initialization_hook=no_memory_left) as trainer:
        found = trainer.train(), trainer.state_dict()["models"][0]
    said = capfd.readouterr().err
    assert said.count("gradients go through Gloo") == 1
    assert "MB of shared memory, but only 0 MB are free" in said
    assert found[0] == expected[0]
    assert all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])


LIMIT_BYTES = 3_000_000_000
HUNGRY = """
class Hungry(torch.nn.Linear):
    calls = 0
    def forward(self, x):
        self.calls += 1
        if os.environ["RANK"] == "1" and self.calls == 4 and not os.path.exists("fired"):
            open("fired", "w").close()
            eaten = []
            while True:
                eaten.append(bytearray(50_000_000))
        return super().forward(x)

CREATORS["model_creator"] = lambda config: Hungry(20, 5)
with TorchTrainer(run_dir=None, **CREATORS) as trainer:
    trainer.train()
    print("failures", [(one.cause, one.how) for one in trainer.status().failures])
"""


def memory_group() -> Path | None:
    """Where a control group with a limit for memory can be made; None: nowhere."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return Path(f"/sys/fs/cgroup/memory{path}")
    return None


def test_a_worker_that_the_system_kills_for_memory_is_named_so_and_made_up_for(tmp_path) -> None:
    parent = memory_group()
    if parent is None or not os.access(parent, os.W_OK):
        pytest.skip("no control group for memory can be made here")
    group = parent / f"torchtrainer-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(LIMIT_BYTES))
        enter = f'open("{group}/cgroup.procs", "w").write("0")\n'
        program = run_program(tmp_path, enter + CREATORS + HUNGRY, whole=True)
        assert "failures [('was killed for memory', 'carried')]" in program.output, program.errors
        program.assert_nothing_left()
    finally:
        group.rmdir()
