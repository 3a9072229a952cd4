"""Starting the launcher as users do, with the scripts below ``launch_scripts``."""

from __future__ import annotations

import sys
from pathlib import Path

from programs import Program, start_program

SCRIPTS = Path(__file__).parent / "launch_scripts"
RUN = (sys.executable, "-m", "torchtrainer", "run")
READY = "ready"
"""What a rank prints when it has come to the point of the test."""


def launch(
    tmp_path: Path,
    script: str,
    *arguments: str,
    options: str = "",
    before: tuple[str, ...] = (),
    environ: dict[str, str] | None = None,
    whole: bool = False,
) -> Program:
    """Starts the launcher on a script, in ``tmp_path``.

    Args:
        tmp_path: where it runs.
        script: below ``launch_scripts``; it is called ``program.py`` where it runs.
        arguments: of the script.
        options: of the launcher, separated by spaces.
        before: a program that starts the launcher, with its arguments.
        environ: more variables.
        whole: as for `start_program`.
    """
    variables = {"OMP_NUM_THREADS": "1", **(environ or {})}
    text = (SCRIPTS / script).read_text()
    return start_program(tmp_path, text, *arguments, python=(*before, *RUN, *options.split()), whole=whole, **variables)


def wait_for_ranks(program: Program, ranks: int = 2, text: str = READY) -> None:
    """Reads the output until so many ranks have printed a line with the text."""
    for _ in range(ranks):
        program.wait_for(text)
