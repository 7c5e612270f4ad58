"""Contexts: created, read, listed, changed, deleted; whose they are, and what they allow."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from context_server.records import Receipt
from context_server.store import Store
from context_server.store.exchanges import Post
from tests.blackbox.calls import SCRIPTED, Answer, Calls, eventually, faults, release, script
from tests.blackbox.sse import EventStream
from tests.blackbox.wire import UNKNOWN_ID, message_body, problem, rows, together, wheres
from tests.databases import KINDS
from tests.server import Server

DATABASES = KINDS

UUID7 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
FIELDS = {
    "id", "epoch", "title", "mode", "model", "state", "version", "head_message_id", "active_run", "allowed_commands",
    "metadata",
    "created_at", "updated_at",
}  # fmt: skip
TRANSITIONS = """
    idle, failed                      message_posted      queued
    queued                            run_claimed         thinking
    thinking                          output_appended     streaming
    thinking, streaming               tool_started        calling_tool
    calling_tool                      tool_finished       thinking
    thinking, streaming, calling_tool approval_requested  awaiting_approval
    awaiting_approval                 approval_decided    queued
    queued, awaiting_approval         cancel_requested    idle
    thinking, streaming, calling_tool cancel_requested    cancelling
    cancelling                        run_stopped         idle
    thinking, streaming, calling_tool run_succeeded       idle
    thinking, streaming, calling_tool run_failed          failed
    thinking, streaming, calling_tool lease_expired       failed
    cancelling                        lease_expired       idle
"""


@pytest.fixture(scope="module")
def calls(database_kind: str | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    with Server(tmp_path_factory.mktemp("contexts"), agent=SCRIPTED, log_format="json") as server:
        yield Calls(server)
        assert faults(server) == []


@pytest.mark.scenario("contexts", "Create a context")
def test_a_context_is_created_with_what_was_posted_and_without(calls: Calls) -> None:
    given = {"title": "Trip to Bergen ⛰", "mode": "plan", "metadata": {"tags": ["a", 1, None], "deep": {"x": 1.5}}}
    full = calls.call("POST", "/contexts", given)
    bare = calls.call("POST", "/contexts", {})
    empty = calls.call("POST", "/contexts")
    for answer in (full, bare, empty):
        assert answer.status == 201
        assert set(answer.json) == FIELDS
        assert UUID7.fullmatch(answer.json["id"])
        assert answer.json["state"] == "idle"
        assert calls.call("GET", answer.headers["location"]).body == answer.body
    assert len({answer.json["id"] for answer in (full, bare, empty)}) == 3
    assert {name: full.json[name] for name in given} == given
    for answer in (bare, empty):
        assert (answer.json["title"], answer.json["mode"], answer.json["metadata"]) == (None, "act", {})


@pytest.mark.scenario("contexts", "Read a context")
def test_a_context_says_where_it_is_and_what_it_allows(calls: Calls) -> None:
    context_id = calls.create()
    idle = calls.call("GET", f"/contexts/{context_id}")
    posted = calls.run(context_id, ["text", "a"], ["wait", "read-a-context"])
    busy = calls.settled(context_id, "streaming")
    release(calls.server, "read-a-context")
    calls.ended(context_id, posted["reply_message_id"])

    assert (idle.json["state"], idle.json["allowed_commands"], idle.json["active_run"]) == ("idle", ["send"], None)
    assert idle.headers["etag"] == f'"{idle.json["version"]}"'
    assert busy["allowed_commands"] == ["cancel"]
    expected = {"id": posted["run_id"], "message_id": posted["reply_message_id"], "status": "running", "attempt": 1}
    expected |= {"tool": None}
    assert busy["active_run"] == expected
    assert busy["head_message_id"] == posted["reply_message_id"]
    assert busy["version"] > posted["version"] > idle.json["version"]
    assert busy["epoch"] == idle.json["epoch"] != ""
    for context in (idle.json, busy):
        assert TIME.fullmatch(context["created_at"])
        assert TIME.fullmatch(context["updated_at"])
    unchanged = calls.call("GET", f"/contexts/{context_id}", headers={"If-None-Match": '"9999"'})
    again = calls.call("GET", f"/contexts/{context_id}", headers={"If-None-Match": unchanged.headers["etag"]})
    assert (unchanged.status, unchanged.json["state"], again.status, again.body) == (200, "idle", 304, b"")


def requests_about(context_id: str, message_id: str) -> list[tuple[str, str, Any, dict[str, str]]]:
    """Every call that names a context: method, path, body, headers."""
    context = f"/contexts/{context_id}"
    message = f"{context}/messages/{message_id}"
    return [
        ("GET", context, None, {}),
        ("PATCH", context, {"title": "mine now"}, {}),
        ("PATCH", context, {"title": "mine now"}, {"If-Match": '"1"'}),
        ("DELETE", context, None, {}),
        ("DELETE", context, None, {"If-Match": '"99"'}),
        ("POST", f"{context}/messages", message_body("hello"), {}),
        ("POST", f"{context}/messages", message_body("hello"), {"Idempotency-Key": "once"}),
        ("POST", f"{context}/messages", message_body("hello"), {"Accept": "text/event-stream"}),
        ("POST", f"{context}/cancel", None, {}),
        ("GET", f"{context}/messages", None, {}),
        ("GET", f"{context}/messages?include=content", None, {}),
        ("GET", message, None, {}),
        ("GET", f"{message}/content", None, {}),
        ("GET", f"{message}/content?from_sequence=0", None, {}),
        ("GET", f"{message}/content?from_sequence=9", None, {}),
        ("GET", f"{message}/content?wait=9&view=chunks", None, {}),
        ("GET", f"{message}/events", None, {}),
        ("GET", f"{context}/stream", None, {}),
        ("GET", f"/stream?context={context_id}", None, {}),
        ("GET", f"/stream?context={context_id}:1", None, {}),
    ]


def everything_of(server: Server, context_id: str) -> list[Any]:
    tables = {"contexts": "id", "messages": "context_id", "runs": "context_id"}
    found = [rows(server, f"SELECT * FROM {table} WHERE {key} = ?", context_id) for table, key in tables.items()]
    return [*found, rows(server, "SELECT * FROM chunks ORDER BY message_id, sequence")]


async def _foreign_context(server: Server, text: str) -> Receipt:
    async with Store.open(server.database_url) as store:
        context = await store.create_context("other", title="theirs", metadata={"private": True})
        receipt, _ = await store.post_message("other", context.id, Post(text=text))
        return receipt


@pytest.mark.scenario("contexts", "Context of another owner")
def test_a_context_of_another_owner_looks_like_none(tmp_path: Path) -> None:
    server = Server(tmp_path, agent=SCRIPTED, log_format="json")
    theirs = asyncio.run(_foreign_context(server, script(["text", "private"], ["wait", "gate"], ["text", "words"])))
    foreign, reply = theirs.context_id, theirs.reply_message_id
    with server:
        calls = Calls(server)
        mine = calls.create()
        with calls.shared() as everything:
            everything.until("state_changed", context_id=mine)
            release(server, "gate")
            # Their reply is in the server's memory too: a look-up by the message's id alone would find it.
            ended = "SELECT 1 FROM messages WHERE id = ? AND status = 'completed'"
            eventually(lambda: rows(server, ended, reply), "their reply")
            before = everything_of(server, foreign)
            posted = calls.run(mine, ["text", "own"])
            everything.until("message_completed", message_id=posted["reply_message_id"])
            assert foreign.encode() not in everything.body
        calls.call("DELETE", f"/contexts/{mine}")
        for message_id in (reply, theirs.message_id):
            unknown = requests_about(UNKNOWN_ID, message_id)
            for asked, instead in zip(requests_about(foreign, message_id), unknown, strict=True):
                assert_same_but_for_the_id(ask(calls, asked), ask(calls, instead), foreign)
        assert [context["id"] for context in calls.call("GET", "/contexts").json["items"]] == []
        assert everything_of(server, foreign) == before
        assert faults(server) == []


def ask(calls: Calls, request: tuple[str, str, Any, dict[str, str]]) -> Answer:
    method, path, body, headers = request
    return calls.call(method, path, body, headers=headers)


def assert_same_but_for_the_id(foreign: Answer, unknown: Answer, foreign_id: str) -> None:
    problem(foreign, 404, "context-not-found")
    assert foreign.body.replace(foreign_id.encode(), UNKNOWN_ID.encode()) == unknown.body
    assert {**foreign.headers, "date": ""} == {**unknown.headers, "date": ""}


@pytest.mark.scenario("contexts", "List contexts")
def test_the_context_that_was_active_last_comes_first(calls: Calls) -> None:
    made = [calls.create(title=str(number)) for number in range(7)]
    posted = calls.run(made[2], ["text", "a"])
    calls.ended(made[2], posted["reply_message_id"])

    listed: list[dict[str, Any]] = []
    cursor = ""
    while True:
        page = calls.call("GET", f"/contexts?limit=2{cursor}").json
        assert 1 <= len(page["items"]) <= 2
        listed += page["items"]
        if page["next_cursor"] is None:
            break
        cursor = f"&cursor={page['next_cursor']}"
    ids = [context["id"] for context in listed]
    assert ids[0] == made[2]
    assert len(ids) == len(set(ids))
    assert set(made) <= set(ids)
    times = [context["updated_at"] for context in listed]
    assert times == sorted(times, reverse=True)
    assert listed[0] == calls.context(made[2])
    assert calls.call("GET", "/contexts?limit=200").json["items"] == listed


@pytest.mark.scenario("contexts", "List contexts")
@pytest.mark.parametrize(
    ("query", "where"),
    [(f"limit={limit}", "query.limit") for limit in ("0", "201", "-1", "x", "", "1.0", "%201", "9" * 400)]
    + [(f"cursor={cursor}", "query.cursor") for cursor in ("x", "AAAA", "%00", "%ff", "MQ", "LTE6eA", "4pi6")]
    + [(f"cursor={'A' * 5000}", "query.cursor")],
)
def test_a_wrong_page_is_refused(calls: Calls, query: str, where: str) -> None:
    assert wheres(calls.call("GET", f"/contexts?{query}")) == [where]


@pytest.mark.scenario("contexts", "Change a context")
def test_a_change_touches_what_it_names_and_raises_the_version(calls: Calls) -> None:
    context_id = calls.create(title="old", metadata={"kept": True})
    before = calls.context(context_id)
    answer = calls.call("PATCH", f"/contexts/{context_id}", {"title": "new"})
    assert answer.status == 200
    assert answer.headers["etag"] == f'"{answer.json["version"]}"'
    assert answer.json["version"] > before["version"]
    changed = {"title": "new", "version": answer.json["version"], "updated_at": answer.json["updated_at"]}
    assert answer.json == before | changed

    longest = calls.call("PATCH", f"/contexts/{context_id}", {"title": "😀" * 200, "metadata": {"x": "a" * 16_375}})
    cleared = calls.call("PATCH", f"/contexts/{context_id}", {"title": None, "mode": "plan", "metadata": {}})
    nothing = calls.call("PATCH", f"/contexts/{context_id}", {})
    assert (longest.status, longest.json["title"]) == (200, "😀" * 200)
    assert (cleared.json["title"], cleared.json["mode"], cleared.json["metadata"]) == (None, "plan", {})
    assert nothing.body == cleared.body


@pytest.mark.scenario("contexts", "Change a context")
@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"title": "x" * 201}, "body.title"),
        ({"title": 1}, "body.title"),
        ({"title": "fine", "metadata": {"x": "a" * 16_384}}, "body.metadata"),
        ({"title": "fine", "metadata": None}, "body.metadata"),
        ({"title": "fine", "mode": "dream"}, "body.mode"),
        ({"title": "fine", "mode": None}, "body.mode"),
        ({"title": "fine", "state": "idle"}, "body.state"),
        ({"title": "fine", "version": 9}, "body.version"),
    ],
)
def test_a_wrong_change_changes_nothing(calls: Calls, change: dict[str, Any], where: str) -> None:
    context_id = calls.create(title="old")
    before = calls.context(context_id)
    assert wheres(calls.call("PATCH", f"/contexts/{context_id}", change)) == [where]
    assert calls.context(context_id) == before


@pytest.mark.scenario("contexts", "Change with an old version")
def test_a_change_of_an_old_version_is_refused(calls: Calls) -> None:
    context_id = calls.create()
    path = f"/contexts/{context_id}"
    old = {"If-Match": calls.call("GET", path).headers["etag"]}
    calls.call("PATCH", path, {"title": "moved on"})
    before = calls.context(context_id)
    text = message_body(script(["text", "a"]))
    for method, at, body in (
        ("PATCH", path, {"title": "late"}),
        ("POST", f"{path}/messages", text),
        ("POST", f"{path}/cancel", None),
        ("DELETE", path, None),
    ):
        document = problem(calls.call(method, at, body, headers=old), 412, "version-mismatch")
        assert document["version"] == before["version"]
    assert calls.context(context_id) == before
    assert calls.messages(context_id) == []

    def present() -> dict[str, str]:
        return {"If-Match": calls.call("GET", path).headers["etag"]}

    assert calls.call("PATCH", path, {"title": "in time"}, headers=present()).json["title"] == "in time"
    posted = calls.call("POST", f"{path}/messages", text, headers=present())
    assert posted.status == 202
    calls.ended(context_id, posted.json["reply_message_id"])
    assert calls.call("POST", f"{path}/cancel", headers=present()).status == 202
    assert calls.call("PATCH", path, {}, headers={"If-Match": "*"}).status == 200
    assert calls.call("DELETE", path, headers=present()).status == 204


@pytest.mark.scenario("contexts", "Delete a context")
def test_nothing_is_left_of_a_deleted_context(calls: Calls) -> None:
    context_id, other = calls.create(), calls.create()
    for _ in range(2):
        posted = calls.run(context_id, ["text", "a"], ["textual", "reasoning", "b"])
        calls.ended(context_id, posted["reply_message_id"])
    kept = calls.run(other, ["text", "kept"])
    calls.ended(other, kept["reply_message_id"])
    message_ids = [message["id"] for message in calls.messages(context_id)]

    answer = calls.call("DELETE", f"/contexts/{context_id}")
    assert (answer.status, answer.body) == (204, b"")
    for method, path, body, headers in requests_about(context_id, posted["reply_message_id"]):
        problem(calls.call(method, path, body, headers=headers), 404, "context-not-found")
    assert context_id not in [context["id"] for context in calls.call("GET", "/contexts?limit=200").json["items"]]
    chunks = "SELECT count(*) FROM chunks WHERE message_id = ?"
    assert [rows(calls.server, chunks, message_id) for message_id in message_ids] == [[(0,)]] * 4
    assert everything_of(calls.server, context_id)[:3] == [[], [], []]
    assert calls.pull(other, kept["reply_message_id"])["content"] == "kept"


@pytest.mark.scenario("contexts", "State machine as data")
def test_the_machine_is_the_documented_table(calls: Calls) -> None:
    expected = set()
    for line in TRANSITIONS.strip().splitlines():
        *sources, event, target = re.split(r",?\s+", line.strip())
        expected |= {(source, event, target) for source in sources}
    machine = calls.call("GET", "/machine").json
    found = {
        (state, event, target) for state, node in machine["states"].items() for event, target in node["on"].items()
    }
    assert found == expected
    assert machine["initial"] == "idle"
    assert set(machine["states"]) == {state for source, _, target in expected for state in (source, target)}


@pytest.mark.scenario("runs", "Fifty posts with one key")
def test_fifty_requests_with_one_key_do_one_thing_even_across_a_restart(tmp_path: Path) -> None:
    with Server(tmp_path, agent=SCRIPTED, log_format="json") as server:
        calls = Calls(server)
        created = together(50, lambda _: calls.call("POST", "/contexts", {"title": "one"}, headers=keyed("create")))
        context_id = created[0].json["id"]
        path, body = f"/contexts/{context_id}/messages", message_body(script(["text", "once"]))
        posted = together(50, lambda _: calls.call("POST", path, body, headers=keyed("post")))
        calls.ended(context_id, posted[0].json["reply_message_id"])
        server.kill()
        server.start()
        created.append(calls.call("POST", "/contexts", {"title": "one"}, headers=keyed("create")))
        posted.append(calls.call("POST", path, body, headers=keyed("post")))

        for answers, status in ((created, 201), (posted, 202)):
            assert {(answer.status, answer.body) for answer in answers} == {(status, answers[0].body)}
            replayed = [answer.headers.get("idempotency-replayed") for answer in answers]
            assert (replayed.count(None), replayed.count("true")) == (1, 50)
        assert len(calls.call("GET", "/contexts").json["items"]) == 1
        assert [message["role"] for message in calls.messages(context_id)] == ["user", "assistant"]
        problem(calls.call("POST", path, message_body("another"), headers=keyed("post")), 422, "idempotency-key-reused")


def keyed(key: str) -> dict[str, str]:
    return {"Idempotency-Key": key}


def test_a_post_inline_with_a_used_key_streams_the_same_reply(calls: Calls) -> None:
    context_id = calls.create()
    body = message_body(script(["text", "once"]))
    texts = []
    for _ in range(2):
        headers = {"Accept": "text/event-stream", **keyed(context_id)}
        path = f"/contexts/{context_id}/messages"
        with EventStream(calls.server.port, path, headers, method="POST", content=body) as stream:
            texts.append([event.data.get("text") for event in stream.rest() if event.type == "text_delta"])
    assert texts == [["once"], ["once"]]
    assert len(calls.messages(context_id)) == 2
    assert json.loads(body)["payload"]["content"] == calls.messages(context_id)[0]["content"]
