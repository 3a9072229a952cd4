"""Who makes the update of a Lightning module, and how: against Lightning's own Trainer, and over several ranks."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from one_rank import OneRank
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import DataLoader, Dataset

with warnings.catch_warnings():  # Lightning's own imports warn of one another's versions
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip("lightning", reason="lightning is not installed: pip install 'lightning>=2.5'")
    from lightning.pytorch.demos.boring_classes import BoringModel, DemoModel, ManualOptimBoringModel

from torchtrainer.comm.group import SingleCollective, open_group
from torchtrainer.config import TrainSettings
from torchtrainer.errors import InvalidArgumentError, OperatorUseError
from torchtrainer.operator import TrainingOperator
from torchtrainer.spec import BuildSpec
from torchtrainer.train.progress import OpenGate, Progress
from torchtrainer.train.rng import seed_all
from torchtrainer.worker.assembly import build_rank

SAMPLES, BATCH, WIDTH, PASSES, RANKS, RANK_DEADLINE_S = 26, 4, 32, 2, 3, 90.0


class Rows(Dataset):
    """The rows of a fixed matrix; their number divides neither by batches nor by ranks."""

    def __init__(self):
        self.rows = torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return self.rows[index]


class Gan(lightning.LightningModule):
    """Two networks that are trained in turn."""

    toggles, dicts = True, False

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, WIDTH))
        self.judge = nn.Sequential(nn.Linear(WIDTH, 16), nn.LeakyReLU(), nn.Linear(16, 1))

    def generator_loss(self, batch):
        judged = self.judge(self.generator(batch[:, :8]))
        return binary_cross_entropy_with_logits(judged, torch.ones_like(judged))

    def judge_loss(self, batch):
        real, made = self.judge(batch), self.judge(self.generator(batch[:, :8]).detach())
        return binary_cross_entropy_with_logits(real, torch.ones_like(real)) + binary_cross_entropy_with_logits(
            made, torch.zeros_like(made)
        )

    def training_step(self, batch, batch_idx):
        for optimizer, schedule, loss_of in zip(
            self.optimizers(), self.lr_schedulers(), (self.generator_loss, self.judge_loss), strict=True
        ):
            if self.toggles:
                self.toggle_optimizer(optimizer)
            loss = loss_of(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            if self.toggles:
                self.untoggle_optimizer(optimizer)
            schedule.step()
        return {"judge": loss, "position": self.global_step}

    def configure_optimizers(self):
        optimizers = [torch.optim.Adam(part.parameters(), lr=0.05) for part in (self.generator, self.judge)]
        schedules = [torch.optim.lr_scheduler.StepLR(one, 2, 0.9) for one in optimizers]
        if self.dicts:
            return tuple(
                {"optimizer": one, "lr_scheduler": {"scheduler": rates, "interval": "step"}}
                for one, rates in zip(optimizers, schedules, strict=True)
            )
        return optimizers, schedules


class Untoggled(Gan):
    toggles, dicts = False, True


class GanOfClosures(Gan):
    def training_step(self, batch, batch_idx):
        for optimizer, loss_of in zip(self.optimizers(), (self.generator_loss, self.judge_loss), strict=True):

            def closure(optimizer=optimizer, loss_of=loss_of):
                optimizer.zero_grad()
                self.manual_backward(loss_of(batch))

            with optimizer.toggle_model():
                optimizer.step(closure=closure)


class GradientPenalty(Gan):
    """Steps one network in each batch, the other in every second one, with gradients of gradients."""

    def training_step(self, batch, batch_idx):
        generator, judge = self.optimizers()
        between = (0.3 * batch + 0.7 * self.generator(batch[:, :8]).detach()).requires_grad_()
        judged = self.judge(between)
        (slopes,) = torch.autograd.grad(judged, between, torch.ones_like(judged), create_graph=True)
        judge.zero_grad()
        self.manual_backward(judged.mean() + (slopes.norm(dim=1) - 1).square().mean())
        judge.step()
        if batch_idx % 2 == 0:
            generator.zero_grad()
            self.manual_backward(self.generator_loss(batch))
            generator.step()


class Accumulating(BoringModel):
    """Two batches for each update; the gradients of all but the last of them stay on their rank."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer, last = self.optimizers(), batch_idx % 2 == 1
        with optimizer.toggle_model(sync_grad=last):
            self.manual_backward(self.step(batch) / 2)
        if last:
            optimizer.step()
            optimizer.zero_grad()


class Parts(BoringModel):
    """One optimizer, and two losses that use a part of the parameters each."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.other = nn.Linear(WIDTH, 2)

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        for part in (self.layer, self.other):
            self.manual_backward(self.loss(part(batch)))
        optimizer.step()


class Lbfgs(BoringModel):
    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.3, max_iter=4)


class LbfgsByHand(Lbfgs):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()

        def closure():
            optimizer.zero_grad()
            loss = self.step(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


class Looking(torch.optim.SGD):
    """Takes the gradients where a step along them would lead to (sharpness-aware minimization)."""

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        moves = [(one, 0.05 * one.grad) for group in self.param_groups for one in group["params"]]
        for one, move in moves:
            one.add_(move)
        with torch.enable_grad():
            closure()
        for one, move in moves:
            one.sub_(move)
        super().step()
        return loss


class LooksAhead(BoringModel):
    def configure_optimizers(self):
        return Looking(self.parameters(), lr=0.1)


class WarmsUp(BoringModel):
    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * min(1.0, (self.trainer.global_step + 1) / 5)
        optimizer.step(closure=optimizer_closure)


class PlateauBySteps(BoringModel):
    def training_step(self, batch, batch_idx):
        loss = self.step(batch)
        self.log("now", loss, on_step=True, on_epoch=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        rates = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, patience=0, factor=0.5, threshold=1e9, threshold_mode="abs"
        )
        entry = {"scheduler": rates, "monitor": "now", "interval": "step", "frequency": 3}
        return {"optimizer": optimizer, "lr_scheduler": entry}


class OneCycle(BoringModel):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        rates = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, 0.01, total_steps=self.trainer.estimated_stepping_batches
        )
        return [optimizer], [{"scheduler": rates, "interval": "step"}]


MODULES = {
    kind.__name__: kind
    for kind in (
        BoringModel,
        DemoModel,
        ManualOptimBoringModel,
        Gan,
        Untoggled,
        GanOfClosures,
        GradientPenalty,
        Accumulating,
        Parts,
        Lbfgs,
        LbfgsByHand,
        LooksAhead,
        WarmsUp,
        PlateauBySteps,
        OneCycle,
    )
}
ALONE = (  # the same over ranks as others, or with a loss that is a sum over the batch, which no mean over ranks is
    "BoringModel",
    "DemoModel",
    "GanOfClosures",
    "WarmsUp",
    "OneCycle",
)
OVER_RANKS = [name for name in MODULES if name not in ALONE]


def loader(batch=BATCH):
    return DataLoader(Rows(), batch_size=batch)


def rank(kind, *, collective=None, batch=BATCH, **settings):
    collective = collective or SingleCollective()
    operator = TrainingOperator.from_ptl(kind, loader(batch), loader(batch))
    spec = BuildSpec(training_operator_cls=operator, config={"max_epochs": PASSES}, settings=TrainSettings(**settings))
    return OneRank(
        build_rank(
            spec,
            collective=collective,
            device=torch.device("cpu"),
            local_rank=collective.rank,
            progress=Progress(),
        ),
        gate=OpenGate(),
    )


def trained(kind, **arguments):
    """A rank that was trained as Lightning's Trainer trains: with a validation after each pass."""
    one = rank(kind, **arguments)
    for _ in range(PASSES):
        one.train()
        if kind.validation_step is not lightning.LightningModule.validation_step:
            one.validate()
    return one


@pytest.mark.parametrize("name", MODULES)
def test_same_bits_as_lightnings_own_trainer(name):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_all(0)
    module = MODULES[name]()
    with warnings.catch_warnings():  # of few loader workers and short passes
        warnings.simplefilter("ignore")
        reference = lightning.Trainer(
            max_epochs=PASSES,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        reference.fit(module, loader(), loader())
    one = trained(MODULES[name])
    mine = one.operator.model.state_dict()
    assert all(torch.equal(mine[key], value) for key, value in module.state_dict().items())
    assert one.operator.model.global_step == reference.global_step
    rates = [[group["lr"] for group in each.param_groups] for each in one.operator.optimizers]
    assert rates == [[group["lr"] for group in each.param_groups] for each in reference.optimizers]


def test_state_of_all_optimizers_and_of_the_count_of_updates():
    one, other = rank(Gan), rank(Gan)
    one.train()
    other.load_state_dict(one.state_dict())
    assert other.operator.model.global_step == 14
    assert other.operator.get_model() is other.operator.model
    found = [each.train().metrics for each in (one, other)]
    assert found[0] == found[1]
    assert found[0]["last_position"] == 28


def test_optimizers_as_the_module_gets_them():
    seen = []

    class Curious(Gan):
        def training_step(self, batch, batch_idx):
            seen.extend(self.optimizers())
            seen.append(self.optimizers(use_pl_optimizer=False))
            super().training_step(batch, batch_idx)

        def on_before_optimizer_step(self, optimizer):
            seen.append(optimizer)

    one = rank(Curious)
    one.train(num_steps=1)
    first, second, raw, *stepped = seen
    assert isinstance(first, torch.optim.Adam)
    assert first.param_groups is raw[0].param_groups
    assert [first.optimizer, second.optimizer] == raw == stepped == one.operator.optimizers
    assert first.state_dict()["param_groups"] == raw[0].state_dict()["param_groups"]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_with_several_optimizers(precision):
    one, plain = rank(Gan, precision=precision), rank(Gan)
    for each in (one, plain):
        each.train(num_steps=2)
    ours, theirs = one.operator.model, plain.operator.model
    for mine, whole in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, whole, rtol=0, atol=0.2)
        assert not torch.equal(mine, whole)


def test_manual_backward_in_automatic_optimization_is_an_error():
    class Confused(BoringModel):
        def training_step(self, batch, batch_idx):
            self.manual_backward(self.step(batch))

    with pytest.raises(
        OperatorUseError, match=r"Confused called self\.manual_backward.*automatic_optimization = False"
    ):
        rank(Confused).train()


def test_scheduler_by_steps_with_a_metric_that_no_step_has():
    class Misspelled(PlateauBySteps):
        def training_step(self, batch, batch_idx):
            return self.step(batch)

    with pytest.raises(
        InvalidArgumentError, match=r"monitors 'now', which is not a metric of the latest training step.*train_loss"
    ):
        rank(Misspelled).train()


# ---------------------------------------------------------------------------------------------- several ranks


class Local(Gan):
    """Forgets that gradients are exchanged."""

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()[0]
        optimizer.zero_grad()
        self.generator_loss(batch).backward()
        optimizer.step()


class Gathering(BoringModel):
    """A loss over the outputs of all ranks, whose last batch is uneven."""

    def training_step(self, batch, batch_idx):
        strategy = self.trainer.strategy
        assert strategy.broadcast({"from": self.global_rank}, src=1) == {"from": 1}
        assert strategy.reduce(torch.tensor(self.global_rank), reduce_op="sum") == 3
        everyone = self.all_gather(self(batch), sync_grads=True)
        assert torch.equal(everyone[self.global_rank], self(batch))
        return self.loss(everyone.flatten(0, 1))


def error_of(kind, collective):
    try:
        rank(kind, collective=collective).train()
    except OperatorUseError as error:
        return str(error)
    return ""


def one_rank(place, number):
    torch.set_num_threads(1)
    group = open_group(
        backend="gloo",
        rank=number,
        world_size=RANKS,
        timeout_s=RANK_DEADLINE_S,
        store_path=str(Path(place) / "store"),
    )
    found = {}
    for name in OVER_RANKS:
        one = trained(MODULES[name], collective=group)
        weights = torch.cat([each.detach().flatten() for each in one.operator.model.parameters()])
        found[name] = [weights.tolist(), one.operator.model.global_step]
    errors = [error_of(kind, group) for kind in (Local, Gathering)]
    (Path(place) / f"{number}.json").write_text(json.dumps({"found": found, "errors": errors}))
    group.close()


def fork_ranks(place):
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=one_rank, args=(place, number)) for number in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(RANK_DEADLINE_S)
        if process.exitcode is None:
            process.kill()
            process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in ranks))


def test_three_ranks_update_as_one_with_the_whole_batch(tmp_path):
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    tmp_path.chmod(0o700)
    program = [sys.executable, __file__, str(tmp_path)]
    with subprocess.Popen(program, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as parent:
        output, _ = parent.communicate(timeout=2 * RANK_DEADLINE_S)
    assert parent.returncode == 0, output
    assert "find_unused_parameters" not in output
    ranks = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(RANKS)]
    for name in OVER_RANKS:
        weights, steps = ranks[0]["found"][name]
        assert [one["found"][name] for one in ranks] == [[weights, steps]] * RANKS, name
        whole = trained(MODULES[name], batch=RANKS * BATCH)
        assert steps == whole.operator.model.global_step
        mine = torch.cat([each.detach().flatten() for each in whole.operator.model.parameters()])
        torch.testing.assert_close(torch.tensor(weights), mine, rtol=1e-4, atol=1e-5)
    for one in ranks:
        local, gathering = one["errors"]
        assert "Adam was stepped without a self.manual_backward(loss)" in local
        assert "those of the ranks are uneven: [(1, 2), (1, 2), (" in gathering


if __name__ == "__main__":
    fork_ranks(sys.argv[1])
