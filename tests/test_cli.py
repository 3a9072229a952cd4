"""The ``torchtrainer`` command."""

from __future__ import annotations

import subprocess
import sys

import pytest

import torchtrainer
from torchtrainer.launcher.cli import COMMANDS, main


def test_version_is_the_package_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"torchtrainer {torchtrainer.__version__}\n"


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for command, summary in COMMANDS.items():
        assert f"  {command} " in text and summary in text


@pytest.mark.parametrize("command", ["run", "status", "doctor", "verify-resume", "replay-driver"])
def test_commands_have_help_of_their_own(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: torchtrainer {command}" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["rn"], ["--nope"]])
def test_wrong_usage_exits_2_with_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: torchtrainer" in capsys.readouterr().err


def test_python_dash_m_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "torchtrainer", "run"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "usage: torchtrainer run" in done.stderr and "SCRIPT" in done.stderr
