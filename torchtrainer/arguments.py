"""Checks the trainer's arguments and turns them into the values that the parts work with. No torch here."""

from __future__ import annotations

import difflib
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from typing import Any

from torchtrainer.config import BATCH_SIZE, CheckpointConfig, FailureConfig, PreemptionConfig, TrainSettings
from torchtrainer.errors import InvalidArgumentError, InvalidArgumentTypeError, NotAvailableError

RETIRED = {
    "num_replicas": "num_workers",
    "batch_size": "config={BATCH_SIZE: ...}, the batch size of all ranks together",
    "data_loader_args": "arguments of the DataLoader that data_creator makes",
    "apex_args": "precision=",
    "serialize_data_creation": "a file lock inside data_creator, if downloads must not happen side by side",
    "dataset": "data_creator=",
}
"""Retired arguments of RaySGD, and what replaces each."""

CALLED_WITH = {
    "model_creator": ("config",),
    "data_creator": ("config",),
    "optimizer_creator": ("model", "config"),
    "scheduler_creator": ("optimizer", "config"),
    "initialization_hook": (),
}
"""Arguments of each user function. A loss creator may take ``config`` or nothing."""

NOT_YET = "is not supported in this version"
ENGINE_PARTS = ("name", "timeouts", "topology", "open_run", "start_group")
"""Attributes that `torchtrainer.engines.base.Engine` requires."""
SEEDS = 1 << 63
"""Seeds are below this, as torch's generators require."""


def refuse_unknown(given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises the error for the first argument that does not exist; a retired one that asks for nothing is left alone."""
    for name, value in given.items():
        if name not in RETIRED or not (value is None or value is False):
            raise unknown_argument(name, known)


def unknown_argument(name: str, known: Iterable[str]) -> InvalidArgumentTypeError:
    """The error for an argument that does not exist: its replacement if it was retired, else names that look like it."""
    if name in RETIRED:
        return InvalidArgumentTypeError(f"{name} was retired: use {RETIRED[name]}")
    near = difflib.get_close_matches(name, list(known), n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else f". Known are: {', '.join(sorted(known))}"
    return InvalidArgumentTypeError(f"unknown argument {name!r}{hint}")


def check_creators(creators: Mapping[str, Any], training_operator_cls: Any) -> None:
    """Checks that there is enough to train with, and that what should be callable is.

    Raises:
        InvalidArgumentError: something is missing or not callable.
        InvalidArgumentTypeError: ``training_operator_cls`` is not a class.
    """
    for name, value in creators.items():
        if value is not None:
            _check_creator(name, value)
    if training_operator_cls is not None and not isinstance(training_operator_cls, type):
        raise InvalidArgumentTypeError(
            f"training_operator_cls must be a TrainingOperator subclass, got {training_operator_cls!r}: pass the "
            "class, not an instance"
        )
    if training_operator_cls is not None and not hasattr(training_operator_cls, "register_data"):
        raise InvalidArgumentTypeError(
            f"training_operator_cls must be a TrainingOperator subclass, got {training_operator_cls.__name__}"
        )
    if training_operator_cls is None:
        for name in ("model_creator", "data_creator", "optimizer_creator"):
            if creators[name] is None:
                raise InvalidArgumentError(
                    f"{name} is missing: pass model_creator, data_creator and optimizer_creator, or a "
                    "training_operator_cls whose setup registers everything"
                )
        if creators["loss_creator"] is None:
            raise InvalidArgumentError(
                "loss_creator is missing: pass a loss class such as torch.nn.CrossEntropyLoss, or a function of config; "
                "only a training_operator_cls with its own train_batch can do without"
            )


def _check_creator(name: str, value: Any) -> None:
    if not callable(value) or (not isinstance(value, type) and _is_made_already(value)):
        hook = name == "initialization_hook"
        advice = "" if hook else ": the workers call it, and each makes its own"
        raise InvalidArgumentError(f"{name} must be a function, got {value!r} ({type(value).__name__}){advice}")
    if name not in CALLED_WITH:
        return
    try:
        signature = inspect.signature(value, follow_wrapped=False)
    except (TypeError, ValueError):  # a callable written in C
        return
    arguments = CALLED_WITH[name]
    try:
        signature.bind(*arguments)
    except TypeError as error:
        called = getattr(value, "__name__", type(value).__name__)
        raise InvalidArgumentTypeError(
            f"{name} is called as {called}({', '.join(arguments)}), but the signature is {called}{signature}: {error}"
        ) from None


def _is_made_already(value: Any) -> bool:
    """Whether a callable is a model or a loss itself, where what makes one is wanted. Without importing torch."""
    return callable(getattr(value, "forward", None)) and callable(getattr(value, "state_dict", None))


def check_counts(num_workers: Any, min_workers: Any, config: Any) -> None:
    """Checks the number of ranks, and that a global batch has a sample for each.

    Raises:
        InvalidArgumentError: not a number of ranks that can work.
        InvalidArgumentTypeError: ``config`` is not a mapping.
    """
    if not isinstance(num_workers, int) or isinstance(num_workers, bool) or num_workers < 1:
        raise InvalidArgumentError(f"num_workers must be a whole number of at least 1, got {num_workers!r}")
    if not isinstance(min_workers, int) or isinstance(min_workers, bool) or not 1 <= min_workers <= num_workers:
        raise InvalidArgumentError(
            f"min_workers must be a whole number from 1 to num_workers={num_workers}, got {min_workers!r}"
        )
    if not (
        isinstance(config, Mapping) or all(hasattr(config, name) for name in ("keys", "items", "get", "__getitem__"))
    ):
        raise InvalidArgumentTypeError(
            f"config must be a dict, got {config!r} ({type(config).__name__}){_as_mapping(config)}"
        )


def _as_mapping(config: Any) -> str:
    """How to get the values of an object as a dict, if it has any."""
    if is_dataclass(config) and not isinstance(config, type):
        return ": pass dataclasses.asdict(config), or {'options': config} for the object itself"
    if hasattr(config, "__dict__") and not isinstance(config, type):
        return ": pass vars(config), or {'options': config} for the object itself"
    return ""


def check_batch_size(config: Mapping[str, Any], world_size: int) -> None:
    """Checks that ``config[BATCH_SIZE]``, if it is there, can be split over the ranks.

    Raises:
        InvalidArgumentError: it cannot.
    """
    if BATCH_SIZE not in config:
        return
    size = config[BATCH_SIZE]
    if not isinstance(size, int) or isinstance(size, bool) or size < world_size:
        raise InvalidArgumentError(
            "config[BATCH_SIZE] is the batch size over all ranks and must be a whole number of at least "
            f"num_workers={world_size}, got {size!r}"
        )


def check_options(
    *,
    resume: Any,
    checkpoint: CheckpointConfig,
    preemption: PreemptionConfig,
    failure: FailureConfig,
) -> None:
    """Checks that each option is an object of its kind.

    Raises:
        InvalidArgumentTypeError: it is something else.
        InvalidArgumentError: ``resume`` means nothing.
    """
    if not isinstance(checkpoint, CheckpointConfig):
        raise InvalidArgumentTypeError(f"checkpoint must be a CheckpointConfig, got {checkpoint!r}")
    if not isinstance(preemption, PreemptionConfig):
        raise InvalidArgumentTypeError(f"preemption must be a PreemptionConfig, got {preemption!r}")
    if not isinstance(failure, FailureConfig):
        raise InvalidArgumentTypeError(
            f"failure must be a FailureConfig, such as FailureConfig(hang_timeout_s=60), got {failure!r}"
        )
    check_resume(resume)


def check_engine(engine: Any) -> None:
    """Raises an InvalidArgumentTypeError if this is neither the name of an engine nor has what one needs."""
    if isinstance(engine, str):
        return
    lacks = [name for name in ENGINE_PARTS if not hasattr(engine, name)]
    if lacks:
        raise InvalidArgumentTypeError(
            f'engine must be "auto", "local", "spmd" or an engine object such as LocalEngine(), got {engine!r}, which has no '
            f"{', '.join(lacks)}"
        )


def check_resume(resume: object) -> None:
    """Raises an InvalidArgumentError if this cannot be meant as ``resume``."""
    if resume not in ("auto", True, False):
        raise InvalidArgumentError(f'resume must be "auto", True or False, got {resume!r}')


def check_may_change(names: Iterable[str]) -> tuple[str, ...]:
    """Names of what may change in a run, as a tuple.

    Raises:
        InvalidArgumentTypeError: they are no names.
    """
    given = (names,) if isinstance(names, str) else tuple(names)
    if not all(isinstance(one, str) for one in given):
        raise InvalidArgumentTypeError(f'may_change must be names such as ("epochs",), got {names!r}')
    return given


def settings_from(
    *,
    precision: str,
    use_fp16: Any,
    scheduler_creator: Callable[..., Any] | None,
    scheduler_step_freq: Any,
    use_gpu: bool,
    backend: Any,
    **rest: Any,
) -> TrainSettings:
    """Makes the settings that every rank gets.

    Args:
        precision, use_fp16: number format; ``use_fp16=True`` is fp16 on GPUs and bf16 on CPUs.
        scheduler_creator, scheduler_step_freq: a scheduler needs to know when to step.
        use_gpu: already decided.
        backend: ``auto``, ``nccl`` or ``gloo``.
        rest: fields of `TrainSettings` that are taken as they are.

    Raises:
        InvalidArgumentError: a value that means nothing.
        ImportError: apex was asked for and is not there.
    """
    check_plain_settings(rest)
    if use_fp16 not in (True, False, "apex"):
        raise InvalidArgumentError(f"use_fp16 must be a bool or 'apex', got {use_fp16!r}")
    if use_fp16 == "apex":
        raise ImportError('use_fp16="apex" needs NVIDIA apex, which torch has replaced: use precision="fp16" or "bf16"')
    if use_fp16 and precision == "fp32":
        precision = "fp16" if use_gpu else "bf16"
    if scheduler_creator is not None and scheduler_step_freq is None:
        raise InvalidArgumentError(
            'scheduler_step_freq is required with a scheduler: pass "batch", "epoch" or "manual"'
        )
    if backend == "auto":
        backend = "nccl" if use_gpu else "gloo"
    if backend not in ("nccl", "gloo"):
        raise InvalidArgumentError(f'backend must be "auto", "nccl" or "gloo", got {backend!r}')
    if backend == "nccl" and not use_gpu:
        raise InvalidArgumentError('backend="nccl" needs GPUs (use_gpu=True); on CPUs use "gloo" or "auto"')
    return TrainSettings(
        precision=precision,  # type: ignore[arg-type]  # checked by TrainSettings
        use_fp16=bool(use_fp16),
        scheduler_step_freq=scheduler_step_freq,
        use_gpu=use_gpu,
        backend=backend,
        **rest,
    )


def check_plain_settings(settings: Mapping[str, Any]) -> None:
    """Checks the types of settings that every rank gets as they are.

    Raises:
        InvalidArgumentTypeError: a switch that is not a bool, or a number that is none.
        InvalidArgumentError: a seed that random generators do not take.
    """
    for name in ("wrap_ddp", "add_dist_sampler", "use_tqdm"):
        if name in settings and not isinstance(settings[name], bool):
            raise InvalidArgumentTypeError(f"{name} must be True or False, got {settings[name]!r}")
    timeout_s = settings.get("timeout_s", 1.0)
    if not isinstance(timeout_s, int | float) or isinstance(timeout_s, bool):
        raise InvalidArgumentTypeError(f"timeout_s must be a number of seconds, got {timeout_s!r}")
    seed = settings.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise InvalidArgumentTypeError(f"seed must be a whole number, got {seed!r}")
    if not 0 <= seed < SEEDS:
        raise InvalidArgumentError(f"seed must be from 0 to 2**63 - 1, got {seed}")


def decide_gpus(use_gpu: Any, world_size: int, found: int) -> tuple[int, ...]:
    """Chooses a GPU per rank; empty: train on the CPU.

    Args:
        use_gpu: what the user wants: True, False or "auto".
        world_size: ranks on this machine.
        found: visible GPUs.

    Raises:
        InvalidArgumentError: GPUs were asked for and there are none.
        NotAvailableError: there are fewer GPUs than ranks.
    """
    if use_gpu not in (True, False, "auto"):
        raise InvalidArgumentError(f'use_gpu must be True, False or "auto", got {use_gpu!r}')
    if not use_gpu or (use_gpu == "auto" and not found):
        return ()
    if not found:
        raise InvalidArgumentError(
            "use_gpu=True, but no GPU is visible to this process "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}): install a driver or make one "
            'visible, or pass use_gpu="auto" to train on the CPU where there is none'
        )
    if found < world_size:
        raise NotAvailableError(
            f"sharing GPUs between ranks {NOT_YET}: {found} GPUs are visible and num_workers={world_size}; pass "
            f"num_workers={found}, or use_gpu=False"
        )
    return tuple(range(world_size))


def decide_threads(
    num_cpus_per_worker: Any, world_size: int, environ: Mapping[str, str], *, launched: bool, cores: int
) -> tuple[int, str]:
    """Intra-op threads per process.

    Args:
        num_cpus_per_worker: a number, or "auto": what the user's environment says; else the cores, divided by the ranks.
        world_size: ranks on this machine.
        environ: of the script.
        launched: a launcher started the ranks; where it starts several, it sets one thread for users who have not said how many.
        cores: that this process may use.

    Returns:
        The threads, and what to tell the user: empty, or that they are more than the cores.

    Raises:
        InvalidArgumentError: neither.
    """
    if num_cpus_per_worker == "auto":
        name, threads = _threads_in(environ)
        if not name or (launched and world_size > 1 and (name, threads) == ("OMP_NUM_THREADS", 1)):
            return max(1, cores // world_size), ""
        if threads * world_size <= cores:
            return threads, ""
        return threads, (
            f"{name}={environ[name]} gives {world_size} processes {threads} threads each, for {cores} cores: unset it "
            "to divide the cores among them, or pass num_cpus_per_worker"
        )
    if not isinstance(num_cpus_per_worker, int) or isinstance(num_cpus_per_worker, bool) or num_cpus_per_worker < 1:
        raise InvalidArgumentError(
            f'num_cpus_per_worker must be "auto" or a whole number of at least 1, got {num_cpus_per_worker!r}'
        )
    return num_cpus_per_worker, ""


def _threads_in(environ: Mapping[str, str]) -> tuple[str, int]:
    """The variable that torch takes its number of threads from, and that number; an empty name if there is none."""
    for name in ("MKL_NUM_THREADS", "OMP_NUM_THREADS"):
        first = environ.get(name, "").partition(",")[0].strip()  # a list is one number per level of nesting
        if first.isdecimal() and int(first) > 0:
            return name, int(first)
    return "", 0
