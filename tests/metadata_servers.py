"""Fake metadata services of the three clouds on loopback: they check what the real ones check, and can misbehave."""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

HOLD_S = 30.0
"""Longest time that a fake holds an answer back; a test is over long before."""


@dataclass(frozen=True)
class Answer:
    """What a fake answers at a path."""

    status: int = 200
    body: str | bytes = ""
    headers: dict[str, str] = field(default_factory=dict)
    hangs: bool = False
    drips: bool = False


class MetadataService:
    """Answers every path with what was set for it, 404 by default, and remembers what it was asked."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.closing = threading.Event()
        self.requests: list[str] = []
        self.bodies: list[str] = []
        self.answers: dict[str, list[Answer]] = {}
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                service.serve(self)

            do_PUT = do_POST = do_GET

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False
        self._server.handle_error = lambda *_: None  # the client may be gone before it has read everything
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def set(self, path: str, *answers: Answer) -> None:
        """Answers come one after the other; the last one stays."""
        with self.changed:
            self.answers[path] = list(answers)
            self.changed.notify_all()

    def wait_until_asked(self, path: str) -> None:
        """Until a path was asked for, now or before."""
        with self.changed:
            assert self.changed.wait_for(lambda: path in self.requests, HOLD_S)

    def wait_for_more(self, count: int, path: str) -> None:
        """Until a path was asked for so many times more."""
        with self.changed:
            wanted = self.requests.count(path) + count
            assert self.changed.wait_for(lambda: self.requests.count(path) >= wanted, HOLD_S)

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        path = urlsplit(request.path).path
        body = request.rfile.read(int(request.headers.get("Content-Length", 0))).decode()
        with self.changed:
            self.requests.append(path)
            self.bodies.append(body)
            self.changed.notify_all()
        answer = self.refusal(request, path) or self.answer(path, parse_qs(urlsplit(request.path).query))
        if answer.hangs:
            self.closing.wait(HOLD_S)
            return
        content = answer.body if isinstance(answer.body, bytes) else answer.body.encode()
        request.send_response(answer.status)
        for name, value in answer.headers.items():
            request.send_header(name, value)
        request.end_headers()
        for part in [content[i : i + 1] for i in range(len(content))] if answer.drips else [content]:
            request.wfile.write(part)
            if answer.drips:
                self.closing.wait(0.05)  # what is tested: an answer that comes slowly

    def refusal(self, request: BaseHTTPRequestHandler, path: str) -> Answer | None:
        """What the real service answers to a request that it would not take."""
        return None

    def answer(self, path: str, query: dict[str, list[str]]) -> Answer:
        with self.changed:
            answers = self.answers.get(path, [Answer(status=404, body="not found")])
            return answers.pop(0) if len(answers) > 1 else answers[0]

    def close(self) -> None:
        self.closing.set()
        with self.changed:
            self.changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Aws(MetadataService):
    """Takes requests with the latest token only."""

    ACTION = "/latest/meta-data/spot/instance-action"
    REBALANCE = "/latest/meta-data/events/recommendations/rebalance"
    TOKEN = "/latest/api/token"

    def __init__(self) -> None:
        self.tokens = 0
        super().__init__()

    def refusal(self, request, path):
        if path == self.TOKEN:
            ttl = request.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "")
            return None if request.command == "PUT" and 1 <= int(ttl) <= 21600 else Answer(status=400)
        given = request.headers.get("X-aws-ec2-metadata-token")
        return None if given == f"token {self.tokens}" else Answer(status=401, body="unauthorized")

    def answer(self, path, query):
        if path == self.TOKEN and path not in self.answers:
            self.tokens += 1
            return Answer(body=f"token {self.tokens}")
        return super().answer(path, query)

    def expire_token(self) -> None:
        self.tokens += 1


class Gcp(MetadataService):
    """Holds an answer back while the value is the one that the client knows."""

    PREEMPTED = "/computeMetadata/v1/instance/preempted"
    MAINTENANCE = "/computeMetadata/v1/instance/maintenance-event"

    def __init__(self) -> None:
        super().__init__()
        self.held: set[str] = set()
        self.set(self.PREEMPTED, self.value("FALSE"))
        self.set(self.MAINTENANCE, self.value("NONE"))

    @staticmethod
    def value(text: str) -> Answer:
        return Answer(body=text, headers={"ETag": f"{sum(text.encode()):x}", "Metadata-Flavor": "Google"})

    def refusal(self, request, path):
        return None if request.headers.get("Metadata-Flavor") == "Google" else Answer(status=403)

    def wait_until_held(self, path: str) -> None:
        """Until a client waits for the value at a path to change."""
        with self.changed:
            assert self.changed.wait_for(lambda: path in self.held, HOLD_S)

    def answer(self, path, query):
        known, wait_s = query["last_etag"][0], float(query["timeout_sec"][0])
        assert query["wait_for_change"] == ["true"]
        with self.changed:
            if self.answers[path][0].headers.get("ETag") == known:
                self.held.add(path)
                self.changed.notify_all()
            self.changed.wait_for(
                lambda: self.closing.is_set() or self.answers[path][0].headers.get("ETag") != known, wait_s
            )
        return super().answer(path, query)


class Azure(MetadataService):
    """Lists scheduled events and takes acknowledgements."""

    EVENTS = "/metadata/scheduledevents"
    NAME = "/metadata/instance/compute/name"

    def __init__(self) -> None:
        super().__init__()
        self.set(self.NAME, Answer(body="machine_0"))
        self.set(self.EVENTS, self.events())

    @staticmethod
    def events(*events: dict[str, object]) -> Answer:
        usual = {
            "EventStatus": "Scheduled",
            "ResourceType": "VirtualMachine",
            "Resources": ["machine_0"],
            "NotBefore": "",
        }
        return Answer(body=json.dumps({"DocumentIncarnation": 1, "Events": [{**usual, **event} for event in events]}))

    def refusal(self, request, path):
        return None if request.headers.get("Metadata") == "true" else Answer(status=400)

    def started(self) -> list[str]:
        """Ids of the events that were acknowledged."""
        return [event["EventId"] for body in self.bodies if body for event in json.loads(body)["StartRequests"]]
