"""The tree of messages: edited messages, regenerated replies, moves between branches, forks."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.blackbox.calls import PATIENCE_MS, SCRIPTED, Calls, faults, release, script
from tests.databases import KINDS
from tests.server import Server

DATABASES = KINDS


@pytest.fixture(scope="module")
def calls(database_kind: str | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    settings = {"log_format": "json", "signal_patience_ms": PATIENCE_MS}
    with Server(tmp_path_factory.mktemp("branches"), agent=SCRIPTED, **settings) as server:
        yield Calls(server)
        assert faults(server) == []


def say(calls: Calls, context_id: str, text: str, **fields: Any) -> dict[str, Any]:
    """Posts, and returns when the reply has ended."""
    posted = calls.run(context_id, ["text", text], **fields)
    calls.ended(context_id, posted["reply_message_id"])
    return posted


def line(calls: Calls, context_id: str) -> list[str]:
    return [message["content"] for message in calls.messages(context_id) if message["role"] == "assistant"]


@pytest.mark.scenario("branches", "An earlier message is edited")
def test_an_edited_message_starts_a_branch(calls: Calls) -> None:
    context_id = calls.create()
    first, second = say(calls, context_id, "one"), say(calls, context_id, "two")
    edited = say(calls, context_id, "TWO", parent_id=first["reply_message_id"])
    assert line(calls, context_id) == ["one", "TWO"]
    found = calls.messages(context_id)
    assert found[2]["siblings"] == [second["message_id"], edited["message_id"]]
    assert found[3]["siblings"] == [edited["reply_message_id"]]
    tree = calls.call("GET", f"/contexts/{context_id}/messages?tree=true").json["items"]
    assert len(tree) == 6
    heard = say(calls, context_id, "x")
    assert calls.context(context_id)["head_message_id"] == heard["reply_message_id"]


@pytest.mark.scenario("branches", "The first message is edited")
def test_the_first_message_is_edited(calls: Calls) -> None:
    context_id = calls.create()
    first = say(calls, context_id, "one")
    edited = say(calls, context_id, "ONE", parent_id=None)
    assert line(calls, context_id) == ["ONE"]
    assert calls.messages(context_id)[0]["siblings"] == [first["message_id"], edited["message_id"]]


@pytest.mark.scenario("branches", "A reply is regenerated")
def test_a_regenerated_reply_stands_beside_the_first(calls: Calls) -> None:
    context_id = calls.create()
    posted = say(calls, context_id, "one")
    again = calls.regenerate(context_id, posted["reply_message_id"])
    assert again["message_id"] == posted["message_id"]
    calls.ended(context_id, again["reply_message_id"])
    found = calls.messages(context_id)
    assert [message["id"] for message in found] == [posted["message_id"], again["reply_message_id"]]
    assert found[1]["siblings"] == [posted["reply_message_id"], again["reply_message_id"]]


@pytest.mark.scenario("branches", "The head moves between branches")
def test_the_head_moves_between_branches(calls: Calls) -> None:
    context_id = calls.create()
    first, second = say(calls, context_id, "one"), say(calls, context_id, "two")
    say(calls, context_id, "TWO", parent_id=first["reply_message_id"])
    with calls.signals(context_id) as stream:
        answer = calls.call("PATCH", f"/contexts/{context_id}", {"head_message_id": second["reply_message_id"]})
        stream.until("context_changed", version=answer.json["version"])
    assert answer.json["head_message_id"] == second["reply_message_id"]
    assert line(calls, context_id) == ["one", "two"]
    following = calls.run(context_id, ["history"])
    heard = json.loads(calls.ended(context_id, following["reply_message_id"])["content"])
    assert [text for text in heard if not text.startswith("[")] == ["one", "two"]


@pytest.mark.scenario("branches", "A fresh start")
def test_a_head_of_none_is_a_fresh_start(calls: Calls) -> None:
    context_id = calls.create()
    say(calls, context_id, "one")
    calls.call("PATCH", f"/contexts/{context_id}", {"head_message_id": None})
    assert calls.messages(context_id) == []
    say(calls, context_id, "two")
    assert line(calls, context_id) == ["two"]


@pytest.mark.scenario("branches", "The head of a busy context")
def test_the_head_of_a_busy_context_stays(calls: Calls) -> None:
    context_id = calls.create()
    first = say(calls, context_id, "one")
    posted = calls.run(context_id, ["wait", "head-gate"])
    moved = calls.call("PATCH", f"/contexts/{context_id}", {"head_message_id": first["reply_message_id"]})
    again = calls.call("POST", f"/contexts/{context_id}/messages/{first['reply_message_id']}/regenerate")
    release(calls.server, "head-gate")
    calls.ended(context_id, posted["reply_message_id"])
    assert (moved.status, moved.json["code"]) == (409, "command-not-allowed")
    assert (again.status, again.json["code"]) == (409, "command-not-allowed")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PATCH", "", {"head_message_id": "nothing"}),
        ("POST", "/messages", {"payload": {"type": "text", "content": "x"}, "parent_id": "nothing"}),
        ("POST", "/messages/nothing/regenerate", {}),
        ("POST", "/fork", {"message_id": "nothing"}),
    ],
)
def test_a_message_that_is_not_there_is_named(calls: Calls, method: str, path: str, body: dict[str, Any]) -> None:
    context_id = calls.create()
    answer = calls.call(method, f"/contexts/{context_id}{path}", body)
    assert (answer.status, answer.json["code"]) == (404, "message-not-found")


@pytest.mark.scenario("branches", "Fork")
def test_a_fork_shares_the_history(calls: Calls) -> None:
    context_id = calls.create(title="first")
    first = say(calls, context_id, "one")
    say(calls, context_id, "two")
    fork_id = calls.fork(context_id, first["reply_message_id"])
    fork = calls.context(fork_id)
    assert (fork["title"], fork["state"]) == ("first", "idle")
    assert line(calls, fork_id) == ["one"]
    (_, reply) = calls.messages(fork_id)
    assert calls.pull(fork_id, reply["id"])["content"] == "one"
    assert reply["digest"] == calls.message(context_id, first["reply_message_id"])["digest"]
    following = calls.run(fork_id, ["history"])
    heard = json.loads(calls.ended(fork_id, following["reply_message_id"])["content"])
    assert heard == [script(["text", "one"]), "one", script(["history"])]
    assert line(calls, context_id) == ["one", "two"]


@pytest.mark.scenario("branches", "The source of a fork is deleted")
def test_a_fork_outlives_its_source(calls: Calls) -> None:
    context_id = calls.create()
    first = say(calls, context_id, "one")
    fork_id = calls.fork(context_id, first["reply_message_id"])
    assert calls.call("DELETE", f"/contexts/{context_id}").status == 204
    assert calls.call("GET", f"/contexts/{context_id}").status == 404
    assert line(calls, fork_id) == ["one"]
    again = calls.fork(fork_id, calls.messages(fork_id)[1]["id"])
    assert calls.call("DELETE", f"/contexts/{fork_id}").status == 204
    assert line(calls, again) == ["one"]


def test_a_message_that_is_being_written_cannot_be_forked(calls: Calls) -> None:
    context_id = calls.create()
    posted = calls.run(context_id, ["wait", "fork-gate"])
    answer = calls.call("POST", f"/contexts/{context_id}/fork", {"message_id": posted["reply_message_id"]})
    release(calls.server, "fork-gate")
    assert (answer.status, answer.json["code"]) == (409, "message-open")
    calls.ended(context_id, posted["reply_message_id"])
