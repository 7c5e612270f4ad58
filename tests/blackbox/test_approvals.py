"""Calls that a person has to approve: asked for, decided on once, and gone on with, on either database."""

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.blackbox.calls import PATIENCE_MS, SCRIPTED, Calls, eventually, faults
from tests.databases import KINDS
from tests.server import Server

DATABASES = KINDS

SEND = {"id": "call-1", "tool": "send_mail", "arguments": {"to": "ann", "text": "Hi"}}


@pytest.fixture(scope="module")
def calls(database_kind: str | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    settings = {"log_format": "json", "signal_patience_ms": PATIENCE_MS}
    with Server(tmp_path_factory.mktemp("approvals"), agent=SCRIPTED, **settings) as server:
        yield Calls(server)
        assert faults(server) == []


def ask(calls: Calls, *requests: dict[str, Any], after: str = "done") -> tuple[str, str, list[dict[str, Any]]]:
    """A context whose run waits for a person: its id, the reply's, and what is asked for."""
    context_id = calls.create()
    posted = calls.run(context_id, ["text", "Wait. "], ["approve", *(requests or (SEND,))], ["text", after])
    calls.settled(context_id, "awaiting_approval")
    return context_id, posted["reply_message_id"], calls.approvals(context_id)


def called(calls: Calls, context_id: str) -> list[str]:
    """The approvals after which the tool was called."""
    path = Path(calls.server.directory) / f"called-{context_id}"
    return path.read_text().split() if path.exists() else []


def results(calls: Calls, context_id: str, message_id: str) -> list[dict[str, Any]]:
    chunks = calls.chunks(context_id, message_id)
    return [chunk["data"] for chunk in chunks if chunk["kind"] == "tool_result"]


@pytest.mark.scenario("approvals", "A call waits for a person")
def test_a_call_waits_for_a_person(calls: Calls) -> None:
    context_id, reply_id, (approval,) = ask(calls)
    context = calls.context(context_id)
    assert (context["state"], context["allowed_commands"]) == ("awaiting_approval", ["approve", "deny", "cancel"])
    assert context["active_run"]["status"] == "suspended"
    assert (approval["tool"], approval["arguments"], approval["status"]) == ("send_mail", SEND["arguments"], "pending")
    call = calls.chunks(context_id, reply_id)[-1]
    assert (call["kind"], call["data"]["id"], call["data"]["approval"]["id"]) == ("tool_call", "call-1", approval["id"])
    assert called(calls, context_id) == []


@pytest.mark.scenario("approvals", "An approved call is made, and the run goes on")
def test_an_approved_call_is_made_and_the_run_goes_on(calls: Calls) -> None:
    context_id, reply_id, (approval,) = ask(calls)
    answer = calls.decide(context_id, approval["id"], "approve", note="fine")
    assert (answer.status, answer.json["status"], answer.json["note"]) == (200, "approved", "fine")
    message = calls.ended(context_id, reply_id)
    assert (message["status"], message["content"]) == ("completed", "Wait. done")
    (result,) = results(calls, context_id, reply_id)
    assert (result["status"], result["result"]) == ("ok", SEND["arguments"])
    assert called(calls, context_id) == [approval["id"]]
    sequences = [chunk["sequence"] for chunk in calls.chunks(context_id, reply_id)]
    assert sequences == list(range(1, message["final_sequence"] + 1))


@pytest.mark.scenario("approvals", "A denied call is not made")
def test_a_denied_call_is_not_made_and_the_run_goes_on(calls: Calls) -> None:
    context_id, reply_id, (approval,) = ask(calls)
    assert calls.decide(context_id, approval["id"], "deny", note="not now").json["status"] == "denied"
    assert calls.ended(context_id, reply_id)["content"] == "Wait. done"
    (result,) = results(calls, context_id, reply_id)
    assert (result["status"], result["result"]) == ("denied", "not now")
    assert called(calls, context_id) == []


@pytest.mark.scenario("approvals", "All of several are decided on")
def test_a_run_goes_on_when_all_of_its_calls_are_decided_on(calls: Calls) -> None:
    other = {"id": "call-2", "tool": "send_mail", "arguments": {"to": "bob"}}
    context_id, reply_id, (first, second) = ask(calls, SEND, other)
    version = calls.context(context_id)["version"]
    calls.decide(context_id, second["id"], "deny")
    context = calls.context(context_id)
    assert (context["state"], context["version"]) == ("awaiting_approval", version + 1)
    assert [each["id"] for each in calls.approvals(context_id)] == [first["id"]]
    calls.decide(context_id, first["id"], "approve")
    calls.ended(context_id, reply_id)
    assert [result["status"] for result in results(calls, context_id, reply_id)] == ["ok", "denied"]
    assert [each["status"] for each in calls.approvals(context_id, "all")] == ["approved", "denied"]


@pytest.mark.scenario("approvals", "The same decision again")
def test_the_same_decision_again_changes_nothing(calls: Calls) -> None:
    context_id, reply_id, (approval,) = ask(calls)
    first = calls.decide(context_id, approval["id"], "approve").json
    calls.ended(context_id, reply_id)
    version = calls.context(context_id)["version"]
    again = calls.decide(context_id, approval["id"], "approve")
    assert (again.status, again.json) == (200, first)
    assert calls.context(context_id)["version"] == version
    assert called(calls, context_id) == [approval["id"]]


@pytest.mark.scenario("approvals", "Another decision afterwards")
@pytest.mark.parametrize(
    ("first", "stands", "second"), [("approve", "approved", "deny"), ("deny", "denied", "approve")]
)
def test_another_decision_afterwards_is_refused(calls: Calls, first: str, stands: str, second: str) -> None:
    context_id, _, (approval,) = ask(calls)
    calls.decide(context_id, approval["id"], first)
    answer = calls.decide(context_id, approval["id"], second)
    assert (answer.status, answer.json["code"]) == (409, "approval-decided")
    assert answer.json["approval"]["status"] == stands


@pytest.mark.scenario("approvals", "Two decide at once")
def test_of_two_who_decide_at_once_one_is_heard(calls: Calls) -> None:
    for _ in range(10):
        context_id, reply_id, (approval,) = ask(calls)
        with ThreadPoolExecutor(2) as pool:
            both = [pool.submit(calls.decide, context_id, approval["id"], word) for word in ("approve", "deny")]
            answers = [each.result() for each in both]
        statuses = sorted(answer.status for answer in answers)
        (winner,) = [answer.json["status"] for answer in answers if answer.status == 200]
        (loser,) = [answer.json for answer in answers if answer.status == 409]
        assert (statuses, loser["code"], loser["approval"]["status"]) == ([200, 409], "approval-decided", winner)
        calls.ended(context_id, reply_id)
        assert called(calls, context_id) == ([approval["id"]] if winner == "approved" else [])


@pytest.mark.scenario("approvals", "Arguments are edited where the tool allows it")
def test_arguments_are_edited_where_the_tool_allows_it(calls: Calls) -> None:
    context_id, reply_id, (approval,) = ask(calls, {**SEND, "editable": True})
    edited = {"to": "bob", "text": "Hi"}
    answer = calls.decide(context_id, approval["id"], "approve", arguments=edited)
    assert answer.json["edited_arguments"] == edited
    assert answer.json["arguments"] == SEND["arguments"]
    calls.ended(context_id, reply_id)
    assert results(calls, context_id, reply_id)[0]["result"] == edited


@pytest.mark.scenario("approvals", "Arguments cannot be changed otherwise")
def test_arguments_cannot_be_changed_otherwise(calls: Calls) -> None:
    context_id, _, (approval,) = ask(calls)
    answer = calls.decide(context_id, approval["id"], "approve", arguments={"to": "eve"})
    assert (answer.status, answer.json["code"]) == (409, "arguments-not-editable")
    assert calls.context(context_id)["state"] == "awaiting_approval"
    calls.decide(context_id, approval["id"], "approve")
    later = calls.decide(context_id, approval["id"], "approve", arguments={"to": "eve"})
    assert (later.status, later.json["code"]) == (409, "approval-decided")


@pytest.mark.scenario("approvals", "Cancelled while it waits")
def test_a_run_cancelled_while_it_waits_leaves_no_open_call(calls: Calls) -> None:
    context_id, reply_id, (approval,) = ask(calls)
    assert calls.cancel(context_id)["state"] == "idle"
    message = calls.message(context_id, reply_id)
    assert (message["status"], message["content"]) == ("cancelled", "Wait. ")
    (result,) = results(calls, context_id, reply_id)
    assert (result["id"], result["status"]) == ("call-1", "cancelled")
    answer = calls.decide(context_id, approval["id"], "approve")
    assert (answer.status, answer.json["approval"]["status"]) == (409, "cancelled")
    posted = calls.run(context_id, ["text", "next"])
    assert calls.ended(context_id, posted["reply_message_id"])["content"] == "next"
    assert called(calls, context_id) == []


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"decision": "maybe"}, 422, "invalid-request"),
        ({}, 422, "invalid-request"),
        ({"decision": "approve", "arguments": [1]}, 422, "invalid-request"),
        ({"decision": "deny", "arguments": {}}, 422, "invalid-request"),
        ({"decision": "approve", "note": "x" * 2001}, 422, "invalid-request"),
    ],
)
def test_a_decision_that_is_none_is_refused(calls: Calls, body: dict[str, Any], status: int, code: str) -> None:
    context_id, _, (approval,) = ask(calls)
    answer = calls.call("POST", f"/contexts/{context_id}/approvals/{approval['id']}", body)
    assert (answer.status, answer.json["code"]) == (status, code)
    assert calls.approvals(context_id) == [approval]


def test_an_approval_of_another_context_is_not_found(calls: Calls) -> None:
    _, _, (approval,) = ask(calls)
    other = calls.create()
    answer = calls.decide(other, approval["id"], "approve")
    assert (answer.status, answer.json["code"]) == (404, "approval-not-found")
    assert calls.call("GET", "/contexts/nowhere/approvals").status == 404


@pytest.mark.scenario("approvals", "A restart changes nothing")
def test_what_waits_survives_a_crash(database_kind: str | None, tmp_path: Path) -> None:
    with Server(tmp_path, agent=SCRIPTED) as server:
        calls = Calls(server)
        context_id, reply_id, (approval,) = ask(calls)
        server.kill()
        server.start()
        assert calls.context(context_id)["state"] == "awaiting_approval"
        assert calls.approvals(context_id) == [approval]
        calls.decide(context_id, approval["id"], "approve")
        assert calls.ended(context_id, reply_id)["content"] == "Wait. done"
        assert called(calls, context_id) == [approval["id"]]


@pytest.mark.scenario("approvals", "Nobody decides in time")
def test_a_request_that_nobody_decides_on_ends_the_run(database_kind: str | None, tmp_path: Path) -> None:
    with Server(tmp_path, agent=SCRIPTED, approval_hours=1 / 3600) as server:
        calls = Calls(server)
        context_id = calls.create()
        posted = calls.run(context_id, ["approve", SEND], ["text", "never"])
        message = calls.ended(context_id, posted["reply_message_id"])
        assert (message["status"], message["error"]["code"]) == ("cancelled", "approval-expired")
        (result,) = results(calls, context_id, posted["reply_message_id"])
        assert result["status"] == "expired"
        (approval,) = calls.approvals(context_id, "all")
        answer = calls.decide(context_id, approval["id"], "approve")
        assert (answer.status, answer.json["approval"]["status"]) == (409, "expired")
        assert calls.context(context_id)["state"] == "idle"
        assert called(calls, context_id) == []


@pytest.mark.scenario("approvals", "A subscriber is told")
def test_a_subscriber_is_told_and_finds_what_to_decide(calls: Calls) -> None:
    context_id = calls.create()
    with calls.signals(context_id) as stream:
        calls.run(context_id, ["approve", SEND, {**SEND, "id": "call-2"}], ["text", "done"])
        stream.until("state_changed", new_state="awaiting_approval")
        first, second = calls.approvals(context_id)
        calls.decide(context_id, first["id"], "deny")
        stream.until("context_changed")
        calls.decide(context_id, second["id"], "deny")
        stream.until("state_changed", new_state="queued")
        stream.until("message_completed", status="completed")


@pytest.mark.scenario("approvals", "Text keeps its digest")
def test_the_digest_is_of_the_whole_text(calls: Calls) -> None:
    context_id, reply_id, (approval,) = ask(calls, after="é" * 100)
    calls.decide(context_id, approval["id"], "approve")
    message = calls.ended(context_id, reply_id)
    assert message["digest"] == hashlib.sha256(message["content"].encode()).hexdigest()


def test_asking_twice_in_one_reply(calls: Calls) -> None:
    context_id = calls.create()
    second = {**SEND, "id": "call-2"}
    posted = calls.run(context_id, ["approve", SEND], ["text", "a"], ["approve", second], ["text", "b"])
    for call_id, word in (("call-1", "approve"), ("call-2", "deny")):
        (approval,) = eventually(lambda: calls.approvals(context_id), "a request")
        assert approval["tool_call_id"] == call_id
        calls.decide(context_id, approval["id"], word)
    assert calls.ended(context_id, posted["reply_message_id"])["content"] == "ab"
    statuses = [each["status"] for each in results(calls, context_id, posted["reply_message_id"])]
    assert statuses == ["ok", "denied"]
    assert json.dumps(calls.approvals(context_id)) == "[]"
