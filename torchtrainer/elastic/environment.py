"""The environment of a worker: torchrun's contract, variable by variable."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LAUNCH_DIR = "TORCHTRAINER_LAUNCH_DIR"
"""The one variable that torchrun does not set: a private directory in which workers report their step counts."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What the workers of one attempt on this machine have in common.

    Attributes:
        attempt: restarts before it.
        max_restarts: how many there may be.
        run_id: of the rendezvous.
        role: of the workers of this machine.
        local_world_size: workers on this machine.
        group_rank, group_world_size: this machine, and how many there are.
        master_addr, master_port: where the ranks meet.
        agent_store: a launcher hosts the store there; workers only connect.
        virtual_local_rank: every worker believes to be local rank 0 with one device.
        launch_dir: private directory of the launcher.
    """

    attempt: int
    max_restarts: int
    run_id: str
    role: str
    local_world_size: int
    group_rank: int
    group_world_size: int
    master_addr: str
    master_port: int
    agent_store: bool
    virtual_local_rank: bool
    launch_dir: str


def worker_environment(launch: Launch, worker: Any, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that a launcher adds for one worker.

    Args:
        launch: what all workers here share.
        worker: torch's ``Worker``: its ranks and world sizes.
        environ: of the launcher.
    """
    variables = {
        "RANK": str(worker.global_rank),
        "GROUP_RANK": str(launch.group_rank),
        "ROLE_RANK": str(worker.role_rank),
        "ROLE_NAME": launch.role,
        "LOCAL_WORLD_SIZE": str(launch.local_world_size),
        "WORLD_SIZE": str(worker.world_size),
        "GROUP_WORLD_SIZE": str(launch.group_world_size),
        "ROLE_WORLD_SIZE": str(worker.role_world_size),
        "MASTER_ADDR": launch.master_addr,
        "MASTER_PORT": str(launch.master_port),
        "TORCHELASTIC_RESTART_COUNT": str(launch.attempt),
        "TORCHELASTIC_MAX_RESTARTS": str(launch.max_restarts),
        "TORCHELASTIC_RUN_ID": launch.run_id,
        "TORCHELASTIC_USE_AGENT_STORE": str(launch.agent_store),
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        LAUNCH_DIR: launch.launch_dir,
    }
    if "OMP_NUM_THREADS" in environ:
        variables["OMP_NUM_THREADS"] = environ["OMP_NUM_THREADS"]
    return {**variables, **_device(launch.virtual_local_rank, worker.local_rank, environ)}


def _device(virtual: bool, local_rank: int, environ: Mapping[str, str]) -> dict[str, str]:
    """Which device a worker takes for its own: by its local rank, or the only one that it sees."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if not virtual:
        seen = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
        return {"LOCAL_RANK": str(local_rank), **seen}
    if visible is None:
        return {"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": str(local_rank)}
    devices = [device.strip() for device in visible.split(",")]
    if local_rank >= len(devices):
        raise ValueError(
            f"--virtual-local-rank gives each worker one device, but CUDA_VISIBLE_DEVICES={visible} has no entry for local "
            f"rank {local_rank}: start at most {len(devices)} workers"
        )
    return {"LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": devices[local_rank]}
