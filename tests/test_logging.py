"""What the user is told goes through the logger ``torchtrainer``: routed, raised and silenced as an application configures it."""

from __future__ import annotations

import io
import logging
import logging.config
import os
import sys

import pytest
from programs import CREATORS, run_program

from torchtrainer.observe.notices import LOGGER, PacedNotices, log, notice, warn
from torchtrainer.observe.progress_bar import PassBar

LINE = "2 traces are in runs"
TOLD = f"torchtrainer: {LINE}\n"


@pytest.fixture(autouse=True)
def untouched():
    """Logging is as in a fresh process, but for what pytest adds, and is so again afterwards."""
    logger, root = logging.getLogger(LOGGER), logging.root
    before = root.level, root.handlers[:]
    yield logger
    logger.handlers[:], logger.filters[:] = [], []
    logger.level, logger.propagate, logger.disabled = logging.NOTSET, True, False
    root.level, root.handlers[:] = before
    logging.disable(logging.NOTSET)
    for one in logging.root.manager.loggerDict.values():
        if isinstance(one, logging.Logger):
            one._cache.clear()


@pytest.fixture
def logger(untouched) -> logging.Logger:
    return untouched


# Where lines go


def test_without_a_configuration_lines_are_on_standard_error_as_it_is_then(capsys, monkeypatch) -> None:
    notice(LINE)
    warn("a worker\n was lost\x1b[2J")
    assert capsys.readouterr() == ("", TOLD + "torchtrainer: a worker was lost?[2J\n")
    later = io.StringIO()
    monkeypatch.setattr(sys, "stderr", later)
    notice(LINE)
    assert later.getvalue() == TOLD


def test_pytest_captures_records(caplog, capsys) -> None:
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        notice(LINE)
        warn("lost")
    notice(LINE)
    told = [(r.name, r.levelname, r.getMessage(), r.module, r.rank, r.pid) for r in caplog.records]
    assert told == [
        (LOGGER, "WARNING", "lost", "test_logging", None, os.getpid()),
        (LOGGER, "INFO", LINE, "test_logging", None, os.getpid()),
    ]
    assert capsys.readouterr().err == "torchtrainer: lost\n" + TOLD


def test_a_handler_of_the_logger_takes_the_place_of_ours(logger, capsys, tmp_path) -> None:
    handler = logging.FileHandler(tmp_path / "app.log")
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(rank)s %(message)s"))
    logger.addHandler(handler)
    notice(LINE)
    logger.removeHandler(handler)
    handler.close()
    assert (tmp_path / "app.log").read_text() == f"INFO torchtrainer None {LINE}\n"
    assert capsys.readouterr().err == ""
    notice(LINE)
    assert capsys.readouterr().err == TOLD, "the handler is gone"


@pytest.mark.parametrize(
    "silence",
    [
        lambda logger: logger.addHandler(logging.NullHandler()),
        lambda logger: logger.setLevel(logging.CRITICAL),
        lambda logger: logger.addFilter(lambda record: False),
        lambda logger: setattr(logger, "disabled", True),
        lambda logger: logging.disable(logging.CRITICAL),
        lambda logger: logging.root.setLevel(logging.ERROR),
    ],
    ids=["NullHandler", "level", "filter", "disabled", "logging.disable", "level of the root logger"],
)
def test_ways_to_silence_it(silence, logger, capsys, caplog) -> None:
    silence(logger)
    notice(LINE)
    warn(LINE)
    assert capsys.readouterr().err == ""


def test_a_raised_level_leaves_what_went_wrong(logger, capsys) -> None:
    logger.setLevel(logging.WARNING)
    notice(LINE)
    warn("lost")
    assert capsys.readouterr().err == "torchtrainer: lost\n"


def test_handlers_of_the_root_logger_get_records_and_a_terminal_shows_a_line_once(capsys, tmp_path) -> None:
    file = logging.FileHandler(tmp_path / "app.log")
    strict = logging.FileHandler(tmp_path / "errors.log")
    strict.setLevel(logging.ERROR)
    logging.root.handlers += [logging.StreamHandler(), file, strict]
    notice(LINE)
    for handler in (file, strict):
        handler.close()
    assert (tmp_path / "app.log").read_text() == f"{LINE}\n"
    assert (tmp_path / "errors.log").read_text() == ""
    assert capsys.readouterr().err == TOLD


def test_nothing_of_ours_is_on_any_logger(logger, capsys) -> None:
    before = logging.root.handlers[:]
    notice(LINE)
    assert (logger.handlers, logger.level, logger.propagate) == ([], logging.NOTSET, True)
    assert logging.root.handlers == before


def test_a_bar_is_not_torn_by_lines(capsys, logger) -> None:
    with PassBar("train epoch 1", total=8) as bar:
        lines = PacedNotices(every_s=0)
        with bar.aside():
            lines.say(LINE)
    drawn = capsys.readouterr().err
    assert f"\r{TOLD}" in drawn


def test_what_another_process_tells_carries_its_rank_and_pid(logger, capsys, caplog) -> None:
    log(logging.WARNING, "lost", rank=3, pid=41, prefix="[rank 3] ")
    (record,) = caplog.records
    assert (record.rank, record.pid, record.levelno, record.getMessage()) == (3, 41, logging.WARNING, "lost")
    assert capsys.readouterr().err == "[rank 3] torchtrainer: lost\n"


# Scripts

BASIC = "import logging; logging.basicConfig(level=logging.INFO, format='APP %(message)s')"
DICT = """
logging.config.dictConfig({"version": 1, "handlers": {"file": {"class": "logging.FileHandler", "filename": "app.log"}},
                           "root": {"handlers": ["file"], "level": "INFO"}})
"""
IN_SCRIPTS = {
    "nothing configured": ("", "", 0),
    "basicConfig before": (BASIC, "", 0),
    "basicConfig after": ("", BASIC, 0),
    "to a file": ("import logging; logging.basicConfig(filename='app.log')", "", 2),
    "existing loggers disabled": ("import logging.config" + DICT, "", 2),
    "existing loggers disabled later": ("import logging.config", DICT, 1),
}


@pytest.mark.parametrize(("before", "after", "filed"), IN_SCRIPTS.values(), ids=IN_SCRIPTS)
def test_a_script_that_configures_logging_is_told_each_line_once(before, after, filed, tmp_path) -> None:
    tell = f"from torchtrainer.observe.notices import notice\nnotice({LINE!r})"
    program = run_program(tmp_path, f"import torchtrainer\n{before}\n{tell}\n{after}\n{tell}")
    assert (program.process.returncode, program.errors) == (0, TOLD * 2)
    log_file = tmp_path / "app.log"
    assert (log_file.read_text().count(LINE) if log_file.exists() else 0) == filed


COLLECT = """
import logging
told = []
class Collect(logging.Handler):
    def emit(self, record):
        told.append(record.getMessage())
        print("RECORD", record.levelname, record.rank, record.pid != os.getpid(), record.getMessage())
logger, collect = logging.getLogger("torchtrainer"), Collect()
"""
WORKERS = """
import types
class Imports(TrainingOperator):
    def setup(self, config):
        sys.modules["torchvision.not_there"] = types.ModuleType("torchvision.not_there")  # the spawner looks for it, too
        super().setup(config)

def run():
    with TorchTrainer(cpu_affinity=True, num_cpus_per_worker=1000, run_dir=None, **CREATORS) as trainer:
        trainer.train(num_steps=1)

for CREATORS["num_workers"] in (1, 2):
    logger.addHandler(collect)
    run()
    logger.removeHandler(collect)
    run()
logger.addHandler(collect)
with TorchTrainer(training_operator_cls=Imports, run_dir=None, **CREATORS) as trainer:
    deadline = time.monotonic() + 30
    while "preload" not in told[-1] and time.monotonic() < deadline:
        trainer.validate()
"""
"""Each process would need a thousand cores: rank 0 says that it has none of its own."""
REFUSED = "cpu_affinity=True: "


def test_records_of_workers_and_of_their_spawner_reach_the_application(tmp_path) -> None:
    program = run_program(tmp_path, CREATORS + COLLECT + WORKERS)
    assert program.process.returncode == 0, program.errors
    assert program.output.count(f"RECORD WARNING 0 True {REFUSED}") == program.output.count(REFUSED) == 2
    plain = [line.partition("torchtrainer: ")[0] for line in program.errors.splitlines() if REFUSED in line]
    assert plain == ["", "[rank 0] "]
    assert "RECORD WARNING None True cannot preload torchvision.not_there: " in program.output


def test_under_a_launcher_records_carry_the_rank_of_their_process(tmp_path) -> None:
    script = COLLECT + "logger.addHandler(collect)\n"
    script += 'CREATORS["num_workers"] = 3\nwith TorchTrainer(run_dir=None, **CREATORS) as trainer:\n    trainer.train(num_steps=1)\n'
    launcher = (sys.executable, "-m", "torchtrainer", "run", "--nproc-per-node", "2")
    program = run_program(tmp_path, CREATORS + script, python=launcher)
    assert program.process.returncode == 0, program.errors
    assert program.output.count("RECORD INFO 0 False num_workers=3 gives way to the 2 processes") == 1
    assert "gives way" not in program.errors


def test_importing_the_package_touches_no_logger(tmp_path) -> None:
    script = "import logging, torchtrainer\ntorchtrainer.TorchTrainer\nprint([n for n in logging.root.manager.loggerDict if 'torchtrainer' in n], logging.root.handlers)\n"
    assert run_program(tmp_path, script).output == "[] []\n"
