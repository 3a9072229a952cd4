"""Runs the calls of the ranks that this process carries: a worker, the driver itself, or a launcher's process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import nn

from torchtrainer.config import BATCH_COUNT, NUM_SAMPLES
from torchtrainer.errors import InvalidArgumentTypeError
from torchtrainer.operator import TrainingOperator
from torchtrainer.train.components import internals
from torchtrainer.train.data import RankLoader
from torchtrainer.train.gradient_sync import GradientSync, NoSync
from torchtrainer.train.hooks import bind_hook, epoch_info
from torchtrainer.train.loop import Extent, StepIterator, train_epoch
from torchtrainer.train.metrics import PassResult, plain
from torchtrainer.train.progress import StepGate
from torchtrainer.train.rank_context import trainable_of
from torchtrainer.train.schedules import step_by_metric
from torchtrainer.train.state import capture, restore, restore_weights
from torchtrainer.train.uneven import GradientShare, UnevenWatch
from torchtrainer.train.weights import WEIGHTS
from torchtrainer.worker.checkpointer import RankCheckpointer, Saver, step_iterator
from torchtrainer.worker.models import copies
from torchtrainer.worker.profiling import PassObserver

_NO_LOADER = (
    "Training Operator does not have any registered {name} loader. Please register one with "
    "`self.register_data({name}_loader=...)` in the setup function, or return one from data_creator."
)


class Executor:
    """The ranks that one process carries: serves the trainer's calls. Everything runs in the thread that trains.

    Args:
        operator: the user's, built.
        gate: asked at every step boundary whether to continue.
        sync: the ranks, and how they come by the gradients of all ranks; None: one rank, which exchanges nothing.
        saver: takes the ranks' state to where it is durable; None: nothing is kept.
        every_steps: optimizer steps between two checkpoints; None: only when somebody asks.

    Attributes:
        operator, sync: as given.
        checkpointer: saves and restores the ranks.
    """

    def __init__(
        self,
        operator: TrainingOperator,
        *,
        gate: StepGate,
        sync: GradientSync | None = None,
        saver: Saver | None = None,
        every_steps: int | None = None,
    ) -> None:
        self.operator = operator
        self.sync = sync if sync is not None else NoSync(operator)
        self.checkpointer = RankCheckpointer(operator, self.sync, saver, every_steps)
        self._progress = internals(operator).context.progress
        self._gate = gate
        self._new_steps = step_iterator(operator, self.checkpointer)
        self._observer: PassObserver
        self._latest: Callable[[int], Any] | None = None
        self._progress.enter("idle")

    @property
    def ranks(self) -> list[int]:
        """The ranks that this process carries now."""
        return sorted(self.sync.contexts)

    @property
    def turn(self) -> int:
        """The rank whose turn it is."""
        return internals(self.operator).context.collective.rank

    def call(self, method: str, **keywords: Any) -> dict[int, Any]:
        """Makes a call of the trainer; what it returns for each rank.

        Args:
            method: one of those below.
            keywords: its arguments.
        """
        if method in ("train", "validate"):
            found: dict[int, Any] = getattr(self, method)(**keywords)
            return found
        value = getattr(self, method)(**keywords)
        self._latest = lambda _: value
        return dict.fromkeys(self.ranks, value)

    def settle(self, method: str, reply: tuple[Any, ...] | None = None) -> None:
        """To be called when a call has returned: the records of the ranks follow what it changed, and keep the reply."""
        self.sync.settle(trained=method == "train", reply=reply)

    def late_result(self, rank: int) -> Any:
        """What the latest call returns for a rank that was taken over after it."""
        return self._latest(rank) if self._latest is not None else None

    # Calls

    def facts(self) -> dict[str, Any]:
        """Facts about the operator for the driver, as JSON data."""
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
    ) -> dict[int, PassResult]:
        """Trains: the built-in loop, or the operator's ``train_epoch``.

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
        sync, extent, completed = self.sync, Extent(num_steps=num_steps, new_pass=new_pass), False
        self._latest = internals(self.operator).meters = None
        sync.begin_call(anew=not self.checkpointer.resuming, new_pass=new_pass)
        try:
            loader = sync.loader
            passes = loader.passes_started - loader.in_pass if loader is not None else 0
            sync.epoch_idx, self.checkpointer.mark = self.checkpointer.epoch_idx_of_resumed(passes), mark or {}
            if trace is not None:
                sync.turn_to_lowest()  # after which the trace is called
            with (
                self._pass(loader, "train", extent, profile, trace) as steps,
                self.operator.timers.record("train_epoch"),
            ):
                returned = self._train_epoch(steps, epoch_info(info, self.operator, num_steps), num_steps)
            completed = True
        finally:
            sync.end_call(completed=completed)
        self._latest = lambda rank: self._train_result(rank, returned, steps)
        return {rank: self._train_result(rank, returned, steps) for rank in self.ranks}

    def _train_epoch(self, steps: StepIterator, info: dict[str, Any], num_steps: int | None) -> Mapping[str, Any]:
        """Runs the loop of a call; returns its metrics, where one rank has made it by itself."""
        epoch_idx, kind = self.sync.epoch_idx, type(self.operator).__name__
        if self.sync.step is not None:
            return train_epoch(self.operator, steps, {**info, "epoch_idx": epoch_idx}, self.sync.step)
        returned = self._hook("train_epoch", steps, info, num_steps)
        if not isinstance(returned, Mapping):
            raise InvalidArgumentTypeError(
                f"{kind}.train_epoch must return a dict of metrics, got {type(returned).__name__}: {returned!r}"
            )
        if "epoch" in returned:
            raise InvalidArgumentTypeError(
                f"the metrics of {kind}.train_epoch may not have the key 'epoch', under which the number of passes is returned; "
                f"use another name for {returned['epoch']!r}"
            )
        return returned

    def _train_result(self, rank: int, returned: Mapping[str, Any], steps: StepIterator) -> PassResult:
        """What a call came to for a rank that was carried in it, or has been taken over since."""
        context = self.sync.turn_to_rank(rank)
        loader, samples = context.loaders.get("train"), steps.samples
        if self.sync.step is not None:
            returned, samples = context.meters.summary(), context.samples
            internals(self.operator).meters = context.meters  # whose weights go into the result
        epoch = {"epoch": loader.passes_started if loader is not None else 0}
        return self._result(returned, steps, samples, epoch)

    def validate(
        self,
        *,
        num_steps: int | None = None,
        profile: bool = False,
        info: dict[str, Any] | None = None,
        new_pass: bool = False,
        mark: dict[str, Any] | None = None,
    ) -> dict[int, PassResult]:
        """Evaluates rank after rank; arguments as for `train`. Models are left in the mode they were in."""
        extent, found, losses = Extent(num_steps=num_steps, new_pass=new_pass), {}, dict[int, Any]()
        self.checkpointer.mark = mark or {}

        def one(rank: int) -> PassResult:
            self.sync.turn_to_rank(rank)
            return self._validate(extent, profile=profile, info=info)

        self._latest = one
        while left := [rank for rank in self.ranks if rank not in found]:  # ranks of lost processes come in between
            found[left[0]] = one(left[0])
            losses.update(self._progress.losses)
        self._progress.losses = losses
        return found

    def _validate(self, extent: Extent, *, profile: bool, info: dict[str, Any] | None) -> PassResult:
        """Runs the operator's ``validate`` for the rank whose turn it is."""
        loader, train = self._loader("validation"), self._loader("train")
        self.sync.epoch_idx = max(train.passes_started - 1, 0) if train is not None else 0
        if extent.new_pass and loader is not None and not self.checkpointer.resuming:
            loader.give_up()
        internals(self.operator).meters = None
        with (
            self._evaluation(),
            self._pass(loader, "validation", extent, profile, None) as steps,
            self.operator.timers.record("validation"),
        ):
            returned = self._hook("validate", steps, info, extent.num_steps)
        return self._result(returned, steps, steps.samples, {})

    def apply_operator(self, fn: Callable[[TrainingOperator], Any]) -> Any:
        """Returns ``fn(operator)``; what it changes of the operator's own state it changes for all ranks of this process."""
        with self.sync.for_all():
            return fn(self.operator)

    def apply_worker(self, fn: Callable[[], Any]) -> Any:
        """Returns ``fn()``, called in this rank's process."""
        return fn()

    def update_scheduler(self, metric: float) -> None:
        """Calls ``step(metric)`` of every scheduler; an OperatorUseError if there is none."""
        step_by_metric(self.operator, metric)

    def get_model(self, to_cpu: bool = True) -> Any:
        """A copy of the model, or a list of copies, without any wrapper. Training continues with the original.

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
            self.sync.state_loaded(positions=False)
            return
        restore(self.operator, state)
        epoch = int(state.get("epoch", 0))
        for name, loader in internals(self.operator).loaders.items():
            loader.load_state_dict(
                {"passes_started": epoch if name == "train" else loader.passes_started, "samples": 0}
            )
        self._progress.reach(self.operator.global_step, epoch)
        self.sync.state_loaded(positions=True)

    def save_complete(self, *, mark: dict[str, Any]) -> None:
        """Saves the complete state between two calls, and returns when it is copied.

        Args:
            mark: the call that comes next.
        """
        self.checkpointer.mark = mark
        self.checkpointer.save(must=True)

    def restore_complete(self, *, path: str) -> None:
        """Goes to where a checkpoint is; see `RankCheckpointer.restore`."""
        self.checkpointer.restore(path)

    def close(self) -> None:
        """Ends the loaders' worker processes."""
        for context in self.sync.contexts.values():
            context.close()

    def _loader(self, name: str) -> RankLoader | None:
        return internals(self.operator).loaders.get(name)

    def _hook(self, hook: str, steps: StepIterator, info: dict[str, Any] | None, num_steps: int | None) -> Any:
        """Calls an epoch hook with what its signature takes; ``info`` is a fresh dict in which ``epoch_idx`` is ours."""
        epoch_idx = self.sync.epoch_idx
        values = {"info": {**(info or {}), "epoch_idx": epoch_idx}, "num_steps": num_steps, "epoch_idx": epoch_idx}
        return bind_hook(getattr(self.operator, hook), tuple(values))(steps, values)

    @contextmanager
    def _pass(
        self, loader: RankLoader | None, name: str, extent: Extent, profile: bool, trace: str | None
    ) -> Iterator[StepIterator]:
        """The iterator of one call, in place while the hook runs and taken down whatever happens in it."""
        operator, inside = self.operator, internals(self.operator)
        self._progress.begin_pass()
        clocked = self.sync.clocked and name == "train"
        observer = self._observer = PassObserver(operator, clocked, profile, trace, extent.num_steps)
        steps = self._new_steps(
            loader,
            missing=_NO_LOADER.format(name=name),
            extent=extent,
            progress=self._progress,
            gate=self._gate,
            timers=operator.timers,
            share=GradientShare(trainable_of(operator), self.sync.averages_over) if name == "train" else None,
            on_step=observer.counting(self._count_step),
            keeper=self.checkpointer if self._keeps_in(name) else None,
            resumed=self.checkpointer.take_resumed(),
        )
        steps.uneven = UnevenWatch(operator, training=name == "train")
        inside.steps = steps
        completed = False
        with observer.watching():
            try:
                yield steps
                completed = True
                self._progress.enter("idle")
            finally:
                steps.close(completed=completed)
                inside.steps = None

    def _keeps_in(self, name: str) -> bool:
        """Whether the state is saved at the step boundaries of a pass. Ranks that validate one after the other have none in common."""
        return self.checkpointer.active and (name == "train" or len(self.sync.contexts) == 1)

    @contextmanager
    def _evaluation(self) -> Iterator[None]:
        """No exchange between the ranks, which may have unequal numbers of batches; modes are put back at the end."""
        components = internals(self.operator).components
        modes = {one: one.training for model in (components.models if components else []) for one in model.modules()}
        self.checkpointer.note_modes()
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
            self.checkpointer.modes = None

    def _follow_first_rank(self) -> list[Any]:
        """Gives every rank the buffers of rank 0, such as batch-norm statistics, as DDP does before each forward.

        Returns:
            The wrapped models that exchange between ranks in their forward.
        """
        syncing = [model for model in self._wrapped() if model.require_forward_param_sync]
        self.sync.take_first_buffers(syncing)
        return syncing

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

    def _result(self, returned: Any, steps: StepIterator, samples: int, epoch: dict[str, int]) -> PassResult:
        """The hook's dict with the counts that it does not have itself; other objects as they are."""
        if not isinstance(returned, Mapping):
            return PassResult(returned)
        values = {str(name): plain(value) for name, value in returned.items()}
        counts = {NUM_SAMPLES: samples, **epoch, BATCH_COUNT: steps.batches}
        metrics = {**counts, **values}
        told = metrics[NUM_SAMPLES]
        weights = dict.fromkeys(values, float(told) if isinstance(told, int | float) else 1.0)
        meters = internals(self.operator).meters
        if meters is not None:
            weights.update(meters.weights())
        if (profile := self._observer.result(steps)) is not None:
            metrics["profile"] = profile
        return PassResult(metrics, {name: weights[name] for name in values if name not in (NUM_SAMPLES, BATCH_COUNT)})
