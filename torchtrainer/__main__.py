"""``python -m torchtrainer``: the ``torchtrainer`` command."""

from __future__ import annotations

import sys

from torchtrainer.launcher.cli import main

sys.exit(main())
