"""Lightning modules as operators: the same numbers as a loop by hand, the hooks, logs, schedulers, and what is refused."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from one_rank import OneRank
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

with warnings.catch_warnings():  # Lightning's own imports warn of one another's versions
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip("lightning", reason="lightning is not installed: pip install 'lightning>=2.5'")
    import torchmetrics

from torchtrainer.comm.group import SingleCollective, open_group
from torchtrainer.config import TrainSettings
from torchtrainer.errors import (
    InvalidArgumentError,
    InvalidArgumentTypeError,
    NotAvailableError,
    OperatorUseError,
)
from torchtrainer.operator import TrainingOperator
from torchtrainer.spec import BuildSpec
from torchtrainer.train.components import internals
from torchtrainer.train.metrics import PassResult, reduce_results
from torchtrainer.train.progress import OpenGate, Progress
from torchtrainer.train.rng import seed_all
from torchtrainer.worker.assembly import build_rank

SAMPLES, BATCH, RANK_DEADLINE_S = 26, 4, 60.0  # 7 batches in a pass, the last one smaller


def data(samples=SAMPLES):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, 3, generator=generator)
    return TensorDataset(x, x.sum(1, keepdim=True) + 0.1)


class Module(lightning.LightningModule):
    """A small regression with everything in one place."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.layer = nn.Linear(3, 1)
        self.calls = []

    def forward(self, x):
        return self.layer(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self(x), y)
        self.log("logged", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.mse_loss(self(x), y)
        self.log("val_error", (self(x) - y).abs().mean())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    def train_dataloader(self):
        return DataLoader(data(), batch_size=self.config.get("batch", BATCH))

    def val_dataloader(self):
        return DataLoader(data(10), batch_size=BATCH)


def rank(module=Module, config=None, *, collective=None, train=None, val=None, **settings):
    operator = TrainingOperator.from_ptl(module, train_dataloader=train, val_dataloader=val)
    collective = collective or SingleCollective()
    return OneRank(
        build_rank(
            BuildSpec(training_operator_cls=operator, config=config or {}, settings=TrainSettings(**settings)),
            collective=collective,
            device=torch.device("cpu"),
            local_rank=collective.rank,
            progress=Progress(),
        ),
        gate=OpenGate(),
    )


def with_optimizers(configure):
    return type("Configured", (Module,), {"configure_optimizers": configure})


def rate(one):
    return one.operator.optimizer.param_groups[0]["lr"]


# ---------------------------------------------------------------------------------------------- training


def by_hand(passes):
    seed_all(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(passes):
        for x, y in DataLoader(data(), batch_size=BATCH):
            loss = nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append((loss.item(), len(x)))
    return model, losses


def test_same_losses_and_weights_as_a_loop_by_hand():
    one = rank()
    model, losses = by_hand(2)
    taken = [one.train(num_steps=1).metrics["train_loss"] for _ in losses]
    assert taken == [loss for loss, _ in losses]
    for mine, reference in zip(one.operator.model.layer.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, reference)
    other = rank()
    last = [other.train().metrics for _ in range(2)][-1]
    pass_losses = losses[len(losses) // 2 :]
    mean = sum(loss * size for loss, size in pass_losses) / SAMPLES
    assert last["train_loss"] == last["logged"] == pytest.approx(mean, rel=1e-12)
    assert last["last_train_loss"] == losses[-1][0]
    assert (last["num_samples"], last["batch_count"], last["epoch"]) == (SAMPLES, 7, 2)


def test_same_bits_rates_metrics_and_hooks_as_lightnings_own_trainer():
    watched = type("Watched", (Module,), {hook: recorder(hook) for hook in HOOKS})
    watched.configure_optimizers = plateau("val_error").configure_optimizers
    seed_all(0)
    module = watched({})
    with warnings.catch_warnings():  # of few loader workers and short passes
        warnings.simplefilter("ignore")
        reference = lightning.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        reference.fit(module)
    one = rank(watched)
    for _ in range(2):
        one.train()
        one.validate()
    assert torch.equal(one.operator.model.layer.weight, module.layer.weight)
    assert rate(one) == reference.optimizers[0].param_groups[0]["lr"] == 5e-4
    for name in ("logged", "logged_epoch", "val_error"):
        assert one.operator.latest_metrics[name] == pytest.approx(reference.callback_metrics[name].item(), rel=1e-6)

    def training(calls):  # Lightning validates before the end of the pass
        return [call for call in calls if "validation" not in call and call != "on_train_epoch_end"]

    assert training(one.operator.model.calls) == training(module.calls)
    assert sorted(one.operator.model.calls) == sorted(module.calls)


def test_modules_of_the_other_package_are_modules_too():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")

    class Other(other.LightningModule):
        forward, training_step = Module.forward, Module.training_step
        configure_optimizers, train_dataloader = Module.configure_optimizers, Module.train_dataloader

        def __init__(self, config):
            super().__init__()
            self.config, self.layer = config, nn.Linear(3, 1)

    assert rank(Other).train().metrics["batch_count"] == 7


def test_validation_is_exact_and_weighted_by_samples():
    one = rank()
    found = one.validate().metrics
    with torch.no_grad():
        x, y = data(10).tensors
        output = one.operator.model(x)
    assert found["val_loss"] == pytest.approx(nn.functional.mse_loss(output, y).item(), rel=1e-6)
    assert found["val_error"] == pytest.approx((output - y).abs().mean().item(), rel=1e-6)
    assert found["num_samples"] == 10


def made_with(signature):
    """A module class whose constructor has this signature, and keeps its arguments."""
    names = {}
    exec(
        f"def __init__(self, {signature}):\n    given = dict(locals())\n    build(self, given)", {"build": build}, names
    )
    return type("Made", (Module,), names)


def build(self, given):
    Module.__init__(self, {})
    self.given = {name: value for name, value in given.items() if name not in ("self", "__class__")}


CONFIG = {"lr": 0.5, "hidden": 4, "batch": 13}


@pytest.mark.parametrize(
    ("signature", "given", "unused"),
    [
        ("lr=0.1, hidden=16", {"lr": 0.5, "hidden": 4}, "'batch' of config is not used: Made takes lr, hidden"),
        ("lr, /, depth=2", {"lr": 0.5, "depth": 2}, "'hidden', 'batch' of config are not used: Made takes lr, depth"),
        ("*, hidden", {"hidden": 4}, "'lr', 'batch' of config are not used: Made takes hidden"),
        ("", {}, "'lr', 'hidden', 'batch' of config are not used: Made takes no arguments"),
        ("config", {"config": CONFIG}, ""),
        ("hparams=None, depth=2", {"hparams": CONFIG, "depth": 2}, ""),
        ("config, lr=0.1", {"config": CONFIG, "lr": 0.5}, ""),
        ("lr=0.1, **more", {"lr": 0.5, "more": {"hidden": 4, "batch": 13}}, ""),
        ("config, **more", {"config": CONFIG, "more": {}}, ""),
        (
            "*values, batch=1",
            {"values": (), "batch": 13},
            "'lr', 'hidden' of config are not used: Made takes values, batch",
        ),
    ],
)
def test_the_constructor_gets_what_it_names_of_config(signature, given, unused, capsys):
    one = rank(made_with(signature), {**CONFIG, "max_epochs": 3} if "config" not in signature else CONFIG)
    found = one.operator.model.given
    if "hparams" in found:
        assert found["hparams"].pop("max_epochs") == 3
    if "more" in found:
        found["more"].pop("max_epochs", None)
    assert found == given
    said = [line for line in capsys.readouterr().err.splitlines() if "not used" in line]
    assert said == ([f"torchtrainer: {unused}"] if unused else [])


def test_hyperparameters_that_the_module_saves_are_those_of_config():
    class Saving(Module):
        def __init__(self, lr=0.1, hidden=16):
            super().__init__({})
            self.save_hyperparameters()

    assert dict(rank(Saving, CONFIG).operator.model.hparams) == {"lr": 0.5, "hidden": 4}


def test_loaders_that_are_given_go_before_the_modules_own():
    one = rank(train=DataLoader(data(), batch_size=13), val=DataLoader(data(), batch_size=13))
    assert one.train().metrics["batch_count"] == 2
    assert one.validate().metrics["batch_count"] == 2


def test_profile_and_bf16():
    one = rank(precision="bf16")
    seen = []
    one.operator.model.layer.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    assert {"mean_fwd_s", "mean_grad_s", "mean_apply_s"} <= set(one.train(profile=True).metrics["profile"])
    assert set(seen) == {torch.bfloat16}


def test_gradients_are_clipped_by_the_module_and_by_the_operator():
    norms = []

    class Clipped(Module):
        def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm):
            self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="norm")

    class Operator(TrainingOperator.from_ptl(Clipped)):
        def clip_gradients(self):
            gradients = [one.grad for one in self.model.parameters()]
            norms.append(torch.cat([one.flatten() for one in gradients]).norm().item())

    spec = BuildSpec(training_operator_cls=Operator)
    OneRank(
        build_rank(
            spec,
            collective=SingleCollective(),
            device=torch.device("cpu"),
            local_rank=0,
            progress=Progress(),
        ),
        gate=OpenGate(),
    ).train()
    assert norms == pytest.approx([0.01] * 7, rel=1e-3)


def test_optimizer_step_of_the_module_is_used():
    class Warmup(Module):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
            self.calls.append((epoch, batch_idx))
            optimizer.step(closure=optimizer_closure)

    one, plain = rank(Warmup), rank()
    one.train()
    plain.train()
    assert one.operator.model.calls == [(0, index) for index in range(7)]
    assert torch.equal(one.operator.model.layer.weight, plain.operator.model.layer.weight)


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (lambda loss, size: {"val_loss": loss.item(), "val_acc": size / 4}, {"val_loss", "val_acc"}),
        (
            lambda loss, size: {"loss": loss, "val_acc": torch.tensor([size / 4]), "outputs": [1]},
            {"val_loss", "val_acc"},
        ),
        (lambda loss, size: {"val_acc": size / 4, "many": torch.ones(2), "epoch": 1}, {"val_acc"}),
        (lambda loss, size: loss.item(), {"val_loss"}),
        (lambda loss, size: loss[None], {"val_loss"}),
        (lambda loss, size: None, set()),
    ],
)
def test_what_validation_step_returns_is_in_the_results(returned, expected):
    class Returning(Module):
        def validation_step(self, batch, batch_idx):
            x, y = batch
            return returned(nn.functional.mse_loss(self(x), y), len(x))

    one = rank(Returning)
    found = one.validate().metrics
    assert set(found) - {"num_samples", "batch_count"} == {
        f"{last}{name}" for name in expected for last in ("", "last_")
    }
    x, y = data(10).tensors
    values = {"val_acc": (4 * 1.0 + 4 * 1.0 + 2 * 0.5) / 10}  # weighted by samples
    values["val_loss"] = nn.functional.mse_loss(one.operator.model(x), y).item()
    assert {name: found[name] for name in expected} == pytest.approx(
        {name: values[name] for name in expected}, rel=1e-6
    )


def test_num_samples_in_what_a_step_returns_weighs_it():
    class Weighing(Module):
        def training_step(self, batch, batch_idx):
            return {"loss": super().training_step(batch, batch_idx), "index": batch_idx, "num_samples": 1}

    found = rank(Weighing).train().metrics
    assert found["index"] == 3.0
    assert found["last_index"] == 6.0


@pytest.mark.parametrize("form", ["dict", "none"])
def test_what_training_step_may_return(form):
    class Other(Module):
        def training_step(self, batch):
            loss = nn.functional.mse_loss(self(batch[0]), batch[1])
            return {"loss": loss, "extra": 1} if form == "dict" else None

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.calls.append(sorted(outputs))

    one = rank(Other)
    before = one.operator.model.layer.weight.clone()
    found = one.train().metrics
    assert one.operator.model.calls == [["extra", "loss"] if form == "dict" else []] * 7
    assert ("train_loss" in found) == (form == "dict")
    assert torch.equal(before, one.operator.model.layer.weight) == (form == "none")


def test_parts_in_evaluation_mode_stay_there():
    class Frozen(Module):
        def __init__(self):
            super().__init__({})
            self.norm = nn.BatchNorm1d(1).eval()

        def training_step(self, batch):
            self.calls.append((self.training, self.norm.training))
            return super().training_step(batch, 0)

        def validation_step(self, batch):
            self.calls.append((self.training, self.norm.training))

    one = rank(Frozen)
    one.train(num_steps=1)
    one.validate(num_steps=1)
    one.train(num_steps=1)
    assert one.operator.model.calls == [(True, False), (False, False), (True, False)]


# ---------------------------------------------------------------------------------------------- hooks and position

HOOKS = [
    "prepare_data",
    "setup",
    "configure_model",
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_validation_start",
    "on_validation_end",
    "on_validation_epoch_start",
    "on_validation_epoch_end",
    "on_validation_batch_start",
    "on_validation_batch_end",
]


def recorder(hook):
    def record(self, *arguments, **options):
        self.calls.append(hook)

    return record


def test_hooks_are_called_in_lightnings_order():
    recorded = type("Recorded", (Module,), {hook: recorder(hook) for hook in HOOKS})
    one = rank(recorded)
    calls = one.operator.model.calls
    assert calls == ["prepare_data", "setup", "configure_model", "on_fit_start"]
    calls.clear()
    update = ["on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step"]
    batch = ["on_train_batch_start", *update, "on_train_batch_end"]
    one.train(num_steps=3)
    assert calls == ["on_train_start", "on_train_epoch_start", *batch * 3]
    calls.clear()
    one.train(num_steps=6)
    assert calls == [*batch * 4, "on_train_epoch_end", "on_train_epoch_start", *batch * 2]
    calls.clear()
    one.train()
    assert calls == [*batch * 5, "on_train_epoch_end"]
    calls.clear()
    one.validate()
    inside = ["on_validation_batch_start", "on_validation_batch_end"] * 3
    assert calls == [
        "on_validation_start",
        "on_validation_epoch_start",
        *inside,
        "on_validation_epoch_end",
        "on_validation_end",
    ]


def test_position_as_the_module_sees_it():
    class Watching(Module):
        def see(self, where):
            self.calls.append((where, self.current_epoch, self.global_step, self.trainer.training))

        def training_step(self, batch, batch_idx):
            self.see(batch_idx)
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.see("batch end")

        def on_train_epoch_end(self):
            self.see("epoch end")

        def on_validation_epoch_end(self):
            self.see("validated")

    one = rank(Watching, {"batch": 13})
    calls = one.operator.model.calls
    one.train(num_steps=3)
    one.validate()
    one.train()
    assert calls == [
        (0, 0, 0, True),
        ("batch end", 0, 1, True),
        (1, 0, 1, True),
        ("batch end", 0, 2, True),
        ("epoch end", 0, 2, True),
        (0, 1, 2, True),
        ("batch end", 1, 3, True),
        ("validated", 1, 3, False),
        (1, 1, 3, True),
        ("batch end", 1, 4, True),
        ("epoch end", 1, 4, True),
    ]


def test_module_sees_its_trainer():
    class Curious(Module):
        def configure_optimizers(self):
            self.calls.append(self.trainer.num_training_batches)
            return [super().configure_optimizers()], []

        def training_step(self, batch, batch_idx):
            trainer = self.trainer
            self.calls.append(
                (
                    self.optimizers().optimizer is trainer.optimizers[0],
                    self.lr_schedulers(),
                    self.device.type,
                    self.logger,
                )
            )
            self.calls.append((trainer.is_global_zero, self.global_rank, self.local_rank, trainer.world_size))
            self.print("hello")
            return super().training_step(batch, batch_idx)

    one = rank(Curious)
    one.train(num_steps=1)
    assert one.operator.model.calls == [7, (True, None, "cpu", None), (True, 0, 0, 1)]


@pytest.mark.parametrize("attribute", ["estimated_stepping_batches", "max_epochs", "max_steps", "checkpoint_callback"])
def test_what_only_lightnings_trainer_has_is_a_clear_error(attribute):
    class Needy(Module):
        def configure_optimizers(self):
            assert not hasattr(self.trainer, attribute)
            return getattr(self.trainer, attribute)

    with pytest.raises(NotAvailableError, match=rf"self\.trainer\.{attribute}: .*torchtrainer"):
        rank(Needy)


def test_how_long_the_training_will_be_is_read_from_config():
    class Planning(Module):
        def configure_optimizers(self):
            self.planned = self.trainer.estimated_stepping_batches
            return super().configure_optimizers()

    lengths = [
        {"max_epochs": 3},
        {"max_steps": 5},
        {"max_epochs": 3, "max_steps": 5},
        {"max_epochs": 1, "max_steps": 99},
    ]
    models = [rank(Planning, config).operator.model for config in lengths]
    assert [one.planned for one in models] == [21, 5, 5, 7]
    assert [one.trainer.max_steps for one in models] == [-1, 5, 5, 99]
    assert models[0].trainer.max_epochs == 3


def test_what_a_module_may_ask_and_tell_its_trainer():
    trainer = rank().operator.model.trainer
    values = torch.ones(2)
    assert trainer.strategy.all_gather(values) is trainer.strategy.broadcast(values) is values
    assert torch.equal(trainer.strategy.reduce(values), values)
    assert (trainer.strategy.root_device.type, trainer.precision, trainer.datamodule) == ("cpu", "32-true", None)
    assert trainer.should_stop is False
    for name, advice in (
        ("should_stop", "stop by not calling"),
        ("max_epochs", "put max_epochs into config"),
        ("x", "shows"),
    ):
        with pytest.raises(NotAvailableError, match=rf"self\.trainer\.{name} = True: .*{advice}"):
            setattr(trainer, name, True)


@pytest.mark.parametrize("use", ["self.logger.experiment.add_scalar('a', 1)", "self.logger.log_metrics({'a': 1})"])
def test_a_logger_that_is_not_there_is_named(use):
    names = {}
    exec(f"def training_step(self, batch, batch_idx):\n    {use}", {}, names)
    with pytest.raises(
        OperatorUseError, match=r"training_step uses \.(experiment|log_metrics) of self\.logger, which is None"
    ):
        rank(type("Logging", (Module,), names)).train()


def test_other_errors_of_hooks_stay_what_they_are():
    class Wrong(Module):
        def training_step(self, batch, batch_idx):
            if self.logger is not None:
                self.logger.experiment.add_scalar("a", 1)
            return self.layer.wieght

    with pytest.raises(AttributeError, match="wieght"):
        rank(Wrong).train()


def test_nothing_stays_on_the_module():
    one = rank()
    one.train(num_steps=1)
    module = one.operator.model
    assert not {"log", "optimizers"} & set(vars(module))
    twin = one.get_model()
    assert type(twin) is Module
    assert twin is not module
    assert set(pickle.loads(pickle.dumps(twin)).state_dict()) == {"layer.weight", "layer.bias"}
    assert torch.equal(copy.deepcopy(module).layer.weight, module.layer.weight)


# ---------------------------------------------------------------------------------------------- data modules


class Data(lightning.LightningDataModule):
    def __init__(self, samples=SAMPLES, batch=13):
        super().__init__()
        self.samples, self.batch, self.calls = samples, batch, []

    def prepare_data(self):
        self.calls.append("prepare_data")

    def setup(self, stage):
        self.calls.append(stage)
        self.train = data(self.samples)

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=self.batch)

    def val_dataloader(self):
        return DataLoader(data(10), batch_size=self.batch)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.calls.append(self.trainer.training)
        return batch

    def state_dict(self):
        return {"seen": len(self.calls)}

    def load_state_dict(self, state):
        self.calls = [None] * state["seen"]


def runtime_of(operator, config=None):
    context = {"collective": SingleCollective(), "device": torch.device("cpu"), "local_rank": 0, "progress": Progress()}
    built = build_rank(BuildSpec(training_operator_cls=operator, config=config or {}), **context)
    return OneRank(built, gate=OpenGate())


@pytest.mark.parametrize(
    ("given", "config", "batches"),
    [
        ({"datamodule": Data()}, {"batch": 2}, 2),
        ({"datamodule": Data}, {"batch": 5}, 6),
        ({"datamodule": Data}, {"samples": 13}, 1),
        ({"train_dataloader": Data()}, {}, 2),
        ({"datamodule": Data(), "train_dataloader": DataLoader(data(), batch_size=1)}, {}, 26),
        ({"datamodule": lightning.LightningDataModule.from_datasets(data(), batch_size=7)}, {"batch": 2}, 4),
    ],
)
def test_data_modules(given, config, batches):
    one = runtime_of(TrainingOperator.from_ptl(Module, **given), config)
    assert one.train().metrics["batch_count"] == batches
    assert one.validate().metrics["num_samples"] == 10
    assert one.operator.model.trainer.datamodule is one.operator.data.datamodule is not None


def test_hooks_and_state_of_a_data_module():
    operator = TrainingOperator.from_ptl(Module, datamodule=Data)
    one, other = runtime_of(operator), runtime_of(operator)
    one.train(num_steps=1)
    one.validate(num_steps=1)
    calls = one.operator.data.datamodule.calls
    assert calls == ["prepare_data", "fit", True, False]
    other.load_state_dict(pickle.loads(pickle.dumps(one.state_dict())))
    assert len(other.operator.data.datamodule.calls) == len(calls)


@pytest.mark.parametrize("value", [Module, "data", DataLoader(data())])
def test_only_data_modules_are_data_modules(value):
    with pytest.raises(InvalidArgumentTypeError, match="LightningDataModule as datamodule"):
        TrainingOperator.from_ptl(Module, datamodule=value)


# ---------------------------------------------------------------------------------------------- logs


def test_reductions_batch_sizes_and_metric_objects():
    class Logging(Module):
        def __init__(self, config):
            super().__init__(config)
            self.mean = torchmetrics.MeanMetric()

        def training_step(self, batch, batch_idx):
            self.mean(float(batch_idx), len(batch[0]))
            self.log_dict({"index": batch_idx, "tensor": torch.tensor([2.0])})
            self.log("metric", self.mean, on_epoch=True)
            self.log("heavy", float(batch_idx), batch_size=1)
            for reduction in ("sum", min, torch.max):
                self.log(f"index_{getattr(reduction, '__name__', reduction)}", batch_idx, reduce_fx=reduction)
            return super().training_step(batch, batch_idx)

        def on_train_epoch_end(self):
            self.log("at_end", 5.0)

    found = rank(Logging).train().metrics
    weighted = sum(index * (4 if index < 6 else 2) for index in range(7)) / SAMPLES
    assert found["index"] == pytest.approx(weighted)
    assert found["metric"] == pytest.approx(weighted)
    assert (found["heavy"], found["last_index"], found["tensor"], found["at_end"]) == (3.0, 6.0, 2.0, 5.0)
    assert (found["index_sum"], found["index_min"], found["index_max"]) == (21.0, 0.0, 6.0)


def test_values_per_step_and_of_the_whole_pass_have_lightnings_names_too():
    one = rank()
    found = one.train().metrics
    latest = one.operator.latest_metrics
    assert latest["logged_step"] == found["last_logged"]
    assert latest["logged_epoch"] == latest["logged"] == found["logged"]


def test_metric_objects_start_anew_with_each_pass():
    class Counting(Module):
        def __init__(self, config):
            super().__init__(config)
            self.total = torchmetrics.SumMetric()

        def training_step(self, batch, batch_idx):
            self.total(1)
            self.log("total", self.total)
            return super().training_step(batch, batch_idx)

    one = rank(Counting)
    assert [one.train(num_steps=steps).metrics["total"] for steps in (3, 4, 7)] == [3.0, 7.0, 7.0]


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (("many", torch.ones(2)), InvalidArgumentTypeError, r"'many'.*one element.*shape \(2,\)"),
        (("text", "a"), InvalidArgumentTypeError, "'text'.*str"),
        (("epoch", 1), InvalidArgumentError, "'epoch'.*another"),
        (
            ("x", 1, False, None, None, None, "median"),
            InvalidArgumentError,
            "reduce_fx='median'.*mean, sum, min or max",
        ),
        (("m", torchmetrics.MeanMetric()), InvalidArgumentError, "'m'.*not an attribute of Bad"),
    ],
)
def test_what_cannot_be_logged(arguments, error, text):
    class Bad(Module):
        def training_step(self, batch, batch_idx):
            self.log(*arguments)

    one = rank(Bad)
    with pytest.raises(error, match=text):
        one.train()
    assert "log" not in vars(one.operator.model)


# ---------------------------------------------------------------------------------------------- optimizers


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=1e-3)


def halving(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


def configured(form):
    def configure(self):
        optimizer = sgd(self)
        rates = halving(optimizer)
        return {
            "one": optimizer,
            "list": [optimizer],
            "lists": ([optimizer], [rates]),
            "lists of dicts": ([optimizer], [{"scheduler": rates, "name": "rate"}]),
            "dict": {"optimizer": optimizer, "lr_scheduler": rates},
            "dict of dict": {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates}},
            "dicts": [{"optimizer": optimizer, "lr_scheduler": rates}],
        }[form]

    return with_optimizers(configure)


@pytest.mark.parametrize(
    ("form", "schedulers"),
    [("one", 0), ("list", 0), ("lists", 1), ("lists of dicts", 1), ("dict", 1), ("dict of dict", 1), ("dicts", 1)],
)
def test_every_form_of_configure_optimizers(form, schedulers):
    one = rank(configured(form))
    one.train(num_steps=6)
    assert rate(one) == 1e-3
    one.train(num_steps=1)
    assert rate(one) == (5e-4 if schedulers else 1e-3)
    assert one.facts()["schedulers"] == schedulers


@pytest.mark.parametrize(
    ("interval", "frequency", "setting", "halvings"),
    [
        ("epoch", 1, None, 2),
        ("epoch", 2, None, 1),
        ("step", 1, None, 14),
        ("step", 3, None, 4),
        (None, 1, "batch", 14),
        (None, 1, "epoch", 2),
        ("epoch", 1, "batch", 2),
        ("step", 1, "manual", 0),
    ],
)
def test_interval_and_frequency_of_schedulers(interval, frequency, setting, halvings):
    def configure(self):
        optimizer = sgd(self)
        entry = {"scheduler": halving(optimizer), "frequency": frequency}
        return [optimizer], [entry if interval is None else {**entry, "interval": interval}]

    one = rank(with_optimizers(configure), scheduler_step_freq=setting)
    one.train()
    one.train()
    assert rate(one) == pytest.approx(1e-3 * 0.5**halvings)


def plateau(monitor, **more):
    def configure(self):
        optimizer = sgd(self)
        rates = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, patience=0, factor=0.5, threshold=1e9, threshold_mode="abs"
        )
        entry = {"scheduler": rates, "monitor": monitor, **more} if more else rates
        return {"optimizer": optimizer, "lr_scheduler": entry, "monitor": monitor}

    return with_optimizers(configure)


@pytest.mark.parametrize("monitor", ["train_loss", "logged_epoch"])
def test_plateau_by_a_metric_of_training(monitor):
    one = rank(plateau(monitor))
    rates = []
    for _ in range(3):
        one.train()
        rates.append(rate(one))
    assert rates == [1e-3, 5e-4, 2.5e-4]


@pytest.mark.parametrize("monitor", ["val_loss", "val_error"])
def test_plateau_by_a_metric_of_validation_steps_once_for_each_training_pass(monitor):
    one = rank(plateau(monitor))
    rates = []
    for _ in range(2):
        one.validate()  # no training pass since
        one.train()
        one.validate()
        one.validate()
        rates.append(rate(one))
    assert rates == [1e-3, 5e-4]


def test_waiting_for_a_metric_is_saved():
    one, other = rank(plateau("val_loss")), rank(plateau("val_loss"))
    one.train()
    other.load_state_dict(one.state_dict())
    assert [schedule.waiting for schedule in other.operator.schedules.members] == [True]


def test_metric_that_nobody_has_is_an_error():
    one = rank(plateau("val_acuracy"))
    one.train()
    with pytest.raises(InvalidArgumentError, match=r"monitors 'val_acuracy'.*val_error, val_loss"):
        one.validate()
    relaxed = rank(plateau("val_acuracy", strict=False))
    relaxed.train()
    assert "val_loss" in relaxed.validate().metrics


# ---------------------------------------------------------------------------------------------- state


def test_save_and_restore_with_the_modules_extras():
    class Extra(Module):
        extra = None

        def on_save_checkpoint(self, checkpoint):
            assert set(checkpoint["state_dict"]) == {"layer.weight", "layer.bias"}
            checkpoint["extra"] = {"steps": torch.tensor(checkpoint["global_step"])}

        def on_load_checkpoint(self, checkpoint):
            self.extra = checkpoint["extra"]["steps"].item(), checkpoint["epoch"]

    one, other = rank(Extra), rank(Extra)
    one.train()
    state = one.state_dict()
    assert set(state["models"][0]) == {"layer.weight", "layer.bias"}
    other.load_state_dict(pickle.loads(pickle.dumps(state)))
    assert other.operator.model.extra is not None
    assert other.operator.model.extra[0] == other.operator.global_step == 7
    assert one.train().metrics == other.train().metrics


# ---------------------------------------------------------------------------------------------- what is refused


class NoStep(Module):
    training_step = lightning.LightningModule.training_step


class TwoLoaders(Module):
    def val_dataloader(self):
        return [super().val_dataloader(), super().val_dataloader()]


class NeedsWidth(Module):
    def __init__(self, config, width):
        super().__init__(config)


class EpochEnd(Module):
    def validation_epoch_end(self, outputs):
        pass


def lbfgs(module):
    return torch.optim.LBFGS(module.parameters(), lr=0.1, max_iter=4)


@pytest.mark.parametrize(
    ("module", "settings", "error", "text"),
    [
        (NoStep, {}, InvalidArgumentError, "NoStep has no training_step"),
        (TwoLoaders, {}, NotAvailableError, "val_dataloader of TwoLoaders gives 2 loaders"),
        (NeedsWidth, {}, InvalidArgumentTypeError, "NeedsWidth.*missing.*'width'.*no entries.*Put it into config"),
        (EpochEnd, {}, NotAvailableError, "validation_epoch_end.*on_validation_epoch_end"),
        (with_optimizers(lambda self: [sgd(self), sgd(self)]), {}, InvalidArgumentError, "returned 2.*automatic_opt"),
        (with_optimizers(lbfgs), {"precision": "fp16"}, InvalidArgumentError, "LBFGS.*bf16"),
        (with_optimizers(lambda self: None), {}, InvalidArgumentTypeError, "configure_optimizers of Configured.*None"),
        (plateau(None), {}, InvalidArgumentError, 'ReduceLROnPlateau.*"monitor"'),
        (plateau("val_loss", interval="day"), {}, InvalidArgumentError, "interval.*'day'"),
        (plateau("val_loss", frequency=0), {}, InvalidArgumentError, "frequency, got 0"),
    ],
)
def test_modules_that_cannot_be_trained(module, settings, error, text):
    with pytest.raises(error, match=text):
        rank(module, **settings)


@pytest.mark.parametrize("value", [nn.Linear, Module({}), "module"])
def test_only_lightning_module_classes(value):
    with pytest.raises(InvalidArgumentTypeError, match=r"lightning\.LightningModule"):
        TrainingOperator.from_ptl(value)


def test_other_returns_and_missing_steps():
    class Odd(Module):
        validation_step = lightning.LightningModule.validation_step

        def training_step(self, batch):
            return {"los": 1}

    class Ending(Module):
        def on_train_batch_start(self, batch, batch_idx):
            return -1

    one = rank(Odd)
    with pytest.raises(InvalidArgumentTypeError, match=r"training_step of Odd must return the loss.*\['los'\]"):
        one.train()
    with pytest.raises(OperatorUseError, match="Odd has none"):
        one.validate()
    with pytest.raises(NotAvailableError, match=r"Ending returned -1.*num_steps"):
        rank(Ending).train()


def test_hooks_that_are_never_called_and_entries_that_nothing_reads_are_named():
    with pytest.warns(UserWarning, match="does not call on_train_end, teardown of Ending"):
        rank(type("Ending", (Module,), {"on_train_end": recorder("x"), "teardown": recorder("y")}))
    with pytest.warns(UserWarning, match=r"has unknown entries: \['opt_idx'\]"):
        rank(plateau("val_loss", opt_idx=0))


# ---------------------------------------------------------------------------------------------- two ranks


class Ranked(Module):
    """Says what only a module over several ranks shows; its data do not divide."""

    def __init__(self, config):
        super().__init__(config)
        self.seen = torchmetrics.SumMetric()

    def prepare_data(self):
        self.calls.append(torch.rand(1))

    def training_step(self, batch, batch_idx):
        self.log("largest", batch[0].max(), reduce_fx="max")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.seen(len(batch[0]))
        self.log("seen", self.seen)
        return super().validation_step(batch, batch_idx)

    def val_dataloader(self):
        return DataLoader(data(1), batch_size=1)  # one rank has nothing

    configure_optimizers = plateau("val_loss").configure_optimizers


def two_ranks(place, number):
    torch.set_num_threads(1)
    group = open_group(backend="gloo", rank=number, world_size=2, timeout_s=30.0, store_path=f"{place}/store")
    one = rank(Ranked, {"batch": 2}, collective=group)
    wrapped = isinstance(internals(one.operator).components.models[0], DistributedDataParallel)
    results = [one.train(), one.validate(), one.train(), one.validate()]
    outcome = {
        "results": [[result.metrics, result.weights] for result in results],
        "weights": one.operator.model.layer.weight.tolist(),
        "keys": list(one.state_dict()["models"][0]),
        "prepared": len(one.operator.model.calls),
        "wrapped": wrapped,
        "rate": rate(one),
    }
    (Path(place) / f"{number}.json").write_text(json.dumps(outcome))
    group.close()


def test_two_ranks_train_as_one(tmp_path):
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    tmp_path.chmod(0o700)
    program = [sys.executable, __file__, str(tmp_path)]
    with subprocess.Popen(program, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as parent:
        output, _ = parent.communicate(timeout=2 * RANK_DEADLINE_S)
    assert parent.returncode == 0, output
    ranks = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2)]
    alone = rank(Ranked, {"batch": 4})
    expected = [alone.train().metrics, alone.validate().metrics, alone.train().metrics, alone.validate().metrics]
    torch.testing.assert_close(torch.tensor(ranks[0]["weights"]), alone.operator.model.layer.weight.detach())
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert ranks[0]["keys"] == list(alone.state_dict()["models"][0])
    assert [one["prepared"] for one in ranks] == [1, 0]
    assert all(one["wrapped"] for one in ranks)
    assert [one["rate"] for one in ranks] == [rate(alone)] * 2
    for index, reference in enumerate(expected):
        found = reduce_results([PassResult(*one["results"][index]) for one in ranks])
        names = [name for name in reference if not name.startswith("last_")]
        assert {name: found[name] for name in names} == pytest.approx(
            {name: reference[name] for name in names}, rel=1e-5
        )


def fork_ranks(place):
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=two_ranks, args=(place, number)) for number in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(RANK_DEADLINE_S)
        if process.exitcode is None:
            process.kill()
            process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))


if __name__ == "__main__":
    fork_ranks(sys.argv[1])
