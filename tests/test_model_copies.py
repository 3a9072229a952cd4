"""Copies of models: what users get by `get_model`, and what they copy themselves of what `register` returned."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

from torchtrainer import TorchTrainer, TrainingOperator
from torchtrainer.comm.copies import copy_of
from torchtrainer.errors import NotSerializableError
from torchtrainer.spec import BuildSpec
from torchtrainer.worker.models import ModelStates, pickled, rebuilt

X = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
Y = X.sum(1, keepdim=True)
parametrizations = nn.utils.parametrizations


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


class Keeps(nn.Module):
    """Keeps what it computed, as many models do for a loss of their own."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.kept = {}

    def forward(self, x):
        out = self.layer(x)
        self.kept["features"] = [out]
        return out


class Locked(nn.Module):
    """Holds what neither copies nor pickles."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.lock = threading.Lock()

    def forward(self, x):
        with self.lock:
            return self.layer(x)


def hooked(hook):
    layer = nn.Linear(6, 6)
    layer.register_forward_hook(hook)
    return layer


def hooked_with_lock():
    lock = threading.Lock()
    return hooked(lambda module, args, out: (lock, out)[1])


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(torch.jit.script(nn.Linear(6, 6)), nn.Linear(6, 6))


KINDS = {
    "plain": lambda: nn.Linear(6, 6),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(6, 6)),
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(6, 6))),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(6, 6)),
    "old weight norm": lambda: old_weight_norm(nn.Linear(6, 6)),
    "old spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(6, 6)),
    "keeps a graph": Keeps,
    "scripted": scripted,
    "hook": lambda: hooked(lambda module, args, out: out),
    "hook that holds a lock": hooked_with_lock,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_was_trained_is_copied_and_pickled(kind) -> None:
    model = KINDS[kind]()
    model(X).sum().backward()
    made = pickle.loads(pickled(copy_of(model).eval()))
    assert type(made).__name__ == type(model).__name__
    assert torch.equal(made(X), model.eval()(X))
    assert made.state_dict().keys() == model.state_dict().keys()
    made.train()(X).sum().backward()
    assert all(one.grad is not None for one in made.parameters())


def test_a_model_that_does_not_pickle_is_made_by_its_creator() -> None:
    spec = BuildSpec(model_creator=lambda config: Locked(), config={"lr": 1})
    trained, before = Locked().eval(), torch.get_rng_state()
    found = pickle.loads(pickled(trained))
    assert isinstance(found, ModelStates)
    made = rebuilt(found, spec, 2)
    assert torch.equal(made(X), trained(X))
    assert not made.layer.training
    torch.manual_seed(0)
    before = torch.get_rng_state()
    rebuilt(found, spec, 2)
    assert torch.equal(torch.get_rng_state(), before), "the user's random numbers are left alone"
    with pytest.raises(NotSerializableError, match=r"cannot pickle '_thread.lock'.*without model_creator"):
        rebuilt(found, BuildSpec(training_operator_cls=TrainingOperator), 2)
    with pytest.raises(NotSerializableError, match=r"what model_creator makes does not take its state"):
        rebuilt(found, BuildSpec(model_creator=lambda config: nn.Linear(1, 1)), 2)


class Averaging(TrainingOperator):
    """Keeps an average of the weights and a teacher: copies of what `register` returned."""

    def setup(self, config):
        torch.manual_seed(0)
        layers = nn.Sequential(*(KINDS[kind]() for kind in config["kinds"]), nn.Linear(6, 1))
        optimizer = torch.optim.SGD(layers.parameters(), lr=0.05)
        self.model, self.optimizer, self.criterion = self.register(
            models=layers, optimizers=optimizer, criterion=nn.MSELoss()
        )
        self.register_data(train_loader=DataLoader(TensorDataset(X, Y), batch_size=4))
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        self.teacher = copy.deepcopy(self.model)
        self.sent = pickle.loads(pickle.dumps(copy.deepcopy(self.model)))


class AveragingEachStep(Averaging):
    """With a step of its own, which uses the wrapper."""

    def train_batch(self, batch, batch_info):
        found = super().train_batch(batch, batch_info)
        self.average.update_parameters(self.model)
        copy.deepcopy(self.model)
        return found


def by_hand(steps: int) -> tuple[nn.Module, nn.Module]:
    """The same on one process: the model and its average."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 1))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for x, y in zip(X.split(8)[:steps], Y.split(8)[:steps], strict=True):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        average.update_parameters(model)
    return model, average


def kinds_of_copies(operator):
    names = [type(one).__name__ for one in (operator.model, operator.average.module, operator.teacher, operator.sent)]
    return names, {name: value.tolist() for name, value in operator.average.module.state_dict().items()}


@pytest.mark.parametrize("operator_class", [Averaging, AveragingEachStep])
def test_what_register_returned_is_copied_without_its_wrapper(operator_class) -> None:
    arguments = {"num_workers": 2, "use_gpu": False, "run_dir": None, "config": {"kinds": ["plain"]}}
    with TorchTrainer(training_operator_cls=operator_class, **arguments) as trainer:
        trainer.train()
        ranks = trainer.apply_all_operators(kinds_of_copies)
        model = trainer.get_model()
    assert ranks[0] == ranks[1]
    assert ranks[0][0][0] != "Sequential"
    assert ranks[0][0][1:] == ["Sequential", "Sequential", "Sequential"]
    expected, average = by_hand(3)
    for name, value in expected.state_dict().items():
        assert torch.allclose(model.state_dict()[name], value, atol=1e-6), name
    if operator_class is AveragingEachStep:
        for name, value in average.module.state_dict().items():
            assert torch.allclose(torch.tensor(ranks[0][1][name]), value, atol=1e-6), name


def test_get_model_returns_models_of_all_kinds_from_worker_processes() -> None:
    arguments = {"num_workers": 2, "use_gpu": False, "run_dir": None}
    kinds = ["weight norm", "old spectral norm", "old weight norm", "scripted", "hook that holds a lock"]
    with TorchTrainer(
        model_creator=lambda config: nn.Sequential(*(KINDS[kind]() for kind in config["kinds"]), nn.Linear(6, 1)),
        optimizer_creator=lambda model, config: torch.optim.SGD(model.parameters(), lr=0.05),
        data_creator=lambda config: DataLoader(TensorDataset(X, Y), batch_size=4),
        loss_creator=nn.MSELoss,
        config={"kinds": kinds},
        **arguments,
    ) as trainer:
        trainer.train()
        model, state = trainer.get_model(), trainer.state_dict()["models"][0]
        trainer.train()
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert model(X).shape == (24, 1)


def test_get_model_makes_a_model_that_cannot_be_sent_by_its_creator() -> None:
    with TorchTrainer(
        model_creator=lambda config: nn.Sequential(Locked(), nn.Linear(6, 1)),
        optimizer_creator=lambda model, config: torch.optim.SGD(model.parameters(), lr=0.05),
        data_creator=lambda config: DataLoader(TensorDataset(X, Y), batch_size=4),
        loss_creator=nn.MSELoss,
        use_gpu=False,
        run_dir=None,
    ) as trainer:
        trainer.train()
        model, state = trainer.get_model(), trainer.state_dict()["models"][0]
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
