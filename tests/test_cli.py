"""The ``torchtrainer`` command."""

from __future__ import annotations

import subprocess
import sys

import pytest

import torchtrainer
from torchtrainer.launcher.cli import PLANNED_COMMANDS, main


def test_version_is_the_package_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"torchtrainer {torchtrainer.__version__}\n"


def test_help_names_every_command_and_says_that_they_are_to_come(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "not in version" in text
    for command in PLANNED_COMMANDS:
        assert f"  {command.name} " in text


@pytest.mark.parametrize("command", [command.name for command in PLANNED_COMMANDS])
@pytest.mark.parametrize("arguments", [[], ["--nproc-per-node", "2", "train.py", "--help"]])
def test_planned_command_says_so_in_one_line_and_exits_2(command, arguments, capsys):
    assert main([command, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"torchtrainer {command} is not in version {torchtrainer.__version__} yet; until then, ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["rn"], ["--nope"]])
def test_wrong_usage_exits_2_with_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: torchtrainer" in capsys.readouterr().err


def test_python_dash_m_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "torchtrainer", "doctor"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "torchtrainer doctor is not in version" in done.stderr
