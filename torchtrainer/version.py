"""The version of this package, in the one place that packaging, ``torchtrainer.__version__`` and ``--version`` read."""

from __future__ import annotations

__version__ = "0.1.0"
