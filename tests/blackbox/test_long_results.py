"""Long tool output: whole in the log and at its own URL, cut where it is one chunk of many."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.blackbox.calls import SCRIPTED, Calls, faults
from tests.blackbox.wire import UNKNOWN_ID, problem, pull, written
from tests.databases import KINDS
from tests.server import Server

DATABASES = KINDS

IMMUTABLE = "private, max-age=31536000, immutable"
SHORT = "naïve 😀 " * 500
LONG = "naïve 😀 " * 4_000
CALL = {"id": "call-1", "name": "read_page", "arguments": {"url": "x" * 20_000, "depth": 1}}
RESULT = {"id": "call-1", "status": "ok", "seconds": 0.25, "result": LONG}


@pytest.fixture(scope="module")
def calls(database_kind: str | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    directory = tmp_path_factory.mktemp("long")
    with Server(directory, agent=SCRIPTED, log_format="json", path_prefix="/api/v1") as server:
        yield Prefixed(server)
        assert faults(server) == []


class Prefixed(Calls):
    """Calls of a server below a prefix."""

    def call(self, method: str, path: str, *arguments: Any, **options: Any) -> Any:
        full = path if path.startswith("/api/v1") else f"/api/v1{path}"
        return Calls.call(self, method, full, *arguments, **options)


@pytest.fixture(scope="module")
def reply(calls: Calls) -> tuple[str, str]:
    """A reply with a long call, its long result, a short one, and text that is long too."""
    return written(
        calls,
        ["data", "tool_call", CALL],
        ["data", "tool_result", RESULT],
        ["data", "tool_call", {"id": "call-2", "name": "look", "arguments": {}}],
        ["data", "tool_result", {**RESULT, "id": "call-2", "result": {"found": SHORT}}],
        ["text", LONG],
    )


def size_of(data: Any) -> int:
    return len(json.dumps(data, ensure_ascii=False).encode())


def url_of(reply: tuple[str, str], sequence: int) -> str:
    return f"/api/v1/contexts/{reply[0]}/messages/{reply[1]}/chunks/{sequence}"


@pytest.mark.scenario("content-pull", "Long tool output in the chunks view")
def test_long_output_is_cut_in_the_pull_and_says_where_the_rest_is(calls: Calls, reply: tuple[str, str]) -> None:
    chunks = calls.chunks(*reply)
    assert chunks[1]["data"] == {
        **RESULT,
        "result": LONG[:2000],
        "truncated": True,
        "size_bytes": size_of(RESULT),
        "url": url_of(reply, 2),
    }
    assert chunks[0]["data"] == {
        **CALL,
        "arguments": json.dumps(CALL["arguments"], ensure_ascii=False)[:2000],
        "truncated": True,
        "size_bytes": size_of(CALL),
        "url": url_of(reply, 1),
    }
    assert chunks[3]["data"]["result"] == {"found": SHORT}
    assert "truncated" not in chunks[3]["data"]
    assert "".join(chunk["text"] for chunk in chunks[4:]) == LONG


@pytest.mark.scenario("content-pull", "Long tool output in the inline view")
def test_long_output_is_cut_in_the_inline_view_too(calls: Calls, reply: tuple[str, str]) -> None:
    answer = calls.call("GET", f"/contexts/{reply[0]}/messages/{reply[1]}/events")
    assert answer.status == 200
    events = [json.loads(line[6:]) for line in answer.body.decode().splitlines() if line.startswith("data: ")]
    (shown,) = [event["data"] for event in events if event.get("sequence") == 2 and "data" in event]
    assert shown == calls.chunks(*reply)[1]["data"]


@pytest.mark.scenario("content-pull", "One chunk, whole")
def test_a_chunk_is_given_whole_and_for_ever(calls: Calls, reply: tuple[str, str]) -> None:
    shown = calls.chunks(*reply)
    for chunk, data in zip(shown[:2], (CALL, RESULT), strict=True):
        answer = calls.call("GET", chunk["data"]["url"])
        assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
        assert answer.json == {"sequence": chunk["sequence"], "kind": chunk["kind"], "data": data}
        assert answer.headers["cache-control"] == IMMUTABLE
        etag = answer.headers["etag"]
        assert etag.startswith('"')
        known = calls.call("GET", chunk["data"]["url"], headers={"If-None-Match": etag})
        assert (known.status, known.body, known.headers["etag"]) == (304, b"", etag)
        head = calls.call("HEAD", chunk["data"]["url"])
        assert (head.status, head.body, head.headers["content-length"]) == (200, b"", str(len(answer.body)))
    for chunk in shown[2:]:
        assert calls.call("GET", url_of(reply, chunk["sequence"])).json == chunk
    assert len({calls.call("GET", url_of(reply, each["sequence"])).headers["etag"] for each in shown}) == len(shown)


@pytest.mark.scenario("content-pull", "Chunk that is not there")
def test_a_chunk_that_is_not_there_is_refused(calls: Calls, reply: tuple[str, str]) -> None:
    head = calls.pull(*reply)["sequence"]
    base = f"/contexts/{reply[0]}/messages"
    for sequence in (head + 1, head + 2, 2**53 - 1):
        answer = calls.call("GET", f"{base}/{reply[1]}/chunks/{sequence}")
        assert problem(answer, 409, "sequence-ahead")["sequence"] == head
        assert f"Sequence {sequence} " in answer.json["detail"]
    for named in ("0", "-1", "x", "1.0", "01", "%00", "1_0", "%D9%A1", str(2**53), "9" * 400):
        problem(calls.call("GET", f"{base}/{reply[1]}/chunks/{named}"), 404, "chunk-not-found")
    for named in ("1", "x"):
        problem(calls.call("GET", f"{base}/{UNKNOWN_ID}/chunks/{named}"), 404, "message-not-found")
        problem(calls.call("GET", f"/contexts/{UNKNOWN_ID}/messages/x/chunks/{named}"), 404, "context-not-found")


def test_the_pull_of_a_long_result_is_the_same_from_memory_and_disk(calls: Calls, reply: tuple[str, str]) -> None:
    before = [pull(calls, *reply, "view=chunks").body, calls.call("GET", url_of(reply, 2)).body]
    calls.server.kill()
    calls.server.start()
    assert [pull(calls, *reply, "view=chunks").body, calls.call("GET", url_of(reply, 2)).body] == before
