"""Trains a ``LightningModule`` as an operator, through Lightning's public interface and without its ``Trainer``.

Lightning itself is not imported here: the user's class brings it, as ``lightning`` or as ``pytorch_lightning``.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from torchtrainer.comm.wrapping import wrap
from torchtrainer.config import SchedulerStepFreq
from torchtrainer.errors import InvalidArgumentTypeError, NotAvailableError, OperatorUseError
from torchtrainer.lightning.log import CallMeters, LoggedMetrics
from torchtrainer.lightning.module import (
    TrainingStep,
    check_module,
    choose_loader,
    create,
    find_base,
    overrides,
    step_arguments,
    training_loss,
    validation_loss,
)
from torchtrainer.lightning.optim import Schedules, read_optimizers
from torchtrainer.lightning.trainer import Position, TrainerView
from torchtrainer.operator import TrainingOperator
from torchtrainer.train.components import internals, place
from torchtrainer.train.rng import isolated_rng
from torchtrainer.train.step import reading

_END_PASS = -1
"""What Lightning lets ``on_train_batch_start`` return to leave out the rest of a pass."""


def operator_from_lightning(
    lightning_module_cls: Any, *, train_dataloader: Any = None, val_dataloader: Any = None
) -> type[LightningOperator]:
    """Makes an operator class out of a ``LightningModule`` class.

    Args:
        lightning_module_cls: gets ``config`` if its ``__init__`` has that parameter.
        train_dataloader: used in place of the module's own.
        val_dataloader: the same for validation.

    Raises:
        InvalidArgumentTypeError: not a ``LightningModule`` class.
    """
    base = find_base(lightning_module_cls)
    if base is None:
        raise InvalidArgumentTypeError(
            f"from_ptl takes a subclass of lightning.LightningModule, the class and not an object; got "
            f"{lightning_module_cls!r}"
        )
    given = (train_dataloader, val_dataloader)
    attributes = {"_module_cls": lightning_module_cls, "_base": base, "_given": given}
    return type(f"OperatorOf{lightning_module_cls.__name__}", (LightningOperator,), attributes)


class LightningOperator(TrainingOperator):
    """Trains one ``LightningModule`` with automatic optimization; made by `TrainingOperator.from_ptl`.

    Results have ``train_loss`` and ``val_loss``, and what the module logs: its mean by samples under its name, and the
    latest value as ``last_<name>``. Precision, loaders and ranks are the trainer's. Schedulers are stepped as their dicts in
    ``configure_optimizers`` say; ``scheduler_step_freq`` is for those that state no interval, and with ``manual`` none is
    stepped. One that monitors a metric of validation is stepped by the first ``validate`` after a training pass.

    Attributes:
        model: the module.
        position: where its training stands.
        schedules: its schedulers.
        latest_metrics: of the latest passes, over all ranks.
    """

    _module_cls: ClassVar[Any]
    _base: ClassVar[Any]
    _given: ClassVar[tuple[Any, Any]]

    def setup(self, config: dict[str, Any]) -> None:
        """Builds the module and everything that it provides, in Lightning's order.

        Raises:
            NotAvailableError: the module needs something that only Lightning's ``Trainer`` has.
            InvalidArgumentError: what it provides cannot be trained.
        """
        module = self.model = create(self._module_cls, config)
        check_module(module, self._base, scaling=self._amp_scaler.is_enabled(), warn=self.world_rank == 0)
        self.position = Position()
        self.latest_metrics: dict[str, Any] = {}
        self.optimizer = None
        self.schedules = Schedules([], module.lr_scheduler_step, active=False)
        self._logged: LoggedMetrics | None = None
        self._started = False
        self._log_signature = inspect.signature(self._base.log)
        module.trainer = TrainerView(self)
        with self._attached():
            if (self.local_rank if module.prepare_data_per_node else self.world_rank) == 0:
                with isolated_rng():  # the other ranks do not draw what this one draws
                    module.prepare_data()
            internals(self).context.collective.barrier()
            module.setup(stage="fit")
            self.register_data(
                train_loader=choose_loader(self._given[0], module, self._base, "train_dataloader"),
                validation_loader=choose_loader(self._given[1], module, self._base, "val_dataloader"),
            )
            module.configure_model()
            module.to(self.device)
            self._register(module.configure_optimizers())
            module.on_fit_start()

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

        Raises:
            NotAvailableError: the module wants to end the pass, or one of several ranks to skip the batch.
        """
        module, position, progress = self.model, self.position, internals(self).context.progress
        name, index = type(module).__name__, self._index(batch_info)
        position.stepped = 0
        with self._attached():
            batch = self._to_device(batch)
            if module.on_train_batch_start(batch, index) == _END_PASS:
                raise NotAvailableError(
                    f"on_train_batch_start of {name} returned -1 to leave out the rest of the pass, which is not available "
                    f"here; limit the call with train(num_steps=...)"
                )
            progress.enter("forward")
            with self.timers.record("fwd"), self._amp.autocast():
                output = self._training_step(*step_arguments(module.training_step, batch, index))
            loss = training_loss(output, name, self.world_size)
            if loss is None:
                module.on_train_batch_end({}, batch, index)
                return {}
            self._update(loss, index)
            position.stepped = 1
            self.schedules.after_step(index)
            extras = dict(output) if isinstance(output, Mapping) else {}
            module.on_train_batch_end({**extras, "loss": loss.detach()}, batch, index)
        return {"train_loss": reading(loss)}

    def validate(self, val_iterator: Iterable[Any], info: dict[str, Any] | None = None) -> Any:
        """The built-in loop with the module's hooks; each call is a validation epoch. See `TrainingOperator.validate`."""
        with self._call(Position(stage="validate", epoch_idx=(info or {}).get("epoch_idx", 0))) as logged:
            summary = super().validate(self._validation_batches(val_iterator), info)
            return self._result(summary, logged)

    def validate_batch(self, batch: Any, batch_info: dict[str, Any] | None = None) -> Any:
        """One ``validation_step``; see `TrainingOperator.validate_batch`.

        Returns:
            ``val_loss``, if the step returns a loss: as a tensor, or in a dict under ``val_loss`` or ``loss``.
        """
        module, index = self.model, self._index(batch_info)
        if not overrides(module, self._base, "validation_step"):
            raise OperatorUseError(
                f"validate needs a validation_step, and {type(module).__name__} has none; write one, or override "
                f"validate_batch of the operator class that from_ptl returns"
            )
        with self._attached():
            batch = self._to_device(batch)
            module.on_validation_batch_start(batch, index)
            internals(self).context.progress.enter("forward")
            with self.timers.record("eval_fwd"), self._amp.autocast():
                output = module.validation_step(*step_arguments(module.validation_step, batch, index))
            module.on_validation_batch_end(output, batch, index)
        loss = validation_loss(output)
        return {} if loss is None else {"val_loss": reading(loss)}

    def state_dict(self) -> Any:
        """What the module's ``on_save_checkpoint`` adds, and which schedulers wait for a metric."""
        checkpoint = self._checkpoint()
        known = set(checkpoint)
        self.model.on_save_checkpoint(checkpoint)
        return {
            "checkpoint": {key: value for key, value in checkpoint.items() if key not in known},
            "waiting": [one.waiting for one in self.schedules.members],
        }

    def load_state_dict(self, state_dict: Any) -> None:
        """Gives ``on_load_checkpoint`` what ``on_save_checkpoint`` added; the weights are loaded by then."""
        if state_dict is None:
            return
        for one, waiting in zip(self.schedules.members, state_dict["waiting"], strict=True):
            one.waiting = waiting
        self.model.on_load_checkpoint({**self._checkpoint(), **state_dict["checkpoint"]})

    @property
    def scheduler_step_freq(self) -> SchedulerStepFreq | None:
        """``manual``: the built-in loop leaves the schedulers to the module's own dicts."""
        return "manual"

    def _register(self, configured: Any) -> None:
        """Registers the module as it is, with a training step around it that exchanges gradients."""
        inside, module = internals(self), self.model
        settings = inside.context.settings
        if settings.strategy != "ddp" or settings.comm_hook is not None:
            raise NotAvailableError(
                f"strategy={settings.strategy!r} and comm_hook={settings.comm_hook!r} are not there for LightningModules in this "
                'version: use strategy="ddp" and comm_hook=None, or write the training as a TrainingOperator'
            )
        frequency = settings.scheduler_step_freq
        self.optimizer, schedules = read_optimizers(
            configured, who=type(module).__name__, default_interval="step" if frequency == "batch" else "epoch"
        )
        self.schedules = Schedules(schedules, module.lr_scheduler_step, active=frequency != "manual")
        placed = place(
            models=module,
            optimizers=self.optimizer,
            criterion=None,
            schedulers=[one.scheduler for one in schedules],
            ddp_args=None,
            # the exchange belongs around the training step; the schedulers have intervals of their own
            context=replace(inside.context, settings=replace(settings, wrap_ddp=False, scheduler_step_freq="manual")),
            stock=False,
        )
        self._training_step: nn.Module = TrainingStep(module)
        if self.world_size > 1 and settings.wrap_ddp:
            self._training_step = wrap(self._training_step, device=self.device, ddp_args=settings.ddp_args)
        inside.components = replace(placed, models=[self._training_step])
        self.scheduler = placed.schedulers[0] if placed.schedulers else None

    def _update(self, loss: torch.Tensor, index: int) -> None:
        """Backward and step, with the module's hooks where Lightning has them."""
        inside, module, optimizer = internals(self), self.model, self.optimizer
        progress, scaler, epoch = inside.context.progress, self._amp_scaler, self.position.epoch_idx
        progress.enter("backward")
        with self.timers.record("grad"):
            module.on_before_zero_grad(optimizer)
            module.optimizer_zero_grad(epoch, index, optimizer)
            scaled = scaler.scale(loss)
            module.on_before_backward(scaled)
            module.backward(scaled)
            module.on_after_backward()
            if inside.gradient_clock is not None:
                self.timers.push("sync", inside.gradient_clock.since_last())
        progress.enter("step")
        with self.timers.record("apply"):
            scaler.unscale_(optimizer)
            module.on_before_optimizer_step(optimizer)
            module.configure_gradient_clipping(optimizer, gradient_clip_val=None, gradient_clip_algorithm=None)
            self.clip_gradients()
            if overrides(module, self._base, "optimizer_step"):
                module.optimizer_step(epoch, index, optimizer, lambda: loss)
            else:
                scaler.step(optimizer)
            scaler.update()

    def _train_batches(self, iterator: Iterable[Any], modes: Mapping[nn.Module, bool]) -> Iterator[Any]:
        """The batches of a call, with the hooks between them; the loop has put everything into training mode by then."""
        inside, position = internals(self), self.position
        steps, loader = inside.steps, inside.loaders.get("train")
        seen = steps.passes_completed if steps is not None else 0
        running = loader is not None and loader.in_pass
        position.batch_idx = loader.batch_in_pass if loader is not None and running else 0
        for module, training in modes.items():
            module.training = training  # a part that the module keeps in evaluation mode stays there
        if not self._started:
            self._started = True
            self.model.on_train_start()
        for batch in iterator:
            position.stepped = 0
            if steps is not None and steps.passes_completed > seen:
                seen, running = steps.passes_completed, False
                self._end_pass()
            if not running:
                running = True
                self.model.on_train_epoch_start()
            position.enter(inside.steps)
            yield batch
            position.leave()
        position.stepped = 0
        if steps is not None and steps.passes_completed > seen:
            self._end_pass()
        elif self._logged is not None:
            self.latest_metrics.update(self._logged.over_ranks(inside.meters, reset=False))

    def _end_pass(self) -> None:
        self.model.on_train_epoch_end()
        if self._logged is not None:
            metrics = self._logged.over_ranks(internals(self).meters, reset=True)
            self.latest_metrics.update(metrics)
            self.schedules.after_pass(self.position.epoch_idx, metrics)
        self.position.next_pass()

    def _validation_batches(self, iterator: Iterable[Any]) -> Iterator[Any]:
        """The same for a validation."""
        inside, module, position = internals(self), self.model, self.position
        loader = inside.loaders.get("validation")
        module.on_validation_start()
        module.on_validation_epoch_start()
        position.batch_idx = loader.batch_in_pass if loader is not None else 0
        for batch in iterator:
            position.enter(inside.steps)
            yield batch
            position.leave()
        module.on_validation_epoch_end()
        if self._logged is not None:
            metrics = self._logged.over_ranks(inside.meters, reset=True)
            self.latest_metrics.update(metrics)
            self.schedules.after_validation(metrics)
        module.on_validation_end()

    def _result(self, summary: Mapping[str, Any], logged: LoggedMetrics) -> dict[str, Any]:
        """The built-in loop's results, then what was logged, which wins where the names are the same."""
        inside = internals(self)
        inside.meters = CallMeters(inside.meters, logged)
        return {**summary, **logged.summary()}

    def _index(self, batch_info: Mapping[str, Any] | None) -> int:
        counted = self.position.batch_idx
        return counted if counted is not None else int((batch_info or {}).get("batch_idx", 0))

    def _to_device(self, batch: Any) -> Any:
        batch = self.model.on_before_batch_transfer(batch, 0)
        batch = self.model.transfer_batch_to_device(batch, self.device, 0)
        return self.model.on_after_batch_transfer(batch, 0)

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
        logged = self._logged = LoggedMetrics(self.model, internals(self).context.collective)
        try:
            with self._attached():
                yield logged
        finally:
            self._logged = None
            self.position = Position(epoch_idx=position.epoch_idx)

    @contextmanager
    def _attached(self) -> Iterator[None]:
        """Module hooks can call ``self.log`` and ``self.optimizers`` inside; afterwards the module is as it was, to be copied."""
        modules = [one for one in self.model.modules() if isinstance(one, self._base) and "log" not in vars(one)]
        for one in modules:
            one.log, one.optimizers = self._log, self._optimizers
        try:
            yield
        finally:
            for one in modules:
                del one.log, one.optimizers

    def _optimizers(self, use_pl_optimizer: bool = True) -> Any:
        return self.optimizer

    def _log(self, *arguments: Any, **options: Any) -> None:
        """Takes the place of the module's ``log``, with its signature."""
        given = self._log_signature.bind(self.model, *arguments, **options).arguments
        if self._logged is None:
            raise OperatorUseError(
                f"self.log({given['name']!r}, ...) was called outside of training and validation, where nothing is collected"
            )
        own = self.position.weight(internals(self).steps)
        self._logged.add(
            given["name"],
            given["value"],
            weight=(given.get("batch_size") or own) if own else 0,
            reduce_fx=given.get("reduce_fx", "mean"),
            both=bool(given.get("on_step") and given.get("on_epoch")),
        )
