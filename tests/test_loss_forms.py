"""Optimizers that evaluate the loss, models that take their target or have no shapes yet, and losses that are no number."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from torchtrainer import TorchTrainer, TrainingOperator
from torchtrainer.errors import InvalidArgumentError
from torchtrainer.train.batches import parameters_of, split_batch
from torchtrainer.train.components import check_models

X = torch.randn(30, 3, generator=torch.Generator().manual_seed(1), dtype=torch.double)
Y = X.sin().sum(1, keepdim=True)


def build(config=None):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def lbfgs(model, config=None):
    return torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=7, line_search_fn="strong_wolfe")


class OwnStep(TrainingOperator):
    def train_batch(self, batch, batch_info):
        return super().train_batch(batch, batch_info)


@pytest.mark.parametrize(
    ("ranks", "more"),
    [(1, {}), (2, {}), (3, {"training_operator_cls": OwnStep}), (2, {"accumulate": 2}), (2, {"comm_hook": "bf16"})],
)
def test_an_optimizer_that_evaluates_the_loss_steps_as_on_one_process(ranks, more) -> None:
    batch, exact = 4, "comm_hook" not in more
    model = build()
    optimizer = lbfgs(model)
    if exact:
        size = batch * ranks * more.get("accumulate", 1)
        for x, y in zip(X.split(size), Y.split(size), strict=True):

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(model(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
    with TorchTrainer(
        model_creator=build,
        optimizer_creator=lbfgs,
        data_creator=lambda config: DataLoader(TensorDataset(X, Y), batch_size=batch),
        loss_creator=nn.MSELoss,
        num_workers=ranks,
        use_gpu=False,
        run_dir=None,
        **more,
    ) as trainer:
        found = trainer.train()
        state = trainer.state_dict()["models"][0]
    assert found["num_samples"] == 30
    if not exact:
        assert found["last_train_loss"] < found["train_loss"] < 3
        return
    for key, value in model.state_dict().items():
        assert torch.allclose(state[key], value, atol=1e-8), key


class Rows(Dataset):
    def __len__(self):
        return 18

    def __getitem__(self, place):
        return {"x": X[place], "labels": Y[place]}


class TakesItsLabels(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1).double()

    def forward(self, x, labels):
        return nn.functional.mse_loss(self.layer(x), labels)


def test_a_model_that_takes_its_target_gets_it() -> None:
    with TorchTrainer(
        model_creator=lambda config: TakesItsLabels(),
        optimizer_creator=lambda model, config: torch.optim.SGD(model.parameters(), lr=0.1),
        data_creator=lambda config: [DataLoader(Rows(), batch_size=4)] * 2,
        loss_creator=lambda config: lambda output, target: output,
        num_workers=2,
        use_gpu=False,
        run_dir=None,
    ) as trainer:
        before = trainer.validate()["val_loss"]
        assert trainer.train()["num_samples"] == 18
        assert trainer.validate()["val_loss"] < before


def test_who_gets_the_target() -> None:
    batch = {"x": 1, "mask": 2, "labels": 3}
    assert split_batch(batch, ("x", "mask", "labels")) == ((), batch, 3)
    assert split_batch(batch, ("x", "labels", "**")) == ((), batch, 3)
    assert split_batch(batch, ("images", "labels")) == ((), {"x": 1, "mask": 2}, 3)
    assert split_batch(batch) == ((), {"x": 1, "mask": 2}, 3)
    assert split_batch({"image": 1, "label": 3}, ("x", "label")) == ((1,), {}, 3)
    assert set(parameters_of(TakesItsLabels())) == {"self", "x", "labels"}
    assert parameters_of(print) == ()


@pytest.mark.parametrize(
    ("loss", "text"),
    [
        (
            lambda config: nn.MSELoss(reduction="none"),
            r"MSELoss\(\) returned a tensor of shape \(4, 1\).*reduction='mean'",
        ),
        (lambda config: lambda output, target: {"loss": output.mean()}, r"lambda.* returned dict"),
    ],
)
def test_a_loss_that_is_no_number_is_told_what_to_do(loss, text) -> None:
    with (
        TorchTrainer(
            model_creator=build,
            optimizer_creator=lambda model, config: torch.optim.SGD(model.parameters(), lr=0.1),
            data_creator=lambda config: DataLoader(TensorDataset(X, Y), batch_size=4),
            loss_creator=loss,
            use_gpu=False,
            run_dir=None,
        ) as trainer,
        pytest.raises(TypeError, match=text),
    ):
        trainer.train()


@pytest.mark.parametrize("layer", [nn.LazyLinear(2), nn.LazyBatchNorm1d(), nn.Sequential(nn.LazyConv1d(2, 3))])
def test_a_model_without_shapes_is_told_what_to_do(layer) -> None:
    with pytest.raises(InvalidArgumentError, match=r"the models .* are of lazy modules.*Call the model once"):
        check_models(layer, "the models")


def test_a_lazy_model_that_was_called_is_fine() -> None:
    model = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d())
    model(torch.zeros(2, 3))
    assert check_models(model, "the models") == [model]
