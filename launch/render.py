#!/usr/bin/env python3
"""Renders a launch kit, shows what would be submitted, and submits it if told to.

    python launch/render.py KIT --script train.py [--set NAME=VALUE ...] [--out DIR] [--submit]

A kit is a directory beside this file: templates, and ``parameters.ini``, which names every value in them; what all
kits share is in the ``parameters.ini`` beside this file. In a template ``@{name}`` is a value, quoted for the language
of that template; ``@{file.sh}`` is another template of the kit, rendered, as one YAML string; a line with ``@{?name}``
is left out where that value is empty. Values are data: whatever they contain, they do not become shell, YAML or unit
syntax.
"""

from __future__ import annotations

import argparse
import configparser
import difflib
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

KITS_DIR = Path(__file__).resolve().parent
PARAMETER_FILE = "parameters.ini"
KIT_SECTION = "kit"
EXIT_FAILURE = 1
EXIT_USAGE = 2

REFERENCE = re.compile(r"@\{(\??)([\w.]+)\}")
PLAIN = re.compile(r"[A-Za-z0-9_.,:/@%+=-]*")
"""Stand for themselves in shell, in ``#SBATCH`` lines, in YAML strings and, with % doubled, in systemd units."""
NUMBER = re.compile(r"0|[1-9][0-9]*")
"""Decimal: with a leading 0, shell and YAML would read it as octal."""
BLOCK_INDENT = 2
"""Columns by which a script inside a manifest is indented more than the line that it belongs to."""
UNSAFE_IN_YAML = re.compile("[\x7f-\x9f\u2028\u2029\ufeff]")


class UsageError(Exception):
    """What was asked for cannot be rendered; the text says why and what to change."""


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One value of a kit.

    Attributes:
        name: as in ``--set NAME=VALUE`` and ``@{NAME}``.
        kind: ``text``: one argument, any characters. ``words``: several, split as a shell splits them. ``plain``:
            characters that no language treats specially. ``number``: decimal digits.
        help: what it is for, and its unit.
        default: None where the value has to be given.
        check: regular expression for the whole value, or for each of the words; empty: anything of that kind.
        above: name of the parameter whose number has to be lower; empty: no such bound.
    """

    name: str
    kind: str
    help: str
    default: str | None = None
    check: str = ""
    above: str = ""

    def __post_init__(self) -> None:
        if self.kind not in {"text", "words", "plain", "number"}:
            raise ValueError(f"parameter {self.name}: unknown kind {self.kind!r}")

    def validate(self, value: str) -> None:
        """Raises UsageError unless the value is of this parameter's kind."""
        if "\0" in value or not _is_unicode(value):
            raise UsageError(f"{self.name}: a value is Unicode text without NUL characters, not {value!r}")
        parts = split_words(self.name, value) if self.kind == "words" else [value]
        if not any(parts):
            if self.default != "":
                raise UsageError(f"{self.name} must not be empty: {self.help}")
            return
        if self.kind == "number" and not NUMBER.fullmatch(value):
            raise UsageError(f"{self.name} is a number, not {value!r}: {self.help}")
        if self.kind == "plain" and not PLAIN.fullmatch(value):
            raise UsageError(
                f"{self.name} takes letters, digits and any of _.,:/@%+=- only, not {value!r}: {self.help}"
            )
        for part in parts:
            if self.check and not re.fullmatch(self.check, part, re.DOTALL):
                raise UsageError(f"{self.name} has to match {self.check}, and {part!r} does not: {self.help}")


@dataclass(frozen=True, kw_only=True)
class Kit:
    """Templates and their parameters.

    Attributes:
        name: of its directory.
        summary: one line for ``--list``.
        files: names of the templates that are written.
        submit: command lines, templates themselves; ``@{out}`` is the directory with the rendered files.
        parameters: by name, in the order of the files: the shared ones first.
    """

    name: str
    summary: str
    files: tuple[str, ...]
    submit: tuple[str, ...]
    parameters: Mapping[str, Parameter]


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def split_words(name: str, value: str) -> list[str]:
    """Splits a value of kind ``words``."""
    try:
        return shlex.split(value)
    except ValueError as error:
        raise UsageError(f"{name} is split into words as a shell does it, and {value!r} cannot be: {error}") from error


def quote_shell(value: str) -> str:
    """One word of POSIX shell."""
    return shlex.quote(value)


def quote_yaml(value: str) -> str:
    """One YAML scalar: JSON is YAML, but for characters that YAML counts as line ends or does not allow."""
    return UNSAFE_IN_YAML.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


def yaml_block(text: str, indent: int) -> str:
    """A script as a YAML block, for people to read; as one escaped line if a block cannot hold its characters."""
    if all(character == "\n" or character.isprintable() for character in text):
        return "|\n" + textwrap.indent(text.rstrip("\n"), " " * indent, lambda _: True)
    return quote_yaml(text)


def quote_systemd(value: str) -> str:
    """One word of a unit's command line: no variables, no specifiers, no second line."""
    doubled = re.sub(r'["\\]', r"\\\g<0>", value.replace("%", "%%").replace("$", "$$"))
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda found: f"\\x{ord(found[0]):02x}", doubled) + '"'


def format_shell(kind: str, value: str) -> str:
    """A value in a shell script or a command line."""
    words = shlex.split(value) if kind == "words" else [value]
    return value if kind in {"plain", "number"} else " ".join(map(quote_shell, words))


def format_yaml(kind: str, value: str) -> str:
    """A value in YAML: a number, a string, or a list of strings."""
    if kind == "words":
        return "[" + ", ".join(map(quote_yaml, shlex.split(value))) + "]"
    return value if kind == "number" else quote_yaml(value)


def format_systemd(kind: str, value: str) -> str:
    """A value in a unit file: bare if plain, otherwise words of a command line."""
    if kind in {"plain", "number"}:
        return value.replace("%", "%%")
    return " ".join(map(quote_systemd, shlex.split(value) if kind == "words" else [value]))


FORMATS: Mapping[str, Callable[[str, str], str]] = {
    ".sh": format_shell,
    ".sbatch": format_shell,
    ".yaml": format_yaml,
    ".service": format_systemd,
}


def kit_names() -> list[str]:
    """The kits beside this file."""
    return sorted(path.parent.name for path in KITS_DIR.glob(f"*/{PARAMETER_FILE}"))


def near(word: str, words: Sequence[str]) -> str:
    """Names the words that may have been meant; empty if none is near."""
    found = difflib.get_close_matches(word, words)
    return f" Did you mean {' or '.join(found)}?" if found else ""


def load_kit(name: str) -> Kit:
    """Reads a kit's parameters, and those that all kits share; where both name one, the kit's counts."""
    if name not in kit_names():
        raise UsageError(f"there is no kit {name!r}.{near(name, kit_names())} The kits: {', '.join(kit_names())}")
    parameters: dict[str, Parameter] = {}
    reader = configparser.ConfigParser(interpolation=None)
    for path in (KITS_DIR / PARAMETER_FILE, KITS_DIR / name / PARAMETER_FILE):
        reader = configparser.ConfigParser(interpolation=None)
        reader.read_string(path.read_text(encoding="utf-8"), str(path))
        for section in reader.sections():
            if section != KIT_SECTION:
                parameters[section] = Parameter(name=section, **dict(reader[section]))
    about = reader[KIT_SECTION]
    return Kit(
        name=name,
        summary=about["summary"],
        files=tuple(about["files"].split()),
        submit=tuple(about["submit"].strip().splitlines()),
        parameters=parameters,
    )


def choose_values(kit: Kit, given: Mapping[str, str]) -> dict[str, str]:
    """Puts the given values over the defaults.

    Raises:
        UsageError: for an unknown name, a missing value, or a value that is not of its parameter's kind.
    """
    for name in given:
        if name not in kit.parameters:
            known = list(kit.parameters)
            raise UsageError(f"kit {kit.name} has no parameter {name!r}.{near(name, known)} It has: {', '.join(known)}")
    values = {name: given.get(name, parameter.default) for name, parameter in kit.parameters.items()}
    missing = [f"{name} ({kit.parameters[name].help})" for name, value in values.items() if value is None]
    if missing:
        raise UsageError(f"kit {kit.name} needs a value, --set NAME=VALUE, for: {'; '.join(missing)}")
    chosen = {name: value for name, value in values.items() if value is not None}
    for name, parameter in kit.parameters.items():
        parameter.validate(chosen[name])
        if parameter.above and int(chosen[name]) <= int(chosen[parameter.above]):
            lower = f"{parameter.above}={chosen[parameter.above]}"
            raise UsageError(f"{name}={chosen[name]} has to be greater than {lower}: {parameter.help}")
    return chosen


def render_text(kit: Kit, values: Mapping[str, str], text: str, suffix: str) -> str:
    """Fills in a template written in the language that the suffix stands for."""
    format_value = FORMATS[suffix]

    def fill(found: re.Match[str]) -> str:
        optional, name = found.groups()
        if optional:
            return ""
        if name in values:
            return format_value(kit.parameters[name].kind if name in kit.parameters else "text", values[name])
        # A script inside a manifest. Kubernetes expands $(NAME) and $$ in a command before the shell sees it.
        indent = len(found.string) - len(found.string.lstrip()) + BLOCK_INDENT
        return yaml_block(render_file(kit, values, name).replace("$", "$$"), indent)

    return "".join(
        REFERENCE.sub(fill, line)
        for line in text.splitlines(keepends=True)
        if all(values[name].strip() for optional, name in REFERENCE.findall(line) if optional)
    )


def render_file(kit: Kit, values: Mapping[str, str], name: str) -> str:
    """Renders one template of the kit."""
    path = KITS_DIR / kit.name / name
    return render_text(kit, values, path.read_text(encoding="utf-8"), path.suffix)


def submit_commands(kit: Kit, values: Mapping[str, str], out: Path) -> list[list[str]]:
    """The commands that submit the rendered files, as argument lists."""
    with_out = {**values, "out": str(out)}
    return [shlex.split(render_text(kit, with_out, line, ".sh")) for line in kit.submit]


def list_kits(names: Sequence[str]) -> str:
    """What ``--list`` prints."""
    shown = []
    for kit in map(load_kit, names):
        shown.append(f"{kit.name}: {kit.summary}")
        for name, parameter in kit.parameters.items():
            value = "required" if parameter.default is None else repr(parameter.default)
            shown.append(f"  {name:<18} {value}\n      {parameter.help}")
    return "\n".join(shown)


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="render.py",
        description="Show what a launch kit would submit (the default), write it (--out), or submit it (--submit).",
        allow_abbrev=False,
    )
    parser.add_argument("kit", nargs="?", metavar="KIT", help=f"one of {', '.join(kit_names())}")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="the value of a parameter")
    parser.add_argument("--script", metavar="FILE", help="the training script: the same as --set script=FILE")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="write the files there; NAME-KIT if --submit needs them"
    )
    parser.add_argument("--submit", action="store_true", help="write the files and run the commands that submit them")
    parser.add_argument("--list", action="store_true", help="show the kits, or one kit, with all parameters")
    return parser


def given_values(options: argparse.Namespace) -> dict[str, str]:
    """The values on the command line; the last one of a name counts."""
    given = {}
    for setting in options.set:
        name, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"--set takes NAME=VALUE, not {setting!r}")
        given[name] = value
    if options.script is not None:
        given["script"] = options.script
    return given


def run_commands(commands: Sequence[list[str]]) -> int:
    """Runs the commands until one fails. The last one takes this process's place, so that signals reach it."""
    for command in commands:
        print(f"+ {shlex.join(command)}", file=sys.stderr, flush=True)
        try:
            if command is commands[-1]:
                os.execvp(command[0], command)  # noqa: S606 - no shell: an argument list of our own
            status = subprocess.run(command, check=False).returncode
        except FileNotFoundError:
            print(f"render.py: {command[0]} is not on this machine: run this where it is", file=sys.stderr)
            return EXIT_FAILURE
        if status:
            return status
    return 0


def show(kit: Kit, options: argparse.Namespace) -> int:
    """Renders the kit, and shows, writes or submits what came out."""
    values = choose_values(kit, given_values(options))
    out = options.out or Path(f"{values['name']}-{kit.name}")
    rendered = {name: render_file(kit, values, name) for name in kit.files}
    commands = submit_commands(kit, values, out)
    if options.out or options.submit:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in rendered.items():
            (out / name).write_text(text, encoding="utf-8")
    else:
        for name, text in rendered.items():
            print(f"==> {out / name} <==\n{text}")
    if options.submit:
        return run_commands(commands)
    print("\n".join(["==> commands that submit it <==", *map(shlex.join, commands)]))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status: 2 for wrong usage, otherwise that of what was run."""
    parser = make_parser()
    options = parser.parse_args(argv)
    try:
        if options.list:
            print(list_kits([options.kit] if options.kit else kit_names()))
            return 0
        if options.kit is None:
            raise UsageError(f"which kit? One of {', '.join(kit_names())}; --list shows their parameters")
        return show(load_kit(options.kit), options)
    except UsageError as error:
        print(f"render.py: {error}", file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        print(f"render.py: {error}", file=sys.stderr)
        return EXIT_FAILURE


if __name__ == "__main__":
    sys.exit(main())
