"""The calls of the contract as a client makes them, and the scripts of the agent in ``scripted.py``."""

import http.client
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.blackbox.sse import DEADLINE_SECONDS, EventStream
from tests.server import Server

SCRIPTED = "tests.blackbox.scripted:scripted"
PATIENCE_MS = 100
"""For servers whose signals are mostly listened to only: as by default, and sooner."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer, whole; header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True, slots=True)
class Calls:
    """Calls a server; each method that does not give an ``Answer`` expects success and gives what it holds."""

    server: Server
    headers: Mapping[str, str] = field(default_factory=dict)

    def call(
        self, method: str, path: str, body: Any = None, *, headers: Mapping[str, str] | None = None, seconds: float = 90
    ) -> Answer:
        """Any request; a body that is not bytes is sent as JSON."""
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent = {**self.headers, **({"Content-Type": "application/json"} if content else {}), **(headers or {})}
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=seconds)
        try:
            connection.request(method, path, content, sent)
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, found, response.read())
        finally:
            connection.close()

    def _get(self, path: str) -> Any:
        answer = self.call("GET", path)
        assert answer.status == 200, answer
        return answer.json

    def create(self, **fields: Any) -> str:
        """A new context's id."""
        answer = self.call("POST", "/contexts", fields)
        assert answer.status == 201, answer
        return str(answer.json["id"])

    def send(self, context_id: str, text: str, *, fields: Mapping[str, Any] | None = None, **options: Any) -> Answer:
        """Posts a message, with further ``fields`` of the body such as ``if_busy``."""
        payload = {"type": "text", "content": text, "display": None}
        body = {"payload": payload, "client_metadata": {}} | dict(fields or {})
        return self.call("POST", f"/contexts/{context_id}/messages", body, **options)

    def post(self, context_id: str, text: str) -> dict[str, Any]:
        """Posts a message; the ids that the answer gives."""
        answer = self.send(context_id, text)
        assert answer.status == 202, answer
        return dict(answer.json)

    def run(self, context_id: str, *steps: list[Any], **fields: Any) -> dict[str, Any]:
        """Has the scripted agent do ``steps``."""
        answer = self.send(context_id, script(*steps), fields=fields)
        assert answer.status == 202, answer
        return dict(answer.json)

    def approvals(self, context_id: str, status: str = "pending") -> list[dict[str, Any]]:
        return list(self._get(f"/contexts/{context_id}/approvals?status={status}")["items"])

    def decide(self, context_id: str, approval_id: str, decision: str, **fields: Any) -> Answer:
        """Approves or denies; any answer."""
        body = {"decision": decision, **fields}
        return self.call("POST", f"/contexts/{context_id}/approvals/{approval_id}", body)

    def queue(self, context_id: str) -> list[dict[str, Any]]:
        return list(self._get(f"/contexts/{context_id}/queue")["items"])

    def regenerate(self, context_id: str, message_id: str) -> dict[str, Any]:
        answer = self.call("POST", f"/contexts/{context_id}/messages/{message_id}/regenerate")
        assert answer.status == 202, answer
        return dict(answer.json)

    def fork(self, context_id: str, message_id: str) -> str:
        answer = self.call("POST", f"/contexts/{context_id}/fork", {"message_id": message_id})
        assert answer.status == 201, answer
        return str(answer.json["id"])

    def cancel(self, context_id: str) -> dict[str, Any]:
        answer = self.call("POST", f"/contexts/{context_id}/cancel")
        assert answer.status == 202, answer
        return dict(answer.json)

    def context(self, context_id: str) -> dict[str, Any]:
        return dict(self._get(f"/contexts/{context_id}"))

    def message(self, context_id: str, message_id: str) -> dict[str, Any]:
        return dict(self._get(f"/contexts/{context_id}/messages/{message_id}"))

    def messages(self, context_id: str) -> list[dict[str, Any]]:
        return list(self._get(f"/contexts/{context_id}/messages?include=content&limit=200")["items"])

    def pull(self, context_id: str, message_id: str, **query: Any) -> dict[str, Any]:
        path = f"/contexts/{context_id}/messages/{message_id}/content"
        return dict(self._get(path + _query(query)))

    def chunks(self, context_id: str, message_id: str) -> list[dict[str, Any]]:
        return list(self.pull(context_id, message_id, view="chunks")["chunks"])

    def metric(self, name: str) -> float:
        """The value of one metric, by its name with labels as it is exposed."""
        lines = self.call("GET", "/metrics").body.decode().splitlines()
        return float(next(line.rsplit(" ", 1)[1] for line in lines if line.startswith(f"{name} ")))

    def signals(self, context_id: str, *, headers: Mapping[str, str] | None = None, **query: Any) -> EventStream:
        """The stream of one context, to be entered."""
        return EventStream(self.server.port, f"/contexts/{context_id}/stream{_query(query)}", headers or {})

    def shared(self, *contexts: str, headers: Mapping[str, str] | None = None, **query: Any) -> EventStream:
        """The stream of some contexts (``id`` or ``id:version``), or of all; to be entered."""
        named = "&".join(f"context={quote(context, safe=':')}" for context in contexts)
        path = f"/stream{_query(query)}"
        if named:
            path += ("&" if "?" in path else "?") + named
        return EventStream(self.server.port, path, headers or {})

    def inline(
        self, context_id: str, message_id: str, *, headers: Mapping[str, str] | None = None, **query: Any
    ) -> EventStream:
        """The inline view of a message, to be entered."""
        path = f"/contexts/{context_id}/messages/{message_id}/events{_query(query)}"
        return EventStream(self.server.port, path, headers or {})

    def ended(self, context_id: str, message_id: str) -> dict[str, Any]:
        """The message once it has ended: a chain of waiting pulls."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        page = self.pull(context_id, message_id)
        while page["final_sequence"] is None:
            assert time.monotonic() < deadline, page
            page = self.pull(context_id, message_id, from_sequence=page["sequence"], wait=5)
        return self.message(context_id, message_id)

    def settled(self, context_id: str, state: str) -> dict[str, Any]:
        """The context once it is in a state, as the signals say."""
        with self.signals(context_id) as stream:
            stream.until("state_changed", new_state=state)
        return self.context(context_id)


def _query(parameters: Mapping[str, Any]) -> str:
    return "?" + "&".join(f"{name}={quote(str(value))}" for name, value in parameters.items()) if parameters else ""


def script(*steps: list[Any]) -> str:
    """A message that has the scripted agent do ``steps``."""
    return json.dumps(steps)


def eventually(condition: Callable[[], Any], what: str = "the condition", seconds: float = DEADLINE_SECONDS) -> Any:
    """What ``condition`` gives, as soon as that is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not come true in {seconds} s"
        time.sleep(0.005)
    return found


def marked(server: Server, name: str) -> str:
    """Waits for a mark of the scripted agent; what it wrote into it."""
    path: Path = server.directory / name
    eventually(path.exists, f"mark {name}")
    return path.read_text()


def release(server: Server, name: str) -> None:
    """Opens a gate at which the scripted agent waits."""
    (server.directory / name).touch()


def faults(server: Server) -> list[str]:
    """Lines of the server's log that tell of an error; the log is JSON."""
    lines = server.log.read_text().splitlines()
    return [line for line in lines if not line.startswith("{") or json.loads(line)["level"] in ("error", "critical")]
