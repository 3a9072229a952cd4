"""Means over batches and ranks."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from torchtrainer.train.metrics import AverageMeter, AverageMeterCollection, PassResult, reduce_results

pytestmark = pytest.mark.pure


def test_means_over_batches_are_weighted_by_samples():
    meters = AverageMeterCollection()
    meters.update({"loss": 1.0, "rare": 4.0}, n=3)
    meters.update({"loss": 5.0}, n=1)
    summary = meters.summary()
    assert summary == {"batch_count": 2, "num_samples": 4, "loss": 2.0, "last_loss": 5.0, "rare": 4.0, "last_rare": 4.0}
    assert list(summary)[:2] == ["batch_count", "num_samples"]
    assert meters.weights() == {"loss": 4.0, "last_loss": 1.0, "rare": 3.0, "last_rare": 3.0}


def test_a_nan_batch_shows_in_the_mean_and_not_in_the_latest():
    meters = AverageMeterCollection()
    for value in (1.0, math.nan, 3.0):
        meters.update({"score": value}, n=2)
    assert math.isnan(meters.summary()["score"])
    assert meters.summary()["last_score"] == 3.0


def test_a_batch_without_samples_of_this_rank_weighs_nothing():
    meters = AverageMeterCollection()
    meters.update({"loss": 1.0}, n=4)
    meters.skip()
    assert meters.summary() == {"batch_count": 2, "num_samples": 4, "loss": 1.0, "last_loss": 1.0}
    assert meters.weights() == {"loss": 4.0, "last_loss": 0.0}


def test_first_batch_of_zero_samples_does_not_divide_by_zero():
    meter = AverageMeter()
    meter.update(7.0, n=0)
    assert meter.mean == 7.0
    meter.update(2.0, n=2)
    assert meter.mean == 2.0


@pytest.mark.parametrize(
    "value",
    [True, np.float32(1.0), np.int64(1), np.ones((1, 1)), torch.tensor(1.0), torch.tensor(1), torch.tensor([[1.0]]), 1],
)
def test_everything_that_is_one_number_is_averaged(value):
    meter = AverageMeter()
    meter.update(value, n=1)
    meter.update(0.0, n=3)
    assert type(meter.mean) is float
    assert meter.mean == 0.25


def test_other_things_are_kept_not_averaged():
    meter = AverageMeter()
    for value in ("first", "second"):
        meter.update(value, n=2)
    assert meter.mean == "second"


def test_a_batch_without_a_value_does_not_enter_the_mean():
    meter = AverageMeter()
    for value, n in ((1.0, 1), (None, 5), (3.0, 3)):
        meter.update(value, n)
    assert meter.mean == 2.5
    meter.update(None, 1)
    assert meter.mean == 2.5


@pytest.mark.parametrize("array", [np.array, torch.tensor])
def test_arrays_are_averaged_element_by_element(array):
    meter = AverageMeter()
    meter.update(array([[1.0, 2.0], [4.0, 0.0]]), n=3)
    meter.update(array([[5.0, 2.0], [0.0, 4.0]]), n=1)
    assert meter.mean.tolist() == [[2.0, 2.0], [3.0, 1.0]]
    other = AverageMeter()
    other.load_state_dict(meter.state_dict())
    assert other.mean.tolist() == meter.mean.tolist()


def test_an_array_whose_shape_changes_is_refused_by_name():
    meters = AverageMeterCollection()
    meters.update({"errors": torch.zeros(4)}, n=4)
    with pytest.raises(TypeError, match=r"'errors' has shape \(2,\) in this batch and \(4,\) in those before"):
        meters.update({"errors": torch.zeros(2)}, n=2)


def test_a_hook_says_what_one_metric_alone_stands_for():
    meters = AverageMeterCollection()
    meters.update({"loss": 1.0, "loss_num_samples": torch.tensor(6.0), "hit": 1.0}, n=1)
    meters.update({"loss": 4.0, "loss_num_samples": 3, "hit": 0.0}, n=3)
    summary = meters.summary()
    assert (summary["loss"], summary["hit"], summary["num_samples"]) == (2.0, 0.25, 4)
    assert "loss_num_samples" not in summary
    assert meters.weights()["loss"] == 9.0


def test_half_precision_values_are_summed_in_more():
    meter = AverageMeter()
    for _ in range(4096):
        meter.update(torch.tensor(1.0, dtype=torch.float16), n=1)
    assert meter.mean == 1.0


def result(weight=None, **metrics):
    names = [name for name in metrics if name not in ("num_samples", "batch_count", "epoch", "profile")]
    return PassResult(metrics, dict.fromkeys(names, float(metrics.get("num_samples", 1) if weight is None else weight)))


def test_reduction_weights_ranks_by_samples():
    reduced = reduce_results(
        [
            result(num_samples=3, epoch=2, batch_count=2, loss=1.0),
            result(num_samples=1, epoch=2, batch_count=1, loss=5.0),
        ]
    )
    assert reduced == {"num_samples": 4, "epoch": 2, "batch_count": 2, "loss": 2.0}
    assert [type(reduced[name]) for name in ("num_samples", "epoch", "batch_count")] == [int, int, int]


def test_last_values_have_weights_of_their_own():
    ranks = [
        PassResult({"num_samples": 9, "last_loss": 1.0}, {"last_loss": 1.0}),
        PassResult({"num_samples": 8, "last_loss": 4.0}, {"last_loss": 0.0}),
    ]
    assert reduce_results(ranks)["last_loss"] == 1.0


def test_a_nan_rank_shows():
    assert math.isnan(reduce_results([result(num_samples=1, loss=1.0), result(num_samples=1, loss=math.nan)])["loss"])


def test_keys_are_those_of_all_ranks():
    reduced = reduce_results(
        [result(num_samples=1, a=1.0), result(num_samples=3, a=2.0, b=8.0), result(num_samples=4, b=1)]
    )
    assert reduced == {"num_samples": 8, "a": 1.75, "b": 4.0}


def test_what_is_alike_on_all_ranks_stays_as_it_is():
    table = {"x": 1, "y": [torch.ones(2), "text"]}
    other = {"x": 1, "y": [torch.ones(2), "text"]}
    reduced = reduce_results([result(a=None), result(a=None, name="one", table=table), result(name="one", table=other)])
    assert reduced["a"] is None
    assert reduced["name"] == "one"
    assert reduced["table"] is table
    alone = {"nan": [math.nan], "object": object()}
    assert reduce_results([result(**alone)]) == alone


@pytest.mark.parametrize(
    "values",
    [
        [[1, 2], [1, 3]],
        [{"x": 1}, {"x": 2}],
        [1, "one"],
        [torch.zeros(2), torch.zeros(3)],
        [np.array(["a", "b"]), np.array(["a", "c"])],
    ],
)
def test_what_differs_between_the_ranks_and_has_no_mean_is_refused_by_name(values):
    with pytest.raises(
        TypeError, match=r"the metric 'found' differs between the ranks.*rank 1.*rank 2.*reduce_results=False"
    ):
        reduce_results([result(other=1), *(result(found=value) for value in values)])


@pytest.mark.parametrize("array", [np.array, torch.tensor])
def test_arrays_of_one_shape_are_averaged_over_the_ranks(array):
    ranks = [result(num_samples=3, score=array([1.0, 4.0])), result(num_samples=1, score=array([5.0, 0.0]))]
    assert reduce_results(ranks)["score"].tolist() == [2.0, 3.0]
    counts = [result(num_samples=1, count=array([[1, 2]])), result(num_samples=1, count=array([[2, 2]]))]
    assert reduce_results(counts)["count"].tolist() == [[1.5, 2.0]]
    halves = [result(num_samples=90000, score=torch.ones(2, dtype=torch.float16))] * 2
    assert reduce_results(halves)["score"].tolist() == [1.0, 1.0]


def test_bools_and_scalars_of_all_kinds_are_numbers():
    ranks = [
        result(num_samples=1, hit=True, np=np.float32(1), t=torch.tensor(1)),
        result(num_samples=1, hit=0, np=0, t=0),
    ]
    assert reduce_results(ranks) == {"num_samples": 2, "hit": 0.5, "np": 0.5, "t": 0.5}


def test_ranks_without_samples_are_averaged_plainly():
    assert reduce_results([result(weight=0, done=1), result(weight=0, done=2)])["done"] == 1.5


def test_one_rank_keeps_its_bits():
    value = 0.1 + 0.2
    assert reduce_results([result(num_samples=3, loss=value)])["loss"] == value


def test_profile_is_the_mean_over_ranks():
    ranks = [result(profile={"mean_fwd_s": 1.0, "mean_data_s": 4.0}), result(profile={"mean_fwd_s": 3.0})]
    assert reduce_results(ranks)["profile"] == {"mean_fwd_s": 2.0, "mean_data_s": 4.0}


def test_results_that_are_no_dicts_cannot_be_reduced():
    with pytest.raises(TypeError, match=r"rank 1 returned list.*reduce_results=False"):
        reduce_results([result(a=1), PassResult([1])])


def test_the_driver_can_reduce_without_torch():
    code = (
        "import sys, torchtrainer.train.metrics, torchtrainer.spec; "
        "sys.exit(any(name == 'torch' or name.startswith('torch.') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
