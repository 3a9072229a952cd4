"""`TorchTrainer`: checks arguments, starts an engine's group, forwards calls and returns results. It trains nothing itself.

Long because it is the public interface: most of it is the documentation of the arguments and methods.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from torchtrainer.arguments import check_may_change, refuse_unknown
from torchtrainer.call_replay import CallReplay, nothing
from torchtrainer.checkpoint.copies import Remade, load_models, made, models_of
from torchtrainer.checkpoint.journal import Journal, Recorded, spell, spell_function
from torchtrainer.config import BATCH_COUNT, NUM_SAMPLES, CheckpointConfig, FailureConfig, PreemptionConfig
from torchtrainer.driver.interrupts import forget_interrupted_calls
from torchtrainer.driver.run_dir import BorrowedRunDirectory, RunDirectory
from torchtrainer.driver.run_record import RunState
from torchtrainer.engines.base import Engine, Group
from torchtrainer.errors import (
    InvalidArgumentError,
    InvalidArgumentTypeError,
    Preempted,
    TrainerClosedError,
)
from torchtrainer.observe.devices import GpuMonitor
from torchtrainer.observe.events import Callbacks, EpochEvent, RunEndEvent, RunStartEvent, ValidateEvent
from torchtrainer.observe.failures import FailureRecord
from torchtrainer.observe.history import History, HistoryFile
from torchtrainer.observe.notices import notice, warn
from torchtrainer.observe.profiles import PROFILE, StepTraces, with_whole_profiles
from torchtrainer.observe.shown import Shown
from torchtrainer.observe.status import ProcessStatus, Status
from torchtrainer.observe.watch import RunObserver
from torchtrainer.planning import RunPlan, plan_run
from torchtrainer.preempt.watch import NoticeWatch
from torchtrainer.process.paths import private_directory
from torchtrainer.process.streams import open_standard_descriptors
from torchtrainer.resume import OpenRun
from torchtrainer.run_places import kept_below
from torchtrainer.script.absent import AbsentTrainer
from torchtrainer.train.metrics import PassResult, reduce_results

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator


class TorchTrainer:
    """Trains a model data-parallel on ``num_workers`` ranks, driven from here.

    Creators (or an operator class) say what to train; they run in every worker process, not here. The trainer starts the
    workers when it is made and ends them with ``shutdown``, as a context manager, or with this process, however that ends.
    Under torchrun, srun or mpirun the same script attaches to the existing processes.

    All arguments are keyword-only.

    Args:
        model_creator: ``(config)`` -> an ``nn.Module``, or several.
        data_creator: ``(config)`` -> a loader, or ``(train, validation)``.
        optimizer_creator: ``(model, config)`` -> an optimizer, or several; gets what ``model_creator`` returned.
        loss_creator: a loss class, or a function of ``config``.
        scheduler_creator: ``(optimizer, config)`` -> a scheduler, or several.
        training_operator_cls: a `TrainingOperator` subclass, alone or with creators.
        initialization_hook: run without arguments in every worker process before anything else.
        config: a dict or another mapping, passed to every creator unchanged; ``config[BATCH_SIZE]`` is a batch size
            over all ranks.
        num_workers: number of ranks.
        min_workers: with fewer processes left, the ranks wait for new ones instead of sharing those.
        num_cpus_per_worker: intra-op threads per process; "auto": ``OMP_NUM_THREADS``, if set, else cores / ``num_workers``.
        use_gpu: one GPU per rank; "auto": if there are any.
        backend: ``nccl``, ``gloo`` or "auto".
        wrap_ddp: wrap models in ``DistributedDataParallel``; ``ddp_args``: its arguments.
        timeout_s: longest wait for any collective, in seconds.
        precision: ``fp32``, ``bf16`` or ``fp16``; ``use_fp16=True`` is fp16 on GPUs and bf16 on CPUs.
        compile: True, or options of ``torch.compile``; compiled code is kept in the run directory.
        memory_format: ``channels_last``, "auto" (where it makes convolutions faster) or ``as_made``; None: "auto" with
            half precision, else ``as_made``.
        accumulate: batches of each rank whose gradients add up to one optimizer step.
        fused: True: torch's fused kernels for the optimizer; False: unchanged; "auto": fused with ``bf16``, else
            whatever gives the same bits.
        strategy: ``ddp``; ``zero1``: each rank keeps a share of the optimizer's state; ``fsdp``: of the parameters as well.
        comm_hook: compress gradients for the exchange: ``fp16``, ``bf16`` or ``powersgd``.
        cpu_affinity: keep each process to its own cores; "auto": to one memory node, where there are several.
        use_tqdm: progress bar.
        add_dist_sampler: deal loaders out to the ranks; False: use them as they are.
        even_batches: give all ranks the same number of samples in each step and the same number of steps: True or
            "repeat": some samples twice; "drop": leave some out; False: each sample once. For losses and models that
            exchange between ranks.
        min_batch_size: fewest samples of a rank in a short last step; "auto": 2 in training with batch-norm layers, else 1.
        scheduler_step_freq: ``batch``, ``epoch`` or ``manual``; required with a scheduler.
        use_local: carry all ranks in this process, in turn, for debuggers.
        seed: everything random derives from it.
        run_dir: directory of the run; "auto": ``./runs/<script>/<time>``; None: nothing is kept.
        resume: resume an interrupted run: "auto", True (raise if there is none that fits) or False.
        may_change: names of arguments of the script, globals, other values and functions that may have changed in a
            resumed run. A word of such a name is enough: ``epochs`` stands for ``--epochs`` and ``args.epochs``.
        checkpoint: how often to save the state, where, and how many states stay.
        preemption: sources of warnings that the machine or the job will be taken away.
        failure: how to react to processes that die or hang.
        engine: ``local``, ``spmd``, "auto", or an engine object.
        callbacks: objects with any of the methods of `Callback`; called in this process; under a launcher, on rank 0.

    Raises:
        InvalidArgumentError, InvalidArgumentTypeError: an argument that cannot work (a ``ValueError``, a ``TypeError``).
        NotSerializableError: something does not pickle; names the attribute.
        NotAvailableError: a feature that this version does not have.
        BaseException: what a creator raised, with the remote traceback as its cause.
    """

    def __init__(
        self,
        *,
        model_creator: Callable[..., Any] | None = None,
        data_creator: Callable[..., Any] | None = None,
        optimizer_creator: Callable[..., Any] | None = None,
        loss_creator: Callable[..., Any] | None = None,
        scheduler_creator: Callable[..., Any] | None = None,
        training_operator_cls: type[TrainingOperator] | None = None,
        initialization_hook: Callable[[], Any] | None = None,
        config: Mapping[str, Any] | None = None,
        num_workers: int = 1,
        min_workers: int = 1,
        num_cpus_per_worker: int | Literal["auto"] = "auto",
        use_gpu: bool | Literal["auto"] = "auto",
        backend: str = "auto",
        wrap_ddp: bool = True,
        ddp_args: dict[str, Any] | None = None,
        timeout_s: float = 1800.0,
        precision: str = "fp32",
        use_fp16: bool | str = False,
        compile: bool | dict[str, Any] = False,
        memory_format: str | None = None,
        accumulate: int = 1,
        fused: bool | Literal["auto"] = "auto",
        strategy: str = "ddp",
        comm_hook: str | None = None,
        cpu_affinity: bool | Literal["auto"] = "auto",
        use_tqdm: bool = False,
        add_dist_sampler: bool = True,
        even_batches: bool | str = False,
        min_batch_size: int | Literal["auto"] = "auto",
        scheduler_step_freq: str | None = None,
        use_local: bool = False,
        seed: int = 0,
        run_dir: str | os.PathLike[str] | None = "auto",
        resume: bool | str = "auto",
        may_change: Iterable[str] = (),
        checkpoint: CheckpointConfig | None = None,
        preemption: PreemptionConfig | None = None,
        failure: FailureConfig | None = None,
        engine: str | Engine = "auto",
        callbacks: Iterable[object] = (),
        **unknown: Any,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "unknown")}
        self._started_at = time.monotonic()
        self._group: Group | None = None
        refuse_unknown(unknown, given)
        forget_interrupted_calls()
        open_standard_descriptors()
        run = plan_run(given)
        self._callbacks = Callbacks(callbacks if run.is_main else ())
        self.config = run.spec.config
        self._made_from = run.spec, run.world_size
        self._is_main = run.is_main
        self._epoch = self._step = 0
        self._run = run.open_run(run_dir, resume, callbacks=tuple(callbacks), may_change=check_may_change(may_change))
        self._run_dir = self._run.directory
        self._history = HistoryFile(self._run_dir.history)
        self._notices = run.watch_notices(self._run)
        self._calls = CallReplay(
            journal=Journal(self._run_dir.root, self._run.records, writes=self._run.keeps, keep=run.checkpoint.keep),
            checkpoint=self._run.checkpoint,
            notices=self._notices,
            timeouts=run.engine.timeouts,
            requeue=run.preemption.requeue,
            on_error=note_weakly(weakref.WeakMethod(self._note_error)),
            newest=self._run.newest,
            max_failures=run.failure.max_failures,
            speaks=run.is_main,
        )
        self._gpu_monitor = GpuMonitor(os.environ) if run.gpus else None
        self._watch = RunObserver(
            callbacks=self._callbacks,
            use_tqdm=use_tqdm and run.is_main,
            world_size=run.world_size,
            gpus=self._gpu_monitor,
            shown=Shown(self._run_dir.shown_steps if self._run.keeps and self._callbacks else None),
            look=self._calls.look,
            on_saved=self._calls.noted,
            on_signal=self._calls.heard,
            keep=failure_writer(self._history, self._run),
        )
        self._start(run)

    def _start(self, run: RunPlan) -> None:
        orders = self._run.orders(run.checkpoint, run.engine.timeouts, run.preemption.signals)
        compiled = str(self._run_dir.compiled) if self._run_dir.durable else None
        plan = run.for_group(
            log_dir=str(self._run_dir.logs), logs_stay=self._run_dir.durable, orders=orders, compiled=compiled
        )
        self._watch.begin_start(f"starting {run.world_size} worker{'s' if run.world_size > 1 else ''}")
        try:
            self._group = run.engine.start_group(plan, self._watch)
        except BaseException:
            self._note("failed")
            _close_all(self._run_dir, self._notices, self._gpu_monitor)
            self._watch.failures.settle()
            raise
        finally:
            self._watch.end_start()
        group = self._group
        self._calls.attach(group, self._watch.failures.on_restarted)
        self._watch.attach(lambda: group.views)
        # Also when nobody calls shutdown: with the trainer, or at the latest with this process.
        self._finalizer = weakref.finalize(self, _end, self._group, self._run, self._notices, self._gpu_monitor)
        self._tell_start(run.world_size)

    def _tell_start(self, world_size: int) -> None:
        reached = self._run.checkpoint.step if self._run.checkpoint is not None else 0
        resumed = reached if self._run.records or reached else None
        try:
            self._callbacks.on_run_start(
                RunStartEvent(
                    config=self.config, run_dir=self._run_dir.shown, resumed_step=resumed, world_size=world_size
                )
            )
        except BaseException:
            self._close("failed", force=True)
            raise

    def __reduce__(self) -> tuple[type[AbsentTrainer], tuple[()]]:
        """Lets an object that keeps its trainer travel to the workers, which have no trainer."""
        return AbsentTrainer, ()

    # Training

    def train(
        self,
        num_steps: int | None = None,
        profile: bool = False,
        reduce_results: bool = True,
        max_retries: int | None = None,
        info: dict[str, Any] | None = None,
        new_pass: bool = False,
        **unknown: Any,
    ) -> Any:
        """Trains for one pass over the data, or for ``num_steps`` batches per rank.

        ``num_steps`` continues where the last call stopped and wraps into the next pass; a call without it finishes the
        pass in progress.

        Args:
            num_steps: batches per rank.
            profile: add under ``profile`` where the time went: ``ranks`` with a dict per rank (``data_s``, ``copy_s``, ``forward_s``,
                ``backward_s``, ``exchange_s``, ``optimizer_s``, ``snapshot_s``, ``other_s`` and their sum ``wall_s``, in seconds per
                step; ``rank``, ``pid``, ``host``, ``device``, ``steps``), ``wall_s``, ``samples_per_s`` (all ranks), ``slowest``,
                ``bottleneck`` (a sentence), and ``mean_<name>_s``, means over the ranks of each measurement.
            reduce_results: one dict for all ranks; False: a list with one dict per rank.
            max_retries: accepted as in RaySGD; ``failure`` of the trainer says how to react to lost workers.
            info: passed to ``train_epoch`` and ``train_batch``.
            new_pass: begin a new pass, whatever is left of the one in progress, and stop at its end at the latest.

        Returns:
            ``num_samples`` (all ranks), ``epoch`` (passes started), ``batch_count``, ``train_loss``, ``last_train_loss``, or
            what the operator's hooks return; means are weighted by samples over all ranks.

        Raises:
            KeyboardInterrupt: Ctrl-C; the pass ends at a step boundary, and the next call continues from there.
            BaseException: what user code raised.
        """
        refuse_unknown(unknown, ("num_steps", "profile", "reduce_results", "max_retries", "info", "new_pass"))
        if max_retries is not None and (not isinstance(max_retries, int) or max_retries < 0):
            raise InvalidArgumentError(f"max_retries must be a whole number of at least 0, got {max_retries!r}")
        call = spell_pass("train", num_steps, profile, reduce_results, info, new_pass)
        asked: dict[str, Any] = {"num_steps": num_steps, "profile": profile, "info": info, "new_pass": new_pass}
        known = self._calls.recorded(call, "train", **asked)
        if known is not None:
            return self._take(known)
        results = with_whole_profiles(self._pass("train", call, **asked))
        metrics = reduce_results_or_list(results, reduce_results)
        self._trained(call, metrics, results, result=metrics)
        return metrics

    def profile_steps(self, n: int = 10, path: str | os.PathLike[str] | None = None) -> StepTraces:
        """Trains for ``n`` batches per rank, as ``train(num_steps=n)`` does, and has every process write a trace of them.

        The traces show each operation of torch on CPU and GPU below its step and phase. Tracing slows the steps down:
        ``train(profile=True)`` says how long they take.

        Args:
            n: batches per rank.
            path: directory of the traces; None: ``traces`` in the run directory.

        Returns:
            ``paths`` of the files, which https://ui.perfetto.dev and chrome://tracing open, and ``metrics``, which ``train``
            would have returned.

        Raises:
            InvalidArgumentError: ``n`` is not a number of batches, or there is no directory to write to.
            BaseException: as for `train`.
        """
        if type(n) is not int or n < 1:
            raise InvalidArgumentError(f"profile_steps takes a whole number of at least 1 batch per rank, got {n!r}")
        call = spell("profile_steps", n=n, path=None if path is None else os.fspath(path))
        directory = self._trace_dir(path)
        known = self._calls.recorded(call, "train", num_steps=n, profile=False, info=None, trace=directory)
        if known is not None:
            found = self._take(known)
            return StepTraces(paths=tuple(found["paths"]), metrics=found["metrics"])
        results = self._pass("train", call, n, profile=False, info=None, trace=directory)
        traces = [result.metrics.pop(PROFILE) for result in results]
        paths = list(dict.fromkeys(one["trace"] for one in traces if not one["error"]))
        metrics = reduce_results_or_list(results, reduce=True)
        self._trained(call, metrics, results, result={"paths": paths, "metrics": metrics})
        if self._is_main:
            tell_traces(directory, paths, [one["error"] for one in traces if one["error"]])
        return StepTraces(paths=tuple(paths), metrics=metrics)

    def _trace_dir(self, path: str | os.PathLike[str] | None) -> str:
        if path is None and not self._run_dir.durable:
            raise InvalidArgumentError(
                "profile_steps has no run directory to write to, as run_dir is None: pass path=<a directory>"
            )
        directory = self._run_dir.traces if path is None else kept_below(Path(path)).absolute()
        try:
            if path is None:
                private_directory(directory)
            else:
                directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidArgumentError(
                f"profile_steps cannot write to path={os.fspath(directory)!r}: {error}"
            ) from error
        return str(directory)

    def _trained(self, call: str, metrics: Any, results: list[PassResult], result: Any) -> None:
        """After a call that has trained: remembers its result, and tells everybody of its metrics."""
        self._epoch = max((r.metrics["epoch"] for r in results), default=self._epoch)
        self._done(call, result)
        self._record("train", metrics)
        self._callbacks.on_epoch_end(EpochEvent(epoch=self._epoch, step=self._step, metrics=metrics))
        self._calls.leave_if_noticed()

    def validate(
        self,
        num_steps: int | None = None,
        profile: bool = False,
        reduce_results: bool = True,
        info: dict[str, Any] | None = None,
        new_pass: bool = False,
        **unknown: Any,
    ) -> Any:
        """Evaluates on the validation data: each sample once, whatever the number of ranks.

        Args:
            num_steps, profile, reduce_results, info, new_pass: as in `train`.

        Returns:
            ``num_samples``, ``batch_count``, ``val_loss``, ``val_accuracy`` and their ``last_`` values, or what the operator's
            hooks return. With ``reduce_results=False`` and ``profile=False`` the hook may return any object.

        Raises:
            RuntimeError: there is no validation loader.
            BaseException: what user code raised.
        """
        refuse_unknown(unknown, ("num_steps", "profile", "reduce_results", "info", "new_pass"))
        call = spell_pass("validate", num_steps, profile, reduce_results, info, new_pass)
        asked: dict[str, Any] = {"num_steps": num_steps, "profile": profile, "info": info, "new_pass": new_pass}
        known = self._calls.recorded(call, "validate", **asked)
        if known is not None:
            return self._take(known)
        results = self._pass("validate", call, **asked)
        metrics = reduce_results_or_list(results, reduce_results)
        self._done(call, metrics)
        self._record("validate", metrics)
        self._callbacks.on_validate_end(ValidateEvent(epoch=self._epoch, step=self._step, metrics=metrics))
        self._calls.leave_if_noticed()
        return metrics

    def fit(self, epochs: int, validate_every: int = 1, profile: bool = False) -> History:
        """Trains for a number of passes and validates after every ``validate_every`` of them.

        Args:
            epochs: passes over the training data.
            validate_every: passes between two validations; 0: none. Without validation data there is none either.
            profile: report under ``profile`` of each pass where its training time went, as `train` does.

        Returns:
            One dict per pass: the results of ``train()``, and those of ``validate()`` without its counts.
        """
        if type(epochs) is not int or epochs < 0:
            raise InvalidArgumentError(f"epochs must be a whole number of at least 0, got {epochs!r}")
        if type(validate_every) is not int or validate_every < 0:
            raise InvalidArgumentError(f"validate_every must be a whole number of at least 0, got {validate_every!r}")
        history, before = History(), len(self._watch.failures.records)
        validating = validate_every > 0 and self._call("facts")[0]["has_validation_loader"]
        for number in range(1, epochs + 1):
            entry = dict(self.train(profile=profile))
            if validating and (number % validate_every == 0 or number == epochs):
                found = self.validate()
                entry.update({name: v for name, v in found.items() if name not in (NUM_SAMPLES, BATCH_COUNT)})
            history.append(entry)
        history.failures = tuple(self._watch.failures.records[before:])
        return history

    # Reaching into the ranks

    def apply_all_workers(self, fn: Callable[[], Any]) -> list[Any]:
        """Runs a function without arguments in every worker process.

        Returns:
            One result per rank, in rank order. With fewer processes than ranks, a result stands for all ranks of its
            process.
        """
        _check_function("apply_all_workers", fn)
        found: list[Any] = self._remembered(spell_function("apply_all_workers", fn), "apply_worker", list, fn=fn)
        return found

    def apply_all_operators(self, fn: Callable[[TrainingOperator], Any]) -> list[Any]:
        """Runs a function of the operator in every worker process; returns as `apply_all_workers`."""
        _check_function("apply_all_operators", fn)
        found: list[Any] = self._remembered(spell_function("apply_all_operators", fn), "apply_operator", list, fn=fn)
        return found

    def update_scheduler(self, metric: Any) -> None:
        """Calls ``scheduler.step(metric)`` for every registered scheduler on every rank.

        Raises:
            RuntimeError: no scheduler is registered.
        """
        self._remembered("update_scheduler(metric)", "update_scheduler", nothing, metric=metric)

    def get_model(self, to_cpu: bool = True) -> Any:
        """Returns a copy of the trained model, without DDP around it; a list if there are several.

        A model that neither copies nor pickles is made here by ``model_creator``, and gets the trained state.

        Args:
            to_cpu: on the CPU, whatever it was trained on.

        Raises:
            NotSerializableError: neither way works; ``state_dict()`` has the model's state.
        """
        from torchtrainer.worker.models import ModelStates, rebuilt

        call = spell("get_model", to_cpu=None if to_cpu else False)
        known = self._calls.recorded(call, "state_dict")

        def ask() -> Any:
            model = self._call("get_model", to_cpu=to_cpu)[0]
            return rebuilt(model, *self._made_from) if isinstance(model, ModelStates) else model

        if known is not None and known.gone:
            self._take(known)
            return Remade(lambda: self._calls.make_again(known.index, ask))
        model = ask()
        if known is not None:
            load_models(model, self._take(known)["models"])
            self._calls.journal.handed_out(known, models_of(model))
        else:
            self._done(call, {"models": models_of(model)}, is_state=True)
        return model

    def get_local_operator(self) -> TrainingOperator:
        """Returns the operator of the rank in this process.

        Raises:
            NotAvailableError: the ranks are in other processes (always, except with ``use_local=True`` or under a
                launcher).
        """
        return self._living_group().local_operator()

    @property
    def local_worker(self) -> LocalWorker:
        """The rank in this process, under its name in Ray 0.8; raises as `get_local_operator` does."""
        return LocalWorker(training_operator=self.get_local_operator())

    # State

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of models, optimizers, schedulers, scaler and operator: copies, on the CPU.

        States of any number of ranks interchange: models are without DDP, so without a ``module.`` prefix.
        """
        self._living_group()
        known = self._calls.recorded("state_dict()", "state_dict")
        if known is not None and known.gone:
            self._take(known)
            remade: Any = Remade(lambda: self._calls.make_again(known.index, lambda: self._call("state_dict")[0]))
            return remade  # type: ignore[no-any-return]  # it behaves as the dict that it stands for
        state: dict[str, Any] = self._take(known) if known is not None else self._call("state_dict")[0]
        if known is not None:
            self._calls.journal.handed_out(known, state)
        else:
            self._done("state_dict()", state, is_state=True)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads a state on every rank, and waits until that is done.

        Args:
            state: what `state_dict` returned; or the weights of the model alone, as any tool saves them (``model.state_dict()``,
                with or without the prefixes of DDP and ``torch.compile``, or a dict that has them under ``state_dict``, ``model``
                and the like): optimizers, schedulers and counters then stay unchanged.

        Raises:
            ValueError: the state belongs to other models, optimizers or schedulers; the first difference is named.
        """
        self._load(state, "load_state_dict got")

    def _load(self, given: Any, what: str) -> None:
        from torchtrainer.train.weights import WEIGHTS, as_state

        self._living_group()
        known = self._calls.recorded("load_state_dict(state)", "load_state_dict", state=given)
        if known is not None:
            self._take(known)
            return
        state = as_state(made(given), what)
        self._call("load_state_dict", state=state)
        if WEIGHTS not in state:
            self._epoch = int(state.get("epoch", 0))
        self._done("load_state_dict(state)", None)

    def save(self, path: str | os.PathLike[str]) -> str:
        """Saves `state_dict` by ``torch.save``; returns the path. Under a launcher rank 0 writes.

        Args:
            path: of a file; ``~`` is the home directory, and missing directories are created.

        Raises:
            InvalidArgumentError: it is a directory.
        """
        import torch

        call = spell("save", path=os.fspath(path))
        known = self._calls.recorded(call, "state_dict")
        file = Path(path).expanduser()
        if known is not None:
            self._take(known)
            return str(file)
        if file.is_dir():
            raise InvalidArgumentError(f"save takes the path of a file, and {file} is a directory")
        group = self._living_group()
        state = self._call("state_dict")[0]
        if self._is_main:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, file)
            _warn_about_extras(file)
        group.wait_for_all()  # no rank may read what rank 0 still writes
        self._done(call, None)
        return str(file)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Loads what `save` wrote, or weights that another tool saved; see `load_state_dict`.

        Nothing in the file is run: it is read with ``weights_only=True``.

        Raises:
            ValueError: it holds anything else, such as objects in a file of a whole model, or of an operator whose
                ``state_dict()`` returns them.
        """
        from torchtrainer.train.weights import read_file

        self._living_group()
        self._load(read_file(path), f"the file {os.fspath(path)} holds")

    # Seeing and ending

    def status(self) -> Status:
        """Returns which processes carry the ranks, what they do, and what failed; callbacks and threads may call it.

        Under a launcher it is not a collective call: any rank may call it, and sees all processes.
        """
        views = self._group.views if self._group is not None else ()
        return Status(
            processes=tuple(ProcessStatus.of(view, self._watch.use_of(view)) for view in views if not view.lost),
            failures=tuple(self._watch.failures.records),
            step=self._step,
            epoch=self._epoch,
            run_dir=self._run_dir.shown,
        )

    def resize(self, processes: int) -> None:
        """Changes how many processes carry the ranks, at the next step boundary; the results stay the same, to the bit.

        Between two calls it takes effect before this returns; from a callback, while the call continues.

        Args:
            processes: from ``min_workers`` to ``num_workers``.

        Raises:
            InvalidArgumentError: more or fewer than that, or the operator cannot share a process with others of its kind.
        """
        self._living_group().resize(processes)

    def shutdown(self, force: bool = False) -> None:
        """Ends the workers and returns when they are gone. Calling it again does nothing.

        Args:
            force: do not wait for them to clean up.
        """
        self._close("finished", force)

    def _close(self, reason: RunState, force: bool) -> None:
        group, self._group = self._group, None
        if group is None:
            return
        self._note(reason)
        _end(group, self._run, self._notices, self._gpu_monitor, force=force)
        self._finalizer.detach()
        seconds = time.monotonic() - self._started_at
        self._watch.end_run(seconds)
        failures = self._watch.failures
        self._callbacks.on_run_end(
            RunEndEvent(
                reason=reason,
                step=self._step,
                epoch=self._epoch,
                seconds=seconds,
                failures=len(failures.records),
                lost_s=failures.lost_s,
            )
        )

    def __enter__(self) -> TorchTrainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(_reason(kind), force=kind is not None)

    # Parts

    def _living_group(self) -> Group:
        if self._group is None:
            raise TrainerClosedError(
                "Trainer is not active any more, because it was shut down: create a new TorchTrainer"
            )
        return self._group

    def _call(self, method: str, **keywords: Any) -> list[Any]:
        group = self._living_group()
        try:
            return self._calls.retrying(lambda: group.call(method, **keywords)).values
        except BaseException as error:
            self._note_error(type(error))
            raise

    def _remembered(self, call: str, method: str, pick: Callable[[list[Any]], Any], **keywords: Any) -> Any:
        """Makes a call and records its result, picked from those of the ranks, for a later start of the script."""
        self._living_group()
        known = self._calls.recorded(call, method, **keywords)
        if known is not None:
            return self._take(known)
        result = pick(self._call(method, **keywords))
        self._done(call, result)
        return result

    def _take(self, known: Recorded) -> Any:
        """The result of a call that was completed in an earlier start of the script."""
        self._step, self._epoch = known.step, known.epoch
        return known.result

    def _done(self, call: str, result: Any, *, is_state: bool = False) -> None:
        self._calls.done(call, result, step=self._step, epoch=self._epoch, is_state=is_state)

    def _note_error(self, kind: type[BaseException]) -> None:
        self._note(_reason(kind))
        self._watch.failures.settle()

    def _note(self, state: RunState) -> None:
        self._run.note(state, step=self._step, epoch=self._epoch)

    def _pass(
        self, method: str, call: str, num_steps: int | None, profile: bool, info: dict[str, Any] | None, **more: Any
    ) -> list[PassResult]:
        group = self._living_group()
        if num_steps is not None and (type(num_steps) is not int or num_steps < 0):
            raise InvalidArgumentError(f"num_steps must be a whole number of at least 0 or None, got {num_steps!r}")
        if info is not None and not isinstance(info, dict):
            raise InvalidArgumentTypeError(f"info must be a dict, got {info!r}")
        self._watch.begin_pass(method, self._epoch + (method == "train"), self._calls.journal.index)
        try:
            result = self._calls.run(method, call, num_steps=num_steps, profile=profile, info=info, **more)
        except BaseException as error:
            self._note_position(group)
            self._note_error(type(error))
            raise
        finally:
            self._watch.end_pass()
        self._note_position(group)
        self._note("running")
        return result.values

    def _note_position(self, group: Group) -> None:
        self._step = max((view.step for view in group.views), default=self._step)
        self._epoch = max((view.epoch for view in group.views), default=self._epoch)

    def _record(self, kind: str, metrics: Any) -> None:
        if not self._is_main or not self._run_dir.durable:
            return
        profile = metrics.get(PROFILE) if isinstance(metrics, dict) else None
        try:
            self._history.append(
                kind,
                epoch=self._epoch,
                step=self._step,
                metrics=metrics,
                devices=self._watch.device_use(),
                phases={name: value for name, value in (profile or {}).items() if name.startswith("mean_")},
            )
        except OSError as error:  # a full disk does not end a training
            self._run.tell_trouble(f"{self._run_dir.history} misses results from epoch {self._epoch} on: {error}")


class LocalWorker(NamedTuple):
    """The rank in the driver's process.

    Attributes:
        training_operator: its operator.
    """

    training_operator: TrainingOperator


def failure_writer(history: HistoryFile, run: OpenRun) -> Callable[[FailureRecord], None]:
    """A function that writes a failure to the history, if the run keeps one; a full disk does not end a training."""

    def write(failure: FailureRecord) -> None:
        if not run.keeps:
            return
        try:
            history.append_failure(failure)
        except OSError as error:
            run.tell_trouble(f"{history.path} misses failures from step {failure.step} on: {error}")

    return write


def note_weakly(
    note: weakref.WeakMethod[Callable[[type[BaseException]], None]],
) -> Callable[[type[BaseException]], None]:
    """A trainer's method as a function that does not keep the trainer alive: it ends when nobody holds it any more."""

    def call(kind: type[BaseException]) -> None:
        living = note()
        if living is not None:
            living(kind)

    return call


def spell_pass(
    method: str, num_steps: int | None, profile: bool, reduce: bool, info: dict[str, Any] | None, new_pass: bool
) -> str:
    """A pass as the user would write it, without default arguments."""
    return spell(
        method,
        num_steps=num_steps,
        profile=profile or None,
        reduce_results=None if reduce else False,
        info=info,
        new_pass=new_pass or None,
    )


def reduce_results_or_list(results: list[PassResult], reduce: bool) -> Any:
    """The result of a call: one dict for all ranks, or what each rank returned."""
    return reduce_results(results) if reduce else [result.metrics for result in results]


def tell_traces(directory: str, paths: list[str], errors: list[str]) -> None:
    """Says where traces are and how to look at them, and why there are none of some processes."""
    for error in errors:
        warn(f"a trace could not be written to {directory}: {error}")
    if paths:
        files = "1 trace is" if len(paths) == 1 else f"{len(paths)} traces are"
        notice(f"{files} in {directory}: open them at https://ui.perfetto.dev or chrome://tracing")


def _check_function(method: str, fn: Any) -> None:
    if not callable(fn):
        raise InvalidArgumentTypeError(f"{method} takes a function, got {fn!r}")


def _reason(error: type[BaseException] | None) -> RunState:
    """Why a run ends, from the exception that ends it."""
    if error is None:
        return "finished"
    if issubclass(error, Preempted):
        return "preempted"
    return "interrupted" if issubclass(error, KeyboardInterrupt) else "failed"


def _end(group: Group, run: OpenRun, notices: NoticeWatch | None, gpus: GpuMonitor | None, force: bool = True) -> None:
    try:
        group.end(force)
    finally:
        run.note_end()
        _close_all(run.directory, notices, gpus)


def _close_all(
    run_dir: RunDirectory | BorrowedRunDirectory, notices: NoticeWatch | None, gpus: GpuMonitor | None
) -> None:
    run_dir.close()
    for one in (notices, gpus):
        if one is not None:
            one.close()


def _warn_about_extras(path: str | os.PathLike[str]) -> None:
    """Says at once if a saved file will not load, instead of when it is needed."""
    import pickle

    import torch

    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        warn(
            f"{os.fspath(path)} holds objects from operator.state_dict() that load() refuses ({str(error).splitlines()[0]}): "
            "let state_dict() return tensors, numbers, text and containers of them"
        )
