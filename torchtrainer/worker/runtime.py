"""What a rank does, call by call, whoever carries it: a worker process, the driver itself, or a launcher's process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from torchtrainer.comm.group import Collective
from torchtrainer.config import BATCH_COUNT, NUM_SAMPLES
from torchtrainer.errors import InvalidArgumentTypeError
from torchtrainer.observe.notices import notice
from torchtrainer.operator import OperatorContext, TrainingOperator
from torchtrainer.spec import BuildSpec, rank_config
from torchtrainer.train.build import build_operator
from torchtrainer.train.components import internals
from torchtrainer.train.data import RankLoader
from torchtrainer.train.group_rank import GroupRank
from torchtrainer.train.hooks import bind_hook, epoch_info
from torchtrainer.train.loop import Extent, StepIterator
from torchtrainer.train.metrics import PassResult, plain
from torchtrainer.train.progress import Progress, StepGate
from torchtrainer.train.schedules import step_by_metric
from torchtrainer.train.seats import trainable_of
from torchtrainer.train.state import capture, restore, restore_weights
from torchtrainer.train.team_loop import TeamLoader
from torchtrainer.train.uneven import GradientShare, UnevenWatch
from torchtrainer.train.weights import WEIGHTS
from torchtrainer.worker.keeper import RankKeeper, Saver, step_iterator
from torchtrainer.worker.models import copies
from torchtrainer.worker.profiling import PassObserver

_NO_LOADER = (
    "Training Operator does not have any registered {name} loader. Please register one with "
    "`self.register_data({name}_loader=...)` in the setup function, or return one from data_creator."
)


def run_initialization_hook(spec: BuildSpec) -> None:
    """Runs the user's ``initialization_hook``, if there is one; before anything else of the run, for any number of ranks."""
    if spec.initialization_hook is not None:
        spec.initialization_hook()


def build_rank(
    spec: BuildSpec,
    *,
    collective: Collective,
    device: torch.device,
    local_rank: int,
    progress: Progress,
    in_memory: bool = False,
    batch_shares: tuple[int, ...] = (),
) -> TrainingOperator:
    """Builds the operator of a rank.

    Args:
        spec: the user's code and options.
        collective: the ranks of the run.
        device: where this rank trains.
        local_rank: place of the rank on its machine.
        progress: where the rank shows what it is doing.
        in_memory: gradients are to be exchanged through shared memory.
        batch_shares: parts of ``config[BATCH_SIZE]`` by rank, for a process that carries all ranks.
    """
    progress.enter("setup")
    context = OperatorContext(
        config=rank_config(spec.config, rank=collective.rank, world_size=collective.world_size),
        settings=spec.settings,
        device=device,
        collective=collective,
        local_rank=local_rank,
        progress=progress,
        in_memory=in_memory,
        batch_shares=batch_shares,
        say=notice if collective.rank == 0 else None,
    )
    return build_operator(spec, context)


class RankRuntime:
    """One rank: serves the trainer's calls. Everything runs in the thread that trains.

    Args:
        operator: the user's, built.
        gate: asked at every step boundary whether to go on.
        saver: takes the rank's state to where it is durable; None: nothing is kept.
        every_steps: optimizer steps between two checkpoints; None: only when somebody asks.
        group_rank: compares the ranks, where gradients go through a process group.

    Attributes:
        operator: as given.
    """

    def __init__(
        self,
        operator: TrainingOperator,
        *,
        gate: StepGate,
        saver: Saver | None = None,
        every_steps: int | None = None,
        group_rank: GroupRank | None = None,
    ) -> None:
        self.operator = operator
        self._group_rank = group_rank
        self._collective = internals(operator).context.collective
        self._progress = internals(operator).context.progress
        self._gate = gate
        self._keeper = RankKeeper(operator, saver, every_steps)
        self._new_steps = step_iterator(operator, self._keeper)
        self._observer: PassObserver
        self._progress.enter("idle")

    def facts(self) -> dict[str, Any]:
        """What the driver wants to know about the operator, as JSON data."""
        components = internals(self.operator).components
        train = self._loader("train")
        return {
            "operator": type(self.operator).__name__,
            "models": len(components.raw_models) if components else 0,
            "optimizers": len(components.optimizers) if components else 0,
            "schedulers": len(components.schedulers) if components else 0,
            "parameters": sum(one.numel() for model in components.raw_models for one in model.parameters())
            if components
            else 0,
            "has_train_loader": train is not None,
            "has_validation_loader": self._loader("validation") is not None,
            "batches_per_pass": train.batches_per_pass if train else None,
            "samples_per_pass": train.samples_per_pass if train else None,
        }

    def train(
        self,
        *,
        num_steps: int | None = None,
        profile: bool = False,
        trace: str | None = None,
        info: dict[str, Any] | None = None,
        new_pass: bool = False,
        mark: dict[str, Any] | None = None,
    ) -> PassResult:
        """Runs the operator's ``train_epoch`` once.

        Args:
            num_steps: batches per rank; None: to the end of the pass.
            profile: measure the parts of a step.
            trace: directory in which the steps are traced; None: they are not.
            info: the user's own values for the hooks.
            new_pass: begin a new pass, and end with it at the latest.
            mark: which call of the script this is, for checkpoints that are taken in it.

        Raises:
            InvalidArgumentTypeError: ``train_epoch`` did not return a dict, or one with the key ``epoch``.
        """
        loader, extent = self._loader("train"), Extent(num_steps=num_steps, new_pass=new_pass)
        self._begin_anew(loader, extent)
        epoch_idx = self._keeper.epoch_idx_of_resumed(
            loader.passes_started - loader.in_pass if loader is not None else 0
        )
        self._keeper.mark, self._keeper.epoch_idx = mark or {}, epoch_idx
        if self._group_rank is not None:
            self._group_rank.begin_call()
        with self._pass(loader, "train", extent, profile, trace) as steps:
            with self.operator.timers.record("train_epoch"):
                told = epoch_info(info, self.operator, num_steps)
                returned = self._call("train_epoch", steps, told, num_steps, epoch_idx)
            if not isinstance(returned, Mapping):
                raise InvalidArgumentTypeError(
                    f"{type(self.operator).__name__}.train_epoch must return a dict of metrics, got "
                    f"{type(returned).__name__}: {returned!r}"
                )
            if "epoch" in returned:
                raise InvalidArgumentTypeError(
                    f"the metrics of {type(self.operator).__name__}.train_epoch may not have the key 'epoch', under which "
                    f"the number of passes is returned; use another name for {returned['epoch']!r}"
                )
        if self._group_rank is not None:
            self._group_rank.end_call()
        epoch = {"epoch": loader.passes_started if loader is not None else 0}
        return self._result(returned, steps, epoch)

    def validate(
        self,
        *,
        num_steps: int | None = None,
        profile: bool = False,
        info: dict[str, Any] | None = None,
        new_pass: bool = False,
        mark: dict[str, Any] | None = None,
    ) -> PassResult:
        """Runs the operator's ``validate`` once; arguments as for `train`. Models are left in the mode they were in."""
        train = self._loader("train")
        epoch_idx = max(train.passes_started - 1, 0) if train is not None else 0
        self._keeper.mark, self._keeper.epoch_idx = mark or {}, epoch_idx
        loader, extent = self._loader("validation"), Extent(num_steps=num_steps, new_pass=new_pass)
        self._begin_anew(loader, extent)
        with (
            self._evaluation(),
            self._pass(loader, "validation", extent, profile, None) as steps,
            self.operator.timers.record("validation"),
        ):
            returned = self._call("validate", steps, info, num_steps, epoch_idx)
        return self._result(returned, steps, {})

    def apply_operator(self, fn: Callable[[TrainingOperator], Any]) -> Any:
        """Returns ``fn(operator)``."""
        return fn(self.operator)

    def apply_worker(self, fn: Callable[[], Any]) -> Any:
        """Returns ``fn()``, called in this rank's process."""
        return fn()

    def update_scheduler(self, metric: float) -> None:
        """Calls ``step(metric)`` of every scheduler; an OperatorUseError if there is none."""
        step_by_metric(self.operator, metric)

    def get_model(self, to_cpu: bool = True) -> Any:
        """A copy of the model, or a list of copies, without any wrapper. Training goes on with the original.

        Args:
            to_cpu: put the copy on the CPU; else it is on this rank's device.
        """
        self._follow_first_rank()
        return copies(self.operator, to_cpu=to_cpu)

    def state_dict(self) -> dict[str, Any]:
        """The state of the training, on the CPU, sharing no memory with it. Alike on all ranks."""
        self._follow_first_rank()
        loader = self._loader("train")
        return capture(self.operator, loader.passes_started if loader is not None else 0)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Loads what `state_dict` returned. A pass that was running is given up: the next call starts a new one.

        Weights alone, under `WEIGHTS`, change nothing but the models.
        """
        if isinstance(state, Mapping) and isinstance(state.get(WEIGHTS), list):
            restore_weights(self.operator, state[WEIGHTS])
            return
        restore(self.operator, state)
        epoch = int(state.get("epoch", 0))
        for name, loader in internals(self.operator).loaders.items():
            loader.load_state_dict(
                {"passes_started": epoch if name == "train" else loader.passes_started, "samples": 0}
            )
        self._progress.reach(self.operator.global_step, epoch)

    def save_complete(self, *, mark: dict[str, Any]) -> None:
        """Saves the complete state between two calls, and returns when it is copied.

        Args:
            mark: the call that comes next.
        """
        self._keeper.mark = mark
        self._keeper.save(must=True)

    def restore_complete(self, *, path: str) -> None:
        """Goes to where a checkpoint is; see `RankKeeper.restore`."""
        self._keeper.restore(path)

    def settle(self, method: str, value: Any) -> None:
        """To be called after every call, with its name and what it returned."""

    def close(self) -> None:
        """Ends the loaders' worker processes."""
        for loader in internals(self.operator).loaders.values():
            loader.close()

    def _loader(self, name: str) -> RankLoader | None:
        return internals(self.operator).loaders.get(name)

    def _begin_anew(self, loader: RankLoader | None, extent: Extent) -> None:
        if extent.new_pass and loader is not None and not self._keeper.resuming:
            loader.give_up()

    def _call(
        self, hook: str, steps: StepIterator, info: dict[str, Any] | None, num_steps: int | None, epoch_idx: int
    ) -> Any:
        """Calls an epoch hook with what its signature takes; ``info`` is a fresh dict in which ``epoch_idx`` is ours."""
        values = {"info": {**(info or {}), "epoch_idx": epoch_idx}, "num_steps": num_steps, "epoch_idx": epoch_idx}
        return bind_hook(getattr(self.operator, hook), tuple(values))(steps, values)

    @contextmanager
    def _pass(
        self, loader: RankLoader | TeamLoader | None, name: str, extent: Extent, profile: bool, trace: str | None
    ) -> Iterator[StepIterator]:
        """The iterator of one call, in place while the hook runs and taken down whatever happens in it."""
        operator, inside = self.operator, internals(self.operator)
        self._progress.begin_pass()
        clocked = self._clocked and name == "train"
        observer = self._observer = PassObserver(operator, clocked, profile, trace, extent.num_steps)
        steps = self._new_steps(
            loader,
            missing=_NO_LOADER.format(name=name),
            extent=extent,
            progress=self._progress,
            gate=self._gate,
            timers=operator.timers,
            share=GradientShare(trainable_of(operator), self._exchanging) if name == "train" else None,
            on_step=observer.counting(self._count_step),
            keeper=self._keeper if self._keeps(name) else None,
            resumed=self._keeper.take_resumed(),
        )
        steps.uneven = UnevenWatch(operator, training=name == "train")
        inside.steps, inside.meters = steps, None
        completed = False
        with observer.watching():
            try:
                yield steps
                completed = True
                self._progress.enter("idle")
            finally:
                steps.close(completed=completed)
                inside.steps = None

    def _keeps(self, name: str) -> bool:
        """Whether the state is saved at the step boundaries of a pass."""
        return self._keeper.active

    _clocked = True
    """Gradients are exchanged inside backward, by what does not measure it."""

    @property
    def _exchanging(self) -> int:
        """How many ranks average their gradients in a backward pass."""
        return self._collective.world_size

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        """No exchange between the ranks, which may have unequal numbers of batches; modes are put back at the end."""
        components = internals(self.operator).components
        modes = {one: one.training for model in (components.models if components else []) for one in model.modules()}
        self._keeper.note_modes()
        syncing = self._follow_first_rank()
        try:
            for model in syncing:
                model.require_forward_param_sync = False
            with components.sharding.undivided() if components is not None else nullcontext():
                yield
        finally:
            for model in syncing:
                model.require_forward_param_sync = True
            for module, training in modes.items():
                module.training = training
            self._keeper.modes = None

    def _follow_first_rank(self) -> list[Any]:
        """Gives every rank the buffers of rank 0, such as batch-norm statistics, as DDP does before each forward.

        Returns:
            The wrapped models that exchange between ranks in their forward.
        """
        syncing = [model for model in self._wrapped() if model.require_forward_param_sync]
        self._take_buffers(syncing)
        return syncing

    def _take_buffers(self, syncing: list[Any]) -> None:
        if syncing:
            self._collective.broadcast_buffers([model for model in syncing if model.broadcast_buffers])

    def _wrapped(self) -> list[Any]:
        """Every ``DistributedDataParallel`` of the operator: ours, and those that the user keeps as attributes."""
        components = internals(self.operator).components
        found: dict[int, nn.Module] = {id(one): one for one in (components.models if components else [])}
        for value in vars(self.operator).values():
            for one in value if isinstance(value, list | tuple) else (value,):
                if isinstance(one, nn.Module):
                    found[id(one)] = one
        return [one for one in found.values() if hasattr(one, "require_forward_param_sync")]

    def _count_step(self) -> None:
        self.operator.global_step += 1
        self._progress.reach(self.operator.global_step)
        self._progress.stepped()

    def _result(self, returned: Any, steps: StepIterator, epoch: dict[str, int]) -> PassResult:
        """The hook's dict with the counts that it does not have itself; other objects as they are."""
        if not isinstance(returned, Mapping):
            return PassResult(returned)
        values = {str(name): plain(value) for name, value in returned.items()}
        counts = {NUM_SAMPLES: steps.samples, **epoch, BATCH_COUNT: steps.batches}
        metrics = {**counts, **values}
        samples = metrics[NUM_SAMPLES]
        weights = dict.fromkeys(values, float(samples) if isinstance(samples, int | float) else 1.0)
        meters = internals(self.operator).meters
        if meters is not None:
            weights.update(meters.weights())
        if (profile := self._observer.result(steps)) is not None:
            metrics["profile"] = profile
        return PassResult(metrics, {name: weights[name] for name in values if name not in (NUM_SAMPLES, BATCH_COUNT)})
