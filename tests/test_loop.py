"""Step semantics: how calls, passes and steps relate, and what hooks get."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from one_rank import OneRank
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from torchtrainer.comm.group import SingleCollective
from torchtrainer.config import TrainSettings
from torchtrainer.operator import TrainingOperator
from torchtrainer.spec import BuildSpec
from torchtrainer.train.batches import split_batch
from torchtrainer.train.components import internals
from torchtrainer.train.hooks import bind_hook
from torchtrainer.train.progress import OpenGate, Progress, StepGate
from torchtrainer.train.uneven import GradientShare
from torchtrainer.worker.assembly import build_rank

pytestmark = pytest.mark.pure

SAMPLES, BATCH = 40, 4  # 10 batches in a pass


def linear_data(samples: int = SAMPLES) -> TensorDataset:
    x = torch.arange(samples, dtype=torch.float32).reshape(-1, 1) / samples
    return TensorDataset(x, 2 * x + 5)


class Endless(IterableDataset[Any]):
    """Samples of unknown number to the loader."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[Any]:
        for index in range(self.samples):
            yield torch.tensor([float(index)]), torch.tensor([1.0])


class Linear(TrainingOperator):
    """y = 2x + 5 by one linear layer, and a record of what the hooks saw."""

    def setup(self, config: dict[str, Any]) -> None:
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        schedulers = [
            torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5) for _ in range(config.get("schedulers", 0))
        ]
        self.model, self.optimizer, self.criterion, *_ = self.register(
            models=model, optimizers=optimizer, criterion=nn.MSELoss(), schedulers=schedulers or None
        )
        make: Callable[[], Any] = config.get("loader", lambda: DataLoader(linear_data(), batch_size=BATCH))
        self.register_data(train_loader=make(), validation_loader=make())
        self.seen: list[dict[str, Any]] = []

    def train_batch(self, batch: Any, batch_info: dict[str, Any] | None = None) -> Any:
        self.seen.append(dict(batch_info or {}))
        return super().train_batch(batch, batch_info)


def rank(
    operator: type[TrainingOperator] = Linear,
    config: dict[str, Any] | None = None,
    gate: StepGate | None = None,
    **settings: Any,
) -> OneRank:
    return OneRank(
        build_rank(
            BuildSpec(training_operator_cls=operator, config=config or {}, settings=TrainSettings(**settings)),
            collective=SingleCollective(),
            device=torch.device("cpu"),
            local_rank=0,
            progress=Progress(),
        ),
        gate=gate or OpenGate(),
    )


def counts(result: Any) -> tuple[int, int, int]:
    return result.metrics["batch_count"], result.metrics["num_samples"], result.metrics["epoch"]


def test_one_call_is_one_pass() -> None:
    one = rank()
    assert counts(one.train()) == (10, 40, 1)
    assert counts(one.train()) == (10, 40, 2)
    assert one.operator.global_step == 20


def test_num_steps_goes_on_and_wraps() -> None:
    one = rank()
    assert counts(one.train(num_steps=3)) == (3, 12, 1)
    assert counts(one.train(num_steps=6)) == (6, 24, 1)
    assert counts(one.train()) == (1, 4, 1)
    assert counts(one.train(num_steps=7)) == (7, 28, 2)
    assert counts(one.train(num_steps=7)) == (7, 28, 3)
    assert counts(one.train(num_steps=25)) == (25, 100, 5)


def test_validation_goes_on_and_wraps() -> None:
    one = rank()
    taken = [one.validate(num_steps=steps).metrics["batch_count"] for steps in (3, None, None, 4, 8, None)]
    assert taken == [3, 7, 10, 4, 8, 8]
    assert "epoch" not in one.validate().metrics


@pytest.mark.parametrize("calls", [(10,), (5, 5)])
def test_call_after_pass_that_ended_exactly_is_not_empty(calls: tuple[int, ...]) -> None:
    one = rank()
    for steps in calls:
        one.train(num_steps=steps)
        one.validate(num_steps=steps)
    assert counts(one.train(num_steps=2)) == (2, 8, 2)
    assert counts(one.train()) == (8, 32, 2)
    assert one.validate().metrics["batch_count"] == 10


def test_unknown_length_has_no_empty_call_either() -> None:
    one = rank(config={"loader": lambda: DataLoader(Endless(12), batch_size=4)})
    assert counts(one.train(num_steps=3)) == (3, 12, 1)
    assert counts(one.train()) == (3, 12, 2)
    assert counts(one.train()) == (3, 12, 3)
    assert counts(one.train(num_steps=7)) == (7, 28, 6)


def test_num_steps_of_zero_trains_nothing() -> None:
    one = rank()
    assert counts(one.train(num_steps=0)) == (0, 0, 0)
    assert one.operator.seen == []


@pytest.mark.parametrize("num_steps", [-1, 2.5, "3", True])
def test_num_steps_must_be_a_count(num_steps: Any) -> None:
    with pytest.raises(ValueError, match="num_steps must be None or a whole number"):
        rank().train(num_steps=num_steps)


def test_epoch_idx_is_that_of_the_pass_in_progress() -> None:
    class Recorder(Linear):
        indices: tuple[int, ...] = ()

        def train_epoch(self, iterator: Any, info: Any = None, num_steps: Any = None, epoch_idx: int = 0) -> Any:
            assert info["epoch_idx"] == epoch_idx
            self.indices += (epoch_idx,)
            return super().train_epoch(iterator, info)

    one = rank(Recorder)
    for steps in (4, 4, None, 10, 3):
        one.train(num_steps=steps)
    assert isinstance(one.operator, Recorder)
    assert one.operator.indices == (0, 0, 0, 1, 2)
    assert {seen["epoch_idx"] for seen in one.operator.seen[:10]} == {0}


def test_batch_info_holds_position_and_the_users_keys() -> None:
    one = rank()
    mine = {"mine": 7, "batch_idx": "theirs", "epoch_idx": "theirs"}
    one.train(num_steps=2, info=mine)
    one.train(num_steps=1, info=mine)
    assert isinstance(one.operator, Linear)
    assert [(seen["batch_idx"], seen["global_step"], seen["epoch_idx"]) for seen in one.operator.seen] == [
        (0, 0, 0),
        (1, 1, 0),
        (0, 2, 0),
    ]
    assert all(seen["mine"] == 7 for seen in one.operator.seen)
    assert mine["epoch_idx"] == "theirs"


class StopAt:
    """Stops a call after some batches."""

    save_wanted = False

    def __init__(self, boundary: int) -> None:
        self.boundary = boundary
        self.asked: list[int] = []

    def stop_requested(self, boundary: int) -> bool:
        self.asked.append(boundary)
        return boundary >= self.boundary


def test_gate_stops_at_a_boundary_and_the_pass_goes_on_later() -> None:
    gate = StopAt(3)
    one = rank(gate=gate)
    assert counts(one.train()) == (3, 12, 1)
    assert gate.asked == [0, 1, 2, 3]
    gate.boundary = 100
    assert counts(one.train()) == (7, 28, 1)


def test_custom_loop_counts_steps_and_samples() -> None:
    class Own(Linear):
        def train_epoch(self, iterator: Any, info: Any) -> Any:
            assert len(iterator) == 10
            for batch_idx, batch in enumerate(iterator):
                assert self.global_step == batch_idx
                self.train_batch(batch)
            return {"mine": 3}

    one = rank(Own)
    result = one.train()
    assert result.metrics == {"num_samples": 40, "epoch": 1, "batch_count": 10, "mine": 3}
    assert result.weights == {"mine": 40.0}
    assert one.operator.global_step == 10


def test_loop_that_breaks_off_leaves_the_rest_for_the_next_call() -> None:
    class Impatient(Linear):
        def train_epoch(self, iterator: Any, info: Any) -> Any:
            for batch_idx, _ in enumerate(iterator):
                if batch_idx == 2:
                    break
            return {}

    one = rank(Impatient)
    assert [counts(one.train()) for _ in range(4)] == [(3, 12, 1), (3, 12, 1), (3, 12, 1), (1, 4, 1)]


def test_loop_that_never_iterates_starts_no_pass() -> None:
    class Idle(Linear):
        def train_epoch(self, iterator: Any, info: Any) -> Any:
            return {"done": 1}

    assert counts(rank(Idle).train()) == (0, 0, 0)


def test_failed_batch_is_not_counted() -> None:
    class Failing(Linear):
        def train_batch(self, batch: Any, batch_info: Any = None) -> Any:
            if batch_info["global_step"] == 2:
                raise KeyError("batch 2")
            return super().train_batch(batch, batch_info)

    one = rank(Failing)
    with pytest.raises(KeyError, match="batch 2"):
        one.train()
    assert one.operator.global_step == 2


@pytest.mark.parametrize(("frequency", "rates"), [("epoch", (0.1, 0.1, 0.05, 0.0125)), ("manual", (0.1,) * 4)])
def test_epoch_schedulers_step_when_a_pass_completes(frequency: str, rates: tuple[float, ...]) -> None:
    one = rank(config={"schedulers": 1}, scheduler_step_freq=frequency)
    found = []
    for steps in (4, 5, 1, 20):
        one.train(num_steps=steps)
        found.append(one.operator.optimizer.param_groups[0]["lr"])
    assert found == pytest.approx(list(rates))


def test_every_registered_scheduler_steps() -> None:
    one = rank(config={"schedulers": 2}, scheduler_step_freq="batch")
    one.train(num_steps=3)
    components = internals(one.operator).components
    assert components is not None
    assert [scheduler.last_epoch for scheduler in components.schedulers] == [3, 3]


def test_plateau_scheduler_needs_a_metric() -> None:
    class Plateau(Linear):
        def setup(self, config: dict[str, Any]) -> None:
            super().setup(config)
            self.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(self.optimizer)

    with pytest.raises(TypeError, match=r"scheduler_step_freq='epoch'.*update_scheduler"):
        rank(Plateau, scheduler_step_freq="epoch").train()
    one = rank(Plateau, scheduler_step_freq="manual")
    one.update_scheduler(0.5)
    one.update_scheduler(0.4)
    assert one.operator.scheduler.last_epoch == 2


def test_update_scheduler_without_one_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="Linear has no scheduler"):
        rank().update_scheduler(1.0)


def test_modes_are_put_back_after_validation() -> None:
    class Frozen(Linear):
        def setup(self, config: dict[str, Any]) -> None:
            super().setup(config)
            self.model.add_module("norm", nn.BatchNorm1d(1).eval())

    one = rank(Frozen)
    one.validate(num_steps=1)
    assert one.operator.model.training
    assert not one.operator.model.norm.training


def test_profile_has_the_parts_of_a_step() -> None:
    one = rank()
    profile = one.train(num_steps=2, profile=True).metrics["profile"]
    assert {name for name in profile if name.startswith("mean_")} == {
        "mean_copy_s",
        "mean_fwd_s",
        "mean_grad_s",
        "mean_apply_s",
        "mean_data_s",
        "mean_sync_s",
        "mean_train_epoch_s",
    }
    assert set(one.validate(profile=True).metrics["profile"]) == {"mean_eval_fwd_s", "mean_data_s", "mean_validation_s"}
    assert "profile" not in one.train(num_steps=1).metrics


def test_validation_may_return_any_object() -> None:
    class Matrix(Linear):
        def validate(self, loader: Any, info: Any = None) -> Any:
            assert info["epoch_idx"] == 0
            return [sum(1 for _ in loader)]

    assert rank(Matrix).validate().metrics == [10]


@pytest.mark.parametrize(
    ("returned", "message"),
    [(None, "train_epoch must return a dict of metrics, got NoneType"), ({"epoch": 3}, "may not have the key 'epoch'")],
)
def test_train_epoch_must_return_metrics(returned: Any, message: str) -> None:
    class Wrong(Linear):
        def train_epoch(self, iterator: Any, info: Any) -> Any:
            return returned

    with pytest.raises(TypeError, match=message):
        rank(Wrong).train()


def test_train_batch_must_return_metrics() -> None:
    class Wrong(Linear):
        def train_batch(self, batch: Any, batch_info: Any = None) -> Any:
            return 3

    with pytest.raises(TypeError, match=r"Wrong\.train_batch must return a dict of metrics, got int: 3"):
        rank(Wrong).train()


def test_missing_loader_is_an_error_only_when_a_batch_is_asked_for() -> None:
    class NoData(TrainingOperator):
        def setup(self, config: dict[str, Any]) -> None:
            self.model = nn.Linear(1, 1)

        def validate(self, loader: Any, info: Any = None) -> Any:
            return {"ok": 1}

    one = rank(NoData)
    assert one.validate().metrics["ok"] == 1
    with pytest.raises(RuntimeError, match=r"does not have any registered train loader.*register_data"):
        one.train()


HOOKS: list[tuple[Callable[..., Any], Any]] = [
    (lambda it, info: (it, info), (1, 2)),
    (lambda it, metadata: (it, metadata), (1, 2)),
    (lambda it, info=None, num_steps=None, epoch_idx=0: (it, info, num_steps, epoch_idx), (1, 2, 3, 4)),
    (lambda it, info, **kwargs: (it, info, kwargs), (1, 2, {"num_steps": 3, "epoch_idx": 4})),
    (lambda it, mine, **kwargs: (it, mine, kwargs), (1, 2, {"num_steps": 3, "epoch_idx": 4})),
    (lambda it: it, 1),
    (lambda it, epoch_idx: (it, epoch_idx), (1, 4)),
    (lambda it, *, info: (it, info), (1, 2)),
    (lambda it, threshold=0.5: (it, threshold), (1, 0.5)),
    (lambda *args, **kwargs: (args, kwargs), ((1,), {"info": 2, "num_steps": 3, "epoch_idx": 4})),
]


@pytest.mark.parametrize(("hook", "expected"), HOOKS)
def test_hooks_get_what_their_signature_takes(hook: Callable[..., Any], expected: Any) -> None:
    bound = bind_hook(hook, ("info", "num_steps", "epoch_idx"))
    assert bound(1, {"info": 2, "num_steps": 3, "epoch_idx": 4}) == expected


def test_batches_of_several_forms() -> None:
    assert split_batch((1, 2, 3)) == ((1, 2), {}, 3)
    assert split_batch({"image": 1, "label": 2}) == ((1,), {}, 2)
    assert split_batch({"ids": 1, "mask": 2, "labels": 3}) == ((), {"ids": 1, "mask": 2}, 3)
    for wrong in ([1], {"ids": 1, "mask": 2}, 5):
        with pytest.raises(TypeError, match="Override train_batch"):
            split_batch(wrong)


def test_gradients_are_weighted_in_uneven_steps_only() -> None:
    weight = nn.Parameter(torch.ones(2))
    share = GradientShare(lambda: [weight], world_size=2)

    def gradient(size: int, global_size: int, loss: Callable[[torch.Tensor], torch.Tensor]) -> list[float]:
        weight.grad = None
        share.apply(size, global_size)
        loss(weight).backward()
        share.remove()
        assert weight.grad is not None
        found: list[float] = weight.grad.tolist()
        return found

    assert gradient(4, 8, torch.sum) == [1.0, 1.0]
    assert gradient(3, 4, torch.sum) == [1.5, 1.5]
    assert gradient(0, 4, lambda w: (w * float("inf")).sum()) == [0.0, 0.0]
    assert gradient(4, 8, torch.sum) == [1.0, 1.0]
