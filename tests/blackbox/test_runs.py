"""How a posted message becomes a run, which states it passes through, and what agents are given."""

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.blackbox.calls import PATIENCE_MS, SCRIPTED, Calls, faults, release, script
from tests.databases import KINDS
from tests.server import Server

DATABASES = KINDS

SECOND = 1_000_000_000


@pytest.fixture(scope="module")
def calls(database_kind: str | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    settings = {"log_format": "json", "signal_patience_ms": PATIENCE_MS}
    with Server(tmp_path_factory.mktemp("runs"), agent=SCRIPTED, **settings) as server:
        yield Calls(server)
        assert faults(server) == []


@pytest.mark.scenario("runs", "Post a message")
def test_a_posted_message_has_a_reply_at_once(calls: Calls) -> None:
    context_id = calls.create()
    payload = {"type": "text", "content": script(["wait", "post-gate"]), "display": {"as": ["a", 1, None]}}
    body = {"payload": payload, "client_metadata": {"tab": 3}}
    answer = calls.call("POST", f"/contexts/{context_id}/messages", body)
    posted = answer.json
    reply = calls.message(context_id, posted["reply_message_id"])
    asked = calls.message(context_id, posted["message_id"])
    release(calls.server, "post-gate")
    assert answer.status == 202
    assert set(posted) == {"context_id", "message_id", "reply_message_id", "run_id", "state", "version"}
    assert (posted["context_id"], posted["state"], posted["version"]) == (context_id, "queued", 2)
    assert (reply["role"], reply["status"], reply["sequence"]) == ("assistant", "pending", 0)
    assert (reply["parent_id"], reply["run_id"], reply["payload"]) == (asked["id"], posted["run_id"], None)
    whole = payload | {"files": [], "name": None, "input": None}
    assert (asked["role"], asked["status"], asked["payload"]) == ("user", "completed", whole)
    assert asked["client_metadata"] == {"tab": 3}
    assert calls.ended(context_id, reply["id"])["status"] == "completed"


@pytest.mark.scenario("runs", "Post a message")
def test_the_next_message_follows_the_reply(calls: Calls) -> None:
    context_id = calls.create()
    replies = []
    for text in ("one", "two"):
        posted = calls.run(context_id, ["text", text])
        calls.ended(context_id, posted["reply_message_id"])
        replies.append(posted["reply_message_id"])
    messages = calls.messages(context_id)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert [message["parent_id"] for message in messages] == [None, *(message["id"] for message in messages[:3])]
    assert [message["id"] for message in messages[1::2]] == replies
    assert calls.context(context_id)["head_message_id"] == replies[-1]


@pytest.mark.scenario("runs", "Post while busy")
def test_a_busy_context_takes_no_message(calls: Calls) -> None:
    context_id = calls.create()
    posted = calls.run(context_id, ["text", "half "], ["wait", "busy-gate"], ["text", "whole"])
    with calls.signals(context_id) as stream:
        stream.until("content_delta")
    before = calls.context(context_id)
    refused = calls.send(context_id, script(["text", "no"]))
    assert (refused.status, refused.headers["content-type"]) == (409, "application/problem+json")
    assert refused.json["code"] == "command-not-allowed"
    assert (refused.json["state"], refused.json["allowed_commands"]) == ("streaming", ["cancel"])
    assert calls.context(context_id) == before
    assert len(calls.messages(context_id)) == 2
    release(calls.server, "busy-gate")
    reply = calls.ended(context_id, posted["reply_message_id"])
    assert (reply["status"], reply["content"]) == ("completed", "half whole")


@pytest.mark.scenario("runs", "Repeat with the same key")
def test_a_repeated_post_is_answered_by_the_first_answer(tmp_path: Path) -> None:
    with Server(tmp_path, agent=SCRIPTED, log_format="json") as server:
        calls = Calls(server)
        context_id = calls.create()
        options = {"headers": {"Idempotency-Key": 'once"~!'}}
        answers = [calls.send(context_id, script(["text", "word"]), **options)]
        answers.append(calls.send(context_id, script(["text", "word"]), **options))
        calls.ended(context_id, answers[0].json["reply_message_id"])
        answers.append(calls.send(context_id, script(["text", "word"]), **options))
        server.kill()
        server.start()
        answers.append(calls.send(context_id, script(["text", "word"]), **options))
        messages = calls.messages(context_id)
        assert faults(server) == []
    assert {(answer.status, answer.body) for answer in answers} == {(202, answers[0].body)}
    assert [answer.headers.get("idempotency-replayed") for answer in answers] == [None, "true", "true", "true"]
    assert [message["role"] for message in messages] == ["user", "assistant"]


@pytest.mark.scenario("runs", "Key with another body")
def test_a_key_is_for_one_request(calls: Calls) -> None:
    context_id, other = calls.create(), calls.create()
    headers = {"Idempotency-Key": "used"}
    assert calls.send(context_id, script(["text", "word"]), headers=headers).status == 202
    for where, text in ((context_id, script(["text", "another"])), (other, script(["text", "word"]))):
        reused = calls.send(where, text, headers=headers)
        assert (reused.status, reused.json["code"]) == (422, "idempotency-key-reused")
    assert len(calls.messages(context_id)) == 2
    assert calls.messages(other) == []
    for key in ("", "x" * 256, "two words", "tab\tbed", "\u00e4"):
        refused = calls.send(other, script(["text", "word"]), headers={"Idempotency-Key": key})
        assert (refused.status, refused.json["code"]) == (422, "invalid-request"), key
        assert [error["where"] for error in refused.json["errors"]] == ["header.Idempotency-Key"]
    assert calls.messages(other) == []
    assert calls.send(other, script(["text", "word"]), headers={"Idempotency-Key": "x" * 255}).status == 202


@pytest.mark.scenario("runs", "Fifty posts with one key")
def test_fifty_posts_with_one_key_are_one(calls: Calls) -> None:
    context_id = calls.create()
    options: dict[str, Any] = {"headers": {"Idempotency-Key": "fifty"}}
    with ThreadPoolExecutor(50) as threads:
        futures = [threads.submit(calls.send, context_id, script(["text", "word"]), **options) for _ in range(50)]
        answers = [future.result() for future in futures]
    assert {(answer.status, answer.body) for answer in answers} == {(202, answers[0].body)}
    assert sum("idempotency-replayed" not in answer.headers for answer in answers) == 1
    assert [message["role"] for message in calls.messages(context_id)] == ["user", "assistant"]


@pytest.mark.scenario("runs", "States of a reply")
def test_a_reply_passes_through_its_states(calls: Calls) -> None:
    context_id = calls.create()
    statuses = []
    with calls.signals(context_id) as stream:
        first = stream.next()
        posted = calls.run(
            context_id,
            ["wait", "states-0"],
            ["data", "tool_call", {"id": "1", "name": "look", "arguments": {"for": "it"}}],
            ["wait", "states-1"],
            ["data", "tool_result", {"id": "1", "status": "ok", "result": [1, None], "seconds": 0.5}],
            ["wait", "states-2"],
            ["text", "found"],
            ["wait", "states-3"],
        )
        for number, state in enumerate(("thinking", "calling_tool", "thinking", "streaming")):
            stream.until("state_changed", new_state=state)
            context = calls.context(context_id)
            assert (context["state"], context["allowed_commands"]) == (state, ["cancel"])
            statuses.append(calls.message(context_id, posted["reply_message_id"])["status"])
            release(calls.server, f"states-{number}")
        stream.until("state_changed", new_state="idle")
    states = stream.of_type("state_changed")
    expected = ["idle", "queued", "thinking", "calling_tool", "thinking", "streaming", "idle"]
    assert [event.data["new_state"] for event in states] == expected
    version = first.data["version"]
    assert [event.data["version"] for event in states] == list(range(version, version + len(expected)))
    context = calls.context(context_id)
    assert (context["state"], context["version"]) == ("idle", version + len(expected) - 1)
    assert (context["allowed_commands"], context["active_run"]) == (["send"], None)
    statuses.append(calls.message(context_id, posted["reply_message_id"])["status"])
    assert statuses == ["pending", "streaming", "streaming", "streaming", "completed"]
    assert calls.chunks(context_id, posted["reply_message_id"]) == [
        {"sequence": 1, "kind": "tool_call", "data": {"id": "1", "name": "look", "arguments": {"for": "it"}}},
        {
            "sequence": 2,
            "kind": "tool_result",
            "data": {"id": "1", "status": "ok", "result": [1, None], "seconds": 0.5},
        },
        {"sequence": 3, "kind": "text", "text": "found"},
    ]


def test_what_cannot_be_stored_is_replaced(calls: Calls) -> None:
    context_id = calls.create()
    posted = calls.run(context_id, ["unclean"], ["textual", "reasoning", ""], ["text", "", "", "end"])
    reply = calls.ended(context_id, posted["reply_message_id"])
    clean = "nul \ufffd, surrogate \ufffd, pair \U0001f600 "
    assert (reply["status"], reply["content"]) == ("completed", clean + "end")
    chunks = calls.chunks(context_id, reply["id"])
    assert [chunk.get("data") for chunk in chunks[1:3]] == [
        {"id": "1", "name": clean, "arguments": {clean: 1}},
        {"id": "1", "result": [clean]},
    ]
    assert [chunk["kind"] for chunk in chunks] == ["text", "tool_call", "tool_result", "text"]  # Nothing of "".


OWN_AGENT = """
async def echo(history, run):
    turns = [f"{turn.role}:{turn.text}" for turn in history]
    yield f"turn {(len(history) + 1) // 2}: "
    yield history[-1].text.upper()
    yield "|" + "|".join(turns[:-1])
"""


@pytest.mark.scenario("runs", "Agent of one's own")
def test_a_generator_of_ones_own_is_an_agent(tmp_path: Path) -> None:
    (tmp_path / "my_agent.py").write_text(OWN_AGENT)
    with Server(tmp_path, agent="my_agent:echo", log_format="json") as server:
        calls = Calls(server)
        context_id = calls.create()
        replies = []
        for text in ("first", "second", "third"):
            posted = calls.post(context_id, text)
            replies.append(calls.ended(context_id, posted["reply_message_id"])["content"])
        assert faults(server) == []
    history = ["user:first", f"assistant:{replies[0]}"]
    assert replies[:2] == ["turn 1: FIRST|", f"turn 2: SECOND|{'|'.join(history)}"]
    history += ["user:second", f"assistant:{replies[1]}"]
    assert replies[2] == f"turn 3: THIRD|{'|'.join(history)}"


@pytest.mark.scenario("runs", "Metronome keeps its schedule")
def test_the_metronome_is_on_time(tmp_path: Path) -> None:
    with Server(tmp_path, agent="metronome", log_format="json") as server:
        calls = Calls(server)
        context_id = calls.create()
        before = time.time_ns()
        posted = calls.post(context_id, "rate=50 seconds=2")
        reply = calls.ended(context_id, posted["reply_message_id"])
        assert faults(server) == []
    assert re.fullmatch(r"([0-9]+:[0-9]+ ){100}", reply["content"])
    words = [tuple(map(int, word.split(":"))) for word in reply["content"].split()]
    assert [number for number, _ in words] == list(range(100))
    # A place in the schedule is by the monotonic clock, in whole milliseconds; the word by the wall clock. Words may be
    # late, the first one too, but not early.
    assert all(at - before >= number * SECOND // 50 - 2_000_000 for number, at in words)


@pytest.mark.scenario("runs", "Demo agent answers from the documentation")
def test_the_demo_agent_answers_fails_and_goes_on_at_length(tmp_path: Path) -> None:
    with Server(tmp_path, log_format="json") as server:  # Whatever agent is the default.
        calls = Calls(server)
        asked = ["How do I resume after a break?", "Please fail.", "Give me a long answer about signals."]
        contexts = [calls.create() for _ in asked]
        posted = [calls.post(context_id, text) for context_id, text in zip(contexts, asked, strict=True)]
        answer, failed = (calls.ended(contexts[n], posted[n]["reply_message_id"]) for n in (0, 1))
        chunks = calls.chunks(contexts[0], answer["id"])
        long_so_far = calls.pull(contexts[2], posted[2]["reply_message_id"])["content"]
        calls.cancel(contexts[2])
        long_answer = calls.ended(contexts[2], posted[2]["reply_message_id"])
    kinds = {chunk["kind"]: chunk for chunk in chunks}
    assert set(kinds) == {"tool_call", "tool_result", "reasoning", "text"}
    assert kinds["tool_call"]["data"]["name"] == "search_docs"
    assert kinds["tool_result"]["data"]["id"] == kinds["tool_call"]["data"]["id"]
    documentation = " ".join(path.read_text() for path in (Path(__file__).parents[2] / "docs").rglob("*.md"))
    sentences = [line for line in answer["content"].splitlines() if len(line.split()) >= 5]
    assert any(line.strip() in documentation for line in sentences), answer["content"]
    assert answer["status"] == "completed"
    assert (failed["status"], failed["error"]["code"]) == ("failed", "agent-error")
    assert failed["content"]
    assert json.dumps(failed["error"]).isascii()
    # It writes 150 words a second at length, so it was much longer than an answer when it was cancelled.
    assert len(long_so_far.split()) > 2 * len(answer["content"].split()) > 0
    assert long_answer["status"] == "cancelled"
