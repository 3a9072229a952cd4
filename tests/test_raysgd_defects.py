"""Defects of RaySGD that must not come back, each shown through the public interface with real worker processes.

Not applicable yet, because this version has no recovery, does not resize and does not look for capacity:

* state taken after the workers were killed, or aliasing the broken epoch: nothing is restored after a failure;
* position, random state and ``global_step`` lost on a resize, and passes counted again on a replay: there is neither;
* the batch size that rounding erodes with every resize: only its other half is here, that the config stays as it is;
* the count of free CPUs that ignores ``num_cpus_per_worker``, and the cooldown without effect: nobody counts or waits;
* a peer's collective error that hides the death of a worker, and no fault handling in ``validate``: nothing is retried;
* ``use_gpu`` and the driver's own GPU worker, ``NCCL_TIMEOUT_S`` under NCCL: they need GPUs; Gloo's time-out is here.
"""

from __future__ import annotations

import itertools
import math
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from torchtrainer import BATCH_SIZE, TrainingOperator

SAMPLES, BATCH = 40, 4
WORKERS = {"local": {"num_workers": 1, "use_local": True}, "1": {"num_workers": 1}, "2": {"num_workers": 2}}


def numbers(samples=SAMPLES):
    """Sample i has x = i."""
    x = torch.arange(samples, dtype=torch.float32).reshape(-1, 1)
    return TensorDataset(x, 2 * x + 5)


def model_creator(config):
    return nn.Linear(1, 1)


def optimizer_creator(model, config):
    return torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)


def data_creator(config):
    make = config.get("loader", lambda: DataLoader(numbers(), batch_size=BATCH))
    return make(), make()


def scheduler_creator(optimizer, config):
    return StepLR(optimizer, step_size=1, gamma=0.5)


CREATORS = {
    "model_creator": model_creator,
    "optimizer_creator": optimizer_creator,
    "data_creator": data_creator,
    "loss_creator": nn.MSELoss,
}


class Seen(TrainingOperator):
    """Made from creators; notes the samples and the position of every batch."""

    def setup(self, config):
        self.trained, self.validated, self.infos = [], [], []

    def train_batch(self, batch, batch_info):
        self.trained.append(as_numbers(batch))
        self.infos.append(dict(batch_info))
        return super().train_batch(batch, batch_info)

    def validate_batch(self, batch, batch_info):
        self.validated.append(as_numbers(batch))
        return super().validate_batch(batch, batch_info)


def as_numbers(batch):
    return [int(x) for x in batch[0].flatten()]


@pytest.fixture
def make(trainers):
    """Makes trainers that are shut down at the end of the test; with creators unless it gets an operator of its own."""

    def make(operator=None, *, creators=CREATORS, **arguments):
        return trainers(**{"training_operator_cls": operator, **creators, **arguments})

    return make


@pytest.fixture(params=list(WORKERS))
def workers(request) -> dict[str, Any]:
    """One rank in this process, one in another, and two."""
    return dict(WORKERS[request.param])


@pytest.fixture(params=["local", "2"])
def two_or_local(request) -> dict[str, Any]:
    """One rank in this process, and two in others: where it does not matter that one rank can have a process too."""
    return dict(WORKERS[request.param])


def chained(lists):
    """The members of all lists."""
    return list(itertools.chain.from_iterable(lists))


def on_all(trainer, name):
    """An attribute of every rank's operator."""
    return trainer.apply_all_operators(lambda operator: getattr(operator, name))


# ------------------------------------------------------------------------------------------------ steps, passes, positions


@pytest.mark.parametrize("method", ["train", "validate"])
@pytest.mark.parametrize("calls", [(None, None), ("all", None), ("all", "all"), ("half", "half", None, 1)])
def test_a_call_after_a_pass_that_ended_exactly_is_not_empty(make, workers, method, calls) -> None:
    ranks = workers["num_workers"]
    trainer = make(config={"loader": lambda: DataLoader(numbers(16 * ranks), batch_size=4)}, **workers)
    lengths = {None: 4, "all": 4, "half": 2, 1: 1}
    steps = {None: None, "all": 4, "half": 2, 1: 1}
    total = 0
    for call in calls:
        stats = getattr(trainer, method)(num_steps=steps[call])
        total += lengths[call]
        assert (stats["batch_count"], stats["num_samples"]) == (lengths[call], lengths[call] * 4 * ranks)
        assert {"train": "train_loss", "validate": "val_loss"}[method] in stats
        if method == "train":
            assert stats["epoch"] == -(-total // 4)


class EpochIdx(Seen):
    def train_epoch(self, iterator, info=None, num_steps=None, epoch_idx=0):
        self.hook = (info["epoch_idx"], num_steps, epoch_idx)
        return super().train_epoch(iterator, info, num_steps, epoch_idx)


def test_epoch_idx_is_that_of_the_pass_also_in_continued_calls(make, workers) -> None:
    ranks = workers["num_workers"]
    trainer = make(EpochIdx, **workers)
    pass_steps = SAMPLES // BATCH // ranks
    for num_steps, epoch_idx in [(2, 0), (1, 0), (None, 0), (1, 1), (pass_steps, 1), (None, 2), (None, 3)]:
        trainer.train(num_steps=num_steps, info={"epoch_idx": 99, "mine": 5})
        assert on_all(trainer, "hook") == [(epoch_idx, num_steps, epoch_idx)] * ranks
    last = on_all(trainer, "infos")[0][-1]
    position = {"epoch_idx": 3, "mine": 5, "batch_idx": pass_steps - 1, "global_step": 4 * pass_steps - 1}
    assert {name: last[name] for name in position} == position


def test_a_pass_that_starts_inside_a_call_has_an_order_of_its_own(make, two_or_local) -> None:
    def loader():
        return DataLoader(numbers(), batch_size=BATCH, shuffle=True)

    ranks = two_or_local["num_workers"]
    inside, between = (make(Seen, config={"loader": loader}, **two_or_local) for _ in range(2))
    steps = SAMPLES // BATCH // ranks
    inside.train(num_steps=2 * steps)
    between.train()
    between.train()
    first = on_all(inside, "trained")
    assert first == on_all(between, "trained")
    assert all(seen[:steps] != seen[steps:] for seen in first)


def test_no_steps_are_no_steps(make, two_or_local) -> None:
    trainer = make(Seen, **two_or_local)
    assert trainer.train(num_steps=0)["batch_count"] == 0
    assert trainer.train()["num_samples"] == SAMPLES


@pytest.mark.parametrize("samples", [17, 18, 24])
@pytest.mark.parametrize("kind", ["samples", "batches", "loader workers"])
def test_validation_stopped_before_an_uneven_last_step_goes_on_there_on_every_rank(make, samples, kind) -> None:
    def loader():
        if kind == "batches":
            return DataLoader(numbers(samples), batch_sampler=[[i] for i in range(-(-samples // 4))])
        return DataLoader(numbers(samples), batch_size=4, num_workers=kind == "loader workers")

    trainer = make(Seen, config={"loader": loader}, num_workers=2)
    whole = samples if kind != "batches" else -(-samples // 4)
    step = 8 if kind != "batches" else 2
    parts = [trainer.validate(num_steps=2)["num_samples"], trainer.validate()["num_samples"]]
    assert parts == [2 * step, whole - 2 * step or whole]
    parts = [trainer.validate(num_steps=2)["num_samples"] for _ in range(3)]
    rest = whole - 2 * step
    expected = [2 * step, rest + step if rest else 2 * step, step + (rest or step)]
    assert parts == expected


def test_loading_gives_up_the_running_pass_on_every_rank(make, two_or_local) -> None:
    trainer = make(Seen, **two_or_local)
    state = trainer.state_dict()
    trainer.train(num_steps=2)
    trainer.load_state_dict(state)
    stats = trainer.train()
    assert (stats["num_samples"], stats["epoch"]) == (SAMPLES, 1)


# ----------------------------------------------------------------------------------------------------- hooks by signature


def epoch_old(self, iterator, info):
    return {"got": [sum(1 for _ in iterator), info["epoch_idx"], info["mine"]]}


def epoch_final(self, iterator, info=None, num_steps=None, epoch_idx=0):
    return {"got": [sum(1 for _ in iterator), epoch_idx, info["mine"]]}


def epoch_open(self, iterator, info, **kwargs):
    return {"got": [sum(1 for _ in iterator), kwargs["epoch_idx"], info["mine"]]}


def epoch_named(self, batches, what):
    return {"got": [sum(1 for _ in batches), what["epoch_idx"], what["mine"]]}


def epoch_keywords(self, iterator, *, epoch_idx, info):
    return {"got": [sum(1 for _ in iterator), epoch_idx, info["mine"]]}


@pytest.mark.parametrize("hook", [epoch_old, epoch_final, epoch_open, epoch_named, epoch_keywords])
def test_a_custom_epoch_of_any_release_is_called_with_what_it_takes(make, two_or_local, hook) -> None:
    trainer = make(
        type("Custom", (TrainingOperator,), {"setup": lambda self, config: None, "train_epoch": hook}),
        **two_or_local,
    )
    assert trainer.train(info={"mine": 7})["got"] == [SAMPLES // BATCH // two_or_local["num_workers"], 0, 7]


class ValidatesByItself(Seen):
    def validate(self, data_loader, info=None):
        return {"batches": sum(1 for _ in data_loader), "is_dict": isinstance(info, dict), "epoch": info["epoch_idx"]}


def test_validate_gets_its_info_as_a_dict(make, two_or_local) -> None:
    found = make(ValidatesByItself, **two_or_local).validate(reduce_results=False)
    assert {(one["is_dict"], one["epoch"], one["batches"]) for one in found} == {
        (True, 0, SAMPLES // BATCH // two_or_local["num_workers"])
    }


class NoAttributes(TrainingOperator):
    """Its own step, and nothing under the names that the built-in one needs."""

    def setup(self, config):
        self.net, self.stepper = self.register(
            models=(net := nn.Linear(1, 1)), optimizers=optimizer_creator(net, config)
        )
        self.register_data(train_loader=DataLoader(numbers(), batch_size=BATCH))

    def train_batch(self, batch, batch_info=None):
        self.stepper.zero_grad()
        nn.functional.mse_loss(self.net(batch[0]), batch[1]).backward()
        self.stepper.step()
        return {"training": self.net.training}


def test_the_built_in_loop_does_not_need_self_model(make, two_or_local) -> None:
    assert make(NoAttributes, creators={}, **two_or_local).train()["training"] == 1.0


# ------------------------------------------------------------------------------------------------------------------ results


class ByRank(Seen):
    """Metrics that differ by rank."""

    def train_batch(self, batch, batch_info):
        stats = {"rank": self.world_rank, "flag": self.world_rank == 1, "text": f"of rank {self.world_rank}"}
        stats["nan"] = math.nan if self.world_rank == 1 else 1.0
        if self.world_rank == 1:
            stats["only_on_1"] = 3.0
        super().train_batch(batch, batch_info)
        return {**stats, "num_samples": len(batch[0])}


def test_ranks_are_averaged_and_none_is_hidden(make) -> None:
    stats = make(ByRank, config={"loader": lambda: DataLoader(numbers(17), batch_size=2)}, num_workers=2).train()
    assert stats["rank"] == pytest.approx(8 / 17)  # rank 0 has 9 of the samples
    assert stats["flag"] == pytest.approx(8 / 17)
    assert stats["only_on_1"] == 3.0
    assert stats["text"] == "of rank 0"
    assert math.isnan(stats["nan"])
    assert stats["last_rank"] == 0.0  # the last step has one sample, of rank 0
    assert (type(stats["epoch"]), type(stats["batch_count"]), type(stats["num_samples"])) == (int, int, int)
    assert (stats["epoch"], stats["batch_count"], stats["num_samples"]) == (1, 5, 17)


def test_validation_weighs_samples_and_repeats_none(make) -> None:
    trainer = make(config={"loader": lambda: DataLoader(numbers(9), batch_size=4)}, num_workers=2)
    stats, (x, y) = trainer.validate(), numbers(9).tensors
    assert stats["num_samples"] == 9
    assert stats["val_loss"] == pytest.approx(nn.functional.mse_loss(trainer.get_model()(x), y).item(), rel=1e-5)
    assert "val_accuracy" not in stats  # of no meaning in a regression


class EmptyFirst(Seen):
    def train_batch(self, batch, batch_info):
        return {"m": 2.0, "num_samples": 0 if batch_info["batch_idx"] == 0 else len(batch[0])}


def test_a_first_batch_of_no_samples_divides_nothing_by_zero(make, two_or_local) -> None:
    stats = make(EmptyFirst, **two_or_local).train()
    assert (stats["m"], stats["num_samples"]) == (2.0, SAMPLES - BATCH * two_or_local["num_workers"])


def test_validation_leaves_models_in_the_mode_they_were_in(make, two_or_local) -> None:
    trainer = make(Seen, **two_or_local)
    trainer.apply_all_operators(lambda operator: operator.model.eval() and None)
    trainer.validate()
    assert trainer.apply_all_operators(lambda op: op.model.training) == [False] * two_or_local["num_workers"]
    trainer.train(num_steps=1)
    trainer.validate()
    assert trainer.apply_all_operators(lambda op: op.model.training) == [True] * two_or_local["num_workers"]


# ------------------------------------------------------------------------------------------------------------ data as given


@pytest.mark.parametrize("method", ["train", "validate"])
def test_nothing_is_shuffled_that_was_not_to_be(make, two_or_local, method) -> None:
    trainer = make(Seen, **two_or_local)
    getattr(trainer, method)()
    per_rank = on_all(trainer, {"train": "trained", "validate": "validated"}[method])
    ranks = len(per_rank)
    for rank, batches in enumerate(per_rank):
        assert batches == [list(range(k, k + BATCH * ranks))[rank::ranks] for k in range(0, SAMPLES, BATCH * ranks)]


def test_what_was_to_be_shuffled_is_in_another_order_each_time(make, two_or_local) -> None:
    trainer = make(
        Seen, config={"loader": lambda: DataLoader(numbers(), batch_size=BATCH, shuffle=True)}, **two_or_local
    )
    for _ in range(2):
        trainer.train()
        trainer.validate()
    for name in ("trained", "validated"):
        passes = []
        for half in (0, 1):
            seen = [
                batch
                for rank in on_all(trainer, name)
                for batch in rank[half * len(rank) // 2 : (half + 1) * len(rank) // 2]
            ]
            assert sorted(chained(seen)) == list(range(SAMPLES))
            passes.append(seen)
        assert passes[0] != passes[1]


SAMPLERS = {
    "subset": lambda: SubsetRandomSampler(range(10, 30)),
    "weighted": lambda: WeightedRandomSampler([0.0] * 20 + [1.0] * 20, num_samples=24),
    "backwards": lambda: list(range(SAMPLES))[::-1],
}


@pytest.mark.parametrize("kind", list(SAMPLERS))
def test_a_sampler_of_the_users_own_is_kept(make, two_or_local, kind) -> None:
    def loader():
        return DataLoader(numbers(), batch_size=BATCH, sampler=SAMPLERS[kind]())

    trainer = make(Seen, config={"loader": loader}, **two_or_local)
    trainer.train()
    per_rank = on_all(trainer, "trained")
    steps = [chained(step) for step in zip(*per_rank, strict=True)]
    seen = [sample for step in steps for sample in step]
    if kind == "subset":
        assert sorted(seen) == list(range(10, 30))
    if kind == "weighted":
        assert len(seen) == 24
        assert min(seen) >= 20
    if kind == "backwards":
        assert [sorted(step, reverse=True) for step in steps] == [
            list(range(SAMPLES))[::-1][k : k + BATCH * len(per_rank)] for k in range(0, SAMPLES, BATCH * len(per_rank))
        ]


BATCHES = [[0, 1, 2], [3], [4, 5], [6, 7, 8, 9]]


def test_the_batches_of_a_batch_sampler_stay_as_they_are(make, two_or_local) -> None:
    trainer = make(Seen, config={"loader": lambda: DataLoader(numbers(), batch_sampler=BATCHES)}, **two_or_local)
    assert trainer.train()["num_samples"] == 10
    assert on_all(trainer, "trained") == [
        BATCHES[rank :: two_or_local["num_workers"]] for rank in range(two_or_local["num_workers"])
    ]


def double(items):
    x, y = torch.utils.data.default_collate(items)
    return 2 * x, y


class SessionLoader(DataLoader):
    """A subclass with an attribute; what it does not override works as ever."""

    @property
    def sampler_name(self):
        return type(self.sampler).__name__


def test_settings_and_subclasses_of_loaders_are_kept(make, two_or_local) -> None:
    def loader():
        return SessionLoader(numbers(), batch_size=BATCH, collate_fn=double, sampler=SequentialSampler(numbers()))

    trainer = make(Seen, config={"loader": loader}, **two_or_local)
    trainer.train()
    ranks = two_or_local["num_workers"]
    assert sorted(chained(map(chained, on_all(trainer, "trained")))) == list(range(0, 2 * SAMPLES, 2))
    assert trainer.apply_all_operators(lambda op: op.train_loader.sampler_name) == ["SequentialSampler"] * ranks
    assert trainer.apply_all_operators(lambda op: len(op.train_loader)) == [SAMPLES // BATCH // ranks] * ranks


class Unsized(IterableDataset):
    def __iter__(self):
        yield from zip(*numbers(12).tensors, strict=True)


@pytest.mark.parametrize("container", [lambda loader: loader, lambda loader: [loader], lambda loader: (loader, None)])
def test_one_loader_may_be_bare_in_a_list_or_without_length(make, two_or_local, container) -> None:
    trainer = make(data_creator=lambda config: container(DataLoader(Unsized(), batch_size=2)), **two_or_local)
    for epoch in (1, 2):
        stats = trainer.train()
        assert (stats["num_samples"], stats["epoch"], stats["batch_count"]) == (
            12,
            epoch,
            6 // two_or_local["num_workers"],
        )


def test_the_global_batch_is_neither_rounded_nor_stored_back(make) -> None:
    config = {BATCH_SIZE: 32}
    sizes = {}
    for ranks in (3, 2, 4):
        trainer = make(Seen, config=config, num_workers=ranks)
        sizes[ranks] = trainer.apply_all_operators(lambda operator: operator.config[BATCH_SIZE])
        assert trainer.config == config == {BATCH_SIZE: 32}
    assert sizes == {3: [11, 11, 10], 2: [16, 16], 4: [8, 8, 8, 8]}
    with pytest.raises(ValueError, match=r"at least num_workers=3.*got 2"):
        make(config={BATCH_SIZE: 2}, num_workers=3)


# --------------------------------------------------------------------------------------------- components and their state


def two_models(config):
    return [nn.Linear(1, 1), nn.Linear(1, 1)]


def two_optimizers(models, config):
    return [torch.optim.SGD(model.parameters(), lr=rate) for model, rate in zip(models, (0.25, 0.5), strict=True)]


def two_schedulers(optimizers, config):
    return [StepLR(optimizer, 1, gamma=gamma) for optimizer, gamma in zip(optimizers, (0.5, 0.1), strict=True)]


class OwnState(TrainingOperator):
    """Two of everything, and a state of its own."""

    def train_epoch(self, iterator, info):
        steps = sum(1 for _ in iterator)
        for stepping in (*self.optimizers, *self.schedulers):
            stepping.step()
        return {"steps": steps}

    def state_dict(self):
        self.asked = getattr(self, "asked", 0) + 1
        return {"note": "mine", "rank": self.world_rank, "tensor": torch.ones(2)}

    def load_state_dict(self, state_dict):
        self.loaded = state_dict


class OwnStateAfterCreators(OwnState):
    def setup(self, config):
        pass


TWO = {
    **CREATORS,
    "model_creator": two_models,
    "optimizer_creator": two_optimizers,
    "scheduler_creator": two_schedulers,
}


@pytest.mark.parametrize("generation", [1, 2])
def test_with_several_optimizers_the_singular_one_is_the_first(make, two_or_local, generation) -> None:
    operator = OwnStateAfterCreators if generation == 1 else OwnState.from_creators(**TWO)
    creators = TWO if generation == 1 else {}
    trainer = make(operator, creators=creators, scheduler_step_freq="manual", **two_or_local)
    found = trainer.apply_all_operators(
        lambda op: (
            op.optimizer is op.optimizers[0],
            op.model is op.models[0],
            op.scheduler is op.schedulers[0],
            [optimizer.param_groups[0]["lr"] for optimizer in op.optimizers],
        )
    )
    assert found == [(True, True, True, [0.25, 0.5])] * two_or_local["num_workers"]


def test_an_operator_gets_its_own_state_and_nobody_elses(make, workers) -> None:
    trainer = make(OwnStateAfterCreators, creators=TWO, scheduler_step_freq="manual", **workers)
    ranks = workers["num_workers"]
    trainer.train()
    state = trainer.state_dict()
    assert state["operator"]["note"] == "mine"
    assert [optimizer["param_groups"][0]["lr"] for optimizer in state["optimizers"]] == [0.125, pytest.approx(0.05)]
    trainer.train()
    trainer.load_state_dict(state)
    assert [one["note"] for one in on_all(trainer, "loaded")] == ["mine"] * ranks
    assert [sorted(one) for one in on_all(trainer, "loaded")] == [["note", "rank", "tensor"]] * ranks
    rates = trainer.apply_all_operators(lambda op: [one.get_last_lr()[0] for one in op.schedulers])
    assert rates == [[0.125, pytest.approx(0.05)]] * ranks
    trainer.load_state_dict({**state, "operator": None})
    assert on_all(trainer, "loaded") == [None] * ranks


def test_training_does_not_fetch_the_state(make, workers) -> None:
    """A rank of several keeps its own part at hand for whoever may have to take it over: once a step, and beside that once a call."""
    trainer = make(OwnStateAfterCreators, creators=TWO, scheduler_step_freq="manual", **workers)
    steps = sum(trainer.train()["batch_count"] for _ in range(2))
    asked = trainer.apply_all_operators(lambda op: getattr(op, "asked", 0))
    several = workers["num_workers"] > 1
    assert all(one <= (steps + 5 if several else 0) for one in asked)


class OwnLoss(TrainingOperator):
    def train_batch(self, batch, batch_info):
        self.optimizer.zero_grad()
        loss = (self.model(batch[0]) - batch[1]).pow(2).mean()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item()}


class OwnLossAfterCreators(OwnLoss):
    def setup(self, config):
        pass


@pytest.mark.parametrize("generation", [1, 2])
def test_a_scheduler_without_a_loss_is_not_taken_for_the_criterion(make, two_or_local, generation) -> None:
    parts = {**CREATORS, "loss_creator": None, "scheduler_creator": scheduler_creator}
    operator = OwnLossAfterCreators if generation == 1 else OwnLoss.from_creators(**parts)
    creators = parts if generation == 1 else {}
    trainer = make(operator, creators=creators, scheduler_step_freq="epoch", **two_or_local)
    trainer.train()
    found = trainer.apply_all_operators(
        lambda op: (op.criterion, type(op.scheduler), op.optimizer.param_groups[0]["lr"])
    )
    assert found == [(None, StepLR, 5e-5)] * two_or_local["num_workers"]


class ManySchedulers(TrainingOperator):
    def setup(self, config):
        model = nn.Linear(1, 1)
        optimizer = optimizer_creator(model, config)
        self.model, self.optimizer, self.criterion, self.schedulers = self.register(
            models=model,
            optimizers=optimizer,
            criterion=nn.MSELoss(),
            schedulers=[StepLR(optimizer, 1, gamma=gamma) for gamma in (0.5, 0.1)],
        )
        self.register_data(train_loader=DataLoader(numbers(), batch_size=BATCH))


def test_every_scheduler_steps_and_by_passes_not_by_calls(make, two_or_local) -> None:
    trainer = make(ManySchedulers, creators={}, scheduler_step_freq="epoch", **two_or_local)
    rates = []
    for num_steps in (2, 1, None, None):
        trainer.train(num_steps=num_steps)
        rates.append(trainer.apply_all_operators(lambda op: op.optimizer.param_groups[0]["lr"]))
    expected = [1e-4, 1e-4, 5e-6, 2.5e-7]
    assert rates == [[pytest.approx(rate)] * two_or_local["num_workers"] for rate in expected]


def test_update_scheduler_without_one_says_so(make, two_or_local) -> None:
    with pytest.raises(RuntimeError, match="has no scheduler"):
        make(**two_or_local).update_scheduler(0.1)


def test_a_state_and_a_model_do_not_follow_the_training(make, workers) -> None:
    trainer = make(**workers)
    trainer.train()
    state, model = trainer.state_dict(), trainer.get_model()
    weight, momentum = (
        state["models"][0]["weight"].clone(),
        state["optimizers"][0]["state"][0]["momentum_buffer"].clone(),
    )
    trainer.train()
    assert torch.equal(state["models"][0]["weight"], weight)
    assert torch.equal(model.weight, weight)
    assert torch.equal(state["optimizers"][0]["state"][0]["momentum_buffer"], momentum)
    assert not torch.equal(trainer.get_model().weight, weight)
    trainer.load_state_dict(state)
    trainer.train()  # nor do they follow after they were loaded
    assert torch.equal(state["models"][0]["weight"], weight)
    assert torch.equal(state["optimizers"][0]["state"][0]["momentum_buffer"], momentum)
    with torch.no_grad():
        trainer.get_model().weight.fill_(123.0)
    assert trainer.train()["train_loss"] < 1e6


def test_the_position_and_the_steps_are_in_the_state(make, workers) -> None:
    first, second = make(Seen, **workers), make(Seen, **workers)
    first.train()
    state = first.state_dict()
    second.load_state_dict(state)
    assert second.train()["epoch"] == 2
    steps = SAMPLES // BATCH // workers["num_workers"]
    assert on_all(second, "infos")[0][0]["global_step"] == steps == state["global_step"]


@pytest.mark.parametrize("part", ["models", "optimizers", "schedulers"])
def test_a_state_with_other_counts_is_refused_at_once(make, two_or_local, part) -> None:
    trainer = make(scheduler_creator=scheduler_creator, scheduler_step_freq="epoch", **two_or_local)
    state = trainer.state_dict()
    state[part] = state[part] * 2
    with pytest.raises(ValueError, match=rf"the state has 2 {part}, this trainer has 1"):
        trainer.load_state_dict(state)


def test_a_state_of_another_model_is_refused_at_once_and_named(make, workers) -> None:
    state = make(model_creator=lambda config: nn.Linear(1, 2)).state_dict()
    with pytest.raises(RuntimeError, match=r"weight has shape \(2, 1\) in the state and \(1, 1\) here"):
        make(**workers).load_state_dict(state)


# ------------------------------------------------------------------------------------------------------ every worker alike


def test_the_initialization_hook_runs_first_in_every_worker(make, workers, monkeypatch) -> None:
    monkeypatch.delenv("SET_BY_HOOK", raising=False)

    def hook():
        os.environ["SET_BY_HOOK"] = os.environ.get("SET_BY_HOOK", "") + f"{os.getpid()};"

    def model(config):
        assert os.environ["SET_BY_HOOK"] == f"{os.getpid()};"
        return nn.Linear(1, 1)

    trainer = make(model_creator=model, initialization_hook=hook, **workers)
    found = trainer.apply_all_workers(lambda: (os.getpid(), os.environ["SET_BY_HOOK"]))
    assert found == [(pid, f"{pid};") for pid, _ in found]
    assert len({pid for pid, _ in found}) == workers["num_workers"]
    os.environ.pop("SET_BY_HOOK", None)


class OnDevice(Seen):
    def setup(self, config):
        super().setup(config)
        self.in_setup = torch.zeros(2, device=self.device)

    def train_batch(self, batch, batch_info):
        return super().train_batch([part.to(self.device) for part in batch], batch_info)


def test_there_is_always_a_device(make, workers) -> None:
    trainer = make(OnDevice, use_gpu=False, **workers)
    found = trainer.apply_all_operators(lambda op: (op.device, op.device_ids, op.use_gpu, op.in_setup.device.type))
    assert found == [(torch.device("cpu"), None, False, "cpu")] * workers["num_workers"]
    assert trainer.train()["num_samples"] == SAMPLES


def group_facts():
    """Size and time-out of this process's group."""
    group = dist.distributed_c10d._get_default_group()
    options = group._get_backend(torch.device("cpu")).options
    return dist.get_world_size(), options._timeout.total_seconds()


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_rank_has_a_group_too_and_timeout_s_is_its_timeout(make, ranks, monkeypatch) -> None:
    monkeypatch.setenv("NCCL_TIMEOUT_S", "99")
    trainer = make(num_workers=ranks, timeout_s=7)
    assert trainer.apply_all_workers(group_facts) == [(ranks, 7.0)] * ranks
    assert make(num_workers=ranks).apply_all_workers(group_facts) == [(ranks, 1800.0)] * ranks


def test_own_collectives_work_for_any_number_of_workers(make) -> None:
    def total():
        value = torch.ones(1)
        dist.all_reduce(value)
        return value.item()

    for ranks in (1, 2):
        assert make(num_workers=ranks).apply_all_workers(total) == [float(ranks)] * ranks


class Broken(TrainingOperator):
    def setup(self, config):
        raise LookupError("no such data")


def test_an_error_in_setup_is_raised_as_it_is(make, workers) -> None:
    with pytest.raises(LookupError, match="no such data") as caught:
        make(Broken, creators={}, **workers)
    assert type(caught.value) is LookupError
    if not workers.get("use_local"):
        assert "in setup" in str(caught.value.__cause__)


def test_trainers_can_follow_and_accompany_each_other(make) -> None:
    first, second = make(num_workers=2), make(num_workers=2)
    assert first.train() == second.train()
    first.shutdown()
    third = make(num_workers=2)
    second.train()
    assert third.train()["epoch"] == 1
