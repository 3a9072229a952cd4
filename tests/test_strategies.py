"""Strategies that divide the state between the ranks, and gradients made smaller: the results are those of plain DDP."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import pytest
import torch
from programs import CREATORS, TORCH, run_program
from recovery_programs import Job, Plan, Strike, digest, epochs_of, undisturbed
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from torchtrainer import CheckpointConfig, TorchTrainer, TrainingOperator
from torchtrainer.comm.full_shard import BLOCK_PARAMETERS
from torchtrainer.comm.hooks import POWERSGD_START_STEP
from torchtrainer.errors import InvalidArgumentError

SHARDED = ("zero1", "fsdp")
STRATEGIES = ("ddp", *SHARDED)
FEATURES, CLASSES, BATCH = 12, 5, 4
QUICK_PAIRS = (("ddp", "zero1"), ("zero1", "fsdp"), ("fsdp", "ddp"))
SAMPLES, MEASURED = 95, 21
"""No number of ranks in the tests divides them: the last step is uneven, and ranks validate unequal numbers of batches."""
WIDE = 320
assert WIDE * WIDE >= BLOCK_PARAMETERS


def soak(*values: Any) -> Any:
    """Parameters of a test that adds to what others show."""
    return pytest.param(*values, marks=pytest.mark.soak)


# What is trained


class Net(nn.Module):
    """Has blocks that are gathered one by one, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, WIDE)
        self.blocks = nn.ModuleList([nn.Linear(WIDE, WIDE) for _ in range(2)])
        self.norm = nn.BatchNorm1d(WIDE)
        self.last = nn.Linear(WIDE, CLASSES)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.last(self.norm(x))


class Tied(Net):
    """Two of its blocks have one weight, so that they cannot be divided apart."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].weight = self.blocks[0].weight


class ListedParameters(torch.optim.SGD):
    """Looks at all parameters in a step."""

    def __init__(self, parameters, **options) -> None:
        self.everything = list(parameters)
        super().__init__(self.everything, **options)


class Halved(torch.optim.SGD):
    """A user's own; it updates parameter by parameter, but who knows."""


MODELS = {
    "small": lambda: nn.Sequential(nn.Linear(FEATURES, 31), nn.BatchNorm1d(31), nn.ReLU(), nn.Linear(31, CLASSES)),
    "one": lambda: nn.Linear(FEATURES, CLASSES, bias=False),
    "net": Net,
    "tied": Tied,
}
OPTIMIZERS = {
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.003),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.003, amsgrad=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.01),
    "lbfgs": torch.optim.LBFGS,
    "listed": lambda parameters: ListedParameters(parameters, lr=0.01),
    "own": lambda parameters: Halved(parameters, lr=0.01),
}


def model_creator(config):
    return MODELS[config["model"]]()


def optimizer_creator(model, config):
    return OPTIMIZERS[config["optimizer"]](model.parameters())


def scheduler_creator(optimizer, config):
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.9)


def data_creator(config):
    train, measured = (samples(n) for n in (SAMPLES, MEASURED))
    return DataLoader(train, batch_size=BATCH, shuffle=True), DataLoader(measured, batch_size=BATCH)


def samples(n):
    generator = torch.Generator().manual_seed(n)
    return TensorDataset(
        torch.randn(n, FEATURES, generator=generator), torch.randint(0, CLASSES, (n,), generator=generator)
    )


class Clipping(TrainingOperator):
    """Looks at the gradients of all parameters between backward and step."""

    def setup(self, config):
        pass

    def clip_gradients(self):
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.2)


class WithClosure(TrainingOperator):
    """Has the optimizer compute the gradients, and clear them."""

    def setup(self, config):
        pass

    def train_batch(self, batch, batch_info):
        x, y = batch

        def closure():
            self.optimizer.zero_grad()
            loss = self.criterion(self.model(x), y)
            loss.backward()
            return loss

        return {"train_loss": self.optimizer.step(closure).item(), "num_samples": len(y)}


def trainer(model: str = "small", optimizer: str = "adam", **arguments: Any) -> TorchTrainer:
    defaults = {
        "model_creator": model_creator,
        "data_creator": data_creator,
        "optimizer_creator": optimizer_creator,
        "scheduler_creator": scheduler_creator,
        "scheduler_step_freq": "batch",
        "loss_creator": nn.CrossEntropyLoss,
        "num_workers": 2,
        "num_cpus_per_worker": 1,
        "config": {"model": model, "optimizer": optimizer},
        "run_dir": None,
    }
    return TorchTrainer(**{**defaults, **arguments})


def results(epochs: int = 2, **arguments: Any) -> tuple[list[Any], dict[str, Any]]:
    """Metrics of some epochs, and the state after them."""
    with trainer(**arguments) as one:
        return [(one.train(), one.validate()) for _ in range(epochs)], one.state_dict()


@pytest.fixture(autouse=True)
def torch_that_shards(request) -> None:
    """Leaves out what an older torch has nothing for."""
    if TORCH < (2, 8) and "fsdp" in request.node.name:
        pytest.skip("fsdp needs torch 2.8 or newer")


@cache
def plain(model: str, optimizer: str) -> tuple[list[Any], dict[str, Any]]:
    """The same of ``strategy="ddp"``."""
    return results(model=model, optimizer=optimizer)


def assert_close(here: Any, there: Any) -> None:
    """Equal in form, and in numbers but for the order of sums."""
    if isinstance(here, dict):
        assert list(here) == list(there)
        for key, value in here.items():
            assert_close(value, there[key])
    elif isinstance(here, list | tuple):
        assert len(here) == len(there)
        for one, other in zip(here, there, strict=True):
            assert_close(one, other)
    elif isinstance(here, torch.Tensor | float):
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-6)
    else:
        assert here == there


# The same results


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "adagrad", soak("adamw"), soak("own")])
def test_zero1_gives_the_bits_of_ddp(optimizer) -> None:
    found, state = results(optimizer=optimizer, strategy="zero1")
    expected, expected_state = plain("small", optimizer)
    assert found == expected
    assert digest(state) == digest(expected_state)


@pytest.mark.parametrize("strategy", SHARDED)
@pytest.mark.parametrize("model", [soak("one"), "net", "tied"])
def test_models_of_any_build_come_out_as_with_ddp(model, strategy) -> None:
    found, state = results(model=model, strategy=strategy)
    expected, expected_state = plain(model, "adam")
    assert_close(found, expected)
    assert_close(state, expected_state)


def test_fsdp_gives_the_same_bits_each_time() -> None:
    (found, state), (again, again_state) = (results(model="net", strategy="fsdp") for _ in range(2))
    assert found == again
    assert digest(state) == digest(again_state)


@pytest.mark.parametrize("strategy", SHARDED)
@pytest.mark.parametrize("operator", [Clipping, soak(WithClosure)])
def test_operators_see_all_gradients(operator, strategy) -> None:
    expected, expected_state = results(optimizer="momentum", training_operator_cls=operator)
    found, state = results(optimizer="momentum", training_operator_cls=operator, strategy=strategy)
    assert_close(found, expected)
    assert_close(state, expected_state)


@pytest.mark.parametrize(
    "arguments", [{"strategy": "zero1"}, {"strategy": "fsdp"}, soak({"comm_hook": "bf16"})], ids=str
)
def test_with_one_worker_it_is_plain_training_and_nothing_is_said(arguments, capfd) -> None:
    expected = results(num_workers=1)
    found = results(num_workers=1, **arguments)
    assert digest(found) == digest(expected)
    assert "lost worker" not in capfd.readouterr().err


def test_zero1_adds_up_batches_as_ddp_does() -> None:
    expected, state = (results(optimizer="momentum", accumulate=3, strategy=one) for one in ("ddp", "zero1"))
    assert digest(state) == digest(expected)


def test_fsdp_adds_up_batches_though_ranks_have_unequal_numbers_of_them() -> None:
    """At the end of a pass one rank has samples for two batches of a step, and the other for one."""
    expected, found = (results(optimizer="momentum", accumulate=2, strategy=one) for one in ("ddp", "fsdp"))
    assert_close(found[0], expected[0])
    assert_close(found[1], expected[1])


# Shares


def kept(operator) -> tuple[int, int]:
    """Numbers that this rank keeps of parameters and of the optimizer's state."""

    def here(tensor):
        return tensor.to_local() if hasattr(tensor, "to_local") else tensor

    state = operator.optimizer.state.values()
    return (
        sum(here(one).numel() for one in operator.model.parameters()),
        sum(here(one).numel() for values in state for one in values.values() if one.dim()),
    )


@pytest.mark.parametrize("strategy", SHARDED)
def test_each_rank_keeps_about_its_share(strategy) -> None:
    with trainer(model="net") as one:
        one.train(num_steps=2)
        (parameters, moments), _ = one.apply_all_operators(kept)
    with trainer(model="net", strategy=strategy) as one:
        one.train(num_steps=2)
        one.state_dict()
        shares = one.apply_all_operators(kept)
    divided = parameters if strategy == "zero1" else parameters / 2
    assert sum(own for _, own in shares) == moments
    for held, own in shares:
        assert held == pytest.approx(divided, rel=0.02)
        assert own == pytest.approx(moments / 2, rel=0.02)


@pytest.mark.parametrize("strategy", SHARDED)
def test_the_model_that_is_handed_out_is_a_plain_one(strategy) -> None:
    with trainer(model="tied", strategy=strategy) as one:
        one.train(num_steps=2)
        model, state = one.get_model(), one.state_dict()["models"][0]
        one.train(num_steps=1)
    assert type(model) is Tied
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    assert model.blocks[0].weight is model.blocks[1].weight
    assert digest(dict(model.state_dict())) == digest(dict(state))


# State that goes from one strategy to another


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (source, target) if (source, target) in QUICK_PAIRS else soak(source, target)
        for source in STRATEGIES
        for target in STRATEGIES
    ],
)
def test_what_one_strategy_saved_goes_on_with_another_and_other_ranks(source, target, tmp_path) -> None:
    path = tmp_path / "state.pt"
    with trainer(model="net", strategy=source) as one:
        one.train(num_steps=5)
        one.save(path)
    with trainer(model="net", strategy=target, num_workers=3) as one:
        one.load(path)
        loaded = one.state_dict()
        found = one.train(num_steps=4)
    with trainer(model="net", num_workers=3) as one:
        one.load(path)
        assert digest(one.state_dict()) == digest(loaded) == digest(torch.load(path, weights_only=True))
        assert_close(found, one.train(num_steps=4))


# Lost workers


@pytest.mark.parametrize(
    ("strategy", "operator"),
    [("zero1", ""), ("fsdp", ""), soak("zero1", "own batch"), soak("fsdp", "own batch")],
)
def test_a_lost_worker_means_the_newest_checkpoint_and_the_same_bits(strategy, operator, tmp_path, capfd) -> None:
    job = Job(operator=operator)
    kill = Strike(phase="forward", rank=1, at=16)
    plan = Plan(directory=str(tmp_path), strikes=(kill,))
    checkpoint = CheckpointConfig(every_steps=5, every_seconds=None, asynchronous=False)
    with job.trainer(plan, strategy=strategy, run_dir=tmp_path / "run", checkpoint=checkpoint) as one:
        found = epochs_of(one, 2)
    assert not plan.missing()
    if strategy == "zero1":
        assert found == list(undisturbed(job, 2))
    else:
        with job.trainer(strategy=strategy) as one:
            assert found == epochs_of(one, 2)
    told = capfd.readouterr().err
    assert f'strategy="{strategy}": a lost worker means a restart from the newest checkpoint' in told
    assert "continuing from the checkpoint of step 15" in told


# Gradients made smaller


@pytest.mark.parametrize("hook", [soak("fp16"), "bf16"])
def test_halved_gradients_train_alike_and_repeat_their_bits(hook, capfd) -> None:
    expected, expected_state = plain("small", "momentum")
    found, state = results(optimizer="momentum", comm_hook=hook)
    again, again_state = results(optimizer="momentum", comm_hook=hook)
    assert digest((found, state)) == digest((again, again_state))
    assert digest(state) != digest(expected_state), "nothing was made smaller"
    assert found[-1][0]["train_loss"] == pytest.approx(expected[-1][0]["train_loss"], rel=1e-2)
    assert f'comm_hook="{hook}"' in capfd.readouterr().err


def test_powersgd_begins_after_its_first_steps_and_keeps_ranks_equal() -> None:
    with trainer(optimizer="momentum", comm_hook="powersgd") as one, trainer(optimizer="momentum") as other:
        for _ in range(2):
            metrics, expected = (each.train(num_steps=POWERSGD_START_STEP) for each in (one, other))
        here, there = one.apply_all_operators(
            lambda operator: operator.model.module[0].weight.detach().numpy().tolist()
        )
        assert digest(one.state_dict()) != digest(other.state_dict()), "nothing was made smaller"
    assert here == there
    assert metrics["train_loss"] == pytest.approx(expected["train_loss"], rel=0.05)


def test_a_powersgd_run_that_is_gone_on_with_says_what_it_lacks(tmp_path, capfd) -> None:
    plan = Plan(directory=str(tmp_path), strikes=(Strike(phase="forward", rank=1, at=8),))
    checkpoint = CheckpointConfig(every_steps=3, every_seconds=None, asynchronous=False)
    with Job().trainer(plan, comm_hook="powersgd", run_dir=tmp_path / "run", checkpoint=checkpoint) as one:
        one.train()
    assert not plan.missing()
    assert capfd.readouterr().err.count("no checkpoint holds what the compression has left out") == 1


# Bad input


@pytest.mark.parametrize(
    ("strategy", "optimizer", "text"),
    [
        ("zero1", "lbfgs", "cannot divide LBFGS"),
        ("zero1", "listed", "in its attribute everything"),
        ("fsdp", "lbfgs", "cannot divide LBFGS"),
        ("fsdp", "adagrad", "has a state before its first step"),
    ],
)
def test_optimizers_that_cannot_be_divided_are_refused(strategy, optimizer, text) -> None:
    with pytest.raises(InvalidArgumentError, match=text):
        trainer(optimizer=optimizer, strategy=strategy)


def test_an_optimizer_of_unknown_kind_is_named(capfd) -> None:
    with trainer(optimizer="own", strategy="zero1"):
        pass
    assert (
        capfd.readouterr().err.count("Halved is assumed to update each parameter from that parameter's gradient") == 1
    )


class Wrapped(TrainingOperator):
    def setup(self, config):
        model = nn.Linear(FEATURES, CLASSES)
        self.register(models=DistributedDataParallel(model), optimizers=torch.optim.SGD(model.parameters(), lr=0.1))


class Sharing(TrainingOperator):
    def setup(self, config):
        model = nn.Linear(FEATURES, CLASSES)
        self.register(models=(model, nn.Sequential(model)), optimizers=torch.optim.SGD(model.parameters(), lr=0.1))


class Scalar(TrainingOperator):
    def setup(self, config):
        model = nn.Linear(FEATURES, CLASSES)
        model.scale = nn.Parameter(torch.ones(()))
        self.register(models=model, optimizers=torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("operator", "text"),
    [
        (Wrapped, "register them without DistributedDataParallel"),
        (Sharing, "models that share parameters: Linear and Sequential"),
        (Scalar, "cannot divide Linear: .*scalar"),
    ],
)
def test_models_that_fsdp_cannot_divide_are_refused(operator, text) -> None:
    with pytest.raises(InvalidArgumentError, match=text):
        TorchTrainer(training_operator_cls=operator, num_workers=2, run_dir=None, strategy="fsdp")


@pytest.mark.parametrize("arguments", [{"strategy": "zero1"}, {"strategy": "fsdp"}, {"comm_hook": "fp16"}], ids=str)
def test_several_ranks_in_one_process_have_nothing_to_divide_or_send(arguments) -> None:
    with pytest.raises(InvalidArgumentError, match="use_local=True"):
        trainer(use_local=True, **arguments)


# Ranks that a launcher started

LAUNCHED = (
    CREATORS
    + """
import hashlib
for strategy in ("ddp", "zero1", "fsdp", "fsdp"):
    with TorchTrainer(**CREATORS, run_dir=None, strategy=strategy) as trainer:
        trainer.train(), trainer.validate()
        trainer.save("state.pt")
        model = trainer.get_model().state_dict()
        state = torch.load("state.pt", weights_only=True)
        assert all(torch.equal(value, model[name]) for name, value in state["models"][0].items())
        digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in model.values())).hexdigest()
    if os.environ["RANK"] == "0":
        print("bits", digest)
"""
)


@pytest.mark.slow
def test_ranks_that_a_launcher_started_divide_the_state_too(tmp_path) -> None:
    run = (sys.executable, "-m", "torchtrainer", "run", "--nproc-per-node", "2")
    program = run_program(tmp_path, LAUNCHED, python=run, OMP_NUM_THREADS="1")
    assert program.ended_well(), program.errors
    bits = [line.split()[-1] for line in program.output.splitlines() if "bits" in line]
    assert len(bits) == len(STRATEGIES) + 1
    assert len(set(bits)) == 1
    assert "a lost worker means a restart" in program.errors
