"""The options of the launcher: those of torchrun and ``torch.distributed.launch``, and a few of ours.

The parsers are made without torch, so that ``--help`` and usage errors take no time; what they return can be given to
`torch.distributed.run.config_from_args` as it is. As under torchrun,

- every option is spelled with dashes or underscores and may be abbreviated while that is unambiguous;
- ``PET_<NAME>`` in the environment gives an option's default;
- everything after the script belongs to the script; of that, argparse takes away a ``--`` directly after the script,
  unless there was one before it. ``torchtrainer run`` looks for ``--num-workers`` there.
"""

from __future__ import annotations

import argparse
import enum
import importlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torchtrainer.launcher.option_checks import OPTION_GROUPS, OWN_GROUP, USE_ENV, Option, conflict_in, read_flag

SHELLS = ("bash", "zsh", "tcsh")
"""The shells that completion is offered for where shtab, which knows its own, is not installed."""

WORKERS_OPTION = "--num-workers"
"""The one option of ours that ``torchtrainer run`` also takes directly after the script."""


class Form(enum.Enum):
    """How the launcher was called; the value is what stands before the options in the usage."""

    RUN = "torchtrainer run"
    MODULE_RUN = "python -m torchtrainer.run"
    LAUNCH = "python -m torchtrainer.launch"


@dataclass(frozen=True, kw_only=True)
class Unreadable:
    """Stands in the namespace for a default from the environment that is no value of its option.

    It is complained about only if nothing on the command line takes its place.

    Attributes:
        complaint: what the variable must be.
    """

    complaint: str


class LaunchParser(argparse.ArgumentParser):
    """A parser of one form.

    Attributes:
        given: by the name of a value, the spelling that the command line gave it with.
        in_full: the spellings that may not be abbreviated.
        ambiguous: by abbreviation, what it could have stood for.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.given: dict[str, str] = {}
        self.in_full: set[str] = set()
        self.ambiguous: dict[str, list[str]] = {}

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """Finds what an abbreviation stands for.

        argparse asks this for every argument that looks like an option and is none, the script's own included. It has
        no public way to say any of the following.

        - Our options must be written in full. So what is unambiguous under torchrun is here, and stays so whatever
          options we add; and an argument of the script never resembles an option that torchrun does not have.
        - Two spellings of one option are one option.
        - What is ambiguous is left unknown and remembered: argparse of some Python versions would end the program even
          where it is an argument of the script.
        """
        found = [entry for entry in super()._get_option_tuples(option_string) if entry[1] not in self.in_full]
        by_option = {id(entry[0]): entry for entry in reversed(found)}
        if len(by_option) > 1:
            self.ambiguous[option_string] = [entry[1] for entry in found if "_" not in entry[1]]
            return []
        return list(by_option.values())

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Ends the program because of arguments that stand before the script and are no options."""
        for argument in unknown:
            if argument in self.ambiguous:
                self.error(f"ambiguous option: {argument} could match {', '.join(self.ambiguous[argument])}")
        self.error(f"unrecognized arguments: {' '.join(unknown)}")


class _Store(argparse.Action):
    """Stores a value, and how it was given."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        assert isinstance(parser, LaunchParser)
        assert option_string is not None
        parser.given[self.dest] = option_string
        setattr(namespace, self.dest, values)


class _PrintCompletion(argparse.Action):
    """Prints the completion of the command that the package installs, and ends the program.

    The shells are asked of shtab only here: other launches need not import it.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        try:
            shtab = importlib.import_module("shtab")
        except ImportError:
            if values not in SHELLS:
                parser.error(f"argument {option_string}: must be one of {', '.join(SHELLS)}, not {values!r}")
            parser.exit(1, f"{option_string} needs the package shtab: pip install shtab\n")
        shells = shtab.SUPPORTED_SHELLS
        if values not in shells:
            parser.error(f"argument {option_string}: must be one of {', '.join(shells)}, not {values!r}")
        # Bound to "python" it would take the place of the user's completion of python, so the two forms of python -m
        # print the completion of the command too.
        program, subcommand = Form.RUN.value.split()
        command = argparse.ArgumentParser(prog=program)
        run = make_parser(Form.RUN)
        command.add_subparsers().add_parser(subcommand, parents=[run], add_help=False, help=run.description)
        print(shtab.complete(command, shell=values))
        parser.exit()


def _default_of(option: Option) -> Any:
    """Returns the default of an option, from the environment if that has one."""
    text = os.environ.get(option.variable) if option.environment else None
    if text is None:
        return list(option.default) if isinstance(option.default, tuple) else option.default
    if option.choices is not None and text not in option.choices:
        return Unreadable(complaint=f"must be one of {', '.join(option.choices)}")
    try:
        return option.reads(text)
    except ValueError:
        wanted = {int: "must be an integer", float: "must be a number", read_flag: "must be 1 to set the flag, or 0"}
        return Unreadable(complaint=wanted[option.reads])


def _add(group: argparse._ArgumentGroup, option: Option) -> None:
    settings: dict[str, Any] = {"dest": option.value_name, "default": _default_of(option), "help": option.meaning}
    if option.reads is read_flag:
        group.add_argument(*option.spellings, action="store_true", **settings)
        return
    settings |= {"metavar": option.metavar or None, "type": option.reads, "choices": option.choices}
    group.add_argument(*option.spellings, action=_Store, **settings)


def make_parser(form: Form) -> LaunchParser:
    """Makes the parser of one form, with its defaults taken from the environment as it is now.

    It knows the types and choices; `parse` also checks the values.
    """
    parser = LaunchParser(
        prog=form.value,
        usage=f"{form.value} [OPTION ...] SCRIPT [ARGUMENT ...]",
        description="Starts a script in several processes, with torchrun's options.",
        epilog="Options of torchrun may be abbreviated. PET_<NAME> in the environment gives the default of --<name>, "
        "except for --logs-specs and --numa-binding; flags are 1 or 0 there.",
    )
    parser.add_argument("training_script", metavar="SCRIPT", help="the script, module or command to start")
    arguments = parser.add_argument(
        "training_script_args", metavar="ARGUMENT", nargs=argparse.REMAINDER, help="the arguments of the script"
    )
    arguments.required = False  # or some versions of Python ask for them, where it is the script that is missing
    parser.add_argument(
        "--print-completion",
        "--print_completion",
        action=_PrintCompletion,
        metavar="SHELL",
        help="print a completion script for bash, zsh or another shell and exit; needs the package shtab",
    )
    for title, options in OPTION_GROUPS.items():
        group = parser.add_argument_group(title)
        for option in options:
            _add(group, option)
        if title == OWN_GROUP:
            _add_number_of_workers(group, form)
            parser.in_full.update(spelling for option in options for spelling in option.spellings)
    if form is Form.LAUNCH:
        _add(parser.add_argument_group("launch"), USE_ENV)
    parser.in_full.update((WORKERS_OPTION, WORKERS_OPTION.replace("-", "_")))
    return parser


def _add_number_of_workers(group: argparse._ArgumentGroup, form: Form) -> None:
    """Adds the second name of ``--nproc-per-node``: an option of its own, for its heading in the help."""
    place = "; may also stand directly after SCRIPT" if form is Form.RUN else ""
    group.add_argument(
        WORKERS_OPTION,
        "--num_workers",
        action=_Store,
        dest="nproc_per_node",
        default=argparse.SUPPRESS,
        metavar="N",
        help=f"the same as --nproc-per-node{place}",
    )


def parse(argv: Sequence[str], form: Form) -> argparse.Namespace:
    """Parses and checks a command line.

    Args:
        argv: the arguments after the program's name, or after ``run``.
        form: how the launcher was called.

    Returns:
        The values by torchrun's names, and ``start_fresh``, ``keep_exit_code`` and ``hang_timeout_s``.

    Raises:
        SystemExit: with status 2 after a usage error, which is shown on stderr as one line after the usage; with 0 after
            ``--help`` and ``--print-completion``, with 1 where the latter has no shtab.
    """
    parser, namespace = _parsed(argv, form)
    complaint = _complaint(namespace, parser.given)
    if complaint is not None:
        parser.error(complaint)
    return namespace


def parse_unchecked(argv: Sequence[str], form: Form) -> argparse.Namespace:
    """Parses a command line, and leaves values that are wrong to `checked`, as torch's ``parse_args`` leaves them to its ``run``.

    Raises:
        SystemExit: as argparse has it, for unknown options, missing arguments and values of the wrong type.
    """
    return _parsed(argv, form)[1]


def checked(args: argparse.Namespace) -> argparse.Namespace:
    """A copy of somebody's options, checked and complete.

    Args:
        args: of `parse_unchecked`, or of ``torch.distributed.run``, of this version of torch or an older one.

    Raises:
        ValueError: a value is wrong, or options exclude each other.
    """
    complete = argparse.Namespace(**vars(args))
    for option in (option for options in OPTION_GROUPS.values() for option in options):
        value = getattr(args, option.value_name) if hasattr(args, option.value_name) else _default_of(option)
        # Programs that make the options themselves have numbers for text, and text for numbers, which torch takes alike.
        if option.reads in (int, float) and isinstance(value, str):
            value = _number(option, value)
        elif option.reads is str and isinstance(value, int):
            value = str(value)
        setattr(complete, option.value_name, value)
    complaint = _complaint(complete, {})
    if complaint is not None:
        raise ValueError(complaint)
    return complete


def _number(option: Option, text: str) -> int | float:
    try:
        number: int | float = option.reads(text)
    except ValueError:
        raise ValueError(f"argument --{option.name}: must be a number, not {text!r}") from None
    return number


def _parsed(argv: Sequence[str], form: Form) -> tuple[LaunchParser, argparse.Namespace]:
    parser = make_parser(form)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.refuse(unknown)
    if form is Form.RUN:
        reordered = _with_workers_first(parser, argv, namespace.training_script_args)
        if reordered is not None:
            return _parsed(reordered, form)
    return parser, namespace


def _complaint(namespace: argparse.Namespace, given: Mapping[str, str]) -> str | None:
    """What is wrong with the values; None if nothing is.

    Args:
        namespace: all of them.
        given: by the name of a value, the spelling that a command line gave it with.
    """
    for option in (option for options in OPTION_GROUPS.values() for option in options):
        value = getattr(namespace, option.value_name)
        if isinstance(value, Unreadable):
            complaint: str | None = value.complaint
        else:
            complaint = option.check(value) if option.check is not None and value is not None else None
        if complaint is None:
            continue
        spelling = given.get(option.value_name)
        if spelling is None and option.environment and option.variable in os.environ:
            return f"{option.variable}={os.environ[option.variable]!r}: {complaint}"
        return f"argument {spelling or '--' + option.name}: {complaint}"
    return conflict_in(namespace)


def _with_workers_first(parser: LaunchParser, argv: Sequence[str], arguments: Sequence[str]) -> list[str] | None:
    """Moves each ``--num-workers N`` that stands directly after the script to the front.

    So the command line means what it means with the option where torchrun wants options, and argparse treats the rest
    as it does there.

    Args:
        parser: what has parsed `argv`.
        argv: the command line; the script's arguments are the last of it, whatever argparse took away before them.
        arguments: the script's arguments; behind a ``--`` they are the script's only.

    Returns:
        The command line with the option at the front; None if there is none to move, or if the number of workers was
        given before the script or by the environment: then the script may have an option of this name.
    """
    options = argv[: len(argv) - len(arguments)]
    if "--" in options or "nproc_per_node" in parser.given or "PET_NPROC_PER_NODE" in os.environ:
        return None
    moved, rest = [], list(arguments)
    while rest and rest[0].partition("=")[0] == WORKERS_OPTION:
        _, equals, number = rest.pop(0).partition("=")
        if not equals and not rest:
            parser.error(f"argument {WORKERS_OPTION}: expected one argument")
        moved.append(f"{WORKERS_OPTION}={number if equals else rest.pop(0)}")
    return [*moved, *options, *rest] if moved else None
