"""Trains a ``LightningModule`` as an operator, through Lightning's public interface and without its ``Trainer``.

Lightning itself is not imported here: the user's class brings it, as ``lightning`` or as ``pytorch_lightning``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from torchtrainer.comm.wrapping import wrap
from torchtrainer.config import SchedulerStepFreq
from torchtrainer.errors import (
    EngineError,
    InvalidArgumentError,
    InvalidArgumentTypeError,
    NotAvailableError,
    OperatorUseError,
)
from torchtrainer.lightning.building import Builder
from torchtrainer.lightning.calls import ModuleCalls
from torchtrainer.lightning.data import ModuleData, is_datamodule
from torchtrainer.lightning.log import CallMeters, LoggedMetrics
from torchtrainer.lightning.module import (
    ForwardPass,
    check_module,
    find_base,
    overrides,
    step_arguments,
    step_metrics,
)
from torchtrainer.lightning.optim import Schedules, read_optimizers
from torchtrainer.lightning.position import Position
from torchtrainer.lightning.stepping import AutomaticStepping, ManualStepping, Stepping
from torchtrainer.lightning.trainer import TrainerView
from torchtrainer.operator import TrainingOperator
from torchtrainer.train.components import internals, place

if TYPE_CHECKING:
    from torchtrainer.train.loop import StepIterator

_END_PASS = -1
"""What ``on_train_batch_start`` may return in Lightning to skip the rest of a pass."""


def operator_from_lightning(
    lightning_module_cls: Any, train_dataloader: Any = None, val_dataloader: Any = None, datamodule: Any = None
) -> type[LightningOperator]:
    """Makes an operator class out of a ``LightningModule`` class.

    The constructor gets the entries of ``config`` that its parameters name, and all of ``config`` as ``config`` or ``hparams``;
    ``**kwargs`` gets the entries that are left.

    Args:
        lightning_module_cls: the class; every rank makes an object of it.
        train_dataloader: used in place of the module's and the data module's own; a data module is taken here too.
        val_dataloader: the same for validation.
        datamodule: a ``LightningDataModule``: an object, or a class that is made as the module is.

    Raises:
        InvalidArgumentTypeError: not a ``LightningModule`` class, or not a data module.
    """
    base = find_base(lightning_module_cls)
    if base is None:
        raise InvalidArgumentTypeError(
            f"from_ptl takes a subclass of lightning.LightningModule, the class and not an object; got "
            f"{lightning_module_cls!r}"
        )
    if is_datamodule(train_dataloader) and datamodule is None:  # where Lightning's own fit takes one too
        train_dataloader, datamodule = None, train_dataloader
    if datamodule is not None and not is_datamodule(datamodule):
        raise InvalidArgumentTypeError(
            f"from_ptl takes a lightning.LightningDataModule as datamodule, a class or an object; got {datamodule!r}"
        )
    attributes = {
        "_module_cls": lightning_module_cls,
        "_base": base,
        "_given": (train_dataloader, val_dataloader),
        "_datamodule": datamodule,
    }
    return type(f"OperatorOf{lightning_module_cls.__name__}", (LightningOperator,), attributes)


class LightningOperator(TrainingOperator):
    """Trains one ``LightningModule``; made by `TrainingOperator.from_ptl`.

    Results have ``train_loss`` and ``val_loss``, the other numbers that the steps return, and what the module logs: the mean by
    samples under the name, and the latest value as ``last_<name>``. Precision, loaders and ranks are the trainer's. Schedulers
    are stepped as their dicts in ``configure_optimizers`` say; ``scheduler_step_freq`` is for those that state no interval, and
    with ``manual``, or with manual optimization, none is stepped. One that monitors a metric of validation is stepped by the
    first ``validate`` after a training pass.

    Attributes:
        model: the module.
        data: its data.
        position: where its training stands.
        stepping: makes its updates.
        schedules: its schedulers.
        latest_metrics: of the latest passes, over all ranks.
    """

    _module_cls: ClassVar[Any]
    _base: ClassVar[Any]
    _given: ClassVar[tuple[Any, Any]]
    _datamodule: ClassVar[Any]

    def setup(self, config: dict[str, Any]) -> None:
        """Builds the module and everything that it provides, in Lightning's order.

        Raises:
            NotAvailableError: the module needs something that only Lightning's ``Trainer`` has.
            InvalidArgumentError: what it provides cannot be trained.
        """
        module = self._build(config)
        self.position = Position()
        self.latest_metrics: dict[str, Any] = {}
        self.optimizer, self.optimizers = None, []
        self.schedules = Schedules([], module.lr_scheduler_step, active=False)
        self._started = False
        self._calls = ModuleCalls(self, self._base)
        with self._calls.attached():
            self.data.prepare(
                local_rank=self.local_rank,
                rank=self.world_rank,
                barrier=internals(self).context.collective.barrier,
            )
            module.configure_model()
            module.to(self.device)
            self.register_data(**self.data.loaders())
            self._register(module.configure_optimizers())
            module.on_fit_start()

    def get_model(self) -> Any:
        """The module, as in RaySGD."""
        return self.model

    def train_epoch(
        self,
        iterator: Iterable[Any],
        info: dict[str, Any] | None = None,
        num_steps: int | None = None,
        epoch_idx: int = 0,
    ) -> Any:
        """The built-in loop with the module's hooks; see `TrainingOperator.train_epoch`."""
        modes = {one: one.training for one in self.model.modules()}
        with self._call(Position(stage="train", epoch_idx=epoch_idx)) as logged:
            summary = super().train_epoch(self._train_batches(iterator, modes), info, num_steps, epoch_idx)
            return self._result(summary, logged)

    def train_batch(self, batch: Any, batch_info: dict[str, Any] | None = None) -> Any:
        """One ``training_step`` and the update that follows from it; see `TrainingOperator.train_batch`.

        Returns:
            The loss that the step returns as ``train_loss``, and the other numbers in a dict that it returns by their names.

        Raises:
            NotAvailableError: the module wants to end the pass, or one of several ranks to skip the batch.
        """
        module, position, index = self.model, self.position, self._index(batch_info)
        position.stepped = 0
        with self._calls.attached():
            batch = self.data.to_device(batch, self.device)
            if module.on_train_batch_start(batch, index) == _END_PASS:
                raise NotAvailableError(
                    f"on_train_batch_start of {type(module).__name__} returned -1 to skip the rest of the pass, which "
                    "is not supported here; limit the call with train(num_steps=...)"
                )
            metrics, outputs = self.stepping.run(batch, index)
            if position.stepped:
                self.schedules.after_step(index)
            module.on_train_batch_end(outputs, batch, index)
            self.schedules.after_batch(index, lambda: self._latest(metrics))
        return metrics

    def validate(self, val_iterator: Iterable[Any], info: dict[str, Any] | None = None) -> Any:
        """The built-in loop with the module's hooks; each call is a validation epoch. See `TrainingOperator.validate`."""
        with self._call(Position(stage="validate", epoch_idx=(info or {}).get("epoch_idx", 0))) as logged:
            summary = super().validate(self._validation_batches(val_iterator), info)
            return self._result(summary, logged)

    def validate_batch(self, batch: Any, batch_info: dict[str, Any] | None = None) -> Any:
        """One ``validation_step``; see `TrainingOperator.validate_batch`.

        Returns:
            The loss that the step returns as ``val_loss``, and the other numbers in a dict that it returns by their names.
        """
        module, index = self.model, self._index(batch_info)
        if not overrides(module, self._base, "validation_step"):
            raise OperatorUseError(
                f"validate needs a validation_step, and {type(module).__name__} has none; write one, or override "
                f"validate_batch of the operator class that from_ptl returns"
            )
        with self._calls.attached():
            batch = self.data.to_device(batch, self.device)
            module.on_validation_batch_start(batch, index)
            internals(self).context.progress.enter("forward")
            with self.timers.record("eval_fwd"), self._amp.autocast():
                output = module.validation_step(*step_arguments(module.validation_step, batch, index))
            module.on_validation_batch_end(output, batch, index)
        return step_metrics(output, "val_loss")

    def state_dict(self) -> Any:
        """What the module's ``on_save_checkpoint`` adds, the data module's state, and where updates, logs and schedulers stand."""
        checkpoint = self._checkpoint()
        known = set(checkpoint)
        self.model.on_save_checkpoint(checkpoint)
        return {
            "checkpoint": {key: value for key, value in checkpoint.items() if key not in known},
            "datamodule": self.data.state_dict(),
            "logged": None if self._calls.logged is None else self._calls.logged.state_dict(),
            "updates": self.stepping.updates,
            "waiting": [one.waiting for one in self.schedules.members],
        }

    def load_state_dict(self, state_dict: Any) -> None:
        """Gives ``on_load_checkpoint`` what ``on_save_checkpoint`` added; the weights are loaded by then."""
        if state_dict is None:
            return
        for one, waiting in zip(self.schedules.members, state_dict["waiting"], strict=True):
            one.waiting = waiting
        self.stepping.updates = state_dict.get("updates", 0)
        self.data.load_state_dict(state_dict.get("datamodule"))
        if self._calls.logged is not None and state_dict.get("logged") is not None:
            self._calls.logged.load_state_dict(state_dict["logged"])
        self.model.on_load_checkpoint({**self._checkpoint(), **state_dict["checkpoint"]})

    @property
    def scheduler_step_freq(self) -> SchedulerStepFreq | None:
        """``manual``: the built-in loop leaves the schedulers to the module's own dicts."""
        return "manual"

    def _build(self, config: Any) -> Any:
        """Makes the module, and the data module if there is one, and says which entries of ``config`` neither took."""
        context, builder = internals(self).context, Builder(config)
        module = self.model = builder.create(self._module_cls)
        check_module(module, self._base, warn=self.world_rank == 0)
        given = self._datamodule
        datamodule = builder.create(given) if isinstance(given, type) else given
        self.data = ModuleData(module, datamodule, self._given)
        if context.say is not None and (unused := builder.unused()):
            context.say(unused)
        module.trainer = TrainerView(self)
        if datamodule is not None:
            datamodule.trainer = module.trainer
        return module

    def _register(self, configured: Any) -> None:
        """Registers the module as it is, with a forward pass around it that exchanges gradients."""
        inside, module = internals(self), self.model
        settings = inside.context.settings
        if settings.strategy != "ddp" or settings.comm_hook is not None:
            raise NotAvailableError(
                f"strategy={settings.strategy!r} and comm_hook={settings.comm_hook!r} are not supported for "
                'LightningModules in this version: use strategy="ddp" and comm_hook=None, or write the training as a TrainingOperator'
            )
        frequency, automatic = settings.scheduler_step_freq, module.automatic_optimization
        optimizers, schedules = read_optimizers(
            configured,
            who=type(module).__name__,
            default_interval="step" if frequency == "batch" else "epoch",
            automatic=automatic,
        )
        self.schedules = Schedules(schedules, module.lr_scheduler_step, active=automatic and frequency != "manual")
        placed = place(
            models=module,
            optimizers=optimizers,
            criterion=None,
            schedulers=[one.scheduler for one in schedules],
            ddp_args=None,
            # the exchange belongs around the training step; the schedulers have intervals of their own
            context=replace(inside.context, settings=replace(settings, wrap_ddp=False, scheduler_step_freq="manual")),
            stock=False,
        )
        forward: nn.Module = ForwardPass(module, partial=not automatic)
        if self.world_size > 1 and settings.wrap_ddp:
            self._check_group()
            unused = {} if automatic else {"find_unused_parameters": True}  # each loss has some of the parameters
            forward = wrap(forward, device=self.device, ddp_args={**unused, **settings.ddp_args})
        inside.components = replace(placed, models=[forward])
        self.optimizers, self.optimizer = placed.optimizers, placed.optimizers[0]
        self.schedulers = placed.schedulers
        self.scheduler = placed.schedulers[0] if placed.schedulers else None
        self.stepping: Stepping = (AutomaticStepping if automatic else ManualStepping)(self, forward)

    def _check_group(self) -> None:
        """Refuses several ranks in this process: a module keeps what only its rank knows, in attributes of its own."""
        try:
            internals(self).context.collective.sum([1.0])
        except EngineError:
            raise InvalidArgumentError(
                f"use_local=True cannot carry {self.world_size} ranks of {type(self.model).__name__} in one process: a "
                "LightningModule keeps what belongs to its rank (metrics, lists of outputs) in its own attributes. Use "
                "num_workers=1 to debug, or worker processes"
            ) from None

    def _train_batches(self, iterator: Iterable[Any], modes: Mapping[nn.Module, bool]) -> Iterator[Any]:
        """The batches of a call, with the hooks between them; the loop has put everything into training mode by then."""
        inside, position = internals(self), self.position
        steps, loader = inside.steps, inside.loaders.get("train")
        position.epoch_idx += steps.passes_scheduled if steps is not None else 0
        running = loader is not None and loader.in_pass
        position.batch_idx = loader.batch_in_pass if loader is not None and running else 0
        for module, training in modes.items():
            module.training = training  # a part that the module keeps in evaluation mode stays there
        if not self._started:
            self._started = True
            self.model.on_train_start()
        for batch in iterator:
            position.stepped = 0
            running = not self._end_passes(steps) and running
            if not running:
                running = True
                self.model.on_train_epoch_start()
            position.enter(inside.steps)
            yield batch
            position.leave()
        position.stepped = 0
        if not self._end_passes(steps) and self._calls.logged is not None:
            self.latest_metrics.update(self._calls.logged.over_ranks(inside.meters, reset=False))

    def _end_passes(self, steps: StepIterator | None) -> bool:
        """Ends the passes that were completed; returns whether there were any."""
        ended = False
        while steps is not None and steps.passes_scheduled < steps.passes_completed:
            steps.passes_scheduled += 1
            ended = True
            self.schedules.after_pass(self.position.epoch_idx)
            self.model.on_train_epoch_end()
            if self._calls.logged is not None:
                metrics = self._calls.logged.over_ranks(internals(self).meters, reset=True)
                self.latest_metrics.update(metrics)
                self.schedules.after_pass_hooks(self.position.epoch_idx, metrics)
            self.position.next_pass()
        return ended

    def _latest(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """The metrics of the batch that is worked on, over all ranks."""
        if self._calls.logged is None:
            return dict(metrics)
        return self._calls.logged.latest(metrics, self.position.weight(internals(self).steps))

    def _validation_batches(self, iterator: Iterable[Any]) -> Iterator[Any]:
        """The same for a validation."""
        inside, module, position = internals(self), self.model, self.position
        loader = inside.loaders.get("validation")
        module.on_validation_model_zero_grad()
        if overrides(module, self._base, "on_validation_model_eval"):
            module.on_validation_model_eval()
        module.on_validation_start()
        module.on_validation_epoch_start()
        position.batch_idx = loader.batch_in_pass if loader is not None else 0
        for batch in iterator:
            position.enter(inside.steps)
            yield batch
            position.leave()
        module.on_validation_epoch_end()
        if self._calls.logged is not None:
            metrics = self._calls.logged.over_ranks(inside.meters, reset=True)
            self.latest_metrics.update(metrics)
            self.schedules.after_validation(metrics)
        module.on_validation_end()
        if overrides(module, self._base, "on_validation_model_train"):
            module.on_validation_model_train()

    def _result(self, summary: Mapping[str, Any], logged: LoggedMetrics) -> dict[str, Any]:
        """The built-in loop's results, then what was logged, which wins where the names are the same."""
        inside = internals(self)
        inside.meters = CallMeters(inside.meters, logged)
        return {**summary, **logged.summary()}

    def _index(self, batch_info: Mapping[str, Any] | None) -> int:
        counted = self.position.batch_idx
        return counted if counted is not None else int((batch_info or {}).get("batch_idx", 0))

    def _checkpoint(self) -> dict[str, Any]:
        """What the checkpoint hooks may read."""
        return {
            "epoch": self.position.epoch_idx,
            "global_step": self.global_step,
            "state_dict": self.model.state_dict(),
        }

    @contextmanager
    def _call(self, position: Position) -> Iterator[LoggedMetrics]:
        """One ``train`` or ``validate`` call."""
        self.position = position
        logged = self._calls.logged = LoggedMetrics(self.model, internals(self).context.collective)
        try:
            with self._calls.attached():
                yield logged
        finally:
            self._calls.logged = None
            self.position = Position(epoch_idx=position.epoch_idx)
