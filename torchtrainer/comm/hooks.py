"""Compresses gradients for the exchange, with torch's own hooks of ``DistributedDataParallel``."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from torchtrainer.errors import InvalidArgumentError, NotAvailableError

POWERSGD_RANK = 2
"""Columns that PowerSGD reduces a matrix of gradients to: fewer send less, more lose less."""
POWERSGD_START_STEP = 100
"""Steps with uncompressed gradients before PowerSGD begins: the first gradients change too much from step to step."""

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


def compress(model: DistributedDataParallel, hook: str) -> None:
    """Has the exchange compress a model's gradients; every rank calls this alike, right after wrapping.

    Args:
        model: over the ranks' process group.
        hook: ``fp16``, ``bf16``, or ``powersgd`` (Vogels et al. 2019, "PowerSGD: Practical Low-Rank Gradient Compression
            for Distributed Optimization").

    Raises:
        InvalidArgumentError: the process group, or this device, cannot do it.
        NotAvailableError: what torch needs for it is not installed.
    """
    if hook == "powersgd":
        _compress_low_rank(model)
        return
    _check_dtype(hook, model)
    make = default_hooks.fp16_compress_hook if hook == "fp16" else default_hooks.bf16_compress_hook
    # Under another name: torch takes bf16's own only where there is NCCL. What the group can do was tried above.
    model.register_comm_hook(dist.group.WORLD, lambda group, bucket: make(group, bucket))  # noqa: PLW0108


def _check_dtype(hook: str, model: DistributedDataParallel) -> None:
    probe = torch.zeros(1, dtype=_DTYPES[hook], device=next(model.parameters()).device)
    try:
        dist.all_reduce(probe)
    except (RuntimeError, ValueError) as error:
        raise InvalidArgumentError(
            f"comm_hook={hook!r}: the backend {dist.get_backend()} of this torch ({torch.__version__}) cannot add numbers of "
            f"this format. Use another comm_hook, or none. torch says: {error}"
        ) from error


def _compress_low_rank(model: DistributedDataParallel) -> None:
    if next(model.parameters()).device.type == "cpu" and torch.cuda.is_available():
        raise InvalidArgumentError(
            'comm_hook="powersgd" on the CPU of a machine with GPUs: torch\'s hook then waits for a GPU that is not there. '
            "Hide the GPUs with CUDA_VISIBLE_DEVICES="
        )
    try:
        from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

        state: Any = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=POWERSGD_RANK, start_powerSGD_iter=POWERSGD_START_STEP
        )
    except ImportError as error:
        raise NotAvailableError(f'comm_hook="powersgd" needs a package that is not installed: {error}') from error
    model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
