"""What becomes of a message that is posted while its context is busy."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.blackbox.calls import PATIENCE_MS, SCRIPTED, Calls, eventually, faults, release, script
from tests.databases import KINDS
from tests.server import Server

DATABASES = KINDS


@pytest.fixture(scope="module")
def calls(database_kind: str | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    settings = {"log_format": "json", "signal_patience_ms": PATIENCE_MS, "max_waiting_messages": 3}
    with Server(tmp_path_factory.mktemp("busy"), agent=SCRIPTED, **settings) as server:
        yield Calls(server)
        assert faults(server) == []


def busy(calls: Calls, gate: str, *after: list[str]) -> tuple[str, str]:
    """A context whose reply has begun and waits at a gate: its id, and the reply's."""
    context_id = calls.create()
    posted = calls.run(context_id, ["text", "one "], ["wait", gate], *after, ["text", "end"])
    calls.settled(context_id, "streaming")
    return context_id, posted["reply_message_id"]


@pytest.mark.scenario("when-busy", "Refused by default")
def test_a_busy_context_refuses_by_default(calls: Calls) -> None:
    context_id, _ = busy(calls, "gate-reject")
    answer = calls.send(context_id, script(["text", "x"]))
    release(calls.server, "gate-reject")
    assert (answer.status, answer.json["code"]) == (409, "command-not-allowed")


@pytest.mark.scenario("when-busy", "Queued")
def test_a_queued_message_is_answered_after_the_run(calls: Calls) -> None:
    context_id, reply_id = busy(calls, "gate-queue")
    waiting = [calls.run(context_id, ["text", text], if_busy="queue") for text in ("two", "three")]
    assert [each["disposition"] for each in waiting] == ["queue", "queue"]
    listed = calls.queue(context_id)
    assert [each["reply_message_id"] for each in listed] == [each["reply_message_id"] for each in waiting]
    assert listed[0]["payload"]["content"] == script(["text", "two"])
    assert calls.message(context_id, waiting[0]["reply_message_id"])["status"] == "pending"
    release(calls.server, "gate-queue")
    for posted, text in zip(waiting, ("two", "three"), strict=True):
        assert calls.ended(context_id, posted["reply_message_id"])["content"] == text
    line = calls.messages(context_id)
    assert [message["id"] for message in line if message["role"] == "assistant"] == [
        reply_id,
        *(each["reply_message_id"] for each in waiting),
    ]
    parents = [message["parent_id"] for message in line]
    assert parents == [None, *(message["id"] for message in line[:-1])]
    assert calls.queue(context_id) == []


@pytest.mark.scenario("when-busy", "The queue is bounded")
def test_a_full_queue_refuses(calls: Calls) -> None:
    context_id, _ = busy(calls, "gate-full")
    for number in range(3):
        calls.run(context_id, ["text", str(number)], if_busy="queue")
    answer = calls.send(context_id, script(["text", "x"]), fields={"if_busy": "queue"})
    release(calls.server, "gate-full")
    assert (answer.status, answer.json["code"]) == (409, "queue-full")


@pytest.mark.scenario("when-busy", "Taken back")
def test_a_waiting_message_can_be_taken_back(calls: Calls) -> None:
    context_id, _ = busy(calls, "gate-back")
    first = calls.run(context_id, ["text", "two"], if_busy="queue")
    second = calls.run(context_id, ["text", "three"], if_busy="queue")
    path = f"/contexts/{context_id}/queue/{first['message_id']}"
    assert calls.call("DELETE", path).status == 204
    assert [each["message_id"] for each in calls.queue(context_id)] == [second["message_id"]]
    again = calls.call("DELETE", path)
    assert (again.status, again.json["code"]) == (404, "not-waiting")
    release(calls.server, "gate-back")
    assert calls.ended(context_id, second["reply_message_id"])["content"] == "three"
    assert len(calls.messages(context_id)) == 4
    assert calls.call("GET", f"/contexts/{context_id}/messages/{first['message_id']}").status == 404


@pytest.mark.scenario("when-busy", "The run before fails")
def test_a_queued_message_has_its_turn_after_a_failure(calls: Calls) -> None:
    context_id, _ = busy(calls, "gate-fail", ["give_up", "out-of-luck", "It gave up."])
    posted = calls.run(context_id, ["text", "two"], if_busy="queue")
    release(calls.server, "gate-fail")
    assert calls.ended(context_id, posted["reply_message_id"])["content"] == "two"


@pytest.mark.scenario("when-busy", "Interrupted")
def test_an_interrupting_message_stops_the_run_and_goes_first(calls: Calls) -> None:
    context_id, reply_id = busy(calls, "gate-never")
    queued = calls.run(context_id, ["text", "two"], if_busy="queue")
    posted = calls.run(context_id, ["text", "now"], if_busy="interrupt")
    assert posted["disposition"] == "interrupt"
    assert calls.ended(context_id, reply_id)["status"] == "cancelled"
    assert calls.ended(context_id, posted["reply_message_id"])["content"] == "now"
    assert calls.ended(context_id, queued["reply_message_id"])["content"] == "two"
    replies = [message["id"] for message in calls.messages(context_id) if message["role"] == "assistant"]
    assert replies == [reply_id, posted["reply_message_id"], queued["reply_message_id"]]


@pytest.mark.scenario("when-busy", "Interrupted while a person is asked")
def test_an_interrupting_message_ends_what_waits_for_a_person(calls: Calls) -> None:
    context_id = calls.create()
    asked = calls.run(context_id, ["approve", {"id": "c", "tool": "t", "arguments": {}}])
    calls.settled(context_id, "awaiting_approval")
    posted = calls.run(context_id, ["text", "now"], if_busy="interrupt")
    assert posted["state"] == "queued"
    assert calls.message(context_id, asked["reply_message_id"])["status"] == "cancelled"
    assert calls.ended(context_id, posted["reply_message_id"])["content"] == "now"
    assert [each["status"] for each in calls.approvals(context_id, "all")] == ["cancelled"]


@pytest.mark.scenario("when-busy", "Steered")
def test_a_steering_message_reaches_the_agent_at_its_next_step(calls: Calls) -> None:
    context_id, reply_id = busy(calls, "gate-steer", ["look"])
    posted = calls.send(context_id, "left, please", fields={"if_busy": "steer"}).json
    assert (posted["disposition"], posted["reply_message_id"]) == ("steer", reply_id)
    release(calls.server, "gate-steer")
    assert calls.ended(context_id, reply_id)["status"] == "completed"
    (step,) = [chunk["data"] for chunk in calls.chunks(context_id, reply_id) if chunk["kind"] == "step"]
    assert (step["said"], step["messages"]) == (["left, please"], [posted["message_id"]])
    assert [message["id"] for message in calls.messages(context_id)][1:] == [reply_id, posted["message_id"]]
    following = calls.run(context_id, ["history"])
    heard = json.loads(calls.ended(context_id, following["reply_message_id"])["content"])
    assert heard[1:3] == ["one end", "left, please"]


@pytest.mark.scenario("when-busy", "Steered too late")
def test_a_steering_message_that_comes_too_late_is_answered_after(calls: Calls) -> None:
    context_id, reply_id = busy(calls, "gate-late")
    posted = calls.send(context_id, script(["text", "after"]), fields={"if_busy": "steer"}).json
    release(calls.server, "gate-late")
    calls.ended(context_id, reply_id)
    line = eventually(lambda: len(found := calls.messages(context_id)) == 4 and found, "an answer")
    assert line[2]["id"] == posted["message_id"]
    assert calls.ended(context_id, line[3]["id"])["content"] == "after"


@pytest.mark.scenario("when-busy", "Cancelled with what waits")
def test_a_cancel_stops_what_waits_too(calls: Calls) -> None:
    context_id, reply_id = busy(calls, "gate-cancel")
    waiting = calls.run(context_id, ["text", "two"], if_busy="queue")
    with calls.signals(context_id) as stream:
        calls.cancel(context_id)
        stream.until("message_completed", message_id=waiting["reply_message_id"], status="cancelled")
    calls.settled(context_id, "idle")
    assert calls.message(context_id, reply_id)["status"] == "cancelled"
    assert calls.queue(context_id) == []
    kept = calls.message(context_id, waiting["message_id"])
    assert kept["content"] == script(["text", "two"])
    assert [message["id"] for message in calls.messages(context_id)][1:] == [reply_id]


@pytest.mark.scenario("when-busy", "Two tabs post at once")
@pytest.mark.parametrize("if_busy", ["reject", "queue", "interrupt", "steer"])
def test_two_tabs_post_at_once(calls: Calls, if_busy: str) -> None:
    for _ in range(5):
        context_id = calls.create()

        def send(text: str, context_id: str = context_id) -> tuple[int, str]:
            answer = calls.send(context_id, script(["text", text]), fields={"if_busy": if_busy})
            return answer.status, answer.json.get("reply_message_id", "")

        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(send, ("a", "b")))
        statuses = sorted(status for status, _ in answers)
        assert statuses == ([202, 409] if if_busy == "reject" else [202, 202])
        for status, reply_id in answers:
            if status == 202:
                calls.ended(context_id, reply_id)
        calls.settled(context_id, "idle")
        said = [message["payload"]["content"] for message in calls.messages(context_id) if message["role"] == "user"]
        assert len(said) == (1 if if_busy == "reject" else 2), said
