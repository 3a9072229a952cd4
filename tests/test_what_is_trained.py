"""What the optimizers update is exchanged, wherever it lives and whenever it comes to them: as one process over the global batch."""

from __future__ import annotations

import copy
import functools
import os

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.data import DataLoader, TensorDataset

from torchtrainer import TorchTrainer, TrainingOperator

ROWS, BATCH = 36, 2
GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(ROWS, 6, generator=GENERATOR)
CLASSES = torch.randint(0, 5, (ROWS,), generator=GENERATOR)
NUMBERS = torch.randint(0, 20, (ROWS, 3), generator=GENERATOR)


def no_memory_left() -> None:
    """Runs in each worker before anything else: gradients then go through the process group."""
    import torchtrainer.comm.shared_memory

    torchtrainer.comm.shared_memory.available_bytes = lambda: 0


class Task:
    """A model, a criterion and an optimizer, how a loss comes about, and what changes after the first pass."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model, self.criterion = self.build()
        self.optimizer = self.optimize(self.model, self.criterion)

    def build(self) -> tuple[nn.Module, nn.Module]:
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)), nn.CrossEntropyLoss()

    def optimize(self, model, criterion):
        return torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.1, momentum=0.9)

    def data(self) -> TensorDataset:
        return TensorDataset(X, CLASSES)

    @staticmethod
    def change(model, optimizer) -> None:
        """After the first pass."""

    def everything(self) -> list[torch.Tensor]:
        """All that is trained."""
        return [one.detach() for group in self.optimizer.param_groups for one in group["params"]]


class Compiled(Task):
    def build(self):
        model, criterion = super().build()
        return torch.compile(model, backend="eager"), criterion


class Margin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.linspace(-1, 1, 40).reshape(5, 8))

    def forward(self, embedded, target):
        return cross_entropy(5 * embedded @ self.centres.T, target)


class LearnedCriterion(Task):
    def build(self):
        return nn.Linear(6, 8), Margin()


class Prompted(nn.Module):
    """Uses a tensor that is a parameter of no module."""

    def __init__(self, prompt) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 5)
        self.prompt = [prompt]

    def forward(self, rows):
        return self.layer(rows + self.prompt[0])


class Loose(Task):
    def build(self):
        return Prompted(nn.Parameter(torch.zeros(6))), nn.CrossEntropyLoss()

    def optimize(self, model, criterion):
        return torch.optim.Adam([*model.parameters(), model.prompt[0]], lr=0.05)


class Unfrozen(Task):
    def build(self):
        model, criterion = super().build()
        model[0].requires_grad_(False)
        return model, criterion

    @staticmethod
    def change(model, optimizer):
        model[0].requires_grad_(True)


class Added(Task):
    """A layer that comes to the model and to the optimizer later."""

    @staticmethod
    def change(model, optimizer):
        layer = nn.Linear(5, 5)
        with torch.no_grad():
            layer.weight.copy_(torch.eye(5))
            layer.bias.zero_()
        model.append(layer)
        optimizer.add_param_group({"params": list(layer.parameters()), "lr": 0.01})


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8, sparse=True)
        self.layer = nn.Linear(8, 5)

    def forward(self, numbers):
        return self.layer(self.table(numbers).mean(dim=1))


class Sparse(Task):
    def build(self):
        return Tables(), nn.CrossEntropyLoss()

    def optimize(self, model, criterion):
        return torch.optim.SGD(model.parameters(), lr=0.2)

    def data(self):
        return TensorDataset(NUMBERS, CLASSES)


class Waves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5, dtype=torch.complex64) / 3)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.steps = nn.Parameter(torch.arange(4), requires_grad=False)

    def forward(self, rows):
        return (rows.to(torch.complex64) @ self.weight).abs() * self.scale


class Complex(Task):
    """Complex, 0-d and frozen integer parameters."""

    def build(self):
        return Waves(), nn.CrossEntropyLoss()

    def optimize(self, model, criterion):
        return torch.optim.SGD([model.weight, model.scale], lr=0.1)


TASKS = {kind.__name__: kind for kind in (Compiled, LearnedCriterion, Loose, Unfrozen, Added, Sparse, Complex)}


@functools.cache
def in_one_process(kind: str, world_size: int) -> list[torch.Tensor]:
    task, size = TASKS[kind](), BATCH * world_size
    rows, target = task.data().tensors
    for step in range(2 * ROWS // size):
        if step == ROWS // size:
            task.change(task.model, task.optimizer)
        part = slice(step * size % ROWS, step * size % ROWS + size)
        task.optimizer.zero_grad()
        task.criterion(task.model(rows[part]), target[part]).backward()
        task.optimizer.step()
    return task.everything()


class Stock(TrainingOperator):
    def setup(self, config):
        task = TASKS[config["task"]]()
        self.task = task
        self.model, self.optimizer, self.criterion = self.register(
            models=task.model, optimizers=task.optimizer, criterion=task.criterion
        )
        self.register_data(train_loader=DataLoader(task.data(), batch_size=BATCH))


class Own(Stock):
    """Calls the user's module past what register returned."""

    def train_batch(self, batch, batch_info):
        model = self.task.model if self.config["past"] else self.model
        self.optimizer.zero_grad()
        loss = self.criterion(model(batch[0]), batch[1])
        loss.backward()
        self.optimizer.step()
        return {"train_loss": loss.item(), "num_samples": len(batch[1])}


class OwnEpoch(Stock):
    """Changes what is trained inside a call, at the beginning of its second half."""

    def train_epoch(self, iterator, info):
        for place, batch in enumerate(iterator):
            if place == len(self.train_loader):
                self.task.change(getattr(self.task.model, "_orig_mod", self.task.model), self.optimizer)
            self.optimizer.zero_grad()
            self.criterion(self.model(batch[0]), batch[1]).backward()
            self.optimizer.step()
        return {"steps": place}


def change(operator) -> None:
    operator.task.change(operator.task.model, operator.optimizer)


UNFROZEN = {"num_cpus_per_worker": 1, "run_dir": None, "use_gpu": False, "config": {"task": "Unfrozen", "past": False}}


def everything(operator) -> list[torch.Tensor]:
    return copy.deepcopy(operator.task.everything())


def train(kind: str, operator: type, world_size: int, *, past: bool = False, **options) -> list[list[torch.Tensor]]:
    """What each rank has after two passes."""
    options = {"num_cpus_per_worker": 1, "run_dir": None, "use_gpu": False, **options}
    config = {"task": kind, "past": past}
    with TorchTrainer(training_operator_cls=operator, num_workers=world_size, config=config, **options) as trainer:
        if operator is OwnEpoch:
            trainer.train(num_steps=2 * ROWS // (BATCH * world_size))
        else:
            trainer.train()
            trainer.apply_all_operators(change)
            trainer.train()
        return trainer.apply_all_operators(everything)


def assert_as_in_one_process(kind: str, world_size: int, ranks: list[list[torch.Tensor]]) -> None:
    wanted = in_one_process(kind, world_size)
    for mine in ranks:
        assert len(mine) == len(wanted)
        for one, first, whole in zip(mine, ranks[0], wanted, strict=True):
            assert torch.equal(one, first), "the ranks have parted"
            torch.testing.assert_close(one, whole, rtol=1e-3, atol=1e-4)  # drift is a thousand times as much


@pytest.mark.parametrize(
    ("operator", "world_size", "options"),
    [
        pytest.param(Stock, 3, {}, id="stock-3"),
        pytest.param(Own, 2, {"past": True}, id="past-the-wrapper-2"),
        pytest.param(OwnEpoch, 2, {}, id="inside-a-call-2"),
        pytest.param(Stock, 2, {"use_local": True}, id="one-process-2"),
        pytest.param(Own, 2, {"initialization_hook": no_memory_left}, id="process-group-2"),
    ],
)
@pytest.mark.parametrize("kind", TASKS)
def test_what_is_trained_is_exchanged(kind, operator, world_size, options) -> None:
    assert_as_in_one_process(kind, world_size, train(kind, operator, world_size, **options))


@pytest.mark.parametrize("operator", [Stock, Own])
def test_a_state_holds_all_that_is_trained(operator, tmp_path) -> None:
    """A criterion's parameters and loose ones go into checkpoints, and come back in a new trainer."""
    for kind in ("LearnedCriterion", "Loose"):
        options = {"training_operator_cls": operator, "num_cpus_per_worker": 1, "run_dir": None, "use_gpu": False}
        config = {"task": kind, "past": False}
        with TorchTrainer(**options, config=config, num_workers=2) as trainer:
            trainer.train()
            saved = trainer.save(tmp_path / kind)
            wanted = trainer.apply_all_operators(everything)[0]
        with TorchTrainer(**options, config=config, num_workers=1) as trainer:
            trainer.load(saved)
            found = trainer.apply_all_operators(everything)[0]
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


class BesideFrozen(TrainingOperator):
    """A small adapter beside a large table that is not trained."""

    def setup(self, config):
        torch.manual_seed(0)
        frozen = nn.Linear(1000, config["rows"]).requires_grad_(False)
        self.model = nn.Sequential(frozen, nn.Linear(config["rows"], 1))
        self.model, self.optimizer, self.criterion = self.register(
            models=self.model,
            optimizers=torch.optim.SGD((one for one in self.model.parameters() if one.requires_grad), lr=0.01),
            criterion=nn.MSELoss(),
        )
        rows = torch.randn(8, 1000)
        self.register_data(train_loader=DataLoader(TensorDataset(rows, rows[:, :1]), batch_size=2))


def shared_bytes(operator) -> int:
    """Memory that this process shares with others and has touched."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssShmem"))


def test_what_is_frozen_takes_no_shared_memory() -> None:
    taken = []
    for rows in (4, 4000):
        options = {
            "num_workers": 2,
            "num_cpus_per_worker": 1,
            "run_dir": None,
            "use_gpu": False,
            "config": {"rows": rows},
        }
        with TorchTrainer(training_operator_cls=BesideFrozen, **options) as trainer:
            trainer.train()
            taken.append(max(trainer.apply_all_operators(shared_bytes)))
    frozen_bytes = 4000 * 1000 * 4
    assert taken[1] - taken[0] < frozen_bytes / 4


def test_a_worker_that_is_lost_after_the_change_is_replaced_with_what_is_trained_now() -> None:
    """The replacement was not there when a layer was unfrozen, nor is that in any checkpoint."""
    for operator in (Stock, Own):
        with TorchTrainer(training_operator_cls=operator, num_workers=2, **UNFROZEN) as trainer:
            trainer.train()
            trainer.apply_all_operators(change)
            trainer.apply_all_operators(end_rank_1)
            trainer.train()
            ranks = trainer.apply_all_operators(everything)
            assert len(trainer.status().failures) == 1
        assert_as_in_one_process("Unfrozen", 2, ranks)


def end_rank_1(operator) -> None:
    """Has rank 1 die in its next step."""
    operator.dies = operator.world_rank == 1
    operator.task.model.register_forward_pre_hook(lambda *_: os._exit(9) if operator.dies else None)


def test_ranks_that_train_other_parameters_are_told() -> None:
    for operator in (Stock, Own):
        with TorchTrainer(training_operator_cls=operator, num_workers=2, **UNFROZEN) as trainer:
            trainer.train()
            trainer.apply_all_operators(lambda one: change(one) if one.world_rank == 1 else None)
            with pytest.raises(RuntimeError, match=r"rank \d trains other parameters than rank \d"):
                trainer.train()


def test_a_loss_that_needs_more_than_the_model() -> None:
    """`torch.autograd.grad` is each rank's own, in an uneven step too."""
    options = {"num_workers": 2, "num_cpus_per_worker": 1, "run_dir": None, "use_gpu": False}
    with TorchTrainer(training_operator_cls=InnerStep, **options) as trainer:
        trainer.train()
        ratios = trainer.apply_all_operators(lambda operator: operator.ratios)
    assert ratios == [pytest.approx([1.0] * 5, abs=1e-3)] * 2


class InnerStep(TrainingOperator):
    def setup(self, config):
        torch.manual_seed(0)
        model = nn.Linear(6, 1, bias=False)
        self.model, self.optimizer = self.register(models=model, optimizers=torch.optim.SGD(model.parameters(), 0.01))
        self.register_data(train_loader=DataLoader(TensorDataset(X[:35], X[:35].sum(1, keepdim=True)), batch_size=4))
        self.ratios: list[float] = []

    def train_batch(self, batch, batch_info):
        (rows, target), weight = batch, next(self.model.parameters())
        loss = mse_loss(rows @ weight.T, target)
        (found,) = torch.autograd.grad(loss, [weight], create_graph=True)
        wanted = 2 * ((rows @ weight.T - target) * rows).mean(0, keepdim=True)
        self.ratios.append(float((found / wanted).mean().detach()))
        self.optimizer.zero_grad()
        mse_loss(rows @ (weight - 0.1 * found).T, target).backward()
        self.optimizer.step()
        return {"num_samples": len(rows)}
