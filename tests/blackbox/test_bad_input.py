"""Whatever a client sends, it gets a 4xx problem document with its code, and nothing that was stored changes."""

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from tests.blackbox.calls import SCRIPTED, Answer, Calls, faults, script
from tests.blackbox.wire import UNKNOWN_ID, message_body, problem, raw, rows, text_of, wheres
from tests.server import Server

pytestmark = pytest.mark.scenario("operations", "Hostile input")

TWO_MIB = 2 * 1_048_576
DEEP = 100_000
HUGE: list[Any] = [2**53, 2**63, 2**64, -1, 1.0, 10**400, -(10**400), True, None, [], {}]
WRONG_TEXT: list[Any] = [1, 1.5, True, None, [], {}, ["a"], 10**400]


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    with Server(tmp_path_factory.mktemp("bad"), agent=SCRIPTED, log_format="json") as server:
        yield Calls(server)
        # The bytes that are no HTTP are logged by the server below us, as warnings.
        assert faults(server) == []


@pytest.fixture(scope="module")
def ids(calls: Calls) -> tuple[str, str]:
    """A context with a conversation in it, and the reply."""
    context_id = calls.create(title="unharmed", metadata={"a": 1})
    reply = calls.run(context_id, ["text", "kept"])["reply_message_id"]
    calls.ended(context_id, reply)
    return context_id, reply


@pytest.fixture(autouse=True)
def _unharmed(calls: Calls, ids: tuple[str, str]) -> Iterator[None]:
    """After each test: what was stored is as it was, nothing was added, the context is as it was."""
    statements = ("SELECT * FROM contexts WHERE id = ?", "SELECT * FROM messages WHERE context_id = ?")
    count = "SELECT (SELECT count(*) FROM contexts), (SELECT count(*) FROM messages), (SELECT count(*) FROM runs)"

    def everything() -> list[Any]:
        return [rows(calls.server, count), *(rows(calls.server, statement, ids[0]) for statement in statements)]

    before = everything()
    yield
    assert everything() == before
    assert text_of(calls, *ids) == "kept"
    assert calls.context(ids[0])["allowed_commands"] == ["send"]


def writes(ids: tuple[str, str]) -> list[tuple[str, str]]:
    """Every call that takes a body."""
    context = f"/contexts/{ids[0]}"
    return [("POST", "/contexts"), ("PATCH", context), ("POST", f"{context}/messages"), ("POST", f"{context}/cancel")]


def reads(ids: tuple[str, str]) -> list[str]:
    """Every call that takes query parameters."""
    context, message = f"/contexts/{ids[0]}", f"/contexts/{ids[0]}/messages/{ids[1]}"
    named = ("/contexts", context, f"{context}/messages", message)
    return [*named, f"{message}/content", f"{message}/events", f"{context}/stream", "/stream", "/files"]


@pytest.mark.parametrize(
    "body",
    [
        b"{", b"}", b"x", b"{]", b'{"a"}', b"{'a': 1}", b"\xff\xfe{\x00}\x00", b"\xef\xbb\xbf{}", b"{}{}", b"\x00",
        b" ",
        b'{"title": "\xff"}', b'{"title": "\xed\xa0\x80"}', b'{"title": "a\nb"}', b'{"title": "\x00"}',
        b'{"title": "\\x"}', b'{"title": "\\ud8"}', b'{"title": "\\ud8zz"}', b'{"title": ' + b"1" * 5000 + b"}",
        b"[" * DEEP, b"[" * DEEP + b"]" * DEEP, b'{"a":' * DEEP + b"1" + b"}" * DEEP,
        b'{"metadata": ' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}",
        b'{"payload": {"display": ' + b"[" * DEEP + b"]" * DEEP + b"}}",
    ],
    ids=lambda body: str(body[:24]),
)  # fmt: skip
def test_what_is_no_json_is_refused(calls: Calls, ids: tuple[str, str], body: bytes) -> None:
    for method, path in writes(ids):
        problem(calls.call(method, path, body), 400, "invalid-json")


@pytest.mark.parametrize("body", [b"null", b"true", b"1", b'"text"', b"[]", b"[{}]", b'{"unknown": 1}', b'{"": 1}'])
def test_json_of_another_shape_is_refused(calls: Calls, ids: tuple[str, str], body: bytes) -> None:
    for method, path in writes(ids):
        assert wheres(calls.call(method, path, body))[0].startswith("body")


@pytest.mark.parametrize("field", ["title", "mode", "metadata"])
def test_fields_of_a_context_have_their_types(calls: Calls, ids: tuple[str, str], field: str) -> None:
    for value in [*HUGE, *WRONG_TEXT, "x" * 201]:
        if (field, value) in [("title", None), ("metadata", {})]:
            continue
        for method, path in writes(ids)[:2]:
            assert wheres(calls.call(method, path, {field: value})) == [f"body.{field}"], value


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400"])
def test_numbers_that_cannot_be_given_back_are_refused(calls: Calls, ids: tuple[str, str], number: str) -> None:
    for body in (f'{{"metadata": {{"a": [{number}]}}}}', f'{{"metadata": {{"a": {{"b": {number}}}}}}}'):
        for method, path in writes(ids)[:2]:
            assert wheres(calls.call(method, path, body.encode())) == ["body.metadata"]
    body = message_body(script(["text", "a"]), client_metadata={"a": 1}).replace(b'"a": 1', f'"a": {number}'.encode())
    assert wheres(calls.call("POST", f"/contexts/{ids[0]}/messages", body)) == ["body.client_metadata"]


def test_messages_have_their_types(calls: Calls, ids: tuple[str, str]) -> None:
    good = {"type": "text", "content": script(["text", "a"])}
    wrong: list[tuple[str, dict[str, Any]]] = [("body.payload", {}), ("body.payload", {"payload": None})]
    wrong += [("body.payload.content", {"payload": good | {"content": value}}) for value in WRONG_TEXT]
    wrong += [
        ("body.payload.content", {"payload": {"type": "text"}}),
        ("body.payload.type", {"payload": {"content": "a"}}),
    ]
    wrong += [("body.payload.content", {"payload": good | {"content": ""}})]
    wrong += [("body.payload.type", {"payload": good | {"type": kind}}) for kind in ("image", "", None, 1, 10**400)]
    wrong += [("body.payload.display", {"payload": good | {"display": "x" * 16_384}})]
    wrong += [
        ("body.payload.role", {"payload": good | {"role": "assistant"}}),
        ("body.role", {"payload": good, "role": 1}),
    ]
    wrong += [("body.client_metadata", {"payload": good, "client_metadata": value}) for value in (None, [], "a", 2**63)]
    wrong += [("body.client_metadata", {"payload": good, "client_metadata": {"a": "x" * 16_384}})]
    for where, body in wrong:
        assert wheres(calls.call("POST", f"/contexts/{ids[0]}/messages", body)) == [where], body


def test_large_bodies_are_refused_however_they_are_sent(calls: Calls, ids: tuple[str, str]) -> None:
    content = b'{"title": "' + b"x" * TWO_MIB + b'"}'
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (content[:1_000_000], content[1_000_000:]))
    head = "{} {} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{}\r\n"
    for method, path in writes(ids):
        problem(calls.call(method, path, content), 413, "content-too-large")
        chunked = head.format(method, path, "Transfer-Encoding: chunked\r\n").encode() + pieces + b"0\r\n\r\n"
        problem(raw(calls.server.port, chunked), 413, "content-too-large")
        # The length alone is enough: none of the body has come yet.
        for length in (TWO_MIB, 2**53, 2**63 - 1):
            declared = head.format(method, path, f"Content-Length: {length}\r\n").encode()
            problem(raw(calls.server.port, declared), 413, "content-too-large")


@pytest.mark.parametrize(
    "headers",
    [
        *("Content-Length: -1", "Content-Length: x", "Content-Length: 1e3", "Content-Length: 2\r\nContent-Length: 3"),
        *("Content-Length: 99999999999999999999999", "Transfer-Encoding: chunked\r\nContent-Length: 2"),
        *("bad header", ": x"),
    ],
)
def test_what_is_no_http_is_refused(calls: Calls, headers: str) -> None:
    request = f"POST /contexts HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{headers}\r\n\r\n{{}}"
    problem(raw(calls.server.port, request.encode()), 400, "bad-request")


@pytest.mark.parametrize(
    "media_type",
    [
        *("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonp"),
        *("application/json, text/plain", "text/json", "application/problem+json", "x", "\u00e9", ""),
    ],
)
def test_another_content_type_is_refused(calls: Calls, ids: tuple[str, str], media_type: str) -> None:
    for method, path in writes(ids):
        body = message_body(script(["text", "a"])) if path.endswith("/messages") else b"{}"
        answer = calls.call(method, path, body, headers={"Content-Type": media_type})
        problem(answer, 415, "unsupported-media-type")


def test_a_body_without_a_content_type_is_refused(calls: Calls, ids: tuple[str, str]) -> None:
    for method, path in writes(ids):
        request = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{{}}"
        problem(raw(calls.server.port, request.encode()), 415, "unsupported-media-type")


@pytest.mark.parametrize("part", [UNKNOWN_ID, "x", "%00", "%ff", "%ED%A0%80", "%2e%2e", "'%20OR%201=1--", "a" * 5000])
def test_unknown_ids_are_not_found(calls: Calls, ids: tuple[str, str], part: str) -> None:
    context, message = f"/contexts/{part}", f"/contexts/{ids[0]}/messages/{part}"
    text = message_body(script(["text", "a"]))
    for method, path, body in (
        ("GET", context, None),
        ("PATCH", context, {"title": "a"}),
        ("DELETE", context, None),
        ("GET", f"{context}/messages", None),
        ("POST", f"{context}/messages", text),
        ("POST", f"{context}/cancel", None),
        ("GET", f"{context}/messages/{ids[1]}", None),
        ("GET", f"{context}/messages/{ids[1]}/content", None),
        ("GET", f"{context}/messages/{ids[1]}/content?from_sequence=1", None),
        ("GET", f"{context}/messages/{ids[1]}/events", None),
        ("GET", f"{context}/stream", None),
    ):
        problem(calls.call(method, path, body), 404, "context-not-found")
    for path in (message, f"{message}/content", f"{message}/content?from_sequence=1&wait=30", f"{message}/events"):
        problem(calls.call("GET", path), 404, "message-not-found")


@pytest.mark.parametrize(
    "target",
    [b"/contexts/\xff", b"/contexts/a\x00b", b"/contexts?cursor=\xff", b"/contexts?limit=\x00", b"/contexts/\x7f"],
)
def test_raw_bytes_in_a_request_line_are_refused(calls: Calls, target: bytes) -> None:
    answer = raw(calls.server.port, b"GET " + target + b" HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert answer.status in (400, 404, 422), answer
    problem(answer, answer.status, answer.json["code"])


@pytest.mark.parametrize(
    "path", ["/", "/nothing", "/contexts/", "//contexts", "/Contexts", "/contexts/a/b", "/contexts/a/messages/", "/%00"]
)
def test_an_unknown_path_is_not_found(calls: Calls, path: str) -> None:
    for method in ("GET", "POST", "DELETE", "PUT"):
        problem(calls.call(method, path), 404, "not-found")


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "POST", "GET", "HEAD", "OPTIONS", "TRACE"])
def test_a_wrong_method_is_told_the_right_ones(calls: Calls, ids: tuple[str, str], method: str) -> None:
    context, message = f"/contexts/{ids[0]}", f"/contexts/{ids[0]}/messages/{ids[1]}"
    allowed = {
        "/contexts": "GET, HEAD, POST",
        context: "DELETE, GET, HEAD, PATCH",
        f"{context}/messages": "GET, HEAD, POST",
        f"{context}/cancel": "POST",
        f"{context}/stream": "GET",
        "/stream": "GET",
        "/chat": "POST",
        message: "GET, HEAD",
        f"{message}/content": "GET, HEAD",
        f"{message}/events": "GET",
        f"{message}/chunks/1": "GET, HEAD",
        "/files": "GET, HEAD, POST",
        "/files/1": "DELETE, GET, HEAD",
        "/machine": "GET, HEAD",
    }
    refused = 0
    for path, methods in allowed.items():
        if method in methods.split(", "):
            continue
        answer = calls.call(method, path)
        assert answer.headers["allow"] == methods
        if method == "HEAD":
            assert (answer.status, answer.body) == (405, b"")
        else:
            problem(answer, 405, "method-not-allowed")
        refused += 1
    assert refused


def test_head_answers_as_get_without_a_body(calls: Calls, ids: tuple[str, str]) -> None:
    message = f"/contexts/{ids[0]}/messages/{ids[1]}"
    for path in ("/contexts", f"/contexts/{ids[0]}", message, f"{message}/content?to_sequence=1", f"{message}x"):
        got, head = calls.call("GET", path), calls.call("HEAD", path)
        assert (head.status, head.body) == (got.status, b"")
        assert {**head.headers, "date": ""} == {**got.headers, "date": ""}


def test_unknown_and_repeated_query_parameters_are_refused(calls: Calls, ids: tuple[str, str]) -> None:
    for path in reads(ids):
        for query in ("unknown=1", "=1", "FROM_SEQUENCE=1", "%00=1", "%ff=%ff"):
            assert wheres(calls.call("GET", f"{path}?{query}"))[0].startswith("query."), (path, query)
    message = f"/contexts/{ids[0]}/messages/{ids[1]}"
    for path, query in (
        ("/contexts", "limit=1&limit=1"),
        (f"/contexts/{ids[0]}/messages", "include=content&include=content"),
        (f"{message}/content", "from_sequence=0&from_sequence=0"),
        (f"{message}/content", "wait=0&wait=0"),
        (f"{message}/events", "from_sequence=0&from_sequence=0"),
        (f"/contexts/{ids[0]}/stream", "named=true&named=true"),
        ("/stream", "types=content_delta&types=content_delta"),
    ):
        assert wheres(calls.call("GET", f"{path}?{query}")) == [f"query.{query.partition('=')[0]}"]


@pytest.mark.parametrize(
    "number", ["-1", "1.0", "%201", "1_0", "%2B1", str(2**53), str(2**63), "1" + "0" * 400, "", "x"]
)
def test_numbers_in_queries_are_plain_and_bounded(calls: Calls, ids: tuple[str, str], number: str) -> None:
    message = f"/contexts/{ids[0]}/messages/{ids[1]}"
    for path, name in (
        ("/contexts", "limit"),
        (f"/contexts/{ids[0]}/messages", "limit"),
        (f"{message}/content", "from_sequence"),
        (f"{message}/content", "to_sequence"),
        (f"{message}/events", "from_sequence"),
    ):
        assert wheres(calls.call("GET", f"{path}?{name}={number}")) == [f"query.{name}"]


def test_a_sequence_ahead_of_the_log_is_refused(calls: Calls, ids: tuple[str, str]) -> None:
    message = f"/contexts/{ids[0]}/messages/{ids[1]}"
    for sequence in (2, 10**9, 2**53 - 1):
        for path in (f"{message}/content", f"{message}/events"):
            answer = calls.call("GET", f"{path}?from_sequence={sequence}")
            assert problem(answer, 409, "sequence-ahead")["sequence"] == 1
        resumed = calls.call("GET", f"{message}/events", headers={"Last-Event-ID": str(sequence)})
        assert problem(resumed, 409, "sequence-ahead")["sequence"] == 1


@pytest.mark.parametrize(
    "tag", ["1", "x", '"x"', 'W/"1"', '"-1"', '"1.0"', '""', '" 1"', f'"{2**53}"', f'"{10**400}"', ""]
)
def test_what_is_no_version_is_refused(calls: Calls, ids: tuple[str, str], tag: str) -> None:
    context, text = f"/contexts/{ids[0]}", message_body(script(["text", "a"]))
    for method, path, body in (
        ("PATCH", context, b'{"title": "a"}'),
        ("DELETE", context, None),
        ("POST", f"{context}/messages", text),
        ("POST", f"{context}/cancel", None),
    ):
        assert wheres(calls.call(method, path, body, headers={"If-Match": tag})) == ["header.If-Match"]


@pytest.mark.parametrize("key", ["", " ", "a b", "a\tb", "\u00e9", "x" * 256])
def test_what_is_no_idempotency_key_is_refused(calls: Calls, ids: tuple[str, str], key: str) -> None:
    context, text = f"/contexts/{ids[0]}", message_body(script(["text", "a"]))
    for path, body in (("/contexts", b"{}"), (f"{context}/messages", text), (f"{context}/cancel", None)):
        answer = calls.call("POST", path, body, headers={"Idempotency-Key": key})
        assert wheres(answer) == ["header.Idempotency-Key"]


@pytest.mark.parametrize("event_id", ["x", "-1", "1:2:3", str(2**53), "1" + "0" * 400, "1:START", "\u00e9", "1\t2"])
def test_what_is_no_event_id_is_refused(calls: Calls, ids: tuple[str, str], event_id: str) -> None:
    context = f"/contexts/{ids[0]}"
    for path in (f"{context}/stream", "/stream", f"{context}/messages/{ids[1]}/events"):
        assert wheres(calls.call("GET", path, headers={"Last-Event-ID": event_id})) == ["header.Last-Event-ID"]
        if not path.endswith("/events"):
            assert wheres(calls.call("GET", f"{path}?last_event_id={quote(event_id)}")) == ["query.last_event_id"]


def test_streams_refuse_what_they_do_not_know(calls: Calls, ids: tuple[str, str]) -> None:
    many = "&".join(f"context={number}" for number in range(201))
    for query, where in (
        ("named=1", "query.named"),
        ("named=TRUE", "query.named"),
        ("types=nothing", "query.types"),
        ("types=content_delta,x", "query.types"),
        ("types=" + "a" * 201, "query.types"),
        (many, "query.context"),
        ("context=" + "a" * 65, "query.context"),
    ):
        paths = ["/stream"] if "context" in where else ["/stream", f"/contexts/{ids[0]}/stream"]
        for path in paths:
            assert wheres(calls.call("GET", f"{path}?{query}"))[0].startswith(where), query
    for context in ("x", "", "x:1", UNKNOWN_ID, f"{ids[0]}&context={UNKNOWN_ID}", "%00", "%ff"):
        problem(calls.call("GET", f"/stream?context={context}"), 404, "context-not-found")


def test_too_many_headers_are_refused(calls: Calls) -> None:
    line = b"X-Filler: " + b"x" * 8000 + b"\r\n"
    answer = raw(calls.server.port, b"GET /contexts HTTP/1.1\r\nHost: localhost\r\n" + line * 8)
    problem(answer, 431, "headers-too-large")
    chunked = b"POST /contexts HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
    answer = raw(calls.server.port, chunked + line * 8)
    problem(answer, 431, "headers-too-large")
    answer = raw(calls.server.port, b"GET /contexts HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n")
    problem(answer, 421, "host-not-allowed")


def test_what_is_large_and_right_is_stored_exactly(calls: Calls) -> None:
    metadata = {"big": 2**63, "bigger": 10**400, "negative": -(2**64), "small": 5e-324, "deep": nested(50)}
    made = calls.call("POST", "/contexts", {"metadata": metadata})
    try:
        assert made.status == 201
        assert calls.context(made.json["id"])["metadata"] == metadata
        answer: Answer = calls.call("PATCH", f"/contexts/{made.json['id']}", {"metadata": {"\ud800": "\x00"}})
        assert answer.json["metadata"] == {"\ufffd": "\ufffd"}
    finally:
        assert calls.call("DELETE", f"/contexts/{made.json['id']}").status == 204


def nested(depth: int) -> Any:
    return json.loads('{"a":' * depth + "1" + "}" * depth)
