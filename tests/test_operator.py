"""What operators register, how creators are called, and the state they save."""

from __future__ import annotations

import itertools
import random
from argparse import Namespace
from collections import ChainMap, OrderedDict, UserDict
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from types import MappingProxyType

import pytest
import torch
from one_rank import OneRank
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torchtrainer.arguments import check_counts
from torchtrainer.comm.group import SingleCollective
from torchtrainer.config import BATCH_SIZE, TrainSettings
from torchtrainer.driver.fingerprint import differences, fingerprint
from torchtrainer.operator import CreatorOperator, TrainingOperator
from torchtrainer.spec import BuildSpec, rank_config
from torchtrainer.train.components import internals
from torchtrainer.train.creators import check_loaders, make_loss
from torchtrainer.train.progress import OpenGate, Progress
from torchtrainer.train.rng import isolated_rng, seed_all
from torchtrainer.worker.assembly import build_rank, run_initialization_hook


def make_model(config):
    return nn.Linear(1, 1)


def make_data(config):
    x = torch.arange(32, dtype=torch.float32).reshape(-1, 1) / 32
    data = TensorDataset(x, 2 * x + 5)
    return DataLoader(data, batch_size=config.get(BATCH_SIZE, 8)), DataLoader(data, batch_size=8)


def make_optimizer(model, config):
    return torch.optim.SGD(model.parameters(), lr=config.get("lr", 0.1), momentum=0.9)


def make_scheduler(optimizer, config):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


CREATORS = {
    "model_creator": make_model,
    "data_creator": make_data,
    "optimizer_creator": make_optimizer,
    "loss_creator": nn.MSELoss,
}


def rank(config=None, *, settings=None, **spec):
    return OneRank(
        build_rank(
            BuildSpec(config=config or {}, settings=TrainSettings(**(settings or {})), **spec),
            collective=SingleCollective(),
            device=torch.device("cpu"),
            local_rank=0,
            progress=Progress(),
        ),
        gate=OpenGate(),
    )


class Custom(TrainingOperator):
    """Needs nothing of what is registered."""

    def train_epoch(self, iterator, info):
        return {"done": 1}


# ---------------------------------------------------------------------------------------------- registration


@pytest.mark.parametrize("container", [tuple, list])
@pytest.mark.parametrize(("models", "optimizers", "schedulers"), list(itertools.product((1, 2), (1, 2), (0, 1, 2))))
@pytest.mark.parametrize("criterion", [None, nn.MSELoss()])
def test_register_returns_the_shapes_it_was_given(models, optimizers, schedulers, criterion, container):
    returned = {}

    class Matrix(Custom):
        def setup(self, config):
            made = [nn.Linear(1, 1) for _ in range(models)]
            steps = [torch.optim.SGD(made[0].parameters(), lr=0.1) for _ in range(optimizers)]
            rates = [torch.optim.lr_scheduler.StepLR(steps[0], 1) for _ in range(schedulers)]

            def shape(members):
                return members[0] if len(members) == 1 else container(members)

            given = {"models": shape(made), "optimizers": shape(steps)}
            if criterion is not None:
                given["criterion"] = criterion
            if schedulers:
                given["schedulers"] = shape(rates)
            returned["given"], returned["back"] = list(given.values()), self.register(**given)

    one = rank(training_operator_cls=Matrix, settings={"scheduler_step_freq": "epoch"})
    assert returned["back"] == tuple(returned["given"])
    assert [type(back) for back in returned["back"]] == [type(given) for given in returned["given"]]
    assert one.train().metrics["done"] == 1
    facts = one.facts()
    assert (facts["models"], facts["optimizers"], facts["schedulers"]) == (models, optimizers, schedulers)


@pytest.mark.parametrize(("models", "optimizers", "schedulers"), list(itertools.product((1, 2), (1, 2), (0, 1, 2))))
@pytest.mark.parametrize("generation", [1, 2])
def test_creators_attach_singular_and_plural(models, optimizers, schedulers, generation):
    def several(make, count):
        made = [make() for _ in range(count)]
        return made[0] if count == 1 else tuple(made)

    def first(members):
        return members[0] if isinstance(members, tuple) else members

    creators = {
        "model_creator": lambda config: several(lambda: nn.Linear(1, 1), models),
        "optimizer_creator": lambda made, config: several(lambda: make_optimizer(first(made), config), optimizers),
        "data_creator": make_data,
    }
    if schedulers:
        creators["scheduler_creator"] = lambda made, config: several(
            lambda: make_scheduler(first(made), config), schedulers
        )

    class Second(TrainingOperator.from_creators(**creators)):
        train_epoch = Custom.train_epoch

    spec = {"training_operator_cls": Custom, **creators} if generation == 1 else {"training_operator_cls": Second}
    operator = rank(settings={"scheduler_step_freq": "epoch"}, **spec).operator
    assert isinstance(operator.model, nn.Linear)
    assert isinstance(operator.optimizer, torch.optim.SGD)
    assert (operator.scheduler is None) == (schedulers == 0)
    assert operator.criterion is None
    for plural, count in (
        (operator.models, models),
        (operator.optimizers, optimizers),
        (operator.schedulers, schedulers),
    ):
        if generation == 1:
            assert isinstance(plural, list)
            assert len(plural) == count
        elif count == 2:
            assert isinstance(plural, tuple)
            assert len(plural) == 2
        elif count == 1:
            assert not isinstance(plural, list | tuple)


def test_iterable_model_and_optimizer_are_single_components():
    class IterableOptimizer(torch.optim.SGD):
        def __iter__(self):
            return iter(())

    class Iterable(TrainingOperator):
        def setup(self, config):
            model = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1))
            optimizer = IterableOptimizer(model.parameters(), lr=0.05)
            self.model, self.optimizer, self.criterion = self.register(
                models=model, optimizers=optimizer, criterion=nn.MSELoss()
            )
            train, validation = make_data(config)
            self.register_data(train_loader=train, validation_loader=validation)

    one = rank(training_operator_cls=Iterable)
    losses = [one.train().metrics["train_loss"] for _ in range(4)]
    assert losses[-1] < losses[0]
    assert isinstance(one.get_model(), nn.Sequential)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"models": 5}, TypeError, "must be an nn.Module.*got 5 of type int"),
        ({"models": [nn.Linear(1, 1), "x"]}, TypeError, "got 'x' of type str at place 1"),
        ({"models": []}, TypeError, "got an empty list"),
        ({"models": None}, TypeError, "got None of type NoneType"),
        ({"optimizers": 1}, TypeError, "must be a torch optimizer"),
        ({"schedulers": 1}, TypeError, "must be a learning rate scheduler"),
        ({"ddp_args": [1]}, ValueError, "ddp_args needs to be a dict object"),
        ({"apex_args": {}}, TypeError, "precision="),
        ({"scheduler": 1}, TypeError, "use schedulers="),
        ({"train_loader": []}, TypeError, "register_data"),
        ({"modles": 1}, TypeError, "does not take 'modles'"),
    ],
)
def test_register_refuses_what_it_cannot_use(arguments, error, message):
    class Wrong(TrainingOperator):
        def setup(self, config):
            model = nn.Linear(1, 1)
            self.register(**{"models": model, "optimizers": make_optimizer(model, {}), **arguments})

    with pytest.raises(error, match=message):
        rank(training_operator_cls=Wrong)


def test_scheduler_needs_a_step_frequency():
    with pytest.raises(ValueError, match="scheduler_step_freq of TorchTrainer is None"):
        rank(**CREATORS, scheduler_creator=make_scheduler)


def test_setup_must_be_implemented():
    with pytest.raises(NotImplementedError, match="must implement setup"):
        rank(training_operator_cls=TrainingOperator)


@pytest.mark.parametrize("name", ["model", "optimizer", "criterion"])
def test_built_in_step_says_what_is_not_set(name):
    class Forgetful(TrainingOperator):
        def setup(self, config):
            self.model, self.optimizer, self.criterion = make_model({}), None, nn.MSELoss()
            self.optimizer = make_optimizer(self.model, {})
            delattr(self, name)
            self.register_data(train_loader=make_data({})[0])

    with pytest.raises(RuntimeError, match=rf"Either set self\.{name} in setup function or override this method"):
        rank(training_operator_cls=Forgetful).train()


def test_operator_properties():
    operator = rank({"lr": 0.5}, **CREATORS, settings={"use_tqdm": True}).operator
    assert operator.device == torch.device("cpu")
    assert operator.device_ids is None
    assert (operator.world_rank, operator.local_rank, operator.world_size) == (0, 0, 1)
    assert (operator.use_gpu, operator.use_fp16, operator.use_fp16_native, operator.use_fp16_apex) == (False,) * 4
    assert operator.use_tqdm
    assert operator.scheduler_step_freq is None
    assert len(operator.train_loader) == 4
    assert operator.train_loader.batch_size == 8
    with operator._amp.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_config_is_the_same_object_in_setup_and_the_users_is_left_alone():
    class Writer(Custom):
        def setup(self, config):
            config["written"] = 1
            assert config is self.config

    config = {"lr": 1}
    assert rank(config, training_operator_cls=Writer).operator.config["written"] == 1
    assert config == {"lr": 1}


@pytest.mark.parametrize(("size", "world"), [(8, 2), (21, 2), (7, 4), (3, 3)])
def test_global_batch_size_is_split_exactly(size, world):
    shares = [rank_config({BATCH_SIZE: size}, rank=r, world_size=world)[BATCH_SIZE] for r in range(world)]
    assert sum(shares) == size
    assert shares == sorted(shares, reverse=True)
    assert max(shares) - min(shares) <= 1


def test_global_batch_smaller_than_the_ranks_is_refused():
    with pytest.raises(ValueError, match=r"at least num_workers=4.*got 3"):
        rank_config({BATCH_SIZE: 3}, rank=0, world_size=4)


class AttributeDict(dict):
    """Keys are attributes too, as in EasyDict and the like."""

    def __getattr__(self, name):
        return self[name]

    __setattr__ = dict.__setitem__


class Frozen(Mapping):
    """Takes no new values, as frozendict."""

    def __init__(self, values):
        self._values = dict(values)

    def __getitem__(self, key):
        return self._values[key]

    def __iter__(self):
        return iter(self._values)

    def __len__(self):
        return len(self._values)


class ReadOnly(MutableMapping, Frozen):
    """Could take values, but is locked, as a read-only OmegaConf."""

    def __setitem__(self, key, value):
        raise RuntimeError("read-only")

    __delitem__ = __setitem__


@dataclass
class Depth:
    layers: int


class Plain:
    """No mapping by name, as the ConfigDict of ml_collections."""

    def __init__(self, values):
        self.values = dict(values)
        self.keys, self.items, self.get = self.values.keys, self.values.items, self.values.get

    def __contains__(self, key):
        return key in self.values

    def __getitem__(self, key):
        return self.values[key]

    def __setitem__(self, key, value):
        self.values[key] = value

    def __copy__(self):
        return type(self)(self.values)


@pytest.mark.parametrize(
    "kind", [dict, OrderedDict, AttributeDict, UserDict, ChainMap, MappingProxyType, Frozen, ReadOnly, Plain]
)
def test_a_config_of_any_kind_stays_of_its_kind(kind):
    config = kind({"lr": 0.5, BATCH_SIZE: 5, "of": kind({"depth": 2})})
    check_counts(2, 1, config)
    mine = [rank_config(config, rank=at, world_size=2) for at in range(2)]
    assert [type(one) for one in mine] == [kind, kind]
    assert [one[BATCH_SIZE] for one in mine] == [3, 2]
    assert config[BATCH_SIZE] == 5
    assert [(one["lr"], type(one["of"])) for one in mine] == [(0.5, kind)] * 2
    other = kind({"lr": 0.1, BATCH_SIZE: 5, "of": kind({"depth": 2})})
    told = differences(fingerprint({"config": config}), fingerprint({"config": other}))
    assert len(told) == 1, "a resumed run is compared by it"
    assert "0.5" in told[0]
    without = kind({"lr": 0.5})
    assert type(rank_config(without, rank=0, world_size=2)) is kind


def test_an_object_that_is_no_mapping_is_told_how_to_become_one():
    for given, way in (
        (Namespace(lr=1), "pass vars"),
        (Depth(2), "pass dataclasses.asdict"),
        (Depth, "must be a dict"),
    ):
        with pytest.raises(TypeError, match=way):
            check_counts(1, 1, given)


# -------------------------------------------------------------------------------------------------- creators


def test_creators_are_called_in_order_with_equal_seeds():
    calls = []

    def note(name, value):
        calls.append((name, random.random(), torch.rand(1).item()))
        return value

    model = nn.Linear(1, 1)
    optimizer = make_optimizer(model, {})
    rank(
        data_creator=lambda config: note("data", make_data(config)),
        model_creator=lambda config: note("model", model),
        optimizer_creator=lambda made, config: note("optimizer", optimizer),
        scheduler_creator=lambda made, config: note("scheduler", make_scheduler(optimizer, config)),
        loss_creator=lambda config: note("loss", nn.MSELoss()),
        settings={"scheduler_step_freq": "epoch", "seed": 5},
    )
    assert [name for name, *_ in calls] == ["data", "model", "optimizer", "scheduler", "loss"]
    assert len({call[1:] for call in calls}) == 1
    seed_all(5)
    assert calls[0][1:] == (random.random(), torch.rand(1).item())


def test_scheduler_without_loss_creator_is_not_taken_for_the_criterion():
    class Own(TrainingOperator):
        def train_batch(self, batch, batch_info):
            self.optimizer.step()
            return {"loss": 1.0}

    creators = {**CREATORS, "loss_creator": None, "scheduler_creator": make_scheduler}
    one = rank(training_operator_cls=Own, settings={"scheduler_step_freq": "epoch"}, **creators)
    one.train()
    assert one.operator.criterion is None
    assert one.operator.optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"model_creator": lambda config: None},
            TypeError,
            "what model_creator .* returns must be an nn.Module.*got None",
        ),
        ({"model_creator": lambda config: nn.Linear}, TypeError, "what model_creator"),
        (
            {"optimizer_creator": lambda m, config: m},
            TypeError,
            "what optimizer_creator .* returns must be a torch opt",
        ),
        ({"scheduler_creator": lambda o, config: 3}, TypeError, "what scheduler_creator .* got 3"),
        ({"loss_creator": lambda config: None}, TypeError, "what loss_creator .* got None"),
        ({"loss_creator": nn.MSELoss()}, ValueError, "itself; pass MSELoss"),
        ({"data_creator": lambda config: None}, TypeError, "what data_creator .* got None"),
        ({"data_creator": lambda config: ()}, ValueError, "must hold a train loader"),
        ({"data_creator": lambda config: ([1],) * 3}, ValueError, "Number of loaders must be <= 2. Got 3"),
        ({"data_creator": lambda config: DataLoader(TensorDataset(torch.ones(0)))}, ValueError, "has no batches"),
        ({"data_creator": lambda config: 5}, TypeError, "something to iterate over.*got 5"),
        ({"data_creator": 3}, ValueError, "data_creator must be a function or None, got 3"),
        ({"model_creator": None}, ValueError, "model_creator must be given together with"),
        ({"loss_creator": None}, ValueError, "needs a loss, but loss_creator is None"),
        ({"training_operator_cls": int}, TypeError, "must be a subclass of torchtrainer.TrainingOperator"),
        (
            {"training_operator_cls": TrainingOperator.from_creators(make_model, make_optimizer)},
            ValueError,
            "remove those",
        ),
    ],
)
def test_wrong_creators_are_named(change, error, message):
    with pytest.raises(error, match=message):
        rank(settings={"scheduler_step_freq": "epoch"}, **{**CREATORS, **change})


def test_from_creators_checks_its_arguments():
    with pytest.raises(ValueError, match="model_creator must be a function, got 3"):
        TrainingOperator.from_creators(3, make_optimizer)
    with pytest.raises(ValueError, match="needs model_creator and optimizer_creator, or training_operator_cls"):
        rank()


@pytest.mark.parametrize("place", ["models", "optimizers"])
def test_built_in_step_refuses_what_it_would_not_train(place):
    change = {
        "models": {
            "model_creator": lambda config: (nn.Linear(1, 1), nn.Linear(1, 1)),
            "optimizer_creator": lambda models, config: make_optimizer(models[0], config),
        },
        "optimizers": {"optimizer_creator": lambda m, config: [make_optimizer(m, {}), make_optimizer(m, {})]},
    }[place]
    for spec in (
        {**CREATORS, **change},
        {"training_operator_cls": TrainingOperator.from_creators(**{**CREATORS, **change})},
    ):
        with pytest.raises(ValueError, match=f"returned 2 {place}; pass training_operator_cls="):
            rank(**spec)


@pytest.mark.parametrize(
    "loader_count",
    [lambda loader: loader, lambda loader: (loader,), lambda loader: [loader], lambda loader: (loader, None)],
)
def test_one_loader_in_any_container_is_the_train_loader(loader_count):
    loader = make_data({})[0]
    assert check_loaders(loader_count(loader), "it") == (loader, None)
    one = rank(**{**CREATORS, "data_creator": lambda config: loader_count(loader)})
    assert one.train().metrics["num_samples"] == 32
    with pytest.raises(RuntimeError, match="does not have any registered validation loader"):
        one.validate()


class OwnLoss(nn.Module):
    def __init__(self, weight=None):
        super().__init__()
        assert weight is None


def test_loss_creators_of_every_kind():
    config = {"smoothing": 0.5}
    assert isinstance(make_loss(nn.CrossEntropyLoss, config), nn.CrossEntropyLoss)
    assert isinstance(make_loss(OwnLoss, config), OwnLoss)
    assert isinstance(make_loss(lambda: nn.MSELoss(reduction="sum"), config), nn.MSELoss)
    assert make_loss(lambda c: nn.CrossEntropyLoss(label_smoothing=c["smoothing"]), config).label_smoothing == 0.5
    assert make_loss(lambda c=None: nn.CrossEntropyLoss(label_smoothing=c["smoothing"]), config).label_smoothing == 0.5


def test_setup_of_a_subclass_of_a_creator_class_runs_the_creators_through_super():
    class Sub(TrainingOperator.from_creators(**CREATORS)):
        def setup(self, config):
            super().setup(config)
            self.mine = self.model

    operator = rank(training_operator_cls=Sub).operator
    assert isinstance(operator, CreatorOperator)
    assert operator.mine is operator.model


def test_hooks_of_the_class_that_from_creators_is_called_on_are_kept():
    class Base(TrainingOperator):
        def train_batch(self, batch, batch_info):
            return {**super().train_batch(batch, batch_info), "mine": 1}

    assert rank(training_operator_cls=Base.from_creators(**CREATORS)).train().metrics["mine"] == 1


def test_first_generation_operator_has_everything_before_setup():
    class First(TrainingOperator):
        def setup(self, config):
            self.steps = len(self.train_loader)
            assert self.models == [self.model]

    assert rank(training_operator_cls=First, **CREATORS).operator.steps == 4


def test_initialization_hook_is_run():
    ran = []
    run_initialization_hook(BuildSpec(initialization_hook=lambda: ran.append(1)))
    run_initialization_hook(BuildSpec())
    assert ran == [1]


# --------------------------------------------------------------------------------------------- the built-in step


def test_built_in_loop_equals_a_hand_written_one_to_the_bit():
    one = rank(**{**CREATORS, "data_creator": make_data})
    results = [one.train().metrics["train_loss"] for _ in range(2)]
    seed_all(0)
    model = make_model({})
    optimizer, losses = make_optimizer(model, {}), []
    for _ in range(2):
        total = 0.0
        for x, y in make_data({})[0]:
            loss = nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(x)
        losses.append(total / 32)
    assert results == losses
    assert torch.equal(one.get_model().weight, model.weight)


def test_accuracy_is_there_for_classes_only():
    x = torch.eye(4)
    data = DataLoader(TensorDataset(x, torch.tensor([0, 1, 2, 0])), batch_size=3)

    def fixed(config):
        model = nn.Linear(4, 4, bias=False)
        nn.init.eye_(model.weight)
        return model

    one = rank(
        **{
            **CREATORS,
            "model_creator": fixed,
            "data_creator": lambda c: (data, data),
            "loss_creator": nn.CrossEntropyLoss,
        }
    )
    metrics = one.validate().metrics
    assert metrics["val_accuracy"] == pytest.approx(0.75)
    assert metrics["last_val_accuracy"] == 0.0
    assert metrics["num_samples"] == 4
    assert "val_accuracy" not in rank(**CREATORS).validate().metrics


def test_several_inputs_and_dict_batches():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, a, b):
            return self.layer(a + b)

    x = torch.ones(4, 1)
    tuples = DataLoader(TensorDataset(x, x, x), batch_size=2)
    dicts = [{"b": x, "label": x, "a": x}, {"a": x, "b": x, "label": x}]
    for loader, samples in ((tuples, 4), (dicts, 8)):
        metrics = (
            rank(**{**CREATORS, "model_creator": lambda c: Sum(), "data_creator": lambda c, loader=loader: [loader]})
            .train()
            .metrics
        )
        assert metrics["num_samples"] == samples


def test_clip_gradients_sees_whole_unscaled_gradients():
    norms = []

    class Clip(TrainingOperator):
        def clip_gradients(self):
            norms.append(float(nn.utils.clip_grad_norm_(self.model.parameters(), 1e-6)))

    for precision in ("fp32", "fp16"):
        one = rank(training_operator_cls=Clip, settings={"precision": precision}, **CREATORS)
        before = one.get_model().weight.clone()
        for _ in range(2):  # with fp16 the first steps overflow and are skipped, until the loss scale has come down
            one.train()
        assert torch.allclose(one.get_model().weight, before, atol=1e-4)
    assert norms[7] == pytest.approx(norms[15], rel=1e-2)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_precision_of_the_forward_pass(precision, dtype):
    seen = []

    class Spy(nn.Linear):
        def forward(self, value):
            output = super().forward(value)
            seen.append(output.dtype)
            return output

    one = rank(settings={"precision": precision}, **{**CREATORS, "model_creator": lambda c: Spy(1, 1)})
    losses = [one.train().metrics["train_loss"] for _ in range(5)]
    one.validate()
    assert set(seen) == {dtype}
    assert losses[-1] < losses[0]
    assert one.operator.model.weight.dtype == torch.float32
    assert one.operator.use_fp16_native == (precision != "fp32")
    assert ("amp_native" in one.state_dict()) == (precision == "fp16")


def test_hook_written_for_native_amp_works_in_every_precision():
    class Amp(TrainingOperator):
        def train_batch(self, batch, batch_info):
            x, y = batch
            with self._amp.autocast():
                loss = self.criterion(self.model(x), y)
            self.optimizer.zero_grad()
            self._amp_scaler.scale(loss).backward()
            self._amp_scaler.unscale_(self.optimizer)
            self._amp_scaler.step(self.optimizer)
            self._amp_scaler.update()
            return {"loss": loss.item(), "num_samples": len(y)}

    for precision in ("fp32", "bf16", "fp16"):
        one = rank({"lr": 0.01}, training_operator_cls=Amp, settings={"precision": precision}, **CREATORS)
        assert one.train().metrics["loss"] > one.train().metrics["loss"]


def test_own_num_samples_weighs_and_its_absence_means_the_batch():
    class Own(TrainingOperator):
        def train_batch(self, batch, batch_info):
            return {"index": batch_info["batch_idx"]} | ({"num_samples": 2} if self.config.get("own") else {})

    assert rank(training_operator_cls=Own, **CREATORS).train().metrics["num_samples"] == 32
    result = rank({"own": True}, training_operator_cls=Own, **CREATORS).train()
    assert (result.metrics["num_samples"], result.metrics["index"], result.metrics["last_index"]) == (8, 1.5, 3)
    assert result.weights == {"index": 8.0, "last_index": 2.0}


# -------------------------------------------------------------------------------------------------------- state


WITH_SCHEDULER = {**CREATORS, "scheduler_creator": make_scheduler}
EPOCHS = {"scheduler_step_freq": "epoch"}


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    members = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [found for member in members for found in tensors(member)]


def test_state_round_trip_goes_on_with_the_same_bits():
    one = rank(**WITH_SCHEDULER, settings=EPOCHS)
    one.train()
    state = one.state_dict()
    assert list(state) == ["epoch", "global_step", "operator", "models", "optimizers", "schedulers"]
    assert (state["epoch"], state["global_step"], state["operator"]) == (1, 4, None)
    other = rank(**WITH_SCHEDULER, settings=EPOCHS)
    other.train(num_steps=2)
    other.load_state_dict(state)
    assert one.train().metrics == other.train().metrics
    assert all(map(torch.equal, tensors(one.state_dict()), tensors(other.state_dict())))


def test_state_shares_no_memory_with_the_training_in_either_direction():
    one = rank(**WITH_SCHEDULER, settings=EPOCHS)
    one.train()
    state = one.state_dict()
    before = [tensor.clone() for tensor in tensors(state)]
    one.train()
    assert all(map(torch.equal, tensors(state), before))
    one.load_state_dict(state)
    one.train()
    assert all(map(torch.equal, tensors(state), before))


def test_model_is_a_copy():
    one = rank(**CREATORS)
    model = one.get_model(to_cpu=False)
    before = model.weight.clone()
    one.train()
    assert torch.equal(model.weight, before)
    assert model is not one.operator.model


def test_two_models_come_back_as_a_list_and_round_trip():
    class Pair(TrainingOperator):
        def setup(self, config):
            models = (nn.Linear(1, 1), nn.Linear(1, 2))
            optimizers = tuple(make_optimizer(model, {}) for model in models)
            self.models, self.optimizers = self.register(models=models, optimizers=optimizers)

    one, other = rank(training_operator_cls=Pair, settings={"seed": 1}), rank(training_operator_cls=Pair)
    other.load_state_dict(one.state_dict())
    assert isinstance(other.get_model(), list)
    assert [type(model) for model in other.get_model()] == [nn.Linear, nn.Linear]
    assert all(map(torch.equal, tensors(one.state_dict()), tensors(other.state_dict())))


def test_loading_gives_up_the_pass_that_was_running():
    one = rank(**CREATORS)
    one.train(num_steps=6)
    state = one.state_dict()
    one.load_state_dict(state)
    metrics = one.train().metrics
    assert (metrics["batch_count"], metrics["epoch"]) == (4, state["epoch"] + 1)


def test_own_state_is_handed_back_last_and_none_included():
    loaded = []

    class Own(TrainingOperator):
        def state_dict(self):
            return {"kept": self.model.weight}

        def load_state_dict(self, state_dict):
            loaded.append((state_dict, self.model.weight.detach().clone()))

    one = rank(training_operator_cls=Own, **CREATORS)
    state = one.state_dict()
    one.train()
    one.load_state_dict(state)
    assert torch.equal(loaded[0][0]["kept"], loaded[0][1])
    one.load_state_dict({**state, "operator": None})
    assert loaded[1][0] is None


def test_loss_scale_is_saved():
    one = rank(**CREATORS, settings={"precision": "fp16"})
    one.train()
    state = one.state_dict()
    state["amp_native"]["scale"] = 8.0
    other = rank(**CREATORS, settings={"precision": "fp16"})
    other.load_state_dict(state)
    assert other.operator._amp_scaler.get_scale() == 8.0
    del state["amp_native"]
    other.load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {**state, "models": []}, "the state has 0 models, this trainer has 1"),
        (lambda state: {**state, "optimizers": state["optimizers"] * 2}, "the state has 2 optimizers"),
        (lambda state: {**state, "schedulers": []}, "the state has 0 schedulers, this trainer has 1"),
        (lambda state: {"weights": 1}, r"takes what state_dict returned.*got \['weights'\]"),
        (lambda state: None, "got NoneType"),
    ],
)
def test_state_of_another_trainer_is_refused(change, message):
    one = rank(**WITH_SCHEDULER, settings=EPOCHS)
    with pytest.raises(ValueError, match=message):
        one.load_state_dict(change(one.state_dict()))


def test_state_of_another_model_names_the_first_difference():
    state = rank(**{**CREATORS, "model_creator": lambda c: nn.Linear(1, 3)}).state_dict()
    with pytest.raises(
        RuntimeError, match=r"model 0 of 1, Linear: weight has shape \(3, 1\) in the state and \(1, 1\)"
    ):
        rank(**CREATORS).load_state_dict(state)


def test_calls_on_operator_and_worker():
    one = rank(**CREATORS)
    assert one.apply_operator(lambda operator: operator.world_rank) == 0
    assert one.apply_worker(lambda: 5) == 5
    one.close()


def test_isolated_rng_leaves_the_generators_as_they_were():
    seed_all(3)
    with isolated_rng():
        first = random.random(), torch.rand(1).item()
    assert (random.random(), torch.rand(1).item()) == first


def test_progress_shows_the_position():
    one = rank(**CREATORS)
    one.train(num_steps=3)
    progress = internals(one.operator).context.progress
    assert (progress.epoch, progress.step, progress.batch, progress.batches, progress.samples) == (1, 3, 3, 3, 24)
    assert progress.phase == "idle"
    assert progress.loss([0]) > 0


def test_compiled_model_keeps_its_keys_and_can_be_copied():
    compiled = []

    def backend(graph, inputs):
        compiled.append(len(inputs))
        return graph.forward

    one = rank(**CREATORS, settings={"compile": {"backend": backend}})
    one.train(num_steps=2)
    assert compiled
    assert list(one.state_dict()["models"][0]) == ["weight", "bias"]
    assert type(one.get_model()) is nn.Linear


def test_two_models_with_a_step_of_their_own():
    class Adversaries(TrainingOperator):
        def setup(self, config):
            models = tuple(nn.Linear(1, 1) for _ in range(2))
            self.models, self.optimizers = self.register(
                models=models, optimizers=[make_optimizer(model, {"lr": 0.01}) for model in models]
            )
            self.register_data(train_loader=make_data(config)[0])

        def train_batch(self, batch, batch_info):
            x, y = batch
            stats = {"num_samples": len(x)}
            for name, model, optimizer in zip("gd", self.models, self.optimizers, strict=True):
                loss = nn.functional.mse_loss(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                stats[f"loss_{name}"] = loss.item()
            return stats

    one = rank(training_operator_cls=Adversaries)
    first, second = one.train().metrics, one.train().metrics
    assert {"loss_g", "last_loss_g", "loss_d", "last_loss_d"} <= set(first)
    assert second["loss_g"] < first["loss_g"]
    assert second["loss_d"] < first["loss_d"]
