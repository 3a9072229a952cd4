"""Tests of the ResNets for 32x32 images."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from torchtrainer.errors import InvalidArgumentError
from torchtrainer.resnet import ResNet18, ResNet34, ResNet50

Creator = Callable[[Any], nn.Module]


@pytest.mark.parametrize(
    ("creator", "parameters"), [(ResNet18, 11_173_962), (ResNet34, 21_282_122), (ResNet50, 23_520_842)]
)
def test_size_shape_and_names(creator: Creator, parameters: int) -> None:
    """The counts are those of the networks of the same names for CIFAR-10 in the literature."""
    model = creator({"lr": 0.1}).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert sum(p.numel() for p in creator({"num_classes": 7}).parameters()) < parameters
    before_pooling: list[torch.Size] = []
    model.get_submodule("layer1").register_forward_hook(lambda m, i, o: before_pooling.append(o.shape))
    with torch.no_grad():
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert before_pooling[0][-2:] == (32, 32)  # nothing was thrown away before the first block
    assert {"conv1.weight", "layer4.0.downsample.0.weight", "fc.weight"} <= set(model.state_dict())


def test_works_without_config_and_with_other_class_counts() -> None:
    assert ResNet18().get_submodule("fc").out_features == 10
    assert ResNet18({"num_classes": 100}).get_submodule("fc").out_features == 100


def test_same_seed_same_weights() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(ResNet18({}).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_creator_and_model_pickle() -> None:
    assert pickle.loads(pickle.dumps(ResNet18)) is ResNet18
    model = ResNet18({}).eval()
    copy = pickle.loads(pickle.dumps(model))
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(copy(images), model(images))


@pytest.mark.parametrize("value", [0, -1, 2.5, "10", True, None])
def test_a_wrong_class_count_is_refused(value: object) -> None:
    with pytest.raises(InvalidArgumentError, match=r'config\["num_classes"\] must be a whole number of 1 or more, got'):
        ResNet18({"num_classes": value})


def test_missing_torchvision_is_named() -> None:
    script = """
import sys
sys.modules["torchvision"] = None  # what Python itself does for a package that must not be imported
from torchtrainer.resnet import ResNet18
try:
    ResNet18({})
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "pip install torchvision" in done.stdout
