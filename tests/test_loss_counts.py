"""Losses that are a mean over something else than the samples: the ranks weigh by what each loss counts, as one process would."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

from torchtrainer import TorchTrainer, TrainingOperator
from torchtrainer.train.losses import count, tells_count

CLASSES, LENGTH, PADDING = 7, 6, 3
SAMPLES = 30
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 3.0, 0.0, 1.0, 4.0])


def padded(value: int) -> TensorDataset:
    x = torch.randint(0, CLASSES, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(2))
    y = x.clone()
    for place in range(SAMPLES):
        y[place, 1 + (place * 5) % LENGTH :] = value
    return TensorDataset(x, y)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.out = nn.Embedding(CLASSES, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.out(self.embedding(x)).transpose(1, 2)


class Masked(nn.Module):
    """A loss of the user's own, which says what it is a mean over."""

    def forward(self, output, target):
        return functional.cross_entropy(output, target, ignore_index=PADDING)

    def num_samples(self, target):
        return (target != PADDING).sum()


LOSSES = {
    "ignored": (lambda config: nn.CrossEntropyLoss(), -100),
    "ignored class": (lambda config: nn.CrossEntropyLoss(ignore_index=255), 255),
    "class weights": (lambda config: nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.1), -100),
    "function": (lambda config: functional.cross_entropy, -100),
    "partial": (lambda config: partial(functional.cross_entropy, weight=WEIGHTS, ignore_index=PADDING), PADDING),
    "own": (lambda config: Masked(), PADDING),
}


def build(config=None):
    torch.manual_seed(0)
    return Tagger()


def sgd(model, config=None):
    return torch.optim.SGD(model.parameters(), lr=0.5)


def by_hand(criterion, data, batch):
    """One process, with the batches of all ranks."""
    model = build()
    optimizer = sgd(model)
    for x, y in zip(*(one.split(batch) for one in data.tensors), strict=True):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    return model


class OwnStep(TrainingOperator):
    """Goes through the built-in step, in a step of its own."""

    def train_batch(self, batch, batch_info):
        return super().train_batch(batch, batch_info)


@pytest.mark.parametrize(
    ("name", "ranks", "more"),
    [
        ("ignored", 2, {}),
        ("ignored class", 3, {"training_operator_cls": OwnStep}),
        ("class weights", 2, {"use_local": True}),
        ("function", 3, {"training_operator_cls": None}),
        ("partial", 2, {"accumulate": 2}),
        ("own", 2, {"training_operator_cls": OwnStep}),
        ("ignored", 2, {"comm_hook": "fp16"}),
        ("class weights", 2, {"strategy": "zero1"}),
    ],
)
def test_ranks_weigh_by_what_the_loss_counts(name, ranks, more) -> None:
    loss_creator, padding = LOSSES[name]
    criterion, data = loss_creator({}), padded(padding)
    batch = 4
    model = by_hand(criterion, data, batch * ranks * more.get("accumulate", 1))
    with TorchTrainer(
        model_creator=build,
        optimizer_creator=sgd,
        data_creator=lambda config: [DataLoader(data, batch_size=batch)] * 2,
        loss_creator=loss_creator,
        num_workers=ranks,
        use_gpu=False,
        run_dir=None,
        **more,
    ) as trainer:
        trainer.train()
        found, state = trainer.validate(), trainer.state_dict()["models"][0]
    tolerance = 2e-3 if "comm_hook" in more else 1e-5
    for key, value in model.state_dict().items():
        assert torch.allclose(state[key], value, atol=tolerance), key
    model.load_state_dict(state)
    x, y = data.tensors
    counts = y != padding
    assert found["val_loss"] == pytest.approx(criterion(model(x), y).item(), rel=1e-5)
    if name != "own":  # of which nobody knows that it leaves a class out
        hits = ((model(x).argmax(1) == y) & counts).sum() / counts.sum()
        assert found["val_accuracy"] == pytest.approx(hits.item(), rel=1e-6)
    assert found["num_samples"] == SAMPLES
    assert not any(key.startswith("val_loss_") for key in found)


class Rows(Dataset):
    """Sentences of different lengths, which are padded to the longest of a batch."""

    def __len__(self):
        return 16

    def __getitem__(self, place):
        return torch.arange(1 + place % 5) % CLASSES


def collate(rows):
    y = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    return y.clamp(min=0), y


def test_batches_of_other_lengths_on_other_ranks_weigh_by_their_tokens() -> None:
    model = build()
    optimizer = sgd(model)
    for first in range(0, 16, 4):
        x, y = collate([Rows()[place] for place in range(first, first + 4)])
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    with TorchTrainer(
        model_creator=build,
        optimizer_creator=sgd,
        data_creator=lambda config: DataLoader(Rows(), batch_size=2, collate_fn=collate),
        loss_creator=nn.CrossEntropyLoss,
        num_workers=2,
        use_gpu=False,
        run_dir=None,
    ) as trainer:
        trainer.train()
        state = trainer.state_dict()["models"][0]
    for key, value in model.state_dict().items():
        assert torch.allclose(state[key], value, atol=1e-5), key


@pytest.mark.parametrize(
    ("criterion", "counted"),
    [
        (nn.CrossEntropyLoss(), 3),
        (nn.CrossEntropyLoss(ignore_index=1), 3),
        (nn.NLLLoss(weight=torch.tensor([1.0, 2.0, 4.0])), 7.0),
        (nn.CrossEntropyLoss(reduction="sum"), None),
        (nn.MSELoss(), None),
        (functional.nll_loss, 3),
        (partial(functional.cross_entropy, reduction="none"), None),
        (lambda output, target: output.mean(), None),
        (None, None),
    ],
)
def test_what_a_loss_counts(criterion, counted) -> None:
    target = torch.tensor([0, 1, 2, -100])
    assert count(criterion, target) == counted
    assert tells_count(criterion) == (counted is not None)
    assert count(criterion, torch.rand(4, 3)) is None, "probabilities are not counted"
