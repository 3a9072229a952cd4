"""Arguments that cannot work: the error's type and text, before any process is started."""

from __future__ import annotations

import functools
import re
import threading

import pytest
import torch
from failing import CREATORS, failure_of, workers
from torch.utils.data import DataLoader

from torchtrainer import (
    BATCH_SIZE,
    FailureConfig,
    InvalidArgumentError,
    InvalidArgumentTypeError,
    NotAvailableError,
    NotSerializableError,
    ResumeError,
    TorchTrainer,
    TrainerClosedError,
    TrainingOperator,
)


class Mute:
    """Looks like a callback, but has no method that is ever called."""

    def on_epoch_ends(self, event):
        pass


WRONG = [
    # what is not there
    ({"model_creator": None}, InvalidArgumentError, "model_creator is missing: pass model_creator, data_creator and"),
    ({"loss_creator": None}, InvalidArgumentError, "loss_creator is missing: pass a loss class such as"),
    # functions
    ({"model_creator": "Net"}, InvalidArgumentError, "model_creator must be a function, got 'Net' (str)"),
    ({"model_creator": torch.nn.Linear(1, 1)}, InvalidArgumentError, "model_creator must be a function, got Linear("),
    ({"data_creator": DataLoader([1])}, InvalidArgumentError, "(DataLoader): the workers call it, and each makes its"),
    ({"loss_creator": torch.nn.MSELoss()}, InvalidArgumentError, "loss_creator must be a function, got MSELoss()"),
    ({"initialization_hook": 3}, InvalidArgumentError, "initialization_hook must be a function, got 3 (int)"),
    (
        {"model_creator": lambda: 1},
        InvalidArgumentTypeError,
        "model_creator is called as <lambda>(config), but the signature is <lambda>()",
    ),
    ({"optimizer_creator": lambda model: 1}, InvalidArgumentTypeError, "called as <lambda>(model, config), but"),
    ({"training_operator_cls": 3}, InvalidArgumentTypeError, "must be a TrainingOperator subclass, got 3"),
    ({"training_operator_cls": dict}, InvalidArgumentTypeError, "must be a TrainingOperator subclass, got dict"),
    # names
    ({"num_worker": 3}, InvalidArgumentTypeError, "unknown argument 'num_worker'; did you mean num_workers"),
    ({"model_creater": 3}, InvalidArgumentTypeError, "did you mean model_creator"),
    ({"zzz": 3}, InvalidArgumentTypeError, "unknown argument 'zzz'. Known are: accumulate, add_dist_sampler, backend"),
    ({"num_replicas": 2}, InvalidArgumentTypeError, "num_replicas was retired: use num_workers"),
    ({"batch_size": 2}, InvalidArgumentTypeError, "batch_size was retired: use config={BATCH_SIZE: ...}"),
    (
        {"data_loader_args": {}},
        InvalidArgumentTypeError,
        "data_loader_args was retired: use arguments of the DataLoader",
    ),
    ({"apex_args": {}}, InvalidArgumentTypeError, "apex_args was retired: use precision="),
    ({"serialize_data_creation": True}, InvalidArgumentTypeError, "was retired: use a file lock inside data_creator"),
    # ranks and batches
    *(
        ({"num_workers": value}, InvalidArgumentError, f"whole number of at least 1, got {value!r}")
        for value in (0, -1, True, "2", 1.5, None)
    ),
    ({"min_workers": 3}, InvalidArgumentError, "min_workers must be a whole number from 1 to num_workers=2, got 3"),
    ({"config": [1]}, InvalidArgumentTypeError, "config must be a dict, got [1] (list)"),
    ({"config": {BATCH_SIZE: 1}}, InvalidArgumentError, "a whole number of at least num_workers=2, got 1"),
    ({"config": {BATCH_SIZE: 8.0}}, InvalidArgumentError, "got 8.0"),
    ({"num_cpus_per_worker": 0}, InvalidArgumentError, 'num_cpus_per_worker must be "auto" or a whole number'),
    # devices
    ({"backend": "mpi"}, InvalidArgumentError, 'backend must be "auto", "nccl" or "gloo", got \'mpi\''),
    ({"backend": "nccl", "use_gpu": False}, InvalidArgumentError, 'backend="nccl" needs GPUs (use_gpu=True)'),
    ({"use_gpu": "yes"}, InvalidArgumentError, "use_gpu must be True, False or \"auto\", got 'yes'"),
    # numbers and switches
    (
        {"accumulate": 0},
        InvalidArgumentError,
        "accumulate must be a whole number of batches per optimizer step, at least 1; got 0",
    ),
    (
        {"memory_format": "nhwc"},
        InvalidArgumentError,
        "memory_format must be one of auto, channels_last, as_made or None; got 'nhwc'",
    ),
    ({"fused": "yes"}, InvalidArgumentTypeError, "fused must be True, False or \"auto\", got 'yes'"),
    ({"cpu_affinity": 3}, InvalidArgumentTypeError, 'cpu_affinity must be True, False or "auto", got 3'),
    ({"strategy": "deepspeed"}, InvalidArgumentError, "strategy must be one of ddp, zero1, fsdp; got 'deepspeed'"),
    ({"comm_hook": "fp4"}, InvalidArgumentError, "comm_hook must be one of fp16, bf16, powersgd or None; got 'fp4'"),
    ({"comm_hook": "fp16", "strategy": "zero1"}, InvalidArgumentError, "comm_hook='fp16' is for strategy=\"ddp\""),
    ({"strategy": "fsdp", "precision": "fp16"}, InvalidArgumentError, 'use precision="bf16"'),
    (
        {"strategy": "zero1", "wrap_ddp": False},
        InvalidArgumentError,
        "wrap_ddp=False leaves the exchange of gradients to you",
    ),
    ({"precision": "fp8"}, InvalidArgumentError, "precision must be one of fp32, bf16, fp16; got 'fp8'"),
    ({"use_fp16": "apex"}, ImportError, 'use precision="fp16" or "bf16"'),
    ({"use_fp16": "x"}, InvalidArgumentError, "use_fp16 must be a bool or 'apex'"),
    ({"timeout_s": 0}, InvalidArgumentError, "timeout_s must be more than 0 seconds, got 0"),
    ({"timeout_s": "1"}, InvalidArgumentTypeError, "timeout_s must be a number of seconds, got '1'"),
    ({"seed": "x"}, InvalidArgumentTypeError, "seed must be a whole number, got 'x'"),
    ({"seed": 2**70}, InvalidArgumentError, "seed must be from 0 to 2**63 - 1"),
    ({"wrap_ddp": "no"}, InvalidArgumentTypeError, "wrap_ddp must be True or False, got 'no'"),
    ({"ddp_args": [1]}, InvalidArgumentError, "ddp_args needs to be a dict object, got list"),
    ({"compile": "x"}, InvalidArgumentTypeError, "compile must be True, False or a dict"),
    ({"scheduler_step_freq": "step"}, InvalidArgumentError, "must be one of batch, epoch, manual or None; got 'step'"),
    ({"scheduler_creator": lambda o, c: o}, InvalidArgumentError, "scheduler_step_freq is required with a scheduler"),
    ({"run_dir": 3}, InvalidArgumentTypeError, 'run_dir must be a path, "auto" or None, got 3'),
    # objects
    ({"callbacks": [Mute()]}, InvalidArgumentTypeError, "on_epoch_ends looks like on_epoch_end"),
    ({"callbacks": Mute}, InvalidArgumentTypeError, "callbacks must be a list or tuple of objects"),
    ({"engine": "slurm"}, InvalidArgumentError, "got 'slurm'"),
    ({"engine": 3}, InvalidArgumentTypeError, "engine object such as LocalEngine(), got 3"),
    ({"engine": "spmd"}, InvalidArgumentError, "start the script with torchrun"),
    ({"checkpoint": True}, InvalidArgumentTypeError, "checkpoint must be a CheckpointConfig, got True"),
    ({"failure": {"hang_timeout_s": 1}}, InvalidArgumentTypeError, "failure must be a FailureConfig, such as"),
    ({"resume": "yes"}, InvalidArgumentError, 'resume must be "auto", True or False'),
    # what this version does not have
    ({"checkpoint": 3}, InvalidArgumentTypeError, "checkpoint must be a CheckpointConfig"),
    ({"preemption": "SIGTERM"}, InvalidArgumentTypeError, "preemption must be a PreemptionConfig"),
    ({"resume": True}, ResumeError, "resume=True needs a run_dir"),
    ({"engine": "ray"}, NotAvailableError, 'the Ray engine is not supported in this version: use engine="local"'),
    (
        {"use_local": True, "wrap_ddp": False},
        InvalidArgumentError,
        "use_local=True cannot carry 2 ranks in one process",
    ),
]


def name_of(value) -> str:
    """Name of a case that is the same in every process: without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


@pytest.mark.parametrize(("arguments", "kind", "text"), WRONG, ids=[name_of(a) for a, _, _ in WRONG])
def test_an_argument_that_cannot_work(arguments, kind, text) -> None:
    before = workers()
    with pytest.raises(kind) as caught:
        TorchTrainer(**{**CREATORS, **arguments})
    assert type(caught.value) is kind
    assert text in str(caught.value)
    assert not issubclass(kind, Warning)
    assert workers() == before


def test_errors_of_arguments_are_the_builtin_ones_too() -> None:
    with pytest.raises(ValueError, match="num_workers"):
        TorchTrainer(**{**CREATORS, "num_workers": 0})
    with pytest.raises(TypeError, match="num_worker"):
        TorchTrainer(**CREATORS, num_worker=2)
    with pytest.raises(NotImplementedError, match="Ray"):
        TorchTrainer(**CREATORS, engine="ray")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpus_that_are_not_there() -> None:
    error = failure_of(InvalidArgumentError, use_gpu=True)
    assert "no GPU is visible to this process (CUDA_VISIBLE_DEVICES=" in str(error)
    assert 'use_gpu="auto"' in str(error)


@pytest.mark.parametrize("value", [-1, 0, "x"])
def test_a_hang_timeout_that_means_nothing(value) -> None:
    with pytest.raises(InvalidArgumentError, match=r'hang_timeout_s must be "auto" or more than 0 seconds'):
        FailureConfig(hang_timeout_s=value)


class Holder:
    def __init__(self):
        self.inner = {"lock": threading.Lock()}


class LockedOperator(TrainingOperator):
    lock = threading.Lock()


LOCK = threading.Lock()


def with_extra(config, extra):
    return torch.nn.Linear(20, 5)


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        ({"config": {"a": [1, Holder()]}}, "config['a'][1].inner['lock']"),
        ({"model_creator": functools.partial(with_extra, extra=LOCK)}, "model_creator.keywords['extra']"),
        ({"model_creator": lambda config, lock=LOCK: lock}, "model_creator.__defaults__[0]"),
    ],
)
def test_what_does_not_pickle_is_named(arguments, path) -> None:
    error = failure_of(NotSerializableError, **arguments)
    assert str(error).startswith(f"{path} cannot be sent to the worker processes: lock object does not pickle")
    assert "inside a creator, setup or the function itself" in str(error)


@pytest.fixture(scope="module")
def trainer():
    with TorchTrainer(**CREATORS) as trainer:
        yield trainer


WRONG_USE = [
    (lambda t: t.train(num_steps=-1), InvalidArgumentError, "num_steps must be a whole number of at least 0 or None"),
    (lambda t: t.train(num_steps=True), InvalidArgumentError, "got True"),
    (lambda t: t.validate(num_steps=1.5), InvalidArgumentError, "got 1.5"),
    (lambda t: t.train(info=[1]), InvalidArgumentTypeError, "info must be a dict, got [1]"),
    (lambda t: t.train(info={"a": LOCK}), NotSerializableError, "info['a'] cannot be sent to the worker processes"),
    (lambda t: t.train(num_step=3), InvalidArgumentTypeError, "unknown argument 'num_step'; did you mean num_steps?"),
    (lambda t: t.validate(profil=3), InvalidArgumentTypeError, "did you mean profile?"),
    (lambda t: t.train(max_retries=-1), InvalidArgumentError, "max_retries must be a whole number"),
    (lambda t: t.fit("x"), InvalidArgumentError, "epochs must be a whole number of at least 0, got 'x'"),
    (lambda t: t.fit(1, validate_every=-1), InvalidArgumentError, "validate_every must be a whole number"),
    (lambda t: t.apply_all_workers(3), InvalidArgumentTypeError, "apply_all_workers takes a function, got 3"),
    (lambda t: t.apply_all_operators("x"), InvalidArgumentTypeError, "apply_all_operators takes a function"),
    (lambda t: t.apply_all_workers(lambda lock=LOCK: lock), NotSerializableError, "fn.__defaults__[0] cannot be sent"),
    (lambda t: t.resize(0), InvalidArgumentError, "resize(0)"),
    (lambda t: t.resize(3), InvalidArgumentError, "resize(3)"),
    (lambda t: t.get_local_operator(), NotAvailableError, "use apply_all_operators(fn), or use_local=True"),
    (lambda t: t.load("/no/such/file"), FileNotFoundError, "/no/such/file"),
]


@pytest.mark.parametrize(("use", "kind", "text"), WRONG_USE)
def test_a_call_that_cannot_work_leaves_the_trainer_as_it_was(trainer, use, kind, text) -> None:
    with pytest.raises(kind) as caught:
        use(trainer)
    assert type(caught.value) is kind
    assert text in str(caught.value)
    assert trainer.apply_all_operators(lambda operator: operator.world_rank) == [0, 1]


METHODS = {
    "train": (),
    "validate": (),
    "fit": (1,),
    "apply_all_workers": (int,),
    "apply_all_operators": (id,),
    "update_scheduler": (1.0,),
    "get_model": (),
    "get_local_operator": (),
    "state_dict": (),
    "load_state_dict": ({},),
    "save": ("x",),
    "load": ("x",),
    "resize": (2,),
}


def test_no_method_works_after_shutdown() -> None:
    before = workers()
    trainer = TorchTrainer(**CREATORS)
    trainer.shutdown()
    for method, arguments in METHODS.items():
        with pytest.raises(TrainerClosedError, match="shut down: create a new TorchTrainer"):
            getattr(trainer, method)(*arguments)
    trainer.shutdown()  # is done already
    trainer.shutdown(force=True)
    assert workers() == before
