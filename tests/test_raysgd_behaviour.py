"""What programs written for RaySGD rely on, through the public interface and with real worker processes.

The first half has a counterpart of every RaySGD test of pure trainer behaviour, with the assertions that those lacked; the
second half the idioms that its users' operators are written in. Its tests of failures are not here: they concern recovery.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, TensorDataset

from torchtrainer import BATCH_SIZE, TrainerClosedError, TrainingOperator

SAMPLES, BATCH = 40, 4
WORKERS = {"local": {"num_workers": 1, "use_local": True}, "1": {"num_workers": 1}, "2": {"num_workers": 2}}


def line(samples=SAMPLES):
    """y = 2x + 5; x in [0, 1)."""
    x = torch.arange(samples, dtype=torch.float32).reshape(-1, 1) / samples
    return TensorDataset(x, 2 * x + 5)


def model_creator(config):
    return nn.Linear(1, 1)


def optimizer_creator(model, config):
    return torch.optim.SGD(model.parameters(), lr=config.get("lr", 0.1))


def data_creator(config):
    batch = config.get(BATCH_SIZE, BATCH)
    return DataLoader(line(), batch_size=batch), DataLoader(line(), batch_size=batch)


def scheduler_creator(optimizer, config):
    return StepLR(optimizer, step_size=1, gamma=0.5)


CREATORS = {
    "model_creator": model_creator,
    "optimizer_creator": optimizer_creator,
    "data_creator": data_creator,
    "loss_creator": nn.MSELoss,
}


class Line(TrainingOperator):
    """The second generation: everything in setup."""

    def setup(self, config):
        model = model_creator(config)
        self.model, self.optimizer, self.criterion = self.register(
            models=model, optimizers=optimizer_creator(model, config), criterion=nn.MSELoss()
        )
        train, validation = data_creator(config)
        self.register_data(train_loader=train, validation_loader=validation)


@pytest.fixture
def make(trainers):
    """Makes trainers that are shut down at the end of the test; without arguments they learn a line with creators."""

    def make(operator=None, **arguments):
        parts = {"training_operator_cls": operator} if operator is not None else CREATORS
        return trainers(**{**parts, **arguments})

    return make


@pytest.fixture(params=list(WORKERS))
def workers(request) -> dict[str, Any]:
    """One rank in this process, one in another, and two."""
    return dict(WORKERS[request.param])


@pytest.fixture(params=["local", "2"])
def two_or_local(request) -> dict[str, Any]:
    """One rank in this process, and two in others: where it does not matter that one rank can have a process too."""
    return dict(WORKERS[request.param])


def same(first, second) -> bool:
    """Whether two states are equal to the bit."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def unwrapped(model):
    """The user's own module."""
    return model.module if isinstance(model, DistributedDataParallel) else model


# ------------------------------------------------------------------------------ RaySGD's tests, in the order of its files


def test_a_function_runs_in_every_worker(make, workers) -> None:
    trainer = make(**workers)
    ranks = workers["num_workers"]
    pids = trainer.apply_all_workers(os.getpid)
    assert len(set(pids)) == ranks
    assert (os.getpid() in pids) == workers.get("use_local", False)
    trainer.apply_all_workers(lambda: os.environ.__setitem__("FOUND_BY_A_LATER_CALL", str(os.getpid())))
    assert trainer.apply_all_workers(lambda: os.environ.pop("FOUND_BY_A_LATER_CALL")) == [str(pid) for pid in pids]


@pytest.mark.parametrize(("frequency", "halvings"), [("epoch", 1), ("batch", SAMPLES // BATCH), ("manual", 0)])
def test_schedulers_step_as_often_as_they_are_told_to(make, workers, frequency, halvings) -> None:
    trainer = make(scheduler_creator=scheduler_creator, scheduler_step_freq=frequency, **workers)
    ranks = workers["num_workers"]
    trainer.train()
    steps = halvings // ranks if frequency == "batch" else halvings
    rates = trainer.apply_all_operators(lambda operator: operator.optimizer.param_groups[0]["lr"])
    assert rates == [pytest.approx(0.1 * 0.5**steps)] * ranks


class Scheduled(Line):
    def setup(self, config):
        super().setup(config)
        self.register(models=nn.Linear(1, 1), optimizers=self.optimizer, schedulers=StepLR(self.optimizer, 1))


@pytest.mark.parametrize("frequency", [None, "sometimes"])
def test_a_scheduler_needs_to_know_when_to_step(make, two_or_local, frequency) -> None:
    with pytest.raises(ValueError, match="scheduler_step_freq"):
        make(scheduler_creator=scheduler_creator, scheduler_step_freq=frequency, **two_or_local)
    with pytest.raises(ValueError, match="scheduler_step_freq"):
        make(Scheduled, scheduler_step_freq=frequency, **two_or_local)


def test_a_profile_has_the_phases_of_training_and_validation(make, workers) -> None:
    trainer = make(**workers)
    trained = trainer.train(profile=True)["profile"]
    assert {"mean_fwd_s", "mean_grad_s", "mean_apply_s", "mean_train_epoch_s"} <= trained.keys()
    validated = trainer.validate(profile=True)["profile"]
    assert {"mean_eval_fwd_s", "mean_validation_s"} <= validated.keys()
    assert all(trained[name] > 0 for name in ("mean_fwd_s", "mean_grad_s", "mean_train_epoch_s"))
    assert validated["mean_validation_s"] >= validated["mean_eval_fwd_s"] > 0
    assert "profile" not in trainer.train()
    assert "profile" not in trainer.validate()


class Sizes(Line):
    """Notes how many samples each batch has."""

    def setup(self, config):
        self.sizes = []
        super().setup({**config, BATCH_SIZE: config[BATCH_SIZE]})
        self.register_data(train_loader=DataLoader(line(600), batch_size=config[BATCH_SIZE]))

    def train_batch(self, batch, batch_info):
        self.sizes.append(len(batch[0]))
        return super().train_batch(batch, batch_info)


def test_a_global_batch_is_split_exactly(make) -> None:
    trainer = make(Sizes, config={BATCH_SIZE: 21}, num_workers=2)
    assert trainer.apply_all_operators(lambda operator: operator.config[BATCH_SIZE]) == [11, 10]
    stats = trainer.train()
    assert (stats["num_samples"], stats["batch_count"]) == (600, 29)
    first, second = trainer.apply_all_operators(lambda operator: operator.sizes)
    assert first == [11] * 28 + [6]
    assert second == [10] * 28 + [6]


def test_results_of_every_rank_come_in_a_list(make) -> None:
    pair = [make(num_workers=2, config={BATCH_SIZE: 7}) for _ in range(2)]
    for method, loss in (("train", "train_loss"), ("validate", "val_loss")):
        whole = getattr(pair[0], method)()
        parts = getattr(pair[1], method)(reduce_results=False)
        assert len(parts) == 2
        assert [part["num_samples"] for part in parts] == [23, 17]  # 7 = 4 + 3, and 5 = 3 + 2 at the end
        assert {part["batch_count"] for part in parts} == {6}
        assert parts[0][loss] != parts[1][loss]
        assert whole["num_samples"] == 40
        assert whole[loss] == pytest.approx((23 * parts[0][loss] + 17 * parts[1][loss]) / 40)
        assert whole["last_" + loss] == pytest.approx((3 * parts[0]["last_" + loss] + 2 * parts[1]["last_" + loss]) / 5)


class Scores(Line):
    """A metric of its own: known for each rank and batch."""

    def score(self, batch_info):
        return self.config["scores"][batch_info["batch_idx"]] + 100 * self.world_rank

    def train_batch(self, batch, batch_info):
        super().train_batch(batch, batch_info)
        return {"score": self.score(batch_info), "num_samples": len(batch[0])}

    def validate_batch(self, batch, batch_info):
        stats = super().validate_batch(batch, batch_info)
        return {"score": self.score(batch_info), "num_samples": stats["num_samples"]}


@pytest.mark.parametrize("method", ["train", "validate"])
def test_metrics_are_means_and_latest_values(make, workers, method) -> None:
    ranks = workers["num_workers"]
    scores = list(range(SAMPLES // BATCH // ranks))
    stats = getattr(make(Scores, config={"scores": scores}, **workers), method)()
    rank_mean = sum(100 * rank for rank in range(ranks)) / ranks
    assert stats["score"] == pytest.approx(sum(scores) / len(scores) + rank_mean)
    assert stats["last_score"] == pytest.approx(scores[-1] + rank_mean)
    assert (stats["num_samples"], stats["batch_count"]) == (SAMPLES, len(scores))


@pytest.mark.parametrize("method", ["train", "validate"])
def test_a_nan_shows_in_the_mean_and_not_in_the_latest_value(make, two_or_local, method) -> None:
    batches = SAMPLES // BATCH // two_or_local["num_workers"]
    trainer = make(Scores, config={"scores": [1.0, math.nan] + [3.0] * (batches - 2)}, **two_or_local)
    stats = getattr(trainer, method)()
    assert math.isnan(stats["score"])
    assert stats["last_score"] == pytest.approx(3.0 + 50 * (two_or_local["num_workers"] - 1))


class Plateau(Line):
    def setup(self, config):
        super().setup(config)
        self.scheduler = ReduceLROnPlateau(self.optimizer, patience=0)
        self.register(models=self.model, optimizers=self.optimizer, schedulers=self.scheduler)


def test_a_plateau_scheduler_steps_by_the_metric_it_is_given(make, workers) -> None:
    trainer = make(Plateau, scheduler_step_freq="manual", **workers)
    trainer.update_scheduler(metric=0.5)
    trainer.update_scheduler(0.7)
    found = trainer.apply_all_operators(lambda op: (op.scheduler.last_epoch, op.optimizer.param_groups[0]["lr"]))
    assert found == [(2, pytest.approx(0.01))] * workers["num_workers"]


@pytest.mark.parametrize(("before", "after"), [("1", "1"), ("1", "2"), ("2", "1"), ("2", "2"), ("local", "2")])
def test_a_saved_trainer_is_restored_in_another(make, tmp_path, before, after) -> None:
    saved, restored = make(**WORKERS[before], seed=1), make(**WORKERS[after], seed=2)
    saved.train()
    path = saved.save(tmp_path / "trainer.pt")
    assert path == str(tmp_path / "trainer.pt")
    assert not same(saved.state_dict(), restored.state_dict())
    restored.load(path)
    state = restored.state_dict()
    assert same(saved.state_dict(), state)
    assert same(saved.get_model().state_dict(), dict(restored.get_model().state_dict()))
    weights = restored.apply_all_operators(lambda operator: unwrapped(operator.model).state_dict())
    assert all(same(state["models"][0], one) for one in weights)


def test_models_are_wrapped_only_if_wanted(make, tmp_path, two_or_local) -> None:
    bare = make(wrap_ddp=False, **two_or_local)
    bare.train()
    path = bare.save(tmp_path / "bare.pt")
    assert bare.apply_all_operators(lambda operator: type(operator.model)) == [nn.Linear] * two_or_local["num_workers"]
    for other in (make(wrap_ddp=False, num_workers=2), make(num_workers=2), make(num_workers=1, use_local=True)):
        other.load(path)
        assert same(dict(other.get_model().state_dict()), dict(bare.get_model().state_dict()))
        assert other.train()["num_samples"] == SAMPLES


class OwnWrapper(Line):
    """The user's own wrapper around a model that was registered bare."""

    def setup(self, config):
        super().setup(config)
        self.model = DistributedDataParallel(self.model)


def test_with_own_wrapper_ranks_stay_alike(make) -> None:
    trainer = make(OwnWrapper, wrap_ddp=False, num_workers=2)
    trainer.train()
    first, second = trainer.apply_all_operators(lambda op: dict(op.model.module.state_dict()))
    assert same(first, second)
    assert not any(key.startswith("module.") for key in trainer.state_dict()["models"][0])


class Partial(nn.Module):
    """One of its layers gets no gradient."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(1, 1), nn.Linear(1, 1)

    def forward(self, x):
        return self.used(x)


class PartialLine(Line):
    def setup(self, config):
        super().setup(config)
        model = Partial()
        self.model, self.optimizer = self.register(
            models=model, optimizers=optimizer_creator(model, config), ddp_args={"find_unused_parameters": True}
        )


@pytest.mark.parametrize("where", ["register", "trainer"])
def test_arguments_reach_ddp(make, where) -> None:
    if where == "register":
        trainer = make(PartialLine, num_workers=2)
    else:
        trainer = make(model_creator=lambda config: Partial(), ddp_args={"find_unused_parameters": True}, num_workers=2)
    assert trainer.apply_all_operators(lambda operator: operator.model.find_unused_parameters) == [True, True]
    assert trainer.train()["num_samples"] == SAMPLES  # DDP fails in the second step without it


class IterableSGD(torch.optim.SGD):
    def __iter__(self):
        return iter(self.param_groups)


@pytest.mark.parametrize("generation", [1, 2])
def test_an_iterable_model_or_optimizer_is_one(make, two_or_local, generation) -> None:
    parts = {
        **CREATORS,
        "model_creator": lambda config: nn.Sequential(nn.Linear(1, 3), nn.Linear(3, 1)),
        "optimizer_creator": lambda model, config: IterableSGD(model.parameters(), lr=0.05),
    }
    operator = TrainingOperator.from_creators(**parts) if generation == 2 else None
    trainer = make(operator, **({} if operator else parts), **two_or_local)
    losses = [trainer.train()["train_loss"] for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]
    assert isinstance(trainer.get_model(), nn.Sequential)
    assert len(trainer.state_dict()["models"]) == len(trainer.state_dict()["optimizers"]) == 1


def test_a_single_step(make, two_or_local) -> None:
    stats = make(**two_or_local).train(num_steps=1)
    assert (stats["batch_count"], stats["num_samples"]) == (1, BATCH * two_or_local["num_workers"])


@pytest.mark.parametrize("use_fp16", [False, True])
def test_training_lowers_the_loss(make, workers, use_fp16) -> None:
    trainer = make(use_fp16=use_fp16, config={"lr": 0.05}, **workers)
    trained, validated = [], [trainer.validate()["val_loss"]]
    for _ in range(2):
        trained += [trainer.train()["train_loss"] for _ in range(3)]
        validated.append(trainer.validate()["val_loss"])
    assert trained == sorted(trained, reverse=True)
    assert validated == sorted(validated, reverse=True)
    assert validated[-1] < validated[0] / 4
    assert trainer.apply_all_operators(lambda op: op.use_fp16) == [use_fp16] * workers["num_workers"]
    assert next(trainer.get_model().parameters()).dtype == torch.float32


@pytest.mark.parametrize("force", [False, True])
def test_a_dead_trainer_refuses_everything(make, workers, force) -> None:
    trainer = make(**workers)
    trainer.train(num_steps=1)
    trainer.shutdown(force=force)
    for use in (
        trainer.train,
        trainer.validate,
        trainer.state_dict,
        lambda: trainer.apply_all_workers(os.getpid),
        lambda: trainer.load("nothing.pt"),
    ):
        with pytest.raises(TrainerClosedError, match="create a new TorchTrainer") as caught:
            use()
        assert isinstance(caught.value, RuntimeError)


class TwoModels(TrainingOperator):
    """Two models and optimizers with an epoch of its own."""

    def setup(self, config):
        models = nn.Linear(1, 1), nn.Linear(1, 1, bias=False)
        optimizers = tuple(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models)
        self.models, self.optimizers = self.register(models=models, optimizers=optimizers)
        self.register_data(train_loader=DataLoader(line(), batch_size=BATCH))

    def train_epoch(self, iterator, info):
        total = 0.0
        for x, y in iterator:
            for model, optimizer in zip(self.models, self.optimizers, strict=True):
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(model(x), y)
                loss.backward()
                optimizer.step()
                total += loss.item()
        return {"loss": total}


def test_two_models_train_and_their_state_goes_round(make, workers) -> None:
    first, second = make(TwoModels, **workers), make(TwoModels, **workers, seed=5)
    losses = [first.train()["loss"] for _ in range(2)]
    assert losses[1] < losses[0]
    state = first.state_dict()
    assert [list(model) for model in state["models"]] == [["weight", "bias"], ["weight"]]
    second.load_state_dict(state)
    assert same(second.state_dict(), state)
    assert [type(model) for model in second.get_model()] == [nn.Linear, nn.Linear]
    assert first.train()["loss"] == second.train()["loss"]
    assert same(first.state_dict(), second.state_dict())


MATRIX = list(itertools.product((1, 2), (1, 2), (1, 2)))


@pytest.mark.parametrize(("models", "optimizers", "schedulers"), MATRIX)
def test_every_number_of_components_arrives_in_its_shape(make, two_or_local, models, optimizers, schedulers) -> None:
    def several(members, count):
        return members[0] if count == 1 else tuple(members[:count])

    class Matrix(TrainingOperator):
        def setup(self, config):
            nets = [nn.Linear(1, 1) for _ in range(models)]
            steps = [torch.optim.SGD(nets[index % models].parameters(), lr=0.1) for index in range(optimizers)]
            rates = [StepLR(steps[index % optimizers], 1) for index in range(schedulers)]
            self.models, self.optimizers, self.schedulers = self.register(
                models=several(nets, models),
                optimizers=several(steps, optimizers),
                schedulers=several(rates, schedulers),
            )

        def train_epoch(self, iterator, **kwargs):
            shapes = [
                len(found) if isinstance(found, tuple) else 1 if isinstance(found, kind) else None
                for found, kind in (
                    (self.models, nn.Module),
                    (self.optimizers, torch.optim.Optimizer),
                    (self.schedulers, StepLR),
                )
            ]
            return dict(zip(("models", "optimizers", "schedulers"), shapes, strict=True))

    trainer = make(Matrix, scheduler_step_freq="manual", **two_or_local)
    for found in trainer.train(reduce_results=False):
        assert (found["models"], found["optimizers"], found["schedulers"]) == (models, optimizers, schedulers)
    state = trainer.state_dict()
    assert [len(state[name]) for name in ("models", "optimizers", "schedulers")] == [models, optimizers, schedulers]


class Seen(Line):
    """Notes what it gets: (epoch_idx, x) of every batch, of both hooks."""

    def setup(self, config):
        self.trained, self.validated = [], []
        super().setup(config)

    def train_batch(self, batch, batch_info):
        self.trained.append((batch_info["epoch_idx"], [round(x * SAMPLES) for x in batch[0].flatten().tolist()]))
        return super().train_batch(batch, batch_info)

    def validate_batch(self, batch, batch_info):
        self.validated.append([round(x * SAMPLES) for x in batch[0].flatten().tolist()])
        return super().validate_batch(batch, batch_info)


def test_num_steps_goes_on_wraps_and_finishes(make, workers) -> None:
    ranks = workers["num_workers"]
    trainer = make(Seen, config={BATCH_SIZE: BATCH * ranks}, **workers)
    one_pass = SAMPLES // BATCH // ranks
    most = one_pass - 1
    calls = [(most, most, 1), (most, most, 2), (None, 2, 2), (None, one_pass, 3), (one_pass + 1, one_pass + 1, 5)]
    for num_steps, batches, epoch in calls:
        stats = trainer.train(num_steps=num_steps)
        assert (stats["batch_count"], stats["epoch"]) == (batches, epoch)
        assert stats["num_samples"] == batches * BATCH * ranks
    for num_steps, batches, _ in calls:
        stats = trainer.validate(num_steps=num_steps)
        assert (stats["batch_count"], stats["num_samples"]) == (batches, batches * BATCH * ranks)
    for rank, (trained, validated) in enumerate(trainer.apply_all_operators(lambda op: (op.trained, op.validated))):
        own = [
            list(range(SAMPLES))[first : first + BATCH * ranks][rank::ranks]
            for first in range(0, SAMPLES, BATCH * ranks)
        ]
        assert validated == (own * 5)[: len(validated)]
        assert [x for _, x in trained] == (own * 5)[: len(trained)]


class Summed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, first, second):
        return self.layer(torch.cat([first, second], dim=1))


def two_inputs(config):
    x = torch.arange(SAMPLES, dtype=torch.float32).reshape(-1, 1) / SAMPLES
    data = TensorDataset(x, 1 - x * x, 2 * x + 5)
    return DataLoader(data, batch_size=BATCH), DataLoader(data, batch_size=BATCH)


def test_models_with_several_inputs(make, two_or_local) -> None:
    trainer = make(model_creator=lambda config: Summed(), data_creator=two_inputs, **two_or_local)
    losses = [trainer.train()["train_loss"] for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]
    assert trainer.validate()["num_samples"] == SAMPLES


class Counting(Line):
    """Counts the calls of its hooks."""

    def setup(self, config):
        self.calls = {"train_epoch": 0, "validate": 0}
        super().setup(config)

    def train_epoch(self, iterator, info):
        self.calls["train_epoch"] += 1
        return super().train_epoch(iterator, info)

    def validate(self, val_iterator, info):
        self.calls["validate"] += 1
        return super().validate(val_iterator, info)


def test_hooks_are_called_once_per_call_and_do_not_mix(make, workers) -> None:
    trainer = make(Counting, **workers)
    ranks = workers["num_workers"]
    epochs = [trainer.train()["epoch"] for _ in range(3)]
    assert epochs == [1, 2, 3]
    assert trainer.apply_all_operators(lambda operator: operator.calls) == [{"train_epoch": 3, "validate": 0}] * ranks
    before = trainer.state_dict()
    assert "epoch" not in trainer.validate()
    assert trainer.apply_all_operators(lambda operator: operator.calls) == [{"train_epoch": 3, "validate": 1}] * ranks
    assert same(trainer.state_dict(), before)
    assert trainer.apply_all_operators(lambda operator: operator.model.training) == [True] * ranks


class FirstGeneration(TrainingOperator):
    """Creators make everything; setup comes last and sees it all."""

    def setup(self, config):
        self.given = {
            "model": self.model is self.models[0],
            "optimizer": self.optimizer is self.optimizers[0],
            "scheduler": self.scheduler is self.schedulers[0],
            "counts": [len(plural) for plural in (self.models, self.optimizers, self.schedulers)],
            "lists": [type(plural) for plural in (self.models, self.optimizers, self.schedulers)],
            "batches": len(self.train_loader),
        }

    def train_epoch(self, iterator, info):
        return {"seen": sum(1 for _ in iterator)}


@pytest.mark.parametrize("count", [1, 2])
def test_singular_and_plural_names_of_the_first_generation(make, two_or_local, count) -> None:
    def several(create):
        return create() if count == 1 else [create() for _ in range(count)]

    def first(made):
        return made if count == 1 else made[0]

    trainer = make(
        FirstGeneration,
        model_creator=lambda config: several(lambda: nn.Linear(1, 1)),
        optimizer_creator=lambda models, config: several(lambda: optimizer_creator(first(models), config)),
        scheduler_creator=lambda optimizers, config: several(lambda: StepLR(first(optimizers), 1)),
        data_creator=data_creator,
        scheduler_step_freq="epoch",
        **two_or_local,
    )
    batches = SAMPLES // BATCH // two_or_local["num_workers"]
    expected = {"model": True, "optimizer": True, "scheduler": True, "counts": [count] * 3, "lists": [list] * 3}
    found = trainer.apply_all_operators(lambda operator: operator.given)
    assert found == [{**expected, "batches": batches}] * two_or_local["num_workers"]
    assert trainer.train()["seen"] == batches


def test_more_than_two_loaders_are_refused(make, two_or_local) -> None:
    with pytest.raises(ValueError, match=r"Number of loaders must be <= 2\. Got 3"):
        make(data_creator=lambda config: [DataLoader(line())] * 3, **two_or_local)


def test_without_validation_data_only_validate_fails(make, workers) -> None:
    trainer = make(data_creator=lambda config: DataLoader(line(), batch_size=BATCH), **workers)
    assert trainer.train()["num_samples"] == SAMPLES
    assert trainer.fit(1)[0]["num_samples"] == SAMPLES
    with pytest.raises(RuntimeError, match="does not have any registered validation loader"):
        trainer.validate()
    assert trainer.train()["epoch"] == 3, "and the trainer goes on"


def test_losses_are_classes_functions_or_lambdas(make, two_or_local) -> None:
    for loss in (nn.MSELoss, lambda config: nn.functional.mse_loss):
        trainer = make(loss_creator=loss, **two_or_local)
        assert trainer.train()["train_loss"] > trainer.train()["train_loss"]


# -------------------------------------------------------------------------------- idioms of operators written for RaySGD


class Gan(TrainingOperator):
    """As RaySGD's DCGAN: tuples in, tuples out, ``self.model`` for the built-in loop, tensors made on ``self.device``."""

    def setup(self, config):
        generator, discriminator = nn.Linear(2, 1), nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))
        self.judge = nn.Linear(1, 1).requires_grad_(False)  # a frozen helper network
        optimizers = tuple(torch.optim.Adam(model.parameters(), lr=0.01) for model in (discriminator, generator))
        self.models, self.optimizers, self.criterion = self.register(
            models=(discriminator, generator), optimizers=optimizers, criterion=nn.BCEWithLogitsLoss()
        )
        self.model, self.optimizer = self.models[0], self.optimizers[0]
        self.register_data(
            train_loader=DataLoader(line(), batch_size=config.get(BATCH_SIZE, 32)), validation_loader=None
        )

    def train_batch(self, batch, batch_info):
        discriminator, generator = self.models
        of_discriminator, of_generator = self.optimizers
        real = batch[1].to(self.device)
        noise = torch.randn(len(real), 2, device=self.device)
        ones, zeros = torch.ones(len(real), 1, device=self.device), torch.zeros(len(real), 1, device=self.device)

        discriminator.zero_grad()
        loss_real = self.criterion(discriminator(real), ones)
        loss_real.backward()
        fake = generator(noise)
        loss_fake = self.criterion(discriminator(fake.detach()), zeros)
        loss_fake.backward()
        of_discriminator.step()

        generator.zero_grad()
        loss_g = self.criterion(discriminator(fake), ones)
        loss_g.backward()
        of_generator.step()
        return {
            "loss_g": loss_g.item(),
            "loss_d": loss_real.item() + loss_fake.item(),
            "inception": float(np.float32(self.judge(fake).mean().item())),
            "num_samples": len(real),
        }


def test_a_gan_trains_two_models_in_one_step(make, workers) -> None:
    trainer = make(Gan, config={BATCH_SIZE: 8}, **workers)
    before = trainer.state_dict()["models"]
    stats = trainer.train()
    assert {"loss_g", "loss_d", "inception", "last_loss_g"} <= stats.keys()
    assert not any("train_loss" in key for key in stats)
    assert (stats["num_samples"], stats["batch_count"]) == (SAMPLES, SAMPLES // 8)
    after = trainer.state_dict()["models"]
    assert not any(same(one, other) for one, other in zip(before, after, strict=True))
    states = trainer.apply_all_operators(lambda operator: [one.state_dict() for one in operator.optimizers])
    assert all(same(states[0], one) for one in states)
    with pytest.raises(RuntimeError, match="validation loader"):
        trainer.validate()


@pytest.mark.parametrize("given", [2, 3, 4])
def test_register_gives_back_as_many_as_it_was_given(make, given) -> None:
    class Unpacking(TrainingOperator):
        def setup(self, config):
            model = nn.Linear(1, 1)
            optimizer = optimizer_creator(model, config)
            parts = {"models": model, "optimizers": optimizer}
            if given == 2:
                self.model, self.optimizer = self.register(**parts)
                self.criterion = nn.functional.mse_loss  # a plain function that is never registered
            if given == 3:
                self.model, self.optimizer, self.criterion = self.register(**parts, criterion=nn.MSELoss())
            if given == 4:
                self.model, self.optimizer, self.criterion, self.scheduler = self.register(
                    **parts, criterion=nn.MSELoss(), schedulers=StepLR(optimizer, 1)
                )
            self.register_data(train_loader=DataLoader(line(), batch_size=BATCH), validation_loader=None)

    trainer = make(Unpacking, scheduler_step_freq="epoch", num_workers=2)
    assert trainer.train()["train_loss"] > trainer.train()["train_loss"]


class Extended(TrainingOperator.from_creators(**CREATORS, scheduler_creator=None)):
    """A class from creators, extended; hooks with defaults and names of their own."""

    def setup(self, config):
        super().setup(config)
        self.args = config["args"]
        config["added"] = "in setup"
        self.initialized = dist.is_initialized()

    def train_batch(self, batch, batch_info=None):
        self.latest = dict(batch_info)
        return super().train_batch(batch)

    def validate(self, data_loader, info=None):
        assert self.config["added"] == "in setup"
        with torch.no_grad():
            error = torch.tensor([(self.model(x) - y).abs().sum() for x, y in data_loader]).sum()
        if dist.is_initialized():
            dist.all_reduce(error)
        return ConfusionMatrix(float(error))


class ConfusionMatrix:
    """Not a dict: what one of RaySGD's examples returns."""

    def __init__(self, total):
        self.total = total


def test_a_class_from_creators_can_be_extended(make, workers) -> None:
    trainer = make(Extended, config={"args": argparse.Namespace(depth=3)}, **workers)
    ranks = workers["num_workers"]
    assert trainer.apply_all_operators(lambda operator: operator.args.depth) == [3] * ranks
    if not workers.get("use_local"):
        assert trainer.apply_all_operators(lambda operator: operator.initialized) == [True] * ranks
    trainer.train(num_steps=2, max_retries=1, info={"epoch_idx": 7, "num_epochs": 9})
    latest = trainer.apply_all_operators(lambda operator: operator.latest)
    position = {"epoch_idx": 0, "num_epochs": 9, "batch_idx": 1, "global_step": 1}
    assert [{name: told[name] for name in position} for told in latest] == [position] * ranks
    matrices = trainer.validate(reduce_results=False)
    model, (x, y) = trainer.get_model(), line().tensors
    assert [one.total for one in matrices] == [pytest.approx((model(x) - y).abs().sum().item())] * ranks
    with pytest.raises(TypeError, match="reduce_results=False"):
        trainer.validate()


class Accumulating(Line):
    """Gradients over two batches, clipped, in native mixed precision, with a warm-up that is never registered."""

    def setup(self, config):
        super().setup(config)
        self.warm_up = LambdaLR(self.optimizer, lambda step: min(1.0, (step + 1) / 4))
        self.updates = 0

    def train_batch(self, batch, batch_info):
        self.model.train()
        with self._amp.autocast():
            loss = self.criterion(self.model(batch[0]), batch[1]) / 2
        self._amp_scaler.scale(loss).backward()
        if (batch_info["batch_idx"] + 1) % 2 == 0:
            self._amp_scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self._amp_scaler.step(self.optimizer)
            self._amp_scaler.update()
            self.warm_up.step()
            self.optimizer.zero_grad()
            self.updates += 1
        return {"loss": np.float64(loss.item()), "lr": self.warm_up.get_last_lr()[0]}


@pytest.mark.parametrize("use_fp16", [False, True])
def test_a_hook_may_accumulate_and_clip_under_mixed_precision(make, two_or_local, use_fp16) -> None:
    trainer = make(Accumulating, config={BATCH_SIZE: 4}, use_fp16=use_fp16, **two_or_local)
    losses = [trainer.train() for _ in range(3)]
    assert losses[0]["loss"] > losses[-1]["loss"]
    assert losses[0]["lr"] == pytest.approx(0.1 * (0.25 + 0.5 * 2 + 0.75 * 2 + 5) / 10)
    assert losses[0]["num_samples"] == SAMPLES
    assert trainer.apply_all_operators(lambda operator: operator.updates) == [15] * two_or_local["num_workers"]
    assert trainer.apply_all_operators(lambda op: op.use_fp16_native) == [use_fp16] * two_or_local["num_workers"]
    assert not any(trainer.apply_all_operators(lambda operator: operator.use_fp16_apex))


class SamplesOfTheUser(Line):
    """Counts samples as it likes: ``len(batch)`` of a pair, as one of RaySGD's examples does."""

    def train_batch(self, batch, batch_info):
        super().train_batch(batch, batch_info)
        return {"loss": 1.0, "num_samples": len(batch)}


def test_the_users_own_count_of_samples_is_returned(make) -> None:
    assert make(SamplesOfTheUser, num_workers=2).train()["num_samples"] == 2 * 2 * (SAMPLES // BATCH // 2)


def test_a_state_with_keys_of_the_users_own_is_saved_and_loaded(make, tmp_path, workers) -> None:
    trainer = make(scheduler_creator=scheduler_creator, scheduler_step_freq="epoch", **workers)
    trainer.train()
    state = trainer.state_dict()
    assert {"epoch", "operator", "models", "optimizers", "schedulers"} <= state.keys()
    assert (state["epoch"], state["operator"]) == (1, None)
    state.update(best=0.5, arch="line")
    torch.save(state, tmp_path / "model_best.pth.tar")
    loaded = torch.load(tmp_path / "model_best.pth.tar")
    assert (loaded["best"], loaded["arch"]) == (0.5, "line")
    other = make(scheduler_creator=scheduler_creator, scheduler_step_freq="epoch", num_workers=2)
    other.load_state_dict(loaded)
    assert same({**other.state_dict(), "best": 0.5, "arch": "line"}, loaded)
    assert other.train()["epoch"] == 2


def test_workers_are_seeded_by_a_lambda(make, workers) -> None:
    trainer = make(**workers)
    state = torch.get_rng_state()
    try:
        trainer.apply_all_workers(lambda: torch.manual_seed(123) and None)
        found = trainer.apply_all_workers(lambda: torch.rand(3).tolist())
    finally:
        torch.set_rng_state(state)  # use_local seeds this process
    expected = torch.rand(3, generator=torch.Generator().manual_seed(123)).tolist()
    assert found == [expected] * workers["num_workers"]


def test_the_local_operator_is_there_in_local_mode_only(make) -> None:
    local, remote = make(Extended, config={"args": argparse.Namespace(depth=1)}, num_workers=1, use_local=True), make()
    assert local.get_local_operator().args.depth == 1
    with pytest.raises(NotImplementedError, match="use_local"):
        remote.get_local_operator()


class Callable18:
    """A class whose objects are models, called with the config as ``ResNet18`` is."""

    def __new__(cls, config):
        return nn.Linear(1, config["width"])


def test_model_creators_may_be_classes_and_the_config_stays_the_users(make, two_or_local) -> None:
    config = {"width": 1, BATCH_SIZE: 6 * two_or_local["num_workers"]}
    trainer = make(model_creator=Callable18, config=config, **two_or_local)
    assert trainer.train()["num_samples"] == SAMPLES
    assert trainer.config == config == {"width": 1, BATCH_SIZE: 6 * two_or_local["num_workers"]}


def test_properties_and_constants_of_an_operator(make) -> None:
    trainer = make(num_workers=2, use_tqdm=False, scheduler_step_freq="manual")
    found = trainer.apply_all_operators(
        lambda op: (
            op.world_rank,
            op.local_rank,
            op.device,
            op.device_ids,
            op.use_gpu,
            op.use_tqdm,
            op.scheduler_step_freq,
            op.global_step,
        )
    )
    assert found == [(rank, rank, torch.device("cpu"), None, False, False, "manual", 0) for rank in (0, 1)]
    trainer.train()
    assert trainer.apply_all_operators(lambda op: op.global_step) == [SAMPLES // BATCH // 2] * 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_workers": 0}, ValueError, "num_workers"),
        ({"backend": "smoke signals"}, ValueError, "backend"),
        ({"use_fp16": "half"}, ValueError, "use_fp16 must be a bool or 'apex'"),
        ({"use_fp16": "apex"}, ImportError, "precision"),
        ({"model_creator": "linear"}, ValueError, "model_creator must be a function"),
        ({"loss_creator": None}, ValueError, "loss_creator"),
        ({"num_replicas": 2}, TypeError, "num_workers"),
        ({"batch_size": 2}, TypeError, "BATCH_SIZE"),
        ({"data_loader_args": {}}, TypeError, "data_creator"),
        ({"apex_args": {}}, TypeError, "precision"),
        ({"model_creators": 1}, TypeError, "did you mean model_creator"),
    ],
)
def test_arguments_that_cannot_work_are_refused_with_ordinary_errors(make, arguments, error, message) -> None:
    with pytest.raises(error, match=message) as caught:
        make(**arguments)
    assert not isinstance(caught.value, Warning)
