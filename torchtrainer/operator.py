"""`TrainingOperator`: what a rank trains, and the hooks with which users change how."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from torchtrainer.comm.group import Collective
from torchtrainer.config import SchedulerStepFreq, TrainSettings
from torchtrainer.train import loop, step
from torchtrainer.train.components import (
    Internals,
    Registered,
    dealing_of,
    in_shape_of,
    losing_of,
    place,
    refuse_retired,
)
from torchtrainer.train.creators import Creators, attach_created
from torchtrainer.train.data import LoaderView, RankLoader
from torchtrainer.train.precision import Amp
from torchtrainer.train.progress import Progress
from torchtrainer.train.timers import TimerCollection


@dataclass(frozen=True, kw_only=True)
class OperatorContext:
    """The surroundings of an operator, given by the rank that builds it.

    Attributes:
        config: the rank's own copy of the trainer's ``config``.
        settings: the trainer's options.
        device: where the rank trains; the CPU is a device too.
        collective: the ranks of the run.
        local_rank: place of the rank on its machine.
        progress: where the rank shows what it is doing.
        in_memory: gradients are exchanged through shared memory.
        batch_shares: parts of ``config[BATCH_SIZE]`` by rank, where this process builds the loaders of all ranks.
        say: tells the user something in one line; None: another rank does.
    """

    config: dict[str, Any]
    settings: TrainSettings
    device: torch.device
    collective: Collective
    local_rank: int
    progress: Progress
    in_memory: bool = False
    batch_shares: tuple[int, ...] = ()
    say: Callable[[str], None] | None = None


class TrainingOperator:
    """One rank's training: subclass it, register everything in `setup`, and override the hooks that should differ.

    Every rank has one, in the process and thread that trains. Do not override ``__init__``.

    Attributes:
        model: what the built-in hooks train; set it in ``setup`` to what `register` returned.
        optimizer: what the built-in `train_batch` steps.
        criterion: the loss that the built-in hooks call with ``(output, target)``.
        scheduler: stepped by the built-in `train_epoch`, as every registered scheduler is.
        train_loader: the registered loader as this rank sees it: its length is the rank's number of batches.
        validation_loader: the same for validation.
        global_step: training batches completed; saved and restored.
        timers: ``with self.timers.record("fwd"): ...`` shows up in ``profile``; costs nothing otherwise.
    """

    model: Any
    models: Any
    optimizer: Any
    optimizers: Any
    criterion: Any
    scheduler: Any
    schedulers: Any
    _models: Any = Registered("models")
    _optimizers: Any = Registered("optimizers")
    _schedulers: Any = Registered("schedulers")

    def __init__(self, context: OperatorContext) -> None:
        self._internals = Internals(context=context, amp=Amp(context.settings.precision, context.device))
        on_gpu = context.device.type == "cuda"
        self.timers = TimerCollection((lambda: torch.cuda.synchronize(context.device)) if on_gpu else None)
        self.train_loader: Any = None
        self.validation_loader: Any = None
        self.global_step = 0

    def setup(self, config: dict[str, Any]) -> None:
        """Override it: build models, optimizers and loaders, and pass them to `register` and `register_data`.

        With creator functions everything is registered already, and this is a place for your own attributes.

        Args:
            config: this rank's own copy of the trainer's ``config``; the same object as ``self.config``.
        """
        if self._internals.components is None:
            raise NotImplementedError(
                f"{type(self).__name__} must implement setup(self, config) and call self.register and self.register_data in it"
            )

    def register(
        self,
        *,
        models: Any = None,
        optimizers: Any = None,
        criterion: Any = None,
        schedulers: Any = None,
        ddp_args: dict[str, Any] | None = None,
        **retired: Any,
    ) -> Any:
        """Registers what is trained and returns it ready for use: on the device, and wrapped to exchange gradients.

        Args:
            models: a module, or several in a tuple or list.
            optimizers: one or several, made from the models' parameters.
            criterion: the loss.
            schedulers: one or several learning rate schedulers.
            ddp_args: arguments of ``DistributedDataParallel``, over those of the trainer.
            retired: arguments of older interfaces; refused, with what to use instead.

        Returns:
            ``(models, optimizers[, criterion][, schedulers])``: the last two only if given, each in the shape given.

        Raises:
            TypeError: not a module, optimizer or scheduler, or a retired argument.
            ValueError: ``ddp_args`` is not a dict, or a scheduler without ``scheduler_step_freq``.
        """
        refuse_retired(retired)
        kind = type(self)
        placed = place(
            models=models,
            optimizers=optimizers,
            criterion=criterion,
            schedulers=schedulers,
            ddp_args=ddp_args,
            context=self._internals.context,
            stock=kind.train_batch is TrainingOperator.train_batch and kind.train_epoch is TrainingOperator.train_epoch,
        )
        self._internals.components = placed
        returned = [in_shape_of(models, placed.models), optimizers]
        if criterion is not None:
            returned.append(placed.criterion)
        if schedulers is not None:
            returned.append(schedulers)
        return tuple(returned)

    def register_data(self, *, train_loader: Any = None, validation_loader: Any = None) -> None:
        """Registers the loaders; each rank then draws its share of their batches through the hooks' iterators.

        Args:
            train_loader: any iterable of batches; a ``DataLoader`` is dealt out to the ranks, its settings are kept.
            validation_loader: the same for `validate`.

        Raises:
            UnshardableLoaderError: a loader cannot be dealt out to the ranks.
        """
        for loader in self._internals.loaders.values():
            loader.close()
        self._internals.loaders.clear()
        for name, loader in (("train", train_loader), ("validation", validation_loader)):
            if loader is not None:
                self._internals.loaders[name] = RankLoader(
                    loader,
                    rank=self.world_rank,
                    world_size=self.world_size,
                    seed=self._internals.context.settings.seed,
                    collective=self._internals.context.collective,
                    training=name == "train",
                    device=self.device,
                    name=name,
                    dealing=dealing_of(self, training=name == "train"),
                    losing=losing_of(self),
                )
                if name == "train":
                    self._internals.loaders[name].accumulate = self._internals.context.settings.accumulate
                setattr(self, f"{name}_loader", LoaderView(loader, self._internals.loaders[name]))

    def train_epoch(
        self,
        iterator: Iterable[Any],
        info: dict[str, Any] | None = None,
        num_steps: int | None = None,
        epoch_idx: int = 0,
    ) -> Any:
        """Runs one ``train`` call on this rank: `train_batch` for each batch, schedulers, means of the metrics.

        An override may take any of the arguments, by these names or ``(iterator, info)`` in this order; what it returns
        must be a dict without the key ``epoch``.

        Args:
            iterator: batches of this rank, until the call is over.
            info: what the user gave to ``train``, and ``epoch_idx``.
            num_steps: number of batches if the user limited it; the iterator keeps to it by itself.
            epoch_idx: index of the pass that is running when the call starts, from 0.

        Returns:
            ``batch_count``, ``num_samples`` and for each metric ``m`` its mean by samples ``m`` and the latest ``last_m``.
        """
        return loop.train_epoch(self, iterator, {"epoch_idx": epoch_idx, **(info or {})})

    def train_batch(self, batch: Any, batch_info: dict[str, Any] | None = None) -> Any:
        """Trains on one batch: forward, loss, backward, `clip_gradients`, step.

        Args:
            batch: ``(*features, target)``, or a dict with the target under ``target``, ``targets``, ``label``, ``labels``
                or ``y``: its one other entry is the input, several are named inputs; a model with a parameter of its name gets it.
            batch_info: ``epoch_idx``, ``batch_idx`` (in this call), ``global_step``, and the user's ``info``.

        Returns:
            A dict of metrics; ``num_samples`` in it weighs them, ``<metric>_num_samples`` one of them. Here: ``train_loss``.
        """
        return step.train_batch(self, batch, batch_info)

    def clip_gradients(self) -> None:
        """Override it to change gradients between backward and step; they are whole: exchanged, and not scaled."""

    def after_step(self, batch_info: dict[str, Any]) -> None:
        """Override it for what follows every optimizer update of the built-in step, such as an average of the weights.

        A process calls it once per update, for all its ranks. What it changes must be equal on all ranks, as the
        parameters are; return it from `state_dict`.

        Args:
            batch_info: what `train_batch` got.
        """

    def validate(self, val_iterator: Iterable[Any], info: dict[str, Any] | None = None) -> Any:
        """Runs one ``validate`` call on this rank: evaluation mode, no gradients, `validate_batch` for each batch.

        Args:
            val_iterator: batches of this rank; no sample is there twice, so ranks may get different numbers of batches.
            info: what the user gave to ``validate``, and ``epoch_idx``: the index of the latest training pass, from 0.
        """
        return loop.validate(self, val_iterator, {"epoch_idx": 0, **(info or {})})

    def validate_batch(self, batch: Any, batch_info: dict[str, Any] | None = None) -> Any:
        """Evaluates one batch, which has the form that `train_batch` takes.

        Returns:
            ``val_loss``, ``num_samples``, and ``val_accuracy`` if the target holds class numbers (N, ...) and the output
            scores (N, C, ...).
        """
        return step.validate_batch(self, batch)

    def state_dict(self) -> Any:
        """Override it to save your own values with the trainer's state; models and the like are saved anyway."""
        return None

    def load_state_dict(self, state_dict: Any) -> None:
        """Override it to load what `state_dict` returned. Called last, with None if there was nothing."""

    @classmethod
    def from_creators(
        cls,
        model_creator: Callable[..., Any],
        optimizer_creator: Callable[..., Any],
        data_creator: Callable[..., Any] | None = None,
        loss_creator: Callable[..., Any] | None = None,
        scheduler_creator: Callable[..., Any] | None = None,
        serialize_data_creation: bool = True,  # noqa: ARG003  # callers of RaySGD pass it
    ) -> type[CreatorOperator]:
        """Makes an operator class from creator functions; in a subclass, ``super().setup(config)`` runs them.

        Args:
            model_creator: ``(config)`` -> a module or several.
            optimizer_creator: ``(models, config)`` -> one or several.
            data_creator: ``(config)`` -> a loader or ``(train, validation)``.
            loss_creator: a loss class or a function of ``config``.
            scheduler_creator: ``(optimizers, config)`` -> one or several.
            serialize_data_creation: not used; ranks call the data creator at the same time.

        Raises:
            ValueError: a creator is not callable.
        """
        creators = Creators(
            model_creator=model_creator,
            optimizer_creator=optimizer_creator,
            data_creator=data_creator,
            loss_creator=loss_creator,
            scheduler_creator=scheduler_creator,
        )
        bases: tuple[type, ...] = (CreatorOperator, cls)  # the hooks of cls, with the setup that runs the creators
        if issubclass(cls, CreatorOperator):
            bases = (cls,)
        elif cls is TrainingOperator:
            bases = (CreatorOperator,)
        return type("OperatorFromCreators", bases, {"_creators": creators})

    @classmethod
    def from_ptl(
        cls, lightning_module_cls: type[Any], train_dataloader: Any = None, val_dataloader: Any = None, **more: Any
    ) -> type[TrainingOperator]:
        """Makes an operator class from a ``LightningModule`` class; see `torchtrainer.lightning.operator_from_lightning`."""
        from torchtrainer.lightning import operator_from_lightning

        made: type[TrainingOperator] = operator_from_lightning(
            lightning_module_cls, train_dataloader, val_dataloader, **more
        )
        return made

    @property
    def device(self) -> torch.device:
        """Where this rank trains."""
        return self._internals.context.device

    @property
    def device_ids(self) -> list[int | None] | None:
        """``[index]`` of the GPU; None on the CPU."""
        return None if self.device.type == "cpu" else [self.device.index]

    @property
    def config(self) -> dict[str, Any]:
        """This rank's own copy of the trainer's ``config``."""
        return self._internals.context.config

    @property
    def world_rank(self) -> int:
        """This rank, from 0."""
        return self._internals.context.collective.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._internals.context.collective.world_size

    @property
    def local_rank(self) -> int:
        """Place of this rank on its machine, from 0."""
        return self._internals.context.local_rank

    @property
    def use_gpu(self) -> bool:
        """Whether this rank trains on a GPU."""
        return self.device.type == "cuda"

    @property
    def use_fp16(self) -> bool:
        """Whether the forward pass runs in half precision, fp16 or bf16."""
        return self._amp.active

    @property
    def use_fp16_native(self) -> bool:
        """The same: half precision is torch's own. Hooks then use ``self._amp.autocast()`` and ``self._amp_scaler``."""
        return self._amp.active

    @property
    def use_fp16_apex(self) -> bool:
        """False: apex is not used."""
        return False

    @property
    def use_tqdm(self) -> bool:
        """Whether the driver shows a progress bar."""
        return self._internals.context.settings.use_tqdm

    @property
    def scheduler_step_freq(self) -> SchedulerStepFreq | None:
        """When the built-in loop steps the schedulers."""
        return self._internals.context.settings.scheduler_step_freq

    @property
    def _amp(self) -> Amp:
        return self._internals.amp

    @property
    def _amp_scaler(self) -> torch.amp.GradScaler:
        return self._internals.amp.scaler


class CreatorOperator(TrainingOperator):
    """An operator whose ``setup`` runs creator functions; made by `TrainingOperator.from_creators`.

    Singular attributes are the first of each, plural ones have the shape that the creator returned.
    """

    _creators: ClassVar[Creators]

    def setup(self, config: dict[str, Any]) -> None:
        """Runs the creators and registers what they return."""
        attach_created(self, self._creators, lists=False)
