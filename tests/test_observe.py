"""Tests of what people see: events, bars, history, device statistics, status, notices."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

import pytest
from programs import run_program

from torchtrainer.control.messages import Failure
from torchtrainer.driver.causes import UserCodeFailed, WorkerDied, WorkerHung
from torchtrainer.driver.events import Joined, Recovered
from torchtrainer.driver.policies import LostSteps
from torchtrainer.driver.views import WorkerView
from torchtrainer.errors import InvalidArgumentError, InvalidArgumentTypeError, RunDirectoryError
from torchtrainer.observe.devices import (
    GIB,
    CpuMeter,
    DeviceUse,
    GpuMonitor,
    ProcessUse,
    gpu_count,
    proportional_memory,
    read_process_use,
)
from torchtrainer.observe.events import (
    Callbacks,
    CheckpointEvent,
    EpochEvent,
    FailureEvent,
    RunEndEvent,
    StepEvent,
    ValidateEvent,
)
from torchtrainer.observe.failure_watch import FailureWatch
from torchtrainer.observe.failures import FailureRecord, How
from torchtrainer.observe.history import History, HistoryFile, read_history
from torchtrainer.observe.notices import PacedNotices, notice
from torchtrainer.observe.plot import curves_of
from torchtrainer.observe.progress_bar import PassBar, StartBar, summarize
from torchtrainer.observe.status import ProcessStatus, Status
from torchtrainer.observe.timeline import HOW_COLOURS, HOW_NAMES, plot_failures

STEP = StepEvent(epoch=2, step=40, batch=10, batches=40, samples=640)
EPOCHS: list[dict[str, Any]] = [
    {"epoch": 1, "num_samples": 60, "batch_count": 2, "train_loss": 2.0, "last_train_loss": 1.5, "val_accuracy": 0.5},
    {"epoch": 2, "num_samples": 60, "batch_count": 2, "train_loss": math.nan, "val_accuracy": 0.75, "profile": {}},
    {"epoch": 3, "num_samples": 60, "batch_count": 2, "train_loss": 1.0, "last_train_loss": 0.5},
]


KILLED = FailureRecord(time=1000.0, ranks=(2,), cause="was killed by SIGKILL", step=37, epoch=2)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Recorder:
    """A callback object with every method."""

    def __init__(self) -> None:
        self.events: list[object] = []

    def on_step(self, event: object) -> None:
        self.events.append(event)

    on_epoch_end = on_validate_end = on_failure = on_checkpoint = on_run_end = on_step


# events


def test_each_event_reaches_its_method() -> None:
    recorder = Recorder()
    callbacks = Callbacks([recorder], clock=Clock())
    events: list[Any] = [
        STEP,
        EpochEvent(epoch=2, step=40, metrics={"train_loss": 1.0}),
        ValidateEvent(epoch=2, step=40, metrics={"val_loss": 1.0}),
        FailureEvent(time=1.0, ranks=(1,), cause="was killed by SIGKILL", message="rank 1 ..."),
        CheckpointEvent(step=40, epoch=2, path="runs/x", seconds=0.5),
        RunEndEvent(reason="finished", step=40, epoch=2, seconds=9.0),
    ]
    callbacks.on_step(events[0])
    callbacks.on_epoch_end(events[1])
    callbacks.on_validate_end(events[2])
    callbacks.on_failure(events[3])
    callbacks.on_checkpoint(events[4])
    callbacks.on_run_end(events[5])
    assert recorder.events == events


def test_steps_are_thinned_out_and_the_last_one_is_never_missed() -> None:
    clock, recorder = Clock(), Recorder()
    callbacks = Callbacks([recorder], steps_per_s=10, clock=clock)
    for step in range(100):  # one second of steps
        callbacks.on_step(replace(STEP, step=step))
        clock.now += 0.01
    seen = [event.step for event in recorder.events if isinstance(event, StepEvent)]
    assert 9 <= len(seen) <= 10
    assert seen[0] == 0
    end = EpochEvent(epoch=2, step=99, metrics={})
    callbacks.on_epoch_end(end)
    assert recorder.events[-1] == end
    assert isinstance(recorder.events[-2], StepEvent)
    assert recorder.events[-2].step == 99
    callbacks.on_validate_end(ValidateEvent(epoch=2, step=99, metrics={}))
    assert len([e for e in recorder.events if isinstance(e, StepEvent) and e.step == 99]) == 1


def test_objects_need_only_some_of_the_methods_and_are_called_in_order() -> None:
    calls: list[str] = []
    first = SimpleNamespace(on_epoch_end=lambda event: calls.append("first"))
    second = SimpleNamespace(on_epoch_end=lambda event: calls.append("second"), on_run_end=lambda event: None)
    callbacks = Callbacks((first, second))
    callbacks.on_step(STEP)
    callbacks.on_epoch_end(EpochEvent(epoch=1, step=1, metrics={}))
    assert calls == ["first", "second"]
    assert callbacks
    assert not Callbacks(())


def test_an_exception_of_a_callback_is_not_touched() -> None:
    def fail(event: object) -> None:
        raise KeyError("mine")

    callbacks = Callbacks([SimpleNamespace(on_step=fail)])
    with pytest.raises(KeyError, match="mine") as caught:
        callbacks.on_step(STEP)
    assert caught.value.__cause__ is None


class OnlyTypos:
    """A callback object whose one method is misspelt."""

    def on_epoch_ends(self, event: object) -> None:
        raise AssertionError("never called")


@pytest.mark.parametrize(
    ("objects", "text"),
    [
        (
            [OnlyTypos()],
            r"callbacks\[0\], a OnlyTypos, .*on_checkpoint, on_run_end \(on_epoch_ends looks like on_epoch_end\)",
        ),
        ([Recorder(), object()], r"callbacks\[1\], a object, has none of the callback methods"),
        ([SimpleNamespace(on_step=3)], r"callbacks\[0\], a SimpleNamespace, has none"),
        (Recorder(), r"write callbacks=\[...\] around a single one"),
        ("on_step", r"must be a list or tuple of objects, got 'on_step'"),
        ([Recorder], r"callbacks\[0\] is the class Recorder; pass an instance, such as Recorder\(\)"),
    ],
)
def test_what_can_never_be_called_is_refused(objects: Any, text: str) -> None:
    with pytest.raises(InvalidArgumentTypeError, match=text):
        Callbacks(objects)


def test_a_rate_of_zero_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="steps_per_s must be more than 0, got 0"):
        Callbacks([], steps_per_s=0)


# progress bars


def screen(stream: io.StringIO) -> list[str]:
    """What a terminal would show: each line as the last carriage return left it."""
    lines = []
    for line in stream.getvalue().split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def test_pass_bar_shows_rate_loss_time_left_and_devices() -> None:
    stream = io.StringIO()
    use = DeviceUse(device="cuda:0", percent=83, memory_used_bytes=12 * GIB, memory_total_bytes=80 * GIB, power_w=240)
    with PassBar("train epoch 2", total=40, file=stream) as bar:
        bar.update(replace(STEP, samples_per_s=12345.6, loss=1.23456, devices=(use,)))
        line = screen(stream)[0]
    assert line.startswith("train epoch 2:  25%|")
    assert "| 10/40 [00:" in line
    assert line.endswith(", 12,346 samples/s, loss 1.235, cuda:0 83% 12.0/80.0 GiB 240 W]")
    assert "<" in line  # time left


def test_pass_bar_of_unknown_length_counts_and_learns_the_length() -> None:
    stream = io.StringIO()
    with PassBar("train epoch 1", file=stream) as bar:
        bar.update(replace(STEP, batches=None, samples_per_s=3.14159))
        assert screen(stream)[0].startswith("train epoch 1: 10 batches [00:")
        assert screen(stream)[0].endswith("3.1 samples/s]")
        bar.update(replace(STEP, batch=20))
        assert screen(stream)[0].startswith("train epoch 1:  50%|")


def test_pass_bar_follows_the_event_backwards_and_draws_an_unchanged_count() -> None:
    stream = io.StringIO()
    with PassBar("train", total=40, file=stream) as bar:
        bar.update(replace(STEP, batch=30, loss=3.0))
        bar.update(replace(STEP, batch=30, loss=2.0))
        assert "30/40" in screen(stream)[0]
        assert "loss 2]" in screen(stream)[0]
        bar.update(replace(STEP, batch=5, loss=math.nan))
        assert "5/40" in screen(stream)[0]
        assert "loss nan]" in screen(stream)[0]


def test_pass_bar_ends_its_line_when_the_pass_raises() -> None:
    stream = io.StringIO()

    def broken_pass() -> None:
        with PassBar("train", total=40, file=stream) as bar:
            bar.update(STEP)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        broken_pass()
    lines = screen(stream)
    assert "10/40" in lines[0]
    assert lines[1:] == [""]


def test_lines_of_workers_do_not_tear_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with PassBar("train", total=40) as bar:
        bar.update(STEP)
        bar.write("[rank 0] hello\n")
        bar.write("[rank 1] no newline")
        notice("kept whole", stream=bar)
    out, err = capsys.readouterr()
    assert out == "[rank 0] hello\n[rank 1] no newline\ntorchtrainer: kept whole\n"
    before_hello = err.split("10/40", 1)[1].split("train:", 1)[0]
    assert "\r" in before_hello  # the bar was wiped, and drawn again below
    assert screen(io.StringIO(err))[0].startswith("train:  25%")


def test_bars_start_no_thread() -> None:
    before = set(threading.enumerate())
    with PassBar("train", total=2, file=io.StringIO()), StartBar("starting", after_s=0, file=io.StringIO()) as start:
        start.tick()
        assert set(threading.enumerate()) == before


def test_start_bar_shows_up_late_turns_and_goes_away() -> None:
    clock, stream = Clock(), io.StringIO()
    with StartBar("starting 2 workers", file=stream, clock=clock) as bar:
        bar.tick()
        clock.now += 1.99
        bar.tick()
        assert stream.getvalue() == ""
        clock.now += 0.02
        bar.tick()
        assert screen(stream)[-1].startswith("| starting 2 workers [00:")
        bar.tick("importing torch")
        assert screen(stream)[-1].startswith("/ importing torch [00:")
    assert screen(stream)[-1] == ""
    bar.tick()
    assert screen(stream)[-1] == ""


def test_start_bar_stays_silent_when_bars_are_off() -> None:
    clock, stream = Clock(), io.StringIO()
    with StartBar("starting", enabled=False, file=stream, clock=clock) as bar:
        clock.now += 60
        bar.tick()
    assert stream.getvalue() == ""


def test_many_devices_are_summed_up() -> None:
    gpus = [DeviceUse(device=f"cuda:{i}", percent=90.0 + i, memory_used_bytes=GIB, power_w=100) for i in range(8)]
    assert summarize(tuple(gpus)) == "8 gpus 90-97% 8.0 GiB 800 W"
    cpus = [DeviceUse(device="cpu", percent=95, memory_used_bytes=GIB) for _ in range(2)]
    assert summarize(tuple(cpus)) == "cpu 190% 2.0 GiB"
    assert summarize((DeviceUse(device="cpu", memory_used_bytes=GIB // 2),)) == "cpu 512 MiB"
    assert summarize((DeviceUse(device="cuda:0"), DeviceUse(device="cuda:1"))) == "2 gpus"


# history


def test_history_is_a_list_that_becomes_a_data_frame() -> None:
    pandas = pytest.importorskip("pandas")
    history = History(EPOCHS)
    frame = history.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["epoch"]) == [1, 2, 3]
    assert frame["val_accuracy"].tolist()[:2] == [0.5, 0.75]
    assert history[0]["train_loss"] == 2.0


def test_curves_leave_out_counts_and_what_is_not_a_number() -> None:
    curves = {curve.label: curve for curve in curves_of([*EPOCHS, {"epoch": 4, "val_note": "text", "val_ok": True}])}
    assert list(curves) == ["training loss", "validation accuracy"]
    assert curves["training loss"].epochs == (1, 2, 3)
    assert curves["validation accuracy"].values == (0.5, 0.75)
    assert [curve.epochs for curve in curves_of([{"loss": 1.0}, {"loss": 2.0}])] == [(1, 2)]


def test_plot_has_labels_title_legend_and_whole_epochs(tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    ax = History(EPOCHS).plot()
    figure = ax.get_figure(root=True)
    assert figure is not None
    try:
        left, right = figure.axes
        assert (ax.get_xlabel(), left.get_ylabel(), right.get_ylabel()) == ("epoch", "loss", "accuracy")
        assert ax.get_title() == "Training and validation"
        legend = left.get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()] == ["training loss", "validation accuracy"]
        figure.savefig(tmp_path / "plot.png")
        assert all(tick == int(tick) for tick in ax.get_xticks())
        assert left.lines[0].get_color() != right.lines[0].get_color()
    finally:
        pyplot.close(figure)


def test_plot_marks_the_passes_in_which_something_failed(tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    history = History(EPOCHS)
    history.failures = (KILLED, KILLED, replace(KILLED, epoch=3))
    ax = history.plot()
    try:
        legend = ax.get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()][-1] == "3 failures"
        assert [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == ":"] == [1.5, 2.5]
    finally:
        pyplot.close(ax.get_figure(root=True))


def test_time_line_shows_who_failed_when_and_for_how_long(tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    clock = Clock()
    file = HistoryFile(tmp_path / "history.jsonl", clock=clock)
    file.append("train", epoch=1, step=10, metrics={})
    file.append_failure(replace(KILLED, time=1002.0, ranks=(0, 2), seconds=0.5, how="carried"))
    file.append_failure(replace(KILLED, time=1004.0, ranks=()))
    clock.now += 10
    file.append("train", epoch=2, step=20, metrics={})
    ax = plot_failures(file.path)
    figure = ax.get_figure(root=True)
    assert figure is not None
    try:
        assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "2", "all"]
        assert [(bar.get_x(), bar.get_width()) for bar in ax.patches] == [(2.0, 0.5), (2.0, 0.5), (4.0, 0.0)]
        legend = ax.get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()] == ["taken over by others", "not recovered"]
        assert ax.get_title() == "2 failures"
        figure.savefig(tmp_path / "failures.png")
        assert (tmp_path / "failures.png").stat().st_size > 1000
    finally:
        pyplot.close(figure)


def test_every_way_to_recover_has_a_name_and_a_colour_of_its_own() -> None:
    ways = set(get_args(How))
    assert set(HOW_COLOURS) == set(HOW_NAMES) == ways
    assert len(set(HOW_COLOURS.values())) == len(ways)


def test_time_line_of_a_run_without_failures_is_empty(tmp_path: Path) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    (tmp_path / "history.jsonl").write_bytes(b"")
    figure, ax = pyplot.subplots()
    try:
        assert plot_failures(tmp_path / "history.jsonl", ax) is ax
        assert ax.get_title() == "0 failures"
    finally:
        pyplot.close(figure)


def test_plot_draws_on_given_axes_without_losses_and_without_epochs() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, (one, two) = pyplot.subplots(1, 2)
    try:
        assert History([{"epoch": 1, "val_accuracy": 0.5}]).plot(one) is one
        assert one.get_ylabel() == "accuracy"
        assert History().plot(two).get_title() == "No epochs yet"
        assert len(figure.axes) == 2
    finally:
        pyplot.close(figure)


@pytest.mark.parametrize(("module", "call"), [("pandas", "to_pandas"), ("matplotlib", "plot")])
def test_a_missing_package_is_named(module: str, call: str) -> None:
    script = f"""
import sys
sys.modules[{module!r}] = None  # what Python itself does for a package that must not be imported
from torchtrainer.observe.history import History
try:
    History([{{"epoch": 1}}]).{call}()
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert f"History.{call}() needs {module}" in done.stdout
    assert f"pip install {module}" in done.stdout


def test_history_html_is_short_and_escaped() -> None:
    html = History([{"epoch": n, "note": "<b>", "train_loss": 0.123456} for n in range(1, 101)])._repr_html_()
    assert "<p>100 epochs</p>" in html
    assert html.count("<tr>") == 1 + 21
    assert "&lt;b&gt;" in html
    assert "<b>" not in html
    assert "<td>0.1235</td>" in html
    assert History()._repr_html_() == "<p>0 epochs</p>"


def test_history_file_keeps_results_private_and_in_order(tmp_path: Path) -> None:
    file = HistoryFile(tmp_path / "history.jsonl", clock=lambda: 0.5)
    use = DeviceUse(device="cpu", percent=99.5, memory_used_bytes=10)
    file.append("train", epoch=1, step=10, metrics={"train_loss": 2.0}, devices=[use], phases={"forward": 0.25})
    file.append("validate", epoch=1, step=10, metrics=[{"val_loss": 1.0}, {"val_loss": 2.0}])
    assert os.stat(file.path).st_mode & 0o777 == 0o600
    first, second = read_history(file.path)
    assert first == {
        "time": "1970-01-01T00:00:00.500+00:00",
        "kind": "train",
        "epoch": 1,
        "step": 10,
        "metrics": {"train_loss": 2.0},
        "devices": [asdict(use)],
        "phases": {"forward": 0.25},
    }
    assert (second["kind"], second["metrics"]) == ("validate", [{"val_loss": 1.0}, {"val_loss": 2.0}])


def test_history_file_has_a_line_for_each_failure(tmp_path: Path) -> None:
    file = HistoryFile(tmp_path / "history.jsonl")
    file.append_failure(replace(KILLED, time=0.5, seconds=0.25, how="carried", redone=1))
    assert read_history(file.path) == [
        {
            "time": "1970-01-01T00:00:00.500+00:00",
            "kind": "failure",
            "epoch": 2,
            "step": 37,
            "metrics": {},
            "ranks": [2],
            "cause": "was killed by SIGKILL",
            "redone": 1,
            "seconds": 0.25,
            "how": "carried",
        }
    ]


def test_history_file_is_strict_json_and_gives_numbers_back(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    file = HistoryFile(tmp_path / "history.jsonl")
    metrics = {
        "nan": math.nan,
        "up": math.inf,
        "down": -math.inf,
        "scalar": numpy.float32(0.5),
        "vector": numpy.zeros(2),
        3: (1, None, True, "ü\n"),
    }
    file.append("train", epoch=1, step=1, metrics=metrics)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    (line,) = file.path.read_bytes().splitlines()
    assert json.loads(line, parse_constant=refuse)["metrics"]["nan"] == "NaN"
    back = read_history(file.path)[0]["metrics"]
    assert math.isnan(back["nan"])
    assert (back["up"], back["down"], back["scalar"]) == (math.inf, -math.inf, 0.5)
    assert back["vector"] == "array([0., 0.])"
    assert back["3"] == [1, None, True, "ü\n"]


def test_a_torn_last_line_is_left_out_and_then_removed(tmp_path: Path) -> None:
    file = HistoryFile(tmp_path / "history.jsonl")
    for epoch in (1, 2):
        file.append("train", epoch=epoch, step=epoch, metrics={"train_loss": 1.0})
    whole = file.path.read_bytes()
    for cut in range(whole.index(b"\n") + 1, len(whole)):
        file.path.write_bytes(whole[:cut])
        assert [record["epoch"] for record in read_history(file.path)] == [1]
    file.append("train", epoch=3, step=3, metrics={})
    assert [record["epoch"] for record in read_history(file.path)] == [1, 3]
    file.path.write_bytes(b'{"half')
    assert read_history(file.path) == []
    file.append("train", epoch=4, step=4, metrics={})
    assert [record["epoch"] for record in read_history(file.path)] == [4]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    path.write_bytes(b'{"epoch": 1}\nrubbish\n{"epoch": 2}\n')
    with pytest.raises(RunDirectoryError, match=r"history\.jsonl, line 2, is not JSON .* b'rubbish'"):
        read_history(path)


def test_a_line_that_does_not_fit_on_the_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    script = """
import resource, sys, signal
from pathlib import Path
from torchtrainer.observe.history import HistoryFile, read_history
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
file = HistoryFile(sys.argv[1])
file.append("train", epoch=1, step=1, metrics={})
size = Path(sys.argv[1]).stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, size + 10))
try:
    file.append("train", epoch=2, step=2, metrics={})
except OSError as error:
    print(type(error).__name__, Path(sys.argv[1]).stat().st_size == size, len(read_history(sys.argv[1])))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "history.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["OSError", "True", "1"]


# devices


class FakeNvmlError(Exception):
    """Stands for ``pynvml.NVMLError``."""


@dataclass
class FakeGpu:
    """One GPU of the fake library."""

    uuid: str
    percent: int = 50
    supports_power: bool = True


class FakeNvml:
    """The part of ``pynvml`` that is used, over GPUs that do not exist."""

    NVMLError = FakeNvmlError

    def __init__(self, *gpus: FakeGpu, mig: tuple[FakeGpu, ...] = (), driver: bool = True) -> None:
        self.gpus, self.mig, self.driver = gpus, mig, driver
        self.opened = 0

    def nvmlInit(self) -> None:
        if not self.driver:
            raise FakeNvmlError("driver not loaded")
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetCount(self) -> int:
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> FakeGpu:
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeGpu:
        for gpu in (*self.gpus, *self.mig):
            if gpu.uuid == uuid:
                return gpu
        raise FakeNvmlError("not found")

    def nvmlDeviceGetUUID(self, gpu: FakeGpu) -> str | bytes:
        return gpu.uuid.encode() if gpu is self.gpus[0] else gpu.uuid

    def nvmlDeviceGetUtilizationRates(self, gpu: FakeGpu) -> SimpleNamespace:
        return SimpleNamespace(gpu=gpu.percent, memory=1)

    def nvmlDeviceGetMemoryInfo(self, gpu: FakeGpu) -> SimpleNamespace:
        return SimpleNamespace(used=2 * GIB, total=8 * GIB, free=6 * GIB)

    def nvmlDeviceGetPowerUsage(self, gpu: FakeGpu) -> int:
        if not gpu.supports_power:
            raise FakeNvmlError("not supported")
        return 123_400


def four_gpus() -> FakeNvml:
    return FakeNvml(
        FakeGpu("GPU-aa00", percent=0),
        FakeGpu("GPU-aa11", percent=10),
        FakeGpu("GPU-bb22", percent=20),
        FakeGpu("GPU-cc33", percent=30, supports_power=False),
        mig=(FakeGpu("MIG-dd44", percent=40),),
    )


@pytest.mark.parametrize(
    ("visible", "percents"),
    [
        (None, [0, 10, 20, 30]),
        ("", []),
        ("-1", []),
        ("2", [20]),
        ("3,0", [30, 0]),
        (" 1 , 2 ", [10, 20]),
        ("0,9,1", [0]),  # CUDA stops at the first wrong entry
        ("1,1", []),  # and shows nothing when one is named twice
        ("GPU-bb22,GPU-aa11", [20, 10]),
        ("GPU-bb", [20]),
        ("GPU-aa", []),  # not unique
        ("MIG-dd44", [40]),
        ("MIG-none", []),
        ("NoDevFiles", []),
    ],
)
def test_gpus_are_those_that_cuda_would_show(visible: str | None, percents: list[int]) -> None:
    nvml = four_gpus()
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    with GpuMonitor(environ, nvml=nvml) as monitor:
        uses = monitor.sample()
        assert [use.percent for use in uses] == percents
        assert [use.device for use in uses] == [f"cuda:{i}" for i in range(len(percents))]
        assert monitor.count == len(percents)
    assert gpu_count(environ, nvml=nvml) == len(percents)
    assert nvml.opened == 0


def test_gpu_use_has_units_and_gaps() -> None:
    with GpuMonitor({"CUDA_VISIBLE_DEVICES": "2,3"}, nvml=four_gpus()) as monitor:
        first, second = monitor.sample()
    assert asdict(first) == {
        "device": "cuda:0",
        "percent": 20.0,
        "memory_used_bytes": 2 * GIB,
        "memory_total_bytes": 8 * GIB,
        "power_w": 123.4,
    }
    assert second.power_w is None
    assert str(second) == "cuda:1 30% 2.0/8.0 GiB"
    assert DeviceUse(**json.loads(json.dumps(asdict(first)))) == first
    monitor.close()
    assert monitor.sample() == ()


def test_without_a_driver_there_are_no_gpus() -> None:
    nvml = FakeNvml(FakeGpu("GPU-aa00"), driver=False)
    with GpuMonitor({}, nvml=nvml) as monitor:
        assert monitor.sample() == ()
    assert nvml.opened == 0
    assert isinstance(gpu_count({}), int)  # the real library, with or without a driver


def test_process_use_of_this_and_of_another_process() -> None:
    own = read_process_use(os.getpid())
    assert own is not None
    assert own.rss_bytes is not None
    assert own.rss_bytes > 2**20
    assert own.cpu_s > 0
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with child:
        seen = read_process_use(child.pid)
        assert seen is not None or not Path("/proc").exists()
        child.communicate(b"\n")
    assert read_process_use(child.pid) is None


def test_process_use_is_read_from_proc(tmp_path: Path) -> None:
    (tmp_path / "7").mkdir()
    tail = " ".join(["S", *map(str, range(4, 14)), "150", "50", *map(str, range(16, 53))])
    (tmp_path / "7" / "stat").write_text(f"7 (a ) b) {tail}\n")
    (tmp_path / "7" / "statm").write_text("100 20 3 4 5 6 7\n")
    (tmp_path / "7" / "smaps_rollup").write_text("55-7f ---p [rollup]\nRss:  30 kB\nPss:  12 kB\nPss_Anon: 3 kB\n")
    use = read_process_use(7, proc=tmp_path)
    ticks, page = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    assert use == ProcessUse(pid=7, rss_bytes=20 * page, cpu_s=200 / ticks)
    assert proportional_memory(7, proc=tmp_path) == 12 * 1024
    assert read_process_use(8, proc=tmp_path) is None
    assert proportional_memory(8, proc=tmp_path) is None


def test_without_proc_only_the_own_process_is_seen(tmp_path: Path) -> None:
    own = read_process_use(os.getpid(), proc=tmp_path / "none")
    assert own is not None
    assert own.cpu_s > 0
    assert read_process_use(os.getppid(), proc=tmp_path / "none") is None


def test_cpu_meter_needs_two_looks() -> None:
    clock = Clock()
    meter = CpuMeter(clock)
    assert meter.percent(5.0) is None
    clock.now += 2
    assert meter.percent(8.0) == pytest.approx(150.0)
    assert meter.percent(9.0) is None  # no time has passed
    clock.now += 1
    assert meter.percent(1.0) is None  # another process
    clock.now += 1
    assert meter.percent(1.5) == pytest.approx(50.0)
    assert ProcessUse(pid=1, rss_bytes=GIB, cpu_s=1.5).on_cpu(50.0) == DeviceUse(
        device="cpu", percent=50.0, memory_used_bytes=GIB
    )


# status and notices


def test_status_reads_as_tables() -> None:
    use = DeviceUse(device="cuda:0", percent=83, memory_used_bytes=12 * GIB, memory_total_bytes=80 * GIB, power_w=240)
    status = Status(
        processes=(
            ProcessStatus(pid=4123, ranks=(0, 2), machine="host<1>", device="cuda:0", step=7, phase="forward", use=use),
            ProcessStatus(pid=99, ranks=(1,), machine="host<1>", device="cpu", step=6, phase="data"),
            ProcessStatus(pid=100, ranks=(), machine="host<1>", device="cpu", step=0, phase="setup"),
        ),
        failures=(
            FailureRecord(
                time=0,
                ranks=(1,),
                cause="was killed by SIGKILL",
                redone=1,
                seconds=0.346,
                how="carried",
                step=6,
                epoch=2,
            ),
        ),
        step=6,
        epoch=2,
        run_dir="runs/train",
    )
    lines = repr(status).splitlines()
    assert lines[0] == "step 6, epoch 2, run directory runs/train"
    assert lines[1].split() == ["ranks", "pid", "machine", "device", "step", "phase", "use"]
    assert lines[2] == "0, 2      4123  host<1>  cuda:0  7     forward  83% 12.0/80.0 GiB 240 W"
    assert lines[3] == "1         99    host<1>  cpu     6     data"
    assert lines[4] == "none yet  100   host<1>  cpu     0     setup"
    assert lines[5] == "failures:"
    assert lines[6].split() == ["time", "ranks", "cause", "redone", "seconds"]
    assert lines[7].endswith("1      was killed by SIGKILL  1 rank's share of a step  0.35")
    html = status._repr_html_()
    assert html.count("<table>") == 2
    assert "host&lt;1&gt;" in html
    assert "host<1>" not in html
    assert json.loads(json.dumps(asdict(status)))["processes"][0]["use"]["power_w"] == 240


def test_status_before_anything_happened() -> None:
    status = Status(processes=(), failures=(), step=0, epoch=0, run_dir=None)
    assert repr(status) == "step 0, epoch 0, no run directory\nno worker processes\nno failures"
    assert status._repr_html_() == "<p>step 0, epoch 0, no run directory</p>"


@pytest.mark.parametrize(
    ("changes", "cells"),
    [
        ({}, ("2", "", "not recovered")),
        ({"seconds": 0.5, "how": "carried"}, ("2", "nothing", "0.50")),
        (
            {"ranks": (1, 3), "seconds": 1.0, "how": "carried", "redone": 2},
            ("1, 3", "2 ranks' shares of a step", "1.00"),
        ),
        ({"seconds": 2.0, "how": "restarted", "redone": 40}, ("2", "40 steps", "2.00")),
        ({"seconds": 2.0, "how": "restarted", "redone": 1}, ("2", "1 step", "2.00")),
        ({"ranks": ()}, ("", "", "not recovered")),
    ],
)
def test_a_failure_says_what_was_redone(changes: dict[str, Any], cells: tuple[str, ...]) -> None:
    _, ranks, cause, *rest = replace(KILLED, **changes).cells()
    assert (ranks, *rest) == cells
    assert cause == "was killed by SIGKILL"


def test_notice_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    notice("4 ranks share\n  2 GPUs", stream=stream)
    assert stream.getvalue() == "torchtrainer: 4 ranks share 2 GPUs\n"
    notice("hello")
    assert capsys.readouterr() == ("", "torchtrainer: hello\n")


def test_many_notices_become_one_line_a_second_and_a_count() -> None:
    clock, said = Clock(), list[str]()
    lines = PacedNotices(said.append, clock=clock)
    lines.say("first")
    lines.say("second")
    lines.say_due()
    assert said == ["first"]
    clock.now += 1
    lines.say_due()
    assert said == ["first", "second"]
    for number in range(5):
        lines.say(f"burst {number}")
    clock.now += 1
    lines.say_due()
    assert said[2:] == ["burst 4 (and 4 more lines since the one before)"]
    lines.say("late")
    lines.say("last")
    lines.say_due(all_held=True)
    lines.say_due(all_held=True)
    assert said[3:] == ["last (and 1 more line since the one before)"]


# failures


def died(rank: int, *more: int) -> WorkerDied:
    return WorkerDied(
        ranks=(rank, *more), pid=4711, exit_code=-9, phase="forward", step=37, stderr_tail="out of luck\n"
    )


def hung(rank: int) -> WorkerHung:
    return WorkerHung(
        ranks=(rank,), pid=4711, phase="data", step=37, silent_s=15, limit_s=15, stacks="Thread 1\n  in wait_for_good"
    )


RAISED = Failure(
    group="",
    worker=1,
    rank=1,
    call=1,
    kind="error",
    type_name="ValueError",
    text="label 7",
    traceback="",
    phase="forward",
    step=37,
)


def recovered(cause: WorkerDied | WorkerHung, how: Literal["carried", "replaced"] = "carried") -> Recovered:
    return Recovered(worker=1, ranks=cause.ranks, cause=cause, step=37, redone=1, seconds=0.25, how=how)


def view(worker: int, *ranks: int) -> WorkerView:
    return WorkerView(worker=worker, ranks=ranks, pid=4700 + worker, epoch=1)


class Seen:
    """A `FailureWatch`, and everything that it tells."""

    def __init__(self, *views: WorkerView) -> None:
        self.clock, self.recorder = Clock(), Recorder()
        self.said: list[str] = []
        self.kept: list[FailureRecord] = []
        self.watch = FailureWatch(
            callbacks=Callbacks([self.recorder]),
            lines=PacedNotices(self.said.append, every_s=0, clock=self.clock),
            keep=self.kept.append,
            clock=self.clock,
            wall_clock=self.clock,
        )
        self.watch.views = lambda: views
        self.watch.epoch = 2

    @property
    def events(self) -> list[FailureEvent]:
        return [event for event in self.recorder.events if isinstance(event, FailureEvent)]


@pytest.mark.parametrize(
    ("found", "views", "line"),
    [
        (
            recovered(died(1)),
            (view(0, 0, 1),),
            "rank 1 (pid 4711) was killed by SIGKILL at step 37; rank 0's process took it over, 0.25 s lost",
        ),
        (
            recovered(died(1, 3)),
            (view(0, 0, 1), view(2, 2, 3), view(4, 4)),
            (
                "the process of ranks 1 and 3 (pid 4711) was killed by SIGKILL at step 37; "
                "the processes of ranks 0 and 2 took them over, 0.25 s lost"
            ),
        ),
        (
            recovered(hung(1), "replaced"),
            (view(0, 0), view(20, 1)),
            (
                "rank 1 (pid 4711) made no progress for 15 s in data at step 37; "
                "it was stopped, and a replacement (pid 4720) took it over, 15 s lost"
            ),
        ),
        (
            recovered(died(1)),
            (view(0, 0), view(20, 1)),
            "rank 1 (pid 4711) was killed by SIGKILL at step 37; other processes took it over, 0.25 s lost",
        ),
    ],
    ids=["carried", "two ranks, two takers", "hung and replaced", "replaced before it is told"],
)
def test_a_recovery_is_told_in_one_line_that_names_who_and_what_it_cost(
    found: Recovered, views: tuple[WorkerView, ...], line: str
) -> None:
    seen = Seen(*views)
    seen.watch.on_recovered(found)
    assert seen.said == [line]
    (event,) = seen.events
    assert event.message.startswith(line)
    assert ("wait_for_good" if isinstance(found.cause, WorkerHung) else "out of luck") in event.message
    assert (event.ranks, event.step, event.epoch, event.redone, event.how) == (found.ranks, 37, 2, 1, found.how)
    assert event.seconds == (15.25 if isinstance(found.cause, WorkerHung) else 0.25)
    assert event.time == seen.clock.now - event.seconds
    assert [asdict(one) for one in seen.kept] == [asdict(one) for one in seen.watch.records]


def test_a_rank_that_gets_a_process_of_its_own_again_is_told() -> None:
    seen = Seen(view(0, 0), view(20, 1))
    seen.watch.on_joined(Joined(worker=20, ranks=(1,)))  # somebody asked for more processes
    assert seen.said == []
    seen.watch.on_recovered(recovered(died(1)))
    seen.watch.on_joined(Joined(worker=20, ranks=(1,)))
    seen.watch.on_joined(Joined(worker=20, ranks=(1,)))
    assert seen.said[1:] == ["a replacement (pid 4720) carries rank 1 again"]


def test_what_failures_cost_is_counted_once_where_they_overlap() -> None:
    seen = Seen(view(0, 0, 1))
    assert seen.watch.goodput(62.0) == ""
    seen.clock.now += 10
    seen.watch.on_recovered(recovered(died(1)))
    seen.clock.now += 0.15
    seen.watch.on_recovered(recovered(died(2)))  # began 0.1 s before the first was over
    assert seen.watch.lost_s == pytest.approx(0.4)
    assert seen.watch.goodput(62.0) == "2 failures cost 0.40 s of 62 s (99.4 % goodput), no step was lost"


@pytest.mark.parametrize(
    ("told", "counts"),
    [
        ([("lost", 500), ("from", 17), "back"], [483]),
        ([("lost", 500), ("from", 17), "back", ("lost", 100), ("from", 17), "back"], [483, 83]),
        ([("lost", 500), ("lost", 500), ("from", 17), "back"], [483]),  # the first try came to nothing
        ([("lost", 500), ("from", 17), ("lost", 17), ("from", 17), "back"], [483]),
        ([("lost", 500), ("from", 17), ("lost", 0), ("from", 17), "back"], [483]),  # it had told no step yet
        ([("lost", 500), ("from", 17), ("lost", 200), ("from", 150), "back"], [183 + 350]),
        ([("lost", 5), ("from", 5), "back", ("lost", 9), ("from", 0), "back"], [0, 9]),
    ],
)
def test_steps_are_counted_that_restarts_take_again(told: list[Any], counts: list[int]) -> None:
    steps, found = LostSteps(), []
    for what in told:
        if what == "back":
            found.append(steps.count())
        else:
            {"lost": steps.lost, "from": steps.go_on_from}[what[0]](what[1])
    assert found == counts


@pytest.mark.parametrize("inside", ["recovered", "recovered twice", "hung", "the next restart"])
def test_a_restart_counts_whole_whatever_fails_inside_it(inside: str) -> None:
    seen = Seen(view(0, 0, 1))
    seen.clock.now += 10
    seen.watch.on_failure(died(1), RuntimeError("rank 1 died"))
    seen.clock.now += 20
    if inside == "the next restart":
        seen.watch.on_failure(died(0), RuntimeError("rank 0 died"))
    elif inside == "hung":
        seen.watch.on_recovered(recovered(hung(1), "replaced"))  # silent since 15 s
    else:
        seen.watch.on_recovered(recovered(died(1)))
    seen.clock.now += 7
    if inside == "recovered twice":
        seen.watch.on_recovered(recovered(died(1)))
    seen.clock.now += 2
    seen.watch.on_restarted(483, 29.0)
    assert seen.watch.lost_s == pytest.approx(29.0)
    seen.clock.now += 10
    seen.watch.on_recovered(recovered(died(1)))
    assert seen.watch.lost_s == pytest.approx(29.25)
    failures = {"recovered twice": 4}.get(inside, 3)
    assert seen.watch.goodput(89.0) == (
        f"{failures} failures cost 29 s of 89 s (67.1 % goodput), 483 steps were taken again"
    )


def test_a_failure_of_the_whole_group_is_told_when_its_outcome_is_known() -> None:
    seen = Seen(view(0, 0), view(1, 1))
    seen.clock.now += 10
    seen.watch.on_failure(died(1), RuntimeError("rank 1 died"))
    assert seen.watch.records[0].seconds is None
    assert seen.events == []
    seen.clock.now += 2
    seen.watch.on_failure(died(0), RuntimeError("rank 0 died too, in the restart"))
    seen.clock.now += 3
    seen.watch.on_restarted(7, 3.0)
    seen.watch.settle()  # nothing is open any more
    assert [(e.ranks, e.seconds, e.redone, e.how) for e in seen.events] == [
        ((1,), 2.0, 0, "restarted"),
        ((0,), 3.0, 7, "restarted"),
    ]
    assert seen.watch.lost_s == pytest.approx(5.0)
    assert seen.watch.goodput(50.0) == "2 failures cost 5.0 s of 50 s (90.0 % goodput), 7 steps were taken again"
    assert len(seen.kept) == len(seen.watch.records) == 2


@pytest.mark.parametrize("cause", [died(1), UserCodeFailed(failures=(RAISED,))], ids=["died", "user code"])
def test_an_error_that_ends_the_call_is_one_event_that_says_so(cause: WorkerDied | UserCodeFailed) -> None:
    seen = Seen(view(0, 0))
    error = ValueError("label 7")
    error.__cause__ = RuntimeError("raised on rank 1")
    seen.watch.on_failure(cause, error)
    seen.watch.settle()
    seen.watch.settle()
    (event,) = seen.events
    assert event.message == "label 7\nraised on rank 1"
    assert (event.rank, event.step, event.seconds, event.how) == (1, 37, None, "")
    assert len(seen.kept) == isinstance(cause, WorkerDied), "what user code raises is in error.json"
    assert seen.watch.goodput(50.0) == ""


@pytest.mark.timeout(60)
def test_a_killed_worker_is_seen_everywhere(tmp_path: Path) -> None:
    program = run_program(tmp_path, KILLED_WORKER)
    assert program.process.returncode == 0, program.errors
    program.assert_nothing_left()
    told = json.loads(program.output.splitlines()[-1])
    (line,) = [one for one in read_history(tmp_path / "run" / "history.jsonl") if one["kind"] == "failure"]
    (record,) = told["status"]
    (event,) = told["events"]
    assert (record["ranks"], record["cause"], record["how"]) == ([1], "was killed by SIGKILL", "carried")
    assert {key: event[key] for key in record} == record
    assert {key: line[key] for key in record} == {**record, "time": line["time"]}
    assert told["history"] == [record]
    assert told["end"]["failures"] == 1
    assert told["end"]["lost_s"] == pytest.approx(record["seconds"], abs=0.01)
    said = [text.removeprefix("torchtrainer: ") for text in program.errors.splitlines() if "torchtrainer: " in text]
    assert said[0] == event["message"].splitlines()[0]
    assert re.fullmatch(r"1 failure cost .* s of .* s \(\d+\.\d % goodput\), no step was lost", said[-1])
    assert told["steps_shown"][-1] == told["end"]["step"], "the last step is shown, whoever carries rank 0"


KILLED_WORKER = """
import json, os, signal
from dataclasses import asdict
import torch
from torch.utils.data import DataLoader, TensorDataset
from torchtrainer import TorchTrainer

def data_creator(config):
    x = torch.randn(64, 4)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)

class Seen:
    def __init__(self):
        self.events, self.ends, self.steps = [], [], []
    def on_failure(self, event):
        self.events.append(asdict(event))
    def on_run_end(self, event):
        self.ends.append(asdict(event))
    def on_step(self, event):
        self.steps.append(event.step)
    def on_epoch_end(self, event):
        if event.epoch == 1:
            pid = next(one.pid for one in trainer.status().processes if one.ranks == (1,))
            os.kill(pid, signal.SIGKILL)

seen = Seen()
with TorchTrainer(
    model_creator=lambda config: torch.nn.Linear(4, 1),
    data_creator=data_creator,
    optimizer_creator=lambda model, config: torch.optim.SGD(model.parameters(), lr=0.1),
    loss_creator=torch.nn.MSELoss,
    num_workers=2,
    use_gpu=False,
    run_dir="run",
    callbacks=[seen],
) as trainer:
    history = trainer.fit(3)
    while not seen.events:
        trainer.train()
    status = [asdict(one) for one in trainer.status().failures]
    failures = [asdict(one) for one in history.failures]
print(json.dumps({"status": status, "events": seen.events, "history": failures, "end": seen.ends[0], "steps_shown": seen.steps}))
"""


def test_nothing_here_imports_torch_or_drawing_packages() -> None:
    script = """
import sys
from torchtrainer import resnet
from torchtrainer.observe import devices, events, failures, history, notices, plot, progress_bar, status, table, timeline
heavy = {"torch", "torchvision", "tqdm", "matplotlib", "pandas", "numpy", "pynvml"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
