"""The errors themselves: they pickle, and the text for each cause says what, who, where, the log and what to change."""

from __future__ import annotations

import inspect
import pickle

import pytest

from torchtrainer import errors
from torchtrainer.control.messages import Failure
from torchtrainer.driver.causes import CrashLoop, EngineLost, StartTimedOut, UserCodeFailed, WorkerDied, WorkerHung
from torchtrainer.driver.policies import root_cause
from torchtrainer.driver.report import LINE_CHARS, TRACEBACK_LINES, Scene, error_of, rank_of, short_cause
from torchtrainer.process.crashes import last_crash

pytestmark = pytest.mark.pure

CLASSES = [
    kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.TorchTrainerError)
]
SCENE = Scene(
    log_dir="/runs/a/logs",
    logs_stay=True,
    pids={0: 100, 1: 101, 2: 102},
    machines={0: "here", 1: "there", 2: "there"},
    doing="train()",
)


def failure(
    rank=1, *, text="no", type_name="MyError", error=None, kind="error", traceback="Traceback ...\nMyError: no"
):
    return Failure(
        group="g",
        worker=rank,
        rank=rank,
        call=1,
        kind=kind,
        type_name=type_name,
        text=text,
        traceback=traceback,
        phase="data",
        step=36,
        blob=pickle.dumps(error) if error is not None else b"",
    )


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_pickles_with_its_text_and_cause(kind) -> None:
    error = kind("what happened")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind
    assert (str(copy), copy.args) == (str(error), error.args)
    assert "what happened" in str(copy)


@pytest.mark.parametrize("kind", [errors.WorkerDiedError, errors.WorkerHungError])
def test_an_error_of_a_process_keeps_what_programs_read(kind) -> None:
    copy = pickle.loads(pickle.dumps(kind("gone", 3, -9)))
    assert (str(copy), copy.rank, copy.exit_code) == ("gone", 3, -9)


def test_every_error_is_exported_and_says_what_it_is_for() -> None:
    import torchtrainer

    for kind in CLASSES:
        assert kind.__doc__
        assert getattr(torchtrainer, kind.__name__) is kind


def test_an_exception_comes_back_as_itself_with_the_place_as_its_cause() -> None:
    error = error_of(UserCodeFailed(failures=(failure(error=KeyError("k")),)), SCENE)
    assert isinstance(error, KeyError)
    assert error.args == ("k",)
    assert isinstance(error.__cause__, errors.RemoteTraceback)
    text = str(error.__cause__)
    assert "raised on rank 1 (pid 101, " in text
    assert "in train(), phase data, at step 36 (36 optimizer steps were completed):" in text
    assert "Traceback ...\nMyError: no" in text
    assert "Log: /runs/a/logs/rank_1/stderr.log" in text


def test_equal_errors_are_told_once_and_others_in_a_line() -> None:
    same = (failure(0), failure(1), failure(2, text="other\nand more"))
    text = str(error_of(UserCodeFailed(failures=same), SCENE).__cause__)
    assert "raised on ranks 0, 1 (equal errors; pids 100, 101, " in text
    assert text.count("Traceback ...") == 1
    assert "rank 2 (pid 102, " in text
    assert "raised MyError: other\n" in text


def test_an_exception_that_cannot_be_made_again_comes_back_by_its_text() -> None:
    error = error_of(UserCodeFailed(failures=(failure(),)), SCENE)
    assert type(error) is errors.WorkerError
    assert str(error) == "MyError in user code: no"
    assert "MyError: no" in str(error.__cause__)


def test_endless_texts_are_cut_where_they_are_shown() -> None:
    traceback = "\n".join(["first", *["x" * (LINE_CHARS + 7)] * (2 * TRACEBACK_LINES), "last"])
    shown = str(error_of(UserCodeFailed(failures=(failure(traceback=traceback),)), SCENE).__cause__)
    assert "... (7 more characters)" in shown
    assert f"... {TRACEBACK_LINES + 2} lines left out; error.json has them ..." in shown
    assert "\nfirst\n" in shown
    assert "\nlast\n" in shown


def test_no_log_is_named_that_will_not_be_there() -> None:
    scene = Scene(log_dir="/tmp/x", logs_stay=False, pids={}, doing="train()")
    text = str(error_of(UserCodeFailed(failures=(failure(),)), scene).__cause__)
    assert "/tmp/x" not in text
    assert "give a run_dir to keep them" in text


@pytest.mark.parametrize(
    ("doing", "phase", "text"),
    [
        ("start", "setup", "during the start of the workers, phase setup:"),
        ("apply_operator()", "apply_operator", "in apply_all_operators(), at step 36"),
        ("apply_worker()", "apply_worker", "in apply_all_workers(), at step 36"),
        ("validate()", "validate", "in validate(), phase validate, at step 36"),
    ],
)
def test_a_place_has_the_name_that_the_user_called(doing, phase, text) -> None:
    scene = Scene(log_dir="/l", logs_stay=True, pids={}, doing=doing)
    failed = Failure(
        group="g", worker=0, rank=0, call=1, kind="error", type_name="E", text="", traceback="", phase=phase, step=36
    )
    assert text in str(error_of(UserCodeFailed(failures=(failed,)), scene).__cause__)


def died(**changes):
    return WorkerDied(
        **{"ranks": (1,), "pid": 101, "exit_code": -9, "phase": "train", "step": 36, "machine": "there", **changes}
    )


def test_a_killed_worker() -> None:
    error = error_of(died(max_rss_bytes=3 << 30), SCENE)
    assert type(error) is errors.WorkerDiedError
    assert (error.rank, error.exit_code) == (1, -9)
    text = str(error)
    assert text.startswith("rank 1 (pid 101, ")
    assert "was killed by SIGKILL in train(), phase train, at step 36 or later" in text
    assert "out-of-memory killer; its peak was 3072 MiB" in text
    assert "start again with a new TorchTrainer" in text
    assert "Log: /runs/a/logs/rank_1/stderr.log" in text


def test_what_was_tried_and_what_to_do_after_a_loss_that_ends_a_group() -> None:
    scene = Scene(log_dir="/l", logs_stay=False, pids={}, doing="train()", why="no worker was left that has the state")
    text = str(error_of(died(ranks=(1, 3)), scene))
    assert text.startswith("ranks 1, 3 (pid 101, ")
    assert "could not continue in place: no worker was left that has the state." in text
    assert "start again with a new TorchTrainer; with a run_dir it can resume" in text


def test_a_crash_loop_says_how_often_and_tells_the_latest_failure() -> None:
    error = error_of(CrashLoop(failures=4, last=died(exit_code=7, stderr_tail="no such file")), SCENE)
    assert type(error) is errors.WorkerDiedError
    assert (error.rank, error.exit_code) == (1, 7)
    text = str(error)
    assert text.startswith("crash loop: workers were lost 4 times in a row without a step in between")
    assert "FailureConfig.max_failures allows 3" in text
    assert "exited with code 7" in text
    assert "no such file" in text


def test_replacements_that_cannot_be_built_are_a_crash_loop_too() -> None:
    late = StartTimedOut(ranks=(1,), setting="worker_connect_s", limit_s=60.0)
    error = error_of(CrashLoop(failures=3, last=late, building=True), SCENE)
    assert type(error) is errors.WorkerStartError
    assert "3 replacements of a lost worker in a row could not be built" in str(error)
    assert "worker_connect_s" in str(error)


def test_a_crashed_worker_shows_the_stack_that_it_died_in(tmp_path) -> None:
    file = tmp_path / "crash.txt"
    file.write_text("Fatal Python error: Aborted\n\nof an earlier process\n")
    before = file.stat().st_size
    assert last_crash(file, before) == ""
    stack = 'Current thread 0x2 (most recent call first):\n  File "mine.py", line 7 in train_batch\n'
    with file.open("a") as more:
        more.write(f"Fatal Python error: Bus error\n\nof a loader\n\nFatal Python error: Segmentation fault\n\n{stack}")
        more.write(f"\nExtension modules: numpy, torch, {'x' * 3000}\n")
    text = str(error_of(died(exit_code=-11, crash=last_crash(file, before), stderr_tail="noise"), SCENE))
    assert "was killed by SIGSEGV" in text
    assert "Fatal Python error: Segmentation fault" in text
    assert 'File "mine.py", line 7 in train_batch' in text
    assert "noise" in text
    assert "Bus error" not in text
    assert "Extension modules" not in text


def test_the_last_lines_of_a_worker_that_just_went() -> None:
    tail = "\n".join(f"line {number}" for number in range(100))
    text = str(error_of(died(exit_code=7, stderr_tail=tail), SCENE))
    assert "exited with code 7" in text
    assert "The last lines of its stderr:" in text
    assert "line 99" in text
    assert "line 50" not in text


@pytest.mark.parametrize(("said", "shown"), [("3", "sys.exit(3)"), ("", "sys.exit()"), ("bye", "sys.exit('bye')")])
def test_a_worker_that_left(said, shown) -> None:
    leaving = failure(kind="exit", text=said, type_name="SystemExit", traceback="Traceback of the exit")
    text = str(error_of(died(exit_code=3, failure=leaving), SCENE))
    assert f"called {shown} in train(), phase train, at step 36" in text
    assert "return from the hook or function, or raise an exception" in text
    assert "Traceback of the exit" in text


def test_a_silent_death_takes_the_step_of_the_ranks_that_saw_it() -> None:
    cause = root_cause((failure(0, text="connection closed"),), (died(step=2),))
    assert isinstance(cause, WorkerDied)
    assert (cause.rank, cause.step) == (1, 36)


def test_a_hung_worker() -> None:
    stacks = 'Thread 0x1 (most recent call first):\n  File "poll.py"\n\nCurrent thread 0x2 (most recent call first):\n  File "mine.py"'
    cause = WorkerHung(ranks=(1,), pid=101, phase="train", step=1, silent_s=1.04, limit_s=1.0, stacks=stacks)
    error = error_of(cause, SCENE)
    assert type(error) is errors.WorkerHungError
    text = str(error)
    assert "rank 1 (pid 101, " in text
    assert "made no progress for 1.0 s in train(), phase train, at step 1 (1 optimizer step was completed)" in text
    assert "The limit was 1 s: pass failure=FailureConfig(hang_timeout_s=...)" in text
    assert text.index("mine.py") < text.index("poll.py")


def test_a_start_that_took_too_long_and_a_lost_engine() -> None:
    late = error_of(StartTimedOut(ranks=(0, 2), setting="worker_connect_s", limit_s=60.0), SCENE)
    assert type(late) is errors.WorkerStartError
    assert "rank 0, 2: no worker process within 60 s (Timeouts.worker_connect_s)" in str(late)
    lost = error_of(EngineLost(text="the host was killed\n"), SCENE)
    assert type(lost) is errors.EngineError
    assert "were lost in train(): the host was killed" in str(lost)
    assert "Create a new TorchTrainer" in str(lost)


@pytest.mark.parametrize(
    ("cause", "rank", "short"),
    [
        (UserCodeFailed(failures=(failure(),)), 1, "MyError in user code"),
        (died(), 1, "was killed by SIGKILL"),
        (died(failure=failure(kind="exit")), 1, "called sys.exit"),
        (StartTimedOut(ranks=(0,), setting="s", limit_s=1.0), None, "did not start"),
        (EngineLost(text=""), None, "engine lost"),
        (CrashLoop(failures=2, last=died()), 1, "crash loop: was killed by SIGKILL"),
    ],
)
def test_causes_in_a_few_words(cause, rank, short) -> None:
    assert (rank_of(cause), short_cause(cause)) == (rank, short)
