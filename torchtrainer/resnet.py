"""ResNet-18, -34 and -50 for 32x32 images, as model creators.

They are torchvision's networks with the stem that small images need: a 3x3 convolution of stride 1 and no max-pooling,
so that the first block still sees 32x32 positions. Parameters have torchvision's names. Importing this module imports
neither torch nor torchvision: the first call does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torchtrainer.errors import InvalidArgumentError

if TYPE_CHECKING:
    from torch import nn


def ResNet18(config: Mapping[str, Any] | None = None) -> nn.Module:
    """Makes a ResNet-18 with random weights (11.2 million parameters).

    Args:
        config: ``num_classes`` is how many classes it tells apart (10 unless given); the rest is ignored.

    Returns:
        A network from images of shape (samples, 3, 32, 32) to scores of shape (samples, num_classes).

    Raises:
        InvalidArgumentError: ``num_classes`` is not a number of 1 or more.
        ImportError: torchvision is not installed.
    """
    return _small_image_resnet("resnet18", config)


def ResNet34(config: Mapping[str, Any] | None = None) -> nn.Module:
    """Makes a ResNet-34 with random weights (21.3 million parameters); else as `ResNet18`."""
    return _small_image_resnet("resnet34", config)


def ResNet50(config: Mapping[str, Any] | None = None) -> nn.Module:
    """Makes a ResNet-50 with random weights (23.5 million parameters); else as `ResNet18`."""
    return _small_image_resnet("resnet50", config)


def _small_image_resnet(name: str, config: Mapping[str, Any] | None) -> nn.Module:
    num_classes = 10 if config is None else config.get("num_classes", 10)
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise InvalidArgumentError(f'config["num_classes"] must be a whole number of 1 or more, got {num_classes!r}')
    try:
        from torchvision.models import resnet
    except ImportError as error:
        raise ImportError(
            f"torchtrainer.resnet builds on torchvision, which does not import here ({error}); "
            "run: pip install torchvision"
        ) from error
    from torch import nn

    model: nn.Module = getattr(resnet, name)(weights=None, num_classes=num_classes)
    stem = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    model.conv1 = stem
    model.maxpool = nn.Identity()
    return model
