"""A client that speaks HTTP/2 over TLS as a browser does: curl, with the test's certificate and name."""

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.engines import missing
from tests.proxy.nginx import NAME, Nginx

ANSWER_SECONDS = 60.0
PROMPT_SECONDS = 4.0
"""Within this a signal is prompt: generous for a slow machine, and far less than what fills a buffer."""


class Silence(Exception):
    """Nothing came in time."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, whole; header names in lower case. ``version`` is that of HTTP: ``2``."""

    status: int
    version: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Event:
    """One signal, and when it arrived, in seconds since the epoch."""

    data: dict[str, Any]
    at: float

    @property
    def type(self) -> str:
        return str(self.data["type"])

    @property
    def made_at(self) -> float:
        """When the node made it, in seconds since the epoch: server and client have one clock."""
        return datetime.fromisoformat(self.data["timestamp"]).timestamp()

    @property
    def late_seconds(self) -> float:
        """How long after it was made it arrived."""
        return self.at - self.made_at


def _command(nginx: Nginx, *options: str) -> list[str]:
    if shutil.which("curl") is None:
        missing("curl")
    return [
        "curl", "-sS", "--http2", "--cacert", str(nginx.certificate),
        "--resolve", f"{NAME}:{nginx.port}:127.0.0.1", "--noproxy", "*", *options,
    ]  # fmt: skip


def _headers(head: str) -> tuple[str, int, dict[str, str]]:
    """Version, status and headers of the last head that curl wrote."""
    first, *lines = head.strip().split("\r\n\r\n")[-1].split("\r\n")
    version, status = first.split(" ")[:2]
    named = (line.partition(":") for line in lines)
    return version.removeprefix("HTTP/"), int(status), {name.lower(): value.strip() for name, _, value in named}


def call(
    nginx: Nginx,
    method: str,
    path: str,
    body: Any = None,
    *,
    headers: Mapping[str, str] | None = None,
    options: tuple[str, ...] = (),
) -> Answer:
    """Any request over HTTP/2; a body that is not bytes is sent as JSON."""
    content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    sent = ({"Content-Type": "application/json"} if content is not None else {}) | dict(headers or {})
    given = ["-X", method, *(part for name, value in sent.items() for part in ("-H", f"{name}: {value}"))]
    if content is not None:
        given += ["--data-binary", "@-"]
    with tempfile.NamedTemporaryFile("r", prefix="context-server-head-") as head:
        ran = subprocess.run(
            _command(nginx, *given, "-D", head.name, *options, nginx.url + path),
            input=content or b"", capture_output=True, timeout=ANSWER_SECONDS, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr.decode()
        version, status, found = _headers(Path(head.name).read_bytes().decode("latin-1"))
    return Answer(status, version, found, ran.stdout)


def create(nginx: Nginx) -> str:
    """A new context's id."""
    answer = call(nginx, "POST", "/contexts", {})
    assert answer.status == 201, answer
    return str(answer.json["id"])


def post(nginx: Nginx, context_id: str, beat: str) -> str:
    """Has the metronome write; the id of its reply."""
    body = {"payload": {"type": "text", "content": beat}}
    answer = call(nginx, "POST", f"/contexts/{context_id}/messages", body)
    assert answer.status == 202, answer
    return str(answer.json["reply_message_id"])


@dataclass(slots=True)
class Stream:
    """An open stream of signals; ``seen`` is every event so far. Use it with ``with``.

    ``answer`` is its head, once an event has come or the stream has ended.
    """

    nginx: Nginx
    path: str
    options: tuple[str, ...] = ()
    seen: list[Event] = field(default_factory=list)
    ended: bool = False
    _bytes: bytes = b""
    _process: "subprocess.Popen[bytes]" = field(init=False)
    _head: str = field(init=False)

    def __enter__(self) -> Self:
        descriptor, self._head = tempfile.mkstemp(prefix="context-server-head-")
        os.close(descriptor)
        self._process = subprocess.Popen(
            _command(self.nginx, "-N", "-D", self._head, *self.options, self.nginx.url + self.path),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        Path(self._head).unlink()

    @property
    def answer(self) -> Answer:
        version, status, headers = _headers(Path(self._head).read_bytes().decode("latin-1"))
        return Answer(status, version, headers, b"")

    def next(self, seconds: float = PROMPT_SECONDS) -> Event | None:
        """The next event; None when the stream has ended.

        Raises:
            Silence: nothing came in that time.
        """
        assert self._process.stdout is not None
        deadline = time.monotonic() + seconds
        while (end := self._bytes.find(b"\n\n")) < 0:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise Silence(f"no event of {self.path} within {seconds} s; seen: {self.seen[-3:]}")
            part = os.read(self._process.stdout.fileno(), 65536)
            if not part:
                self.ended = True
                return None
            self._bytes += part
        lines = self._bytes[:end].decode("ascii").split("\n")
        self._bytes = self._bytes[end + 2 :]
        (data,) = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        self.seen.append(Event(json.loads(data), time.time()))
        return self.seen[-1]

    def until(self, kind: str, seconds: float = ANSWER_SECONDS, **fields: Any) -> Event:
        """The next event of a type whose fields have these values."""
        deadline = time.monotonic() + seconds
        while (event := self.next(max(0.0, deadline - time.monotonic()))) is not None:
            if event.type == kind and all(event.data.get(name) == value for name, value in fields.items()):
                return event
        raise AssertionError(f"{self.path} ended without {kind}; seen: {self.seen[-3:]}")
