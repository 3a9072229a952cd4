"""Advance warnings of every source, and that watching for them leaves nothing behind."""

from __future__ import annotations

import os
import queue
import re
import select
import signal
import threading
import time
from dataclasses import fields
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import pytest
from metadata_servers import Answer, Aws, Azure, Gcp, MetadataService
from programs import CREATORS, marked_processes, start_program

from torchtrainer.config import PreemptionConfig
from torchtrainer.errors import InvalidArgumentError, InvalidArgumentTypeError
from torchtrainer.preempt.clouds import detect_cloud
from torchtrainer.preempt.metadata import MAX_BODY_BYTES
from torchtrainer.preempt.notice import Notice, is_more_urgent
from torchtrainer.preempt.poller import FAILURES_TO_TELL
from torchtrainer.preempt.slurm import requeue
from torchtrainer.preempt.watch import NoticeWatch
from torchtrainer.process.signals import EXIT_PREEMPTED

DEADLINE_S = 30.0
"""Only a deadlock takes this long."""
FIRMWARE = {
    "aws": {"sys_vendor": "Amazon EC2\n", "product_name": "p5.48xlarge\n"},
    "aws xen": {"sys_vendor": "Xen\n", "bios_vendor": "Xen\n", "bios_version": "4.11.amazon\n"},
    "gcp": {"sys_vendor": "Google\n", "product_name": "Google Compute Engine\n"},
    "azure": {"sys_vendor": "Microsoft Corporation\n", "chassis_asset_tag": "7783-7084-3265-9085-8269-3286-77\n"},
    "hyper-v": {"sys_vendor": "Microsoft Corporation\n", "product_name": "Virtual Machine\n"},
    "chromebook": {"sys_vendor": "Google\n", "product_name": "Eve\n"},
    "nothing": {},
}


def open_descriptors() -> set[str]:
    return {fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")}


def notice_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("torchtrainer notices")]


@pytest.fixture(autouse=True)
def nothing_left():
    before = open_descriptors()
    handlers = [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGUSR1)]
    yield
    assert notice_threads() == []
    assert open_descriptors() == before
    assert [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGUSR1)] == handlers


@pytest.fixture
def lines():
    return queue.Queue()


@pytest.fixture
def watching(lines, tmp_path):
    """Starts watches, and closes them at the end of the test."""
    watches = []

    def start(environ=None, *, clouds="auto", base_urls=None, **options):
        config = PreemptionConfig(**{"metadata": clouds, "metadata_every_s": 0.02, "check_every_s": 0.02, **options})
        watch = NoticeWatch(
            config, environ or {}, metadata=True, say=lines.put, dmi_root=tmp_path, base_urls=base_urls or {}
        )
        watches.append(watch)
        watch.start()
        return watch

    yield start
    for watch in watches:
        watch.close()
        watch.close()


@pytest.fixture
def service():
    """Starts fake metadata services, and closes them at the end of the test."""
    services = []

    def start(kind=MetadataService):
        services.append(kind())
        return services[-1]

    yield start
    for one in services:
        one.close()


@pytest.fixture
def on_cloud(service, watching, tmp_path):
    """Starts a watch on a machine of a cloud, beside the fake service that it asks."""

    def start(kind, **options):
        fake = service(kind)
        name = kind.__name__.lower()
        write_firmware(tmp_path, name)
        return fake, watching(base_urls={name: fake.url}, **{"metadata_timeout_s": 5.0, **options})

    return start


def write_firmware(root, name):
    for file, text in FIRMWARE[name].items():
        (root / file).write_text(text)


def next_notice(watch):
    """The notice after the news arrives."""
    assert select.select([watch.wait_fd()], [], [], DEADLINE_S)[0]
    notice = watch.pending()
    assert notice is not None
    return notice


def near(deadline, seconds, tolerance=10.0):
    return abs(deadline - time.monotonic() - seconds) < tolerance


def in_seconds(seconds):
    return datetime.now(timezone.utc) + timedelta(seconds=seconds)


# What a notice is


def notice(*, must_stop=True, deadline=None):
    return Notice(source="test", deadline=deadline, must_stop=must_stop, text="a test")


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [
        (notice(must_stop=False), None, True),
        (notice(), notice(must_stop=False, deadline=1.0), True),
        (notice(must_stop=False, deadline=1.0), notice(), False),
        (notice(must_stop=False), notice(must_stop=False), True),  # a later hint is news
        (notice(deadline=1.0), notice(deadline=2.0), True),
        (notice(deadline=2.0), notice(deadline=1.0), False),
        (notice(deadline=1.0), notice(), True),
        (notice(), notice(deadline=1.0), False),
        (notice(), notice(), False),
    ],
)
def test_which_notice_is_more_urgent(new, old, expected):
    assert is_more_urgent(new, old) is expected


def test_a_deadline_counts_down_to_zero():
    assert notice().seconds_left() is None
    assert notice(deadline=time.monotonic() - 5).seconds_left() == 0
    assert 0 < notice(deadline=time.monotonic() + 60).seconds_left() <= 60


# On a machine where nothing applies


def test_a_usual_machine_costs_no_thread(watching):
    watch = watching({"HOME": "/", "SLURM_JOB_END_TIME": "", "SLURM_JOB_ID": "1"})
    assert notice_threads() == []
    assert watch.pending() is None
    assert not watch.urgent
    watch.acknowledge()


@pytest.mark.parametrize("name", FIRMWARE)
def test_firmware_says_whose_machine_it_is(tmp_path, name):
    write_firmware(tmp_path, name)
    expected = name.split()[0] if name.startswith(("aws", "gcp", "azure")) else None
    assert detect_cloud(tmp_path) == expected
    assert detect_cloud(tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["GCP metadata (preempted)", "GCP metadata (maintenance-event)"]),
        ({"config": ("azure", "aws")}, ["Azure metadata", "AWS metadata"]),
        ({"config": ()}, []),
        ({"config": None}, []),
        ({"asks": False}, []),
    ],
)
def test_only_the_clouds_that_apply_are_asked(tmp_path, service, lines, options, expected):
    write_firmware(tmp_path, "gcp")
    url = service().url
    watch = NoticeWatch(
        PreemptionConfig(metadata=options.get("config", "auto"), metadata_timeout_s=5.0),
        {},
        metadata=options.get("asks", True),
        say=lines.put,
        dmi_root=tmp_path,
        base_urls=dict.fromkeys(("aws", "azure", "gcp"), url),
    )
    watch.start()
    assert sorted(notice_threads()) == sorted(f"torchtrainer notices: {name}" for name in expected)
    watch.close()


# Clouds


def test_aws_takes_a_spot_machine_back(on_cloud):
    fake, watch = on_cloud(Aws)
    fake.wait_for_more(3, Aws.ACTION)
    assert watch.pending() is None
    when = in_seconds(120).strftime("%Y-%m-%dT%H:%M:%SZ")
    fake.set(Aws.ACTION, Answer(body=f'{{"action": "terminate", "time": "{when}"}}'))
    notice = next_notice(watch)
    assert (notice.source, notice.must_stop) == ("AWS spot", True)
    assert near(notice.deadline, 120)
    assert notice.text == f"AWS will reclaim this spot machine: terminate at {when}"
    assert fake.tokens == 1


def test_aws_says_so_without_a_time_that_can_be_read(on_cloud):
    fake, watch = on_cloud(Aws)
    fake.set(Aws.ACTION, Answer(body='{"action": "hibernate", "time": "soon"}'))
    assert next_notice(watch).deadline is None


def test_aws_recommends_to_leave_which_is_only_a_hint(on_cloud):
    fake, watch = on_cloud(Aws)
    fake.set(Aws.REBALANCE, Answer(body='{"noticeTime": "2026-01-31T12:00:00Z"}'))
    hint = next_notice(watch)
    assert (hint.source, hint.must_stop, hint.deadline) == ("AWS rebalance", False, None)
    fake.wait_for_more(3, Aws.REBALANCE)
    assert watch.pending() is hint  # given once
    fake.set(Aws.ACTION, Answer(body='{"action": "stop", "time": "2026-01-31T12:02:00Z"}'))
    assert next_notice(watch).source == "AWS spot"


def test_aws_token_that_has_ended_is_renewed(on_cloud, lines):
    fake, watch = on_cloud(Aws)
    fake.wait_for_more(2, Aws.ACTION)
    fake.expire_token()
    fake.set(Aws.ACTION, Answer(body='{"action": "stop", "time": "2026-01-31T12:02:00Z"}'))
    next_notice(watch)
    assert fake.tokens == 3
    assert lines.empty()


def test_gcp_takes_a_spot_machine_back(on_cloud):
    fake, watch = on_cloud(Gcp)
    fake.wait_until_held(Gcp.PREEMPTED)
    fake.set(Gcp.PREEMPTED, Gcp.value("TRUE"))
    notice = next_notice(watch)
    assert (notice.source, notice.must_stop) == ("GCP", True)
    assert near(notice.deadline, 30)


def test_gcp_machine_that_is_preempted_already(service, watching):
    fake = service(Gcp)
    fake.set(Gcp.PREEMPTED, Gcp.value("TRUE"))
    watch = watching(base_urls={"gcp": fake.url}, metadata_timeout_s=5.0, clouds=("gcp",))
    assert next_notice(watch).source == "GCP"


def test_an_answer_that_comes_slowly_but_in_time_counts(on_cloud):
    fake, watch = on_cloud(Gcp)
    fake.set(Gcp.PREEMPTED, Answer(body="TRUE", drips=True))
    assert next_notice(watch).must_stop


@pytest.mark.parametrize("event", ["MIGRATE_ON_HOST_MAINTENANCE", "TERMINATE_ON_HOST_MAINTENANCE"])
def test_gcp_maintenance_is_a_hint(on_cloud, event):
    fake, watch = on_cloud(Gcp)
    fake.set(Gcp.MAINTENANCE, Gcp.value(event))
    hint = next_notice(watch)
    assert (hint.source, hint.must_stop, hint.deadline) == ("GCP maintenance", False, None)


@pytest.mark.parametrize(
    ("event", "must_stop", "left_s"),
    [
        ({"EventType": "Preempt", "NotBefore": 30}, True, 30),
        ({"EventType": "Preempt", "EventStatus": "Started"}, True, 0),
        ({"EventType": "Preempt", "NotBefore": "soon"}, True, None),
        ({"EventType": "Terminate", "NotBefore": 60}, True, 60),
        ({"EventType": "Reboot", "NotBefore": 900}, False, 900),
        ({"EventType": "Redeploy", "NotBefore": 60}, True, 60),
        ({"EventType": "Freeze", "NotBefore": 900}, False, 900),
        ({"EventType": "Something new", "NotBefore": 900}, False, 900),
    ],
)
def test_azure_announces_an_event(on_cloud, event, must_stop, left_s):
    fake, watch = on_cloud(Azure)
    if isinstance(event.get("NotBefore"), int):
        event = {**event, "NotBefore": format_datetime(in_seconds(event["NotBefore"]), usegmt=True)}
    fake.set(Azure.EVENTS, Azure.events({"EventId": "1", **event}))
    notice = next_notice(watch)
    assert (notice.source, notice.must_stop) == ("Azure", must_stop)
    assert notice.deadline is None if left_s is None else near(notice.deadline, left_s)


def test_azure_events_of_other_machines_are_not_ours(on_cloud):
    fake, watch = on_cloud(Azure)
    fake.set(Azure.EVENTS, Azure.events({"EventId": "1", "EventType": "Preempt", "Resources": ["machine_1"]}))
    fake.wait_until_asked(Azure.NAME)
    fake.wait_for_more(3, Azure.EVENTS)
    assert watch.pending() is None


def test_azure_may_go_ahead_only_when_told_that_the_state_is_saved(on_cloud, lines):
    fake, watch = on_cloud(Azure)
    fake.set(
        Azure.EVENTS,
        Azure.events({"EventId": "pause", "EventType": "Freeze"}, {"EventId": "end", "EventType": "Preempt"}),
    )
    while not next_notice(watch).must_stop:
        pass
    fake.wait_for_more(2, Azure.EVENTS)
    assert fake.started() == []
    watch.acknowledge()
    assert fake.started() == ["end"]
    watch.acknowledge()
    assert fake.started() == ["end"]
    assert lines.empty()


def test_azure_that_does_not_take_it_is_told(on_cloud, lines):
    fake, watch = on_cloud(Azure)
    fake.set(Azure.EVENTS, Azure.events({"EventId": "end", "EventType": "Preempt"}), Answer(status=500))
    next_notice(watch)
    watch.acknowledge()
    told = [lines.get_nowait() for _ in range(lines.qsize())]  # polling fails as well
    assert any("could not tell that the state is saved (answered with status 500 to POST" in line for line in told)


# Services that misbehave

AWAY = Answer(status=302, headers={"Location": "http://127.0.0.1:9/"})
BAD_ANSWERS = {
    "status 503": Answer(status=503),
    "no whole answer to GET": Answer(hangs=True),
    "within PreemptionConfig.metadata_timeout_s=0.2": Answer(body="x" * 500, drips=True),
    "status 302": AWAY,
    "more than 65536 bytes": Answer(body="x" * (MAX_BODY_BYTES + 1)),
    "not JSON": Answer(body="<html>sign in</html>"),
    "UnicodeDecodeError": Answer(body=b"\xff\xfe"),
    "not a JSON object": Answer(body="[1]"),
    "unknown action": Answer(body='{"action": ["terminate"]}'),
    "answered something that is not JSON": Answer(body="[" * 60000),
}


@pytest.mark.parametrize("text", BAD_ANSWERS)
def test_a_service_that_misbehaves_is_told_once_and_forgiven(on_cloud, lines, text):
    fake, watch = on_cloud(Aws, metadata_timeout_s=0.2)
    fake.set(Aws.ACTION, BAD_ANSWERS[text])
    line = lines.get(timeout=DEADLINE_S)
    assert line.startswith(f"AWS metadata: failed {FAILURES_TO_TELL} times in a row (")
    assert text in line
    assert watch.pending() is None
    fake.set(Aws.ACTION, Answer(body='{"action": "terminate", "time": "2026-01-31T12:00:00Z"}'))
    assert next_notice(watch).source == "AWS spot"
    assert lines.empty()


def test_a_service_that_misbehaves_again_is_not_told_again(on_cloud, lines):
    fake, _watch = on_cloud(Aws)
    fake.set(Aws.ACTION, Answer(status=500))
    lines.get(timeout=DEADLINE_S)
    fake.set(Aws.ACTION, Answer(status=404))
    fake.wait_for_more(2, Aws.REBALANCE)
    fake.set(Aws.ACTION, Answer(status=500))
    fake.wait_for_more(FAILURES_TO_TELL + 2, Aws.ACTION)
    assert lines.empty()


@pytest.mark.parametrize(
    ("kind", "path", "answer", "text"),
    [
        (Aws, Aws.TOKEN, Answer(status=403), "status 403"),
        (Aws, Aws.TOKEN, Answer(body="two\nlines"), "gives no token"),
        (Aws, Aws.TOKEN, Answer(body="wrong"), "refuses the token that it has just given"),
        (Gcp, Gcp.PREEMPTED, Answer(body="perhaps"), "neither TRUE nor FALSE"),
        (Gcp, Gcp.PREEMPTED, Answer(status=404), "status 404"),
        (Gcp, Gcp.MAINTENANCE, Answer(body="TEA_BREAK"), "unknown maintenance"),
        (Azure, Azure.EVENTS, Answer(body="{}"), "lists no events"),
        (Azure, Azure.EVENTS, Answer(body='{"Events": [1]}'), "is not an event"),
        (Azure, Azure.EVENTS, Answer(status=404), "status 404"),
        (Azure, Azure.EVENTS, Answer(status=503), "status 503"),
    ],
)
def test_other_wrong_answers(service, watching, lines, kind, path, answer, text):
    fake, cloud = service(kind), kind.__name__.lower()
    fake.set(path, answer)
    watch = watching(clouds=(cloud,), base_urls={cloud: fake.url}, metadata_timeout_s=5.0)
    assert text in lines.get(timeout=DEADLINE_S)
    assert watch.pending() is None


def test_nobody_there(watching, lines):
    watching(base_urls={"aws": "http://127.0.0.1:9"}, clouds=("aws",))
    assert "ConnectionRefusedError" in lines.get(timeout=DEADLINE_S)


def test_a_proxy_is_not_used(on_cloud, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    fake, _watch = on_cloud(Aws)
    fake.wait_until_asked(Aws.ACTION)


def test_close_does_not_wait_for_an_answer(service, watching, lines):
    fake = service(Aws)
    fake.set(Aws.ACTION, Answer(hangs=True))
    watch = watching(clouds=("aws",), base_urls={"aws": fake.url}, metadata_timeout_s=1000.0)
    fake.wait_until_asked(Aws.ACTION)
    watch.close()
    assert notice_threads() == []
    assert lines.empty()


# Slurm


def test_the_end_of_a_slurm_job_is_announced(watching):
    end = time.time() + 50
    watch = watching({"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": f"{end:.0f}"})
    notice = next_notice(watch)
    assert (notice.source, notice.must_stop) == ("Slurm time limit", True)
    assert near(notice.deadline, 50)
    assert notice.text.startswith("the time of this Slurm job ends in ")


def test_the_end_of_a_slurm_job_is_waited_for(watching):
    watch = watching({"SLURM_JOB_END_TIME": f"{time.time() + 60.5}"})
    assert near(next_notice(watch).deadline, 60)


@pytest.mark.parametrize(
    ("end", "lead_s", "threads"), [("-50", 60.0, 0), ("50", 0.0, 0), ("5000", 60.0, 1), ("unlimited", 60.0, 0)]
)
def test_an_end_that_is_far_or_past_or_unknown_is_none(watching, end, lead_s, threads):
    end = end if end.isalpha() else f"{time.time() + float(end):.0f}"
    watch = watching({"SLURM_JOB_END_TIME": end}, slurm_lead_s=lead_s)
    assert len(notice_threads()) == threads
    assert watch.pending() is None


@pytest.fixture
def scontrol(tmp_path):
    """Makes a `scontrol` that writes down how it was called; returns the environment of a job."""

    def make(then="exit 0"):
        path = tmp_path / "bin" / "scontrol"
        path.parent.mkdir()
        path.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n{then}\n')
        path.chmod(0o755)
        return {"PATH": f"{path.parent}:/usr/bin:/bin", "SLURM_JOB_ID": "12", "SLURM_PROCID": "0"}

    return make


def test_a_job_is_requeued(scontrol, tmp_path):
    assert requeue(scontrol()) == "Slurm job 12 is requeued and resumes when it starts again"
    assert (tmp_path / "calls").read_text() == "requeue 12\n"


def test_only_the_task_of_an_array_is_requeued(scontrol, tmp_path):
    requeue({**scontrol(), "SLURM_ARRAY_JOB_ID": "10", "SLURM_ARRAY_TASK_ID": "2"})
    assert (tmp_path / "calls").read_text() == "requeue 10_2\n"


@pytest.mark.parametrize(
    ("ranks", "does_it"),
    [({}, True), ({"SLURM_PROCID": "1"}, False), ({"RANK": "3"}, False), ({"RANK": "0", "SLURM_PROCID": "1"}, True)],
)
def test_only_the_first_rank_requeues(scontrol, tmp_path, ranks, does_it):
    assert (requeue({**scontrol(), **ranks}) is not None) is does_it
    assert (tmp_path / "calls").exists() is does_it


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        ("echo 'Requested operation is presently disabled' >&2; exit 1", "(Requested operation is presently disabled)"),
        ("exit 3", "(scontrol exited with status 3)"),
    ],
)
def test_a_job_that_cannot_be_requeued(scontrol, then, reason):
    line = requeue(scontrol(then))
    assert line.startswith(f"Slurm job 12 was not requeued {reason}: submit it again")


def test_a_scontrol_that_is_missing_or_no_program_or_outside_slurm(scontrol, tmp_path):
    environ = scontrol()
    assert "(scontrol is not on PATH)" in requeue({**environ, "PATH": str(tmp_path)})
    assert "this is not a Slurm job" in requeue({"PATH": environ["PATH"]})
    (tmp_path / "bin" / "scontrol").write_bytes(b"\x7fELF")
    assert "(scontrol could not be started: " in requeue(environ)


# A file, and a function


def test_a_file_that_appears(watching, tmp_path):
    path = tmp_path / "stop"
    watch = watching(file=path)
    assert watch.pending() is None
    path.touch()
    notice = next_notice(watch)
    assert (notice.source, notice.must_stop, notice.deadline) == ("file", True, None)
    assert notice.text == f"the file {path} exists"


OWN = Notice(source="my scheduler", deadline=None, must_stop=False, text="busy hour")


@pytest.mark.parametrize(
    ("answer", "source", "left_s"), [(True, "callable", None), (25, "callable", 25), (OWN, "my scheduler", None)]
)
def test_a_function_that_knows(watching, lines, answer, source, left_s):
    answers = iter([None, False, 0, ""])
    called_in = []

    def check():
        called_in.append(threading.current_thread().name)
        return next(answers, answer)

    notice = next_notice(watching(check=check))
    assert notice.source == source
    assert notice.deadline is None if left_s is None else near(notice.deadline, left_s)
    assert set(called_in) == {"torchtrainer notices: callable"}
    assert lines.empty()


@pytest.mark.parametrize("bad", [RuntimeError("no connection"), "soon", float("nan")])
def test_a_function_that_fails_is_told_once_and_called_again(watching, lines, bad):
    calls = iter(range(10))

    def check():
        if next(calls, 10) >= 5:
            return True
        if isinstance(bad, Exception):
            raise bad
        return bad

    assert next_notice(watching(check=check)).must_stop
    expected = "RuntimeError: no connection" if isinstance(bad, Exception) else "not a false value, True, a number"
    assert expected in lines.get_nowait()
    assert lines.empty()


def test_a_function_that_does_not_return_is_left_behind(watching, lines):
    called, release = threading.Event(), threading.Event()
    watch = watching(check=lambda: called.set() or release.wait(DEADLINE_S))
    [thread] = [thread for thread in threading.enumerate() if thread.name in notice_threads()]
    assert called.wait(DEADLINE_S)
    watch.close()
    assert "callable: did not return within 3 s" in lines.get_nowait()
    release.set()
    thread.join(DEADLINE_S)


# Signals, in processes of their own

PROGRAM = """
import multiprocessing, os, select, signal, sys, threading, time
from torchtrainer.config import PreemptionConfig
from torchtrainer.preempt.watch import NoticeWatch

def watching(start=True, **options):
    config = PreemptionConfig(metadata=None, slurm_lead_s=0, **options)
    watch = NoticeWatch(config, os.environ, metadata=True, say=print)
    if start:
        watch.start()
    return watch

def next_notice(watch):
    assert select.select([watch.wait_fd()], [], [], 30)[0]
    return watch.pending()

def left(notice):
    return None if notice.deadline is None else round(notice.seconds_left(), -1)
"""


def send(program, *names):
    for name in names:
        program.process.send_signal(getattr(signal, name))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_the_first_signal_is_a_notice_and_the_second_says_leave_now(tmp_path, name):
    program = start_program(
        tmp_path,
        PROGRAM
        + """
watch = watching(repeat_s=0)
print("ready")
notice = next_notice(watch)
print("first", notice.source, notice.must_stop, notice.deadline, notice.text, watch.urgent)
print("second", next_notice(watch) is notice, watch.urgent)
watch.close()
""",
    )
    program.wait_for("ready")
    send(program, name)
    assert program.wait_for("first") == f"first {name} True None got {name} False\n"
    send(program, name)
    assert program.wait_for("second") == "second True True\n"
    assert program.finish() == 0, program.errors


def test_a_signal_that_a_launcher_passes_on_once_more_is_the_same_notice(tmp_path):
    program = start_program(
        tmp_path,
        PROGRAM
        + """
got = []
signal.signal(signal.SIGTERM, lambda *_: got.append(1))  # is called for each: how the program knows that both are there
watch = watching(repeat_s=1000)
woken, wake = os.pipe()  # not signal.pause(): a signal that comes just before it would be handled only after the next one
os.set_blocking(wake, False)
signal.set_wakeup_fd(wake)
print("ready")
for count in (1, 2):
    while len(got) < count:
        os.read(woken, 1)
    print("got", count, watch.urgent)
""",
    )
    program.wait_for("ready")
    send(program, "SIGTERM")
    assert program.wait_for("got") == "got 1 False\n"
    send(program, "SIGTERM")
    assert program.wait_for("got") == "got 2 False\n"
    assert program.finish() == 0, program.errors


def test_a_storm_of_signals_disturbs_nothing(tmp_path):
    program = start_program(
        tmp_path,
        PROGRAM
        + """
watch = watching(repeat_s=1000)
print("ready")
while not watch.urgent:  # until another signal comes after the storm
    watch.pending()
print("calm", watch.pending().source)
""",
    )
    program.wait_for("ready")
    send(program, *["SIGUSR1"] * 1000, "SIGTERM")
    assert program.wait_for("calm") == "calm SIGUSR1\n"
    assert program.finish() == 0, program.errors


def test_a_handler_of_the_user_is_called_after_ours(tmp_path):
    program = start_program(
        tmp_path,
        PROGRAM
        + """
def user(signum, frame):
    print("user's", signum == signal.SIGUSR1, bool(select.select([watch.wait_fd()], [], [], 0)[0]))

signal.signal(signal.SIGUSR1, user)
watch = watching()
print("ready")
next_notice(watch)
watch.close()
print("restored", signal.getsignal(signal.SIGUSR1) is user, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
""",
    )
    program.wait_for("ready")
    send(program, "SIGUSR1")
    assert program.wait_for("user's") == "user's True True\n"
    assert program.wait_for("restored") == "restored True True\n"
    assert program.finish() == 0, program.errors


RAY = """
def init():  # what ray.init() does to the signal
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(signum))

def wrap():
    ours = signal.getsignal(signal.SIGTERM)
    def over(signum, frame):
        print("over ours", flush=True)
        ours(signum, frame)
    signal.signal(signal.SIGTERM, over)
"""


@pytest.mark.parametrize(
    "setup",
    [
        "init(); watch = watching()",
        "watch = watching(); init()",
        "watch = watching(); wrap()",
        "init(); watch = watching(); init(); wrap()",
    ],
    ids=["before", "after", "over ours", "twice"],
)
def test_a_handler_that_exits_neither_takes_the_signal_away_nor_ends_the_process(tmp_path, setup):
    program = start_program(
        tmp_path,
        PROGRAM
        + RAY
        + f"""
{setup}
assert watch.pending() is None  # as every call asks
print("ready")
print("noticed", next_notice(watch).source)
watch.close()
print("left", callable(signal.getsignal(signal.SIGTERM)))
""",
    )
    program.wait_for("ready")
    send(program, "SIGTERM")
    assert program.wait_for("noticed") == "noticed SIGTERM\n"
    assert program.wait_for("left") == "left True\n"
    assert program.finish() == 0, program.errors
    assert program.output.count("over ours") == ("wrap" in setup)


IN_A_CALL = (
    CREATORS
    + """
import signal

def init():  # what ray.init() does to the signal
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(signum))

class Forever(TrainingOperator):
    def train_epoch(self, iterator, info):
        for step, batch in enumerate(iterator):
            self.train_batch(batch, {})
            if self.world_rank == 0 and step == 1:
                print("in the pass", flush=True)
        return {}

def data_creator(config):
    return DataLoader(dataset(200_000, 0), batch_size=1)

CREATORS["data_creator"] = data_creator
MORE = dict(**CREATORS, run_dir="run", training_operator_cls=Forever)
"""
)


@pytest.mark.parametrize(
    "ending",
    [
        "init(); TorchTrainer(**MORE).train()",
        "trainer = TorchTrainer(**MORE); init(); trainer.train()",
        "trainer = TorchTrainer(**MORE); trainer.apply_all_workers(init); trainer.train()",
    ],
    ids=["before", "after the trainer", "in the ranks"],
)
def test_a_preemption_saves_the_state_although_another_library_has_taken_the_signal(tmp_path, ending):
    program = start_program(tmp_path, IN_A_CALL + ending)
    program.wait_for("in the pass")
    if "workers" in ending:
        pids = [int(line.split()[0]) for line in marked_processes(program.mark)]
        os.kill(
            max(pid for pid in pids if os.getsid(pid) == pid), signal.SIGTERM
        )  # one that was forked last: a rank, which hands it on
    else:
        send(program, "SIGTERM")
    assert program.finish() == EXIT_PREEMPTED, program.errors
    assert list((tmp_path / "run").rglob("manifest.json"))
    program.assert_nothing_left()


IN_A_THREAD = """
watch = watching(start=False)
thread = threading.Thread(target=watch.start)
thread.start()
thread.join()
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
signal.signal(signal.SIGUSR1, signal.SIG_IGN)
"""


@pytest.mark.parametrize(
    "setup",
    [
        "signal.signal(signal.SIGUSR1, signal.SIG_IGN); watch = watching()",
        "watch = watching(signals=('SIGTERM',)); signal.signal(signal.SIGUSR1, signal.SIG_IGN)",
        "watch = watching(); signal.signal(signal.SIGUSR1, signal.SIG_IGN)",
        IN_A_THREAD,
    ],
    ids=["ignored before", "not configured", "replaced meanwhile", "not in the main thread"],
)
def test_signals_that_are_not_ours_are_left_alone(tmp_path, setup):
    program = start_program(
        tmp_path,
        PROGRAM
        + f"{setup}\n"
        + """
os.kill(os.getpid(), signal.SIGUSR1)
print("ignored:", signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN, watch.pending() is not None)
watch.close()
print("still:", signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN)
""",
    )
    assert program.wait_for("ignored:") == "ignored: True False\n"
    assert program.wait_for("still:") == "still: True\n"
    assert program.finish() == 0, program.errors


@pytest.mark.parametrize("close", ["watch.close()", "t = threading.Thread(target=watch.close); t.start(); t.join()"])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_closed_watch_keeps_nothing_alive(tmp_path, close, name):
    program = start_program(tmp_path, PROGRAM + f"watch = watching()\n{close}\nprint('ready')\ntime.sleep(60)")
    program.wait_for("ready")
    send(program, name)
    assert program.finish() == -getattr(signal, name)


@pytest.mark.parametrize("order", ["first.close(); second", "second.close(); first"])
def test_two_watches_of_one_process(tmp_path, order):
    program = start_program(
        tmp_path,
        PROGRAM
        + f"""
first = watching()
second = watching()
{order.split(";")[0]}
rest = {order.split(";")[1]}
print("ready")
print("rest", next_notice(rest).source)
rest.close()
os.kill(os.getpid(), signal.SIGUSR1)
""",
    )
    program.wait_for("ready")
    send(program, "SIGUSR1")
    assert program.wait_for("rest") == "rest SIGUSR1\n"
    assert program.finish() == -signal.SIGUSR1


def test_forked_processes_end_as_before_and_do_not_report(tmp_path):
    program = start_program(
        tmp_path,
        PROGRAM
        + """
def loader(connection):
    os.kill(os.getpid(), signal.SIGUSR1)  # Slurm sends it to every process
    connection.send("alive")
    time.sleep(60)

watch = watching()
here, there = multiprocessing.Pipe()
child = multiprocessing.get_context("fork").Process(target=loader, args=(there,))
child.start()
print("loader", here.recv(), watch.pending(), select.select([watch.wait_fd()], [], [], 0)[0])
child.terminate()
child.join(30)
print("ended", child.exitcode, watch.pending())
""",
    )
    assert program.wait_for("loader") == "loader alive None []\n"
    assert program.wait_for("ended") == "ended -15 None\n"
    assert program.finish() == 0, program.errors


@pytest.mark.parametrize(
    ("options", "environ", "name", "left_s"),
    [
        ("", {"TORCHTRAINER_GRACE_S": "60"}, "SIGTERM", "60.0"),
        ("grace_s=30", {"TORCHTRAINER_GRACE_S": "60"}, "SIGTERM", "30.0"),
        ("", {"SLURM_JOB_END_TIME": "+120"}, "SIGUSR1", "120.0"),
        ("grace_s=60", {"SLURM_JOB_END_TIME": "+120"}, "SIGUSR1", "60.0"),
        ("", {"SLURM_JOB_END_TIME": "+120"}, "SIGTERM", "None"),
        ("", {"SLURM_JOB_END_TIME": "+7200"}, "SIGUSR1", "None"),
        ("", {"SLURM_JOB_END_TIME": "-120"}, "SIGUSR1", "None"),
        ("", {}, "SIGUSR1", "None"),
    ],
)
def test_how_long_a_signal_leaves(tmp_path, options, environ, name, left_s):
    if "SLURM_JOB_END_TIME" in environ:
        environ = {"SLURM_JOB_END_TIME": str(time.time() + int(environ["SLURM_JOB_END_TIME"]))}
    program = start_program(
        tmp_path,
        PROGRAM + f"watch = watching({options})\nprint('ready')\nprint('left', left(next_notice(watch)))",
        **environ,
    )
    program.wait_for("ready")
    send(program, name)
    assert program.wait_for("left") == f"left {left_s}\n"
    assert program.finish() == 0, program.errors


# Settings


def test_the_page_lists_the_settings_and_their_defaults():
    page = (Path(__file__).parents[1] / "docs" / "preemption.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", page, re.MULTILINE)
    assert listed == [(field.name, repr(field.default)) for field in fields(PreemptionConfig)]


@pytest.mark.parametrize("text", ["", "soon", "-1", "inf", "nan"])
def test_a_grace_period_that_is_no_number_is_told(watching, lines, text):
    watching({"TORCHTRAINER_GRACE_S": text})
    assert lines.get_nowait() == (
        f"TORCHTRAINER_GRACE_S={text!r} is not a number of seconds: the time left after a notice is unknown"
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"signals": ("SIGINT",)}, "cannot contain SIGINT: Ctrl-C"),
        ({"signals": ("SIGKILL",)}, "cannot contain SIGKILL"),
        ({"signals": ("SIGWHAT",)}, "there is no 'SIGWHAT'"),
        ({"signals": ("SIG_DFL",)}, "there is no 'SIG_DFL'"),
        ({"metadata": ("aws", "oracle")}, "got ('aws', 'oracle')"),
        ({"metadata": "aws"}, "got 'aws'"),
        ({"metadata_every_s": 0}, "metadata_every_s must be more than 0 seconds, got 0"),
        ({"metadata_timeout_s": float("nan")}, "metadata_timeout_s must be more than 0 seconds, got nan"),
        ({"check_every_s": -1}, "check_every_s must be more than 0 seconds, got -1"),
        ({"repeat_s": -1}, "repeat_s must be at least 0 seconds, got -1"),
        ({"grace_s": float("inf")}, "grace_s must be at least 0 seconds, got inf"),
        ({"slurm_lead_s": -60}, "slurm_lead_s must be at least 0 seconds, got -60"),
    ],
)
def test_wrong_settings(options, text):
    with pytest.raises(InvalidArgumentError) as caught:
        PreemptionConfig(**options)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"signals": "SIGTERM"}, "must be a tuple of names of signals, got 'SIGTERM'"),
        ({"check": "squeue"}, "must be a function without arguments, got 'squeue'"),
    ],
)
def test_settings_of_the_wrong_type(options, text):
    with pytest.raises(InvalidArgumentTypeError) as caught:
        PreemptionConfig(**options)
    assert text in str(caught.value)
