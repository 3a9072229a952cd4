"""The launcher's options: the same as torchrun's, and a few of ours."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import pytest
from torch.distributed import launch as torch_launch
from torch.distributed import run as torch_run

from torchtrainer.launcher.option_checks import OPTION_GROUPS, OWN_GROUP, OWN_OPTIONS
from torchtrainer.launcher.options import Form, make_parser, parse

pytestmark = pytest.mark.pure

EXTRA_DESTS = {option.value_name for option in OWN_OPTIONS}
TORCH_ACTIONS = {action.dest: action for action in torch_run.get_args_parser()._actions}


@pytest.fixture(autouse=True)
def _no_pet_variables(monkeypatch):
    for name in os.environ:
        if name.startswith("PET_"):
            monkeypatch.delenv(name)


def skip_if_torch_lacks_an_option(argv, environment):
    """Older torch has not all the options: what it would say to them is not compared."""
    for action in make_parser(Form.RUN)._actions:
        if action.dest in TORCH_ACTIONS or action.dest in EXTRA_DESTS:
            continue
        given = {argument.partition("=")[0] for argument in argv}
        if given & set(action.option_strings) or f"PET_{action.dest.upper()}" in environment:
            pytest.skip(f"this torch has no {action.option_strings[0]}")


def shared_values(namespace):
    values = {dest: value for dest, value in vars(namespace).items() if dest in TORCH_ACTIONS or dest == "use_env"}
    if values["master_port"] is None:  # what an older torch has as its default, a newer one fills in later
        values["master_port"] = TORCH_ACTIONS["master_port"].default
    return values


def usage_error(argv, form, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(argv, form)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    usage, error = err.splitlines()
    assert usage == f"usage: {form.value} [OPTION ...] SCRIPT [ARGUMENT ...]"
    return error.removeprefix(f"{form.value}: error: ")


# The parser itself


@pytest.mark.parametrize("dest", [dest for dest in TORCH_ACTIONS if dest != "help"])
def test_each_option_of_torchrun_has_its_spellings_default_choices_and_type(dest):
    theirs = TORCH_ACTIONS[dest]
    ours = next(action for action in make_parser(Form.RUN)._actions if action.dest == dest)
    assert ours.option_strings == theirs.option_strings
    if (dest, theirs.default) != ("master_port", 29500):  # an older torch fills it in here, a newer one later
        assert ours.default == theirs.default
        assert type(ours.default) is type(theirs.default)
    assert ours.nargs == theirs.nargs
    if dest != "print_completion":  # which shells there are is asked of shtab when one is to be completed
        assert list(ours.choices or []) == list(theirs.choices or [])
    if isinstance(theirs.type, type):
        assert (ours.type or str) is theirs.type


def test_a_torch_of_this_version_has_no_option_that_is_missing():
    ours = {action.dest for action in make_parser(Form.LAUNCH)._actions}
    assert set(TORCH_ACTIONS) <= ours


COMMAND_LINES = [
    ({}, ["train.py"]),
    ({}, ["train.py", "--lr", "0.1", "-x", "positional"]),
    ({}, ["--nproc-per-node", "2", "train.py"]),
    ({}, ["--nproc_per_node=4", "train.py", "--nproc-per-node", "8"]),
    ({}, ["--nproc-per-node=auto", "--nnodes=1:4", "train.py"]),
    ({}, ["--nproc-per-node", "private_device", "train.py"]),
    ({}, ["--standalone", "--nproc-per-node", "gpu", "train.py"]),
    ({}, ["--nnodes", "2", "--node-rank", "1", "--master-addr", "host0", "--master-port", "1234", "train.py"]),
    ({}, ["--nnodes", "2", "--node_rank", "1", "--master_addr", "host0", "--master_port=0", "train.py"]),
    ({}, ["--rdzv-backend", "c10d", "--rdzv-endpoint", "host0:29400", "--rdzv-id", "job", "train.py"]),
    (
        {},
        ["--rdzv_backend=etcd-v2", "--rdzv_endpoint=h:1", "--rdzv_id=7", "--rdzv_conf", "timeout=30,is_host=1", "t.py"],
    ),
    ({}, ["--rdzv-conf", " a = 1 , b=x=y", "train.py"]),
    ({}, ["--max-restarts", "3", "--monitor-interval", "0.5", "--start-method", "fork", "train.py"]),
    ({}, ["--max_restarts=3", "--monitor_interval=5", "--start_method=forkserver", "train.py"]),
    ({}, ["--role", "trainer", "--event-log-handler", "console", "train.py"]),
    ({}, ["-m", "package.module", "--flag"]),
    ({}, ["--module", "package.module", "-m", "x"]),
    ({}, ["--no-python", "bash", "-c", "echo $RANK"]),
    ({}, ["--no_python", "./program", "-m", "x"]),
    ({}, ["--run-path", "/abs/train.py", "--run_path"]),
    ({}, ["--run-path", "--no-python", "-m", "/abs/train.py"]),
    ({}, ["--log-dir", "/tmp/logs", "-r", "3", "-t", "0:1,1:2", "train.py"]),
    ({}, ["--log_dir=/dev/null", "--redirects", "1", "--tee=3", "train.py"]),
    ({}, ["-r3", "-t2", "-m", "train"]),
    ({}, ["--redirect=3", "train.py"]),
    ({}, ["--log-line-prefix-template", "${rank}: ", "--local-ranks-filter", "0,2", "train.py"]),
    ({}, ["--log_line_prefix_template=[${hostname}]", "--local_ranks_filter=1", "train.py"]),
    ({}, ["--duplicate-stdout-filters", "a,,b,c", "--duplicate_stderr_filters=", "train.py"]),
    ({}, ["--duplicate-stdout-filters", ",,,", "--duplicate-stderr-filters", "a,,,b,,,,c,", "train.py"]),
    ({}, ["--local-addr", "10.0.0.1", "--logs-specs", "mine", "train.py"]),
    ({}, ["--local_addr=10.0.0.1", "--logs_specs=mine", "--numa-binding", "core-complex", "train.py"]),
    ({}, ["--signals-to-handle", "SIGTERM,SIGUSR1", "--shutdown-timeout", "5", "train.py"]),
    ({}, ["--signals_to_handle=SIGINT, SIGHUP", "--shutdown_timeout=0", "--virtual_local_rank", "train.py"]),
    ({}, ["--nnodes", "2", "--nnodes", "3", "train.py"]),
    ({}, ["--", "train.py", "--nnodes", "3"]),
    ({}, ["train.py", "--", "--nnodes", "3"]),
    ({}, ["train.py", "--", "--", "a"]),
    ({}, ["--", "train.py", "--", "a"]),
    ({}, ["--standalone", "train.py", "a", "--", "b"]),
    ({}, ["train.py", "--standalone", "--start-fresh", "--num-worker"]),
    ({}, ["train.py", "--help"]),
    ({}, ["train.py", "-", "", "a b", "-5", "--x=y z"]),
    ({"PET_NNODES": "1:2", "PET_NPROC_PER_NODE": "3", "PET_RDZV_ID": ""}, ["train.py"]),
    ({"PET_NPROC_PER_NODE": "3"}, ["train.py", "--num-workers", "4"]),
    ({"PET_NPROC_PER_NODE": "3"}, ["--nproc-per-node", "2", "train.py"]),
    ({"PET_MAX_RESTARTS": "2", "PET_MONITOR_INTERVAL": "1", "PET_SHUTDOWN_TIMEOUT": "9"}, ["train.py"]),
    ({"PET_MAX_RESTARTS": "many"}, ["--max-restarts", "1", "train.py"]),
    ({"PET_MASTER_PORT": "1234", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "::1"}, ["train.py"]),
    ({"PET_STANDALONE": "1", "PET_MODULE": "0", "PET_VIRTUAL_LOCAL_RANK": "2"}, ["train.py"]),
    ({"PET_NO_PYTHON": "0", "PET_RUN_PATH": " 1 "}, ["/abs/train.py"]),
    ({"PET_STANDALONE": "0"}, ["--standalone", "train.py"]),
    ({"PET_REDIRECTS": "3", "PET_TEE": "0:3", "PET_R": "9", "PET_LOG_DIR": "/tmp/x"}, ["train.py"]),
    ({"PET_DUPLICATE_STDOUT_FILTERS": "a,b,,c", "PET_DUPLICATE_STDERR_FILTERS": ""}, ["train.py"]),
    ({"PET_START_METHOD": "fork", "PET_ROLE": "r", "PET_LOCAL_ADDR": "h"}, ["train.py"]),
    (
        {"PET_LOGS_SPECS": "x", "PET_NUMA_BINDING": "none", "PET_USE_ENV": "1", "PET_PRINT_COMPLETION": "x"},
        ["train.py"],
    ),
    ({"PET_SIGNALS_TO_HANDLE": "SIGTERM", "PET_LOCAL_RANKS_FILTER": "0"}, ["train.py"]),
    ({"PET_EVENT_LOG_HANDLER": "console", "PET_RDZV_CONF": "a=1", "PET_RDZV_BACKEND": "c10d"}, ["train.py"]),
    ({"PET_LOG_LINE_PREFIX_TEMPLATE": "x", "PET_RDZV_ENDPOINT": "h:1"}, ["train.py"]),
]


@pytest.mark.parametrize("form", list(Form), ids=lambda form: form.name)
@pytest.mark.parametrize(("environment", "argv"), COMMAND_LINES)
def test_a_command_line_means_what_it_means_to_torch(environment, argv, form, monkeypatch):
    skip_if_torch_lacks_an_option(argv, environment)
    for name, text in environment.items():
        monkeypatch.setenv(name, text)
    if form is Form.LAUNCH:
        argv = ["--use-env", *argv]
    theirs = (torch_launch if form is Form.LAUNCH else torch_run).parse_args(list(argv))
    assert shared_values(parse(argv, form)) == vars(theirs)


@pytest.mark.parametrize("argv", [["train.py"], ["--use-env", "train.py"], ["--use_env", "-m", "train", "--use-env"]])
def test_use_env_is_an_option_of_launch_alone(argv, capsys):
    assert shared_values(parse(argv, Form.LAUNCH)) == vars(torch_launch.parse_args(list(argv)))
    for form in (Form.RUN, Form.MODULE_RUN):
        assert not hasattr(parse(["train.py"], form), "use_env")
        assert usage_error(["--use-env", "train.py"], form, capsys) == "unrecognized arguments: --use-env"


def test_torch_makes_the_same_launch_of_our_values_as_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    argv = ["--nproc-per-node=2", "--nnodes=1:3", "--rdzv-backend=c10d", "--rdzv-conf=timeout=5", "--tee=0:3,1:1"]
    argv += ["--max-restarts=2", f"--log-dir={tmp_path}", "--local-ranks-filter=0", "-m", "pkg.train", "--lr", "1"]
    (theirs, *their_command), (ours, *our_command) = (
        torch_run.config_from_args(namespace) for namespace in (torch_run.parse_args(argv), parse(argv, Form.RUN))
    )
    assert our_command == their_command
    values, their_values = dict(vars(ours)), dict(vars(theirs))
    logs, their_logs = values.pop("logs_specs"), their_values.pop("logs_specs")
    assert values == their_values
    assert (logs._redirects, logs._tee, logs._local_ranks_filter) == (
        their_logs._redirects,
        their_logs._tee,
        their_logs._local_ranks_filter,
    )


# Abbreviations


def sample_argument(action):
    if action.nargs == 0:
        return []
    if action.choices:
        return [next(iter(action.choices))]
    samples = {"rdzv_conf": "a=1", "signals_to_handle": "SIGTERM"}
    return [samples.get(action.dest, "2")]


@pytest.mark.skipif(
    {action.dest for action in make_parser(Form.RUN)._actions} - EXTRA_DESTS > set(TORCH_ACTIONS),
    reason="this torch has fewer options, so that more abbreviations are unambiguous to it",
)
@pytest.mark.parametrize("dest", [dest for dest, action in TORCH_ACTIONS.items() if action.option_strings])
def test_every_abbreviation_that_torchrun_takes_stands_for_the_same_option(dest, capsys):
    action = TORCH_ACTIONS[dest]
    long_spellings = [spelling for spelling in action.option_strings if spelling.startswith("--")]
    abbreviations = {spelling[:end] for spelling in long_spellings for end in range(3, len(spelling) + 1)}
    theirs, ours = {}, {}
    for argument in abbreviations:
        argv = [argument, *sample_argument(action), "train.py", argument]
        for parsed, parse_one in ((theirs, torch_run.parse_args), (ours, lambda argv: parse(argv, Form.RUN))):
            try:
                parsed[argument] = shared_values(parse_one(list(argv)))
            except SystemExit as stop:
                parsed[argument] = stop.code
    if dest == "help":
        theirs, ours = ({key: code for key, code in codes.items() if code == 0} for codes in (theirs, ours))
        assert "--h" in ours
    elif dest != "print_completion":  # which exits with 1 or 0, whether shtab is there or not
        assert set(long_spellings) <= {argument for argument, values in theirs.items() if isinstance(values, dict)}
    for argument, values in theirs.items():
        if values != 2:  # ambiguous
            assert ours[argument] == values


def test_two_spellings_of_one_option_are_not_ambiguous():
    namespace = parse(["--nproc", "2", "--log-d=x", "--stan", "train.py"], Form.RUN)
    assert (namespace.nproc_per_node, namespace.log_dir, namespace.standalone) == ("2", "x", True)
    assert parse(["--u", "train.py"], Form.LAUNCH).use_env


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("--n", "--nnodes, --nproc-per-node, --no-python, --node-rank, --numa-binding"),
        ("--log=x", "--log-dir, --log-line-prefix-template, --logs-specs"),
        ("--st", "--standalone, --start-method"),
    ],
)
def test_an_ambiguous_option_is_named_with_what_it_could_be(argument, options, capsys):
    error = usage_error([argument, "train.py", "--lr", "1"], Form.RUN, capsys)
    ambiguous, _, matches = error.partition(" could match ")
    assert ambiguous == f"ambiguous option: {argument}"
    assert sorted(matches.split(", ")) == sorted(options.split(", "))


@pytest.mark.parametrize("form", list(Form), ids=lambda form: form.name)
def test_arguments_of_the_script_may_resemble_options(form):
    arguments = ["--log", "x", "--n=3", "--master", "--hang", "1", "--keep", "--start", "--num", "2", "--nope", "-h"]
    assert parse(["train.py", *arguments], form).training_script_args == arguments


# Options of ours


def test_options_of_ours_have_defaults_that_change_nothing():
    namespace = parse(["train.py"], Form.RUN)
    assert {dest: getattr(namespace, dest) for dest in EXTRA_DESTS} == {
        "start_fresh": False,
        "keep_exit_code": False,
        "hang_timeout_s": None,
    }


@pytest.mark.parametrize("form", list(Form), ids=lambda form: form.name)
@pytest.mark.parametrize("separator", ["-", "_"])
def test_options_of_ours_are_taken_in_every_form(form, separator):
    argv = ["--num-workers=3", "--start-fresh", "--keep-exit-code", "--hang-timeout=1.5"]
    argv = ["--" + argument[2:].replace("-", separator) for argument in argv]
    namespace = parse([*argv, "train.py"], form)
    assert namespace.nproc_per_node == "3"
    assert (namespace.start_fresh, namespace.keep_exit_code, namespace.hang_timeout_s) == (True, True, 1.5)
    assert namespace.training_script_args == []


def test_options_of_ours_have_variables(monkeypatch):
    monkeypatch.setenv("PET_START_FRESH", "1")
    monkeypatch.setenv("PET_KEEP_EXIT_CODE", "0")
    monkeypatch.setenv("PET_HANG_TIMEOUT", "30")
    namespace = parse(["train.py"], Form.MODULE_RUN)
    assert (namespace.start_fresh, namespace.keep_exit_code, namespace.hang_timeout_s) == (True, False, 30.0)


@pytest.mark.parametrize("argument", ["--num-worker", "--start-fr", "--keep", "--hang-timeou"])
def test_options_of_ours_are_written_in_full(argument, capsys):
    assert usage_error([argument, "train.py"], Form.RUN, capsys) == f"unrecognized arguments: {argument}"


def test_the_last_of_two_numbers_of_workers_counts():
    assert parse(["--nproc-per-node", "2", "--num-workers", "3", "train.py"], Form.RUN).nproc_per_node == "3"
    assert parse(["--num-workers", "3", "--nproc-per-node", "2", "train.py"], Form.RUN).nproc_per_node == "2"


@pytest.mark.parametrize("form", list(Form), ids=lambda form: form.name)
def test_help_names_every_option_and_ours_apart(form, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help"], form)
    assert stop.value.code == 0
    text, own = capsys.readouterr().out.split(f"{OWN_GROUP}:")
    own, _, launch_only = own.partition("\nlaunch:")
    for title, options in OPTION_GROUPS.items():
        for option in options:
            assert f"--{option.name}" in (own if title == OWN_GROUP else text)
    assert "--num-workers N" in own
    assert ("--use-env" in launch_only) == (form is Form.LAUNCH)


# --num-workers after the script


@pytest.mark.parametrize(
    ("argv", "workers", "arguments"),
    [
        (["train.py", "--num-workers", "4"], "4", []),
        (["train.py", "--num-workers=4", "--lr", "1"], "4", ["--lr", "1"]),
        (["train.py", "--num-workers", "2", "--num-workers=auto", "x"], "auto", ["x"]),
        (["--standalone", "--tee", "3", "train.py", "--num-workers", "4", "x"], "4", ["x"]),
        (["-m", "pkg.train", "--num-workers", "4", "x"], "4", ["x"]),
        (["--no-python", "./train", "--num-workers", "4", "x"], "4", ["x"]),
        (["--run-path", "/abs/train.py", "--num-workers", "4", "x"], "4", ["x"]),
        # not the first after the script
        (["train.py", "--lr", "1", "--num-workers", "4"], "1", ["--lr", "1", "--num-workers", "4"]),
        (["train.py", "x", "--num-workers=4"], "1", ["x", "--num-workers=4"]),
        (["train.py", "--num-workers", "2", "x", "--num-workers", "4"], "2", ["x", "--num-workers", "4"]),
        # another spelling
        (["train.py", "--num_workers", "4"], "1", ["--num_workers", "4"]),
        (["train.py", "--num-worker", "4"], "1", ["--num-worker", "4"]),
        (["train.py", "--nproc-per-node", "4"], "1", ["--nproc-per-node", "4"]),
        # the number of workers is known
        (["--nproc-per-node", "1", "train.py", "--num-workers", "4"], "1", ["--num-workers", "4"]),
        (["--num-workers", "2", "train.py", "--num-workers", "4"], "2", ["--num-workers", "4"]),
        (["--nproc=2", "train.py", "--num-workers", "0"], "2", ["--num-workers", "0"]),
        # behind --, which is dropped where torchrun drops it
        (["train.py", "--", "--num-workers", "4"], "1", ["--num-workers", "4"]),
        (["train.py", "--", "--", "--num-workers", "4"], "1", ["--", "--num-workers", "4"]),
        (["--", "train.py", "--num-workers", "4"], "1", ["--num-workers", "4"]),
        (["train.py", "--num-workers", "2", "--", "--num-workers", "4"], "2", ["--num-workers", "4"]),
        (["train.py", "--num-workers", "2", "x", "--", "y"], "2", ["x", "--", "y"]),
    ],
)
def test_num_workers_directly_after_the_script_is_taken_by_torchtrainer_run(argv, workers, arguments):
    namespace = parse(argv, Form.RUN)
    assert (namespace.nproc_per_node, namespace.training_script_args) == (workers, arguments)


@pytest.mark.parametrize("form", [Form.MODULE_RUN, Form.LAUNCH], ids=lambda form: form.name)
def test_the_python_m_forms_never_look_past_the_script(form):
    namespace = parse(["train.py", "--num-workers", "4"], form)
    assert (namespace.nproc_per_node, namespace.training_script_args) == ("1", ["--num-workers", "4"])


def test_what_is_left_after_the_number_of_workers_is_what_torchrun_leaves():
    for rest in (["--", "a"], ["a", "--", "b"], ["--", "--"], []):
        theirs = torch_run.parse_args(["--nproc-per-node", "2", "train.py", *rest])
        assert shared_values(parse(["train.py", "--num-workers", "2", *rest], Form.RUN)) == vars(theirs)


# Usage errors

WORKERS = "must be a number of workers above 0 or one of auto, cpu, gpu, xpu, not "
NODES = "must be N or MIN:MAX with 0 < MIN <= MAX, not "
STREAMS = "must be 0 (none), 1 (stdout), 2 (stderr), 3 (both), or one of these by local rank as in 0:1,1:2, not "
RANKS = "must be local ranks separated by commas, as in 0,1,2, not "
SETTINGS = "must be NAME=VALUE,NAME=VALUE,..., not "


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        *(("nproc-per-node", text, f"{WORKERS}{text!r}") for text in ("0", "-1", "2.5", "", "two workers", "gpu:2")),
        *(
            ("nnodes", text, f"{NODES}{text!r}")
            for text in ("0", "-1", "2:1", "1:2:3", "a", "1:", ":2", "", "0:2", "1.5")
        ),
        *(
            ("redirects", text, f"{STREAMS}{text!r}")
            for text in ("4", "33", "out", "0:4", "10:1", "0:1,", "0:1 ,1:2", "")
        ),
        *(("tee", text, f"{STREAMS}{text!r}") for text in ("x", "3\n")),
        *(("local-ranks-filter", text, f"{RANKS}{text!r}") for text in ("a", "0,", "0;1", "1.5")),
        ("rdzv-conf", "timeout", f"{SETTINGS}'timeout': 'timeout' has no value"),
        ("rdzv-conf", "a=1,b=", f"{SETTINGS}'a=1,b=': 'b=' has no value"),
        ("rdzv-conf", "=1", f"{SETTINGS}'=1': '=1' has no name"),
        ("rdzv-conf", "a=1,", f"{SETTINGS}'a=1,': '' has no name"),
        ("max-restarts", "-1", "must be 0 or more, not -1"),
        ("shutdown-timeout", "-1", "must be 0 or more, not -1"),
        ("node-rank", "-2", "must be 0 or more, not -2"),
        ("master-port", "65536", "must be a port from 0 to 65535, not 65536"),
        ("master-port", "-1", "must be a port from 0 to 65535, not -1"),
        *(
            ("monitor-interval", text, f"must be a number of seconds above 0, not {text}")
            for text in ("0", "-1", "nan", "inf")
        ),
        *(
            ("hang-timeout", text, f"must be a number of seconds above 0, not {text}")
            for text in ("0", "-0.5", "nan", "inf")
        ),
        (
            "signals-to-handle",
            "SIGTERM,SIGNOPE",
            "must be names of signals separated by commas, as in SIGTERM,SIGUSR1; there is no 'SIGNOPE'",
        ),
        (
            "signals-to-handle",
            "15",
            "must be names of signals separated by commas, as in SIGTERM,SIGUSR1; there is no '15'",
        ),
        ("signals-to-handle", "SIGTERM, SIGKILL", "must name signals that a process can handle, not SIGKILL"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_option_or_the_variable(name, text, complaint, monkeypatch, capsys):
    error = usage_error([f"--{name}={text}", "train.py"], Form.RUN, capsys)
    assert error == f"argument --{name}: {complaint}"
    variable = f"PET_{name.replace('-', '_').upper()}"
    monkeypatch.setenv(variable, text)
    assert usage_error(["train.py"], Form.MODULE_RUN, capsys) == f"{variable}={text!r}: {complaint}"


@pytest.mark.parametrize(
    ("variable", "text", "complaint"),
    [
        ("PET_STANDALONE", "true", "must be 1 to set the flag, or 0"),
        ("PET_NO_PYTHON", "", "must be 1 to set the flag, or 0"),
        ("PET_START_FRESH", "yes", "must be 1 to set the flag, or 0"),
        ("PET_MAX_RESTARTS", "many", "must be an integer"),
        ("PET_MASTER_PORT", "", "must be an integer"),
        ("PET_MONITOR_INTERVAL", "1s", "must be a number"),
        ("PET_START_METHOD", "thread", "must be one of spawn, fork, forkserver"),
    ],
)
def test_a_variable_that_cannot_be_read_is_one_line_that_names_it(variable, text, complaint, monkeypatch, capsys):
    monkeypatch.setenv(variable, text)
    for form in Form:
        assert usage_error(["train.py"], form, capsys) == f"{variable}={text!r}: {complaint}"


def test_a_variable_that_cannot_be_read_does_not_matter_where_the_option_is_given_or_only_help_is_wanted(monkeypatch):
    monkeypatch.setenv("PET_STANDALONE", "true")
    monkeypatch.setenv("PET_MAX_RESTARTS", "many")
    namespace = parse(["--standalone", "--max-restarts=1", "train.py"], Form.RUN)
    assert (namespace.standalone, namespace.max_restarts) == (True, 1)
    with pytest.raises(SystemExit) as stop:
        parse(["--help"], Form.RUN)
    assert stop.value.code == 0


@pytest.mark.parametrize(
    ("argv", "form", "error"),
    [
        ([], Form.RUN, "the following arguments are required: SCRIPT"),
        (["--standalone"], Form.LAUNCH, "the following arguments are required: SCRIPT"),
        (["--nope", "train.py"], Form.MODULE_RUN, "unrecognized arguments: --nope"),
        (["--nnodes"], Form.RUN, "argument --nnodes: expected one argument"),
        (["--standalone=1", "train.py"], Form.RUN, "argument --standalone: ignored explicit argument '1'"),
        (["--max-restarts", "x", "t.py"], Form.RUN, "argument --max-restarts/--max_restarts: invalid int value: 'x'"),
        (["--hang-timeout", "x", "t.py"], Form.RUN, "argument --hang-timeout/--hang_timeout: invalid float value: 'x'"),
        (["--num-workers", "0", "train.py"], Form.RUN, f"argument --num-workers: {WORKERS}'0'"),
        (["train.py", "--num-workers", "0"], Form.RUN, f"argument --num-workers: {WORKERS}'0'"),
        (["train.py", "--num-workers=", "x"], Form.RUN, f"argument --num-workers: {WORKERS}''"),
        (["train.py", "--num-workers", "-x"], Form.RUN, f"argument --num-workers: {WORKERS}'-x'"),
        (["train.py", "--num-workers"], Form.RUN, "argument --num-workers: expected one argument"),
        (
            ["-m", "--no-python", "train"],
            Form.RUN,
            "--no-python and --module exclude each other: a module is run by Python",
        ),
        (
            ["--no-python", "./train"],
            Form.LAUNCH,
            "--no-python needs --use-env as well: a command that is not Python is not passed --local-rank",
        ),
    ],
)
def test_wrong_usage_is_one_line(argv, form, error, capsys):
    assert usage_error(argv, form, capsys) == error


@pytest.mark.parametrize("argv", [["--start-method", "thread", "t.py"], ["--numa-binding", "x", "t.py"]])
def test_a_choice_that_is_none_is_shown_with_the_choices(argv, capsys):
    error = usage_error(argv, Form.RUN, capsys)
    assert error.startswith(f"argument {argv[0]}/")
    assert f"invalid choice: '{argv[1]}' (choose from " in error


@pytest.mark.parametrize(
    "argv",
    [
        ["--signals-to-handle=", "train.py"],
        ["--signals-to-handle=SIGTERM,SIGRTMIN,", "train.py"],
        ["--local-ranks-filter=-1", "train.py"],
        ["--nproc-per-node=hpu", "train.py"],
        ["--rdzv-conf=  ", "train.py"],
        ["--master-port=0", "train.py"],
    ],
)
def test_values_that_torch_can_use_are_not_refused(argv):
    if argv[0].startswith("--signals-to-handle") and "signals_to_handle" not in TORCH_ACTIONS:
        pytest.skip("this torch has no such option")
    assert shared_values(parse(argv, Form.RUN)) == vars(torch_run.parse_args(argv))


# Shell completion, and what importing costs


def test_completion_without_shtab_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    for form in Form:
        with pytest.raises(SystemExit) as stop:
            parse(["--print-completion", "zsh"], form)
        assert stop.value.code == 1
        assert capsys.readouterr().err == "--print-completion needs the package shtab: pip install shtab\n"


@pytest.mark.parametrize("form", list(Form), ids=lambda form: form.name)
def test_completion_is_made_for_the_command_that_is_installed(form, monkeypatch, capsys):
    shtab = types.ModuleType("shtab")  # not one of the packages that the tests need
    shtab.SUPPORTED_SHELLS = ["bash", "oil"]
    shtab.complete = lambda parser, shell: f"{shell}: {parser.prog}: {parser.format_usage()}"
    monkeypatch.setitem(sys.modules, "shtab", shtab)
    with pytest.raises(SystemExit) as stop:
        parse(["--print-completion", "oil"], form)
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == "oil: torchtrainer: usage: torchtrainer [-h] {run} ..."
    error = usage_error(["--print-completion=ed"], form, capsys)
    assert error == "argument --print-completion: must be one of bash, oil, not 'ed'"


@pytest.mark.parametrize("argv", [["train.py"], ["--help"], ["--nope", "train.py"]])
def test_options_are_parsed_without_torch(argv):
    program = (
        "import atexit, sys; from torchtrainer.launcher.options import Form, parse\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        f"parse({argv!r}, Form.RUN)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stderr.splitlines()[-1] == "False"
