"""What tests of contexts, pulls and hostile input need beside ``calls.py``: problems, texts, raw bytes, rows."""

import hashlib
import http.client
import json
import socket
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, TypeVar

from tests.blackbox.calls import Answer, Calls, eventually
from tests.blackbox.sse import DEADLINE_SECONDS
from tests.databases import run_beside
from tests.server import Server

T = TypeVar("T")

PAGE_BYTES = 1_048_576
UNKNOWN_ID = "01890000-0000-7000-8000-000000000000"

CALL: dict[str, Any] = {"id": "call-1", "name": "look_up", "arguments": {"q": "ü", "n": [1, 2.5, None, True]}}
RESULT: dict[str, Any] = {"id": "call-1", "status": "ok", "result": {"found": "naïve 😀"}, "seconds": 0.25}
# Adjacent ones differ in kind, so each becomes a chunk of its own however they fall into commits.
STEPS: list[list[Any]] = [
    ["textual", "reasoning", "Let me see. "],
    ["data", "tool_call", CALL],
    ["data", "tool_result", RESULT],
    ["textual", "text", "First, "],
    ["data", "step", {"number": 1}],
    ["textual", "text", "naïve \U0001f600 "],
    ["textual", "reasoning", "Enough."],
    ["textual", "text", "and 'last'.\n"],
]
TEXT = "First, naïve \U0001f600 and 'last'.\n"


def digest_of(text: str) -> str:
    """The digest of a message's text."""
    return hashlib.sha256(text.encode()).hexdigest()


def problem(answer: Answer, status: int, code: str) -> dict[str, Any]:
    """The problem document that an answer is, once it is sure that it is one."""
    assert (answer.status, answer.headers["content-type"]) == (status, "application/problem+json"), answer
    document = dict(answer.json)
    assert (document["status"], document["code"]) == (status, code), document
    assert document["type"]
    assert document["title"]
    assert document["detail"]
    return document


def wheres(answer: Answer) -> list[str]:
    """What an ``invalid-request`` complains of."""
    return [error["where"] for error in problem(answer, 422, "invalid-request")["errors"]]


def pull(
    calls: Calls, context_id: str, message_id: str, query: str = "", headers: Mapping[str, str] | None = None
) -> Answer:
    """The answer of a pull, with its headers and its very bytes."""
    path = f"/contexts/{context_id}/messages/{message_id}/content"
    return calls.call("GET", f"{path}?{query}" if query else path, headers=headers)


def pages(calls: Calls, context_id: str, message_id: str, from_sequence: int = 0) -> list[dict[str, Any]]:
    """Every page of a message as it is now, pulled one after the other."""
    found = [calls.pull(context_id, message_id, from_sequence=from_sequence)]
    while not found[-1]["up_to_date"]:
        found.append(calls.pull(context_id, message_id, from_sequence=found[-1]["sequence"]))
        assert found[-1]["sequence"] > found[-2]["sequence"]
    return found


def text_of(calls: Calls, context_id: str, message_id: str, from_sequence: int = 0) -> str:
    """The text of a message as it is now."""
    return "".join(page["content"] for page in pages(calls, context_id, message_id, from_sequence))


def reached(calls: Calls, context_id: str, message_id: str, sequence: int) -> None:
    """Waits until the log of a message reaches a sequence."""
    eventually(
        lambda: calls.pull(context_id, message_id, view="chunks")["sequence"] >= sequence, f"sequence {sequence}"
    )


def raw(port: int, request: bytes) -> Answer:
    """Sends bytes that no HTTP library would send; the answer to them."""
    with socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_SECONDS) as connection:
        connection.sendall(request)
        response = http.client.HTTPResponse(connection, method=request.split(b" ", 1)[0].decode())
        response.begin()
        with closing(response):
            headers = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, headers, response.read())


def rows(server: Server, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """What another connection reads of the server's database now."""
    return run_beside(server.database_url, statement, *parameters)


def together(count: int, work: Callable[[int], T]) -> list[T]:
    """What ``work(0)`` … ``work(count - 1)`` give, all begun at the same moment."""
    start = threading.Barrier(count)

    def begin(number: int) -> T:
        start.wait(DEADLINE_SECONDS)
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


def message_body(text: str, **fields: Any) -> bytes:
    """The body that posts a text."""
    return json.dumps({"payload": {"type": "text", "content": text}, **fields}).encode()


def begin(calls: Calls, *steps: list[Any], gate: str) -> tuple[str, str]:
    """A reply of 8 chunks that goes on with ``steps`` when the gate opens: ids of context and reply."""
    context_id = calls.create()
    posted = calls.run(context_id, *STEPS, ["wait", gate], *steps)
    reached(calls, context_id, posted["reply_message_id"], len(STEPS))
    return context_id, posted["reply_message_id"]


def written(calls: Calls, *steps: list[Any]) -> tuple[str, str]:
    """A reply that has ended: ids of context and reply."""
    context_id = calls.create()
    posted = calls.run(context_id, *steps)
    calls.ended(context_id, posted["reply_message_id"])
    return context_id, posted["reply_message_id"]
