"""The log: durable before visible, gapless, immutable, kept, and read message by message."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from context_server.store import Store
from tests.blackbox.calls import SCRIPTED, Calls, eventually, faults, release, script
from tests.blackbox.scripted import UNCLEAN_TEXT
from tests.blackbox.wire import PAGE_BYTES, digest_of, pages, problem, reached, rows, text_of, wheres
from tests.databases import KINDS
from tests.server import Server

DATABASES = KINDS

ODD_TEXT = (
    "nul \x00, low \udc00, high \ud83d, pair \U0001f600, family \U0001f469\u200d\U0001f467, n\u0303, \ufeff, \uffff"
)
STORED = ODD_TEXT.replace("\x00", "\ufffd").replace("\udc00", "\ufffd").replace("\ud83d", "\ufffd")
STORED_UNCLEAN = UNCLEAN_TEXT.replace("\x00", "\ufffd").replace("\ud800", "\ufffd")


@pytest.fixture(scope="module")
def calls(database_kind: str | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    with Server(tmp_path_factory.mktemp("log"), agent=SCRIPTED, log_format="json") as server:
        yield Calls(server)
        assert faults(server) == [line for line in faults(server) if '"agent_failed"' in line]


def ended_replies(calls: Calls) -> dict[str, tuple[str, str]]:
    """A reply for each way of ending: ids of context and reply by status. Each has text and chunks of other kinds."""
    begin: list[list[Any]] = [
        ["textual", "reasoning", "hm "],
        ["text", "naïve \U0001f600 "],
        ["data", "tool_call", {"id": "1", "name": "n", "arguments": {"a": [1, 2.5, None]}}],
        ["data", "tool_result", {"id": "1", "status": "ok", "result": "r", "seconds": 0.5}],
        ["words", 10, 0.05],
    ]
    last: dict[str, list[Any]] = {
        "completed": ["text", "end"],
        "failed": ["fail", "no"],
        "cancelled": ["wait", "never"],
    }
    found = {}
    for status, step in last.items():
        context_id = calls.create()
        reply = calls.run(context_id, *begin, ["mark", f"written-{context_id}"], step)["reply_message_id"]
        if status == "cancelled":
            reached(calls, context_id, reply, 6)
            calls.cancel(context_id)
        assert calls.ended(context_id, reply)["status"] == status
        found[status] = (context_id, reply)
    return found


@pytest.mark.scenario("content-log", "Signalled content is committed")
def test_what_is_signalled_or_served_is_in_the_database(calls: Calls) -> None:
    committed = "SELECT count(*), max(sequence) FROM chunks WHERE message_id = ?"
    context_id = calls.create()
    with calls.signals(context_id) as stream:
        steps = [step for number in range(6) for step in (["words", 12, 0.05], ["wait", f"looked-up-{number}"])]
        reply = calls.run(context_id, *steps)["reply_message_id"]
        named: list[int] = []
        while stream.next().type != "message_completed":
            if stream.seen[-1].type == "content_delta":
                # Both are looked up at once: what was named must be there by now.
                signalled = stream.seen[-1].data["current_sequence"]
                assert rows(calls.server, committed, reply)[0][0] >= signalled
                pulled = calls.pull(context_id, reply, from_sequence=signalled)["sequence"]
                count, newest = rows(calls.server, committed, reply)[0]
                assert count == newest >= pulled >= signalled
                release(calls.server, f"looked-up-{len(named) // 2}")
                named += [signalled, pulled]
    final = stream.seen[-1].data["final_sequence"]
    assert rows(calls.server, committed, reply) == [(final, final)]
    assert len(set(named)) >= 6


@pytest.mark.scenario("content-log", "Signalled content is committed")
def test_the_writer_syncs_each_commit(tmp_path: Path) -> None:
    async def pragmas() -> list[Any]:
        async with Store.open(f"sqlite:///{tmp_path / 'a.db'}") as store:
            names = ("synchronous", "journal_mode", "foreign_keys")
            return [
                await store._write(lambda connection, name=name: connection.exec_driver_sql(f"PRAGMA {name}").scalar())
                for name in names
            ]

    full = 2
    assert asyncio.run(pragmas()) == [full, "wal", 1]


@pytest.mark.scenario("content-log", "Sequences without gaps")
def test_no_sequence_is_missing_whatever_happens_to_the_runs(calls: Calls) -> None:
    dice = random.Random(5)
    runs = []
    for number in range(24):
        last: list[Any] = [["text", "end"], ["fail", "no"], ["wait", "never"]][number % 3]
        steps = [["words", dice.randrange(10, 60), 0.4], ["data", "step", {"number": number}], ["words", 20, 0.2], last]
        context_id = calls.create()
        runs.append((context_id, calls.run(context_id, *steps)["reply_message_id"], steps))
    for context_id, reply, _ in dice.sample(runs[2::3], 8):
        reached(calls, context_id, reply, dice.randrange(1, 8))
        calls.cancel(context_id)
    found = set()
    for context_id, reply, steps in runs:
        message = calls.ended(context_id, reply)
        sequences = rows(calls.server, "SELECT sequence FROM chunks WHERE message_id = ? ORDER BY 1", reply)
        assert [sequence for (sequence,) in sequences] == list(range(1, message["final_sequence"] + 1))
        yielded = "".join(f"{word} " for count in (steps[0][1], 20) for word in range(count))
        text = text_of(calls, context_id, reply)
        assert text == yielded + "end" if message["status"] == "completed" else yielded.startswith(text)
        assert message["status"] == "cancelled" or text.removesuffix("end") == yielded
        found.add(message["status"])
    assert found == {"completed", "failed", "cancelled"}


@pytest.mark.scenario("content-log", "Adjacent deltas become one chunk")
def test_deltas_merge_within_a_kind_and_keep_the_order_of_kinds(calls: Calls) -> None:
    before, after = [f"b{number} " for number in range(200)], [f"a{number} " for number in range(200)]
    call = {"id": "1", "name": "n", "arguments": {}}
    context_id = calls.create()
    result = {"id": "1", "status": "ok", "result": None, "seconds": 0}
    called = [["data", "tool_call", call], ["data", "tool_result", result]]
    steps = [["text", *before], *called, ["text", *after], ["textual", "reasoning", "x"]]
    reply = calls.run(context_id, *steps)["reply_message_id"]
    calls.ended(context_id, reply)
    chunks = calls.chunks(context_id, reply)
    kinds = [chunk["kind"] for chunk in chunks]
    position = kinds.index("tool_call")
    assert len(chunks) < 100
    assert "".join(chunk["text"] for chunk in chunks[:position]) == "".join(before)
    assert [chunk["data"] for chunk in chunks[position : position + 2]] == [call, result]
    assert "".join(chunk["text"] for chunk in chunks[position + 2 : -1]) == "".join(after)
    assert (kinds.count("tool_call"), kinds[-1], kinds.count("reasoning")) == (1, "reasoning", 1)


@pytest.mark.scenario("content-log", "Every chunk is kept")
def test_chunks_outlive_later_messages_and_restarts(calls: Calls) -> None:
    replies = ended_replies(calls)
    before = {status: (calls.chunks(*ids), calls.message(*ids)) for status, ids in replies.items()}
    assert all(len(chunks) >= 6 for chunks, _ in before.values())
    for context_id, _ in replies.values():
        later = calls.run(context_id, ["words", 20, 0.05])
        calls.ended(context_id, later["reply_message_id"])
    for end in (calls.server.stop, calls.server.kill):
        end()
        calls.server.start()
        for status, ids in replies.items():
            assert (calls.chunks(*ids), calls.message(*ids)) == before[status]
            for chunk in before[status][0]:
                number = chunk["sequence"]
                one = calls.pull(*ids, from_sequence=number - 1, to_sequence=number, view="chunks")
                assert one["chunks"] == [chunk]


@pytest.mark.scenario("content-log", "Digest of an ended message")
def test_a_digest_proves_the_text_of_an_ended_message(calls: Calls) -> None:
    for status, ids in ended_replies(calls).items():
        page = calls.pull(*ids)
        assert (page["digest"], page["status"]) == (digest_of(page["content"]), status)
        assert page["content"].startswith("naïve \U0001f600 0 1 ")
        assert calls.message(*ids)["digest"] == page["digest"]
    context_id = calls.create()
    reply = calls.run(context_id, ["text", "a"], ["wait", "digest"])["reply_message_id"]
    reached(calls, context_id, reply, 1)
    still_open = calls.pull(context_id, reply)
    release(calls.server, "digest")
    empty = calls.create()
    nothing = calls.run(empty)["reply_message_id"]
    calls.ended(empty, nothing)
    assert (still_open["content"], still_open["digest"], still_open["final_sequence"]) == ("a", None, None)
    page = calls.pull(empty, nothing)
    assert (page["content"], page["final_sequence"], page["digest"]) == ("", 0, digest_of(""))


@pytest.mark.scenario("content-log", "User message in the log")
def test_a_users_message_is_pulled_like_a_reply(calls: Calls) -> None:
    # One chunk holds 65,536 characters, so this is a message of two; JSON lets spaces follow a list.
    text = script(["text", "a"]) + " " * 70_000
    context_id = calls.create()
    posted = calls.post(context_id, text)
    calls.ended(context_id, posted["reply_message_id"])
    page = calls.pull(context_id, posted["message_id"])
    assert page["content"] == text
    assert (page["status"], page["sequence"], page["final_sequence"]) == ("completed", 2, 2)
    assert page["digest"] == digest_of(text)
    rest = calls.pull(context_id, posted["message_id"], from_sequence=1)
    assert rest["content"] == text[65_536:]
    assert [chunk["kind"] for chunk in calls.chunks(context_id, posted["message_id"])] == ["text", "text"]


@pytest.mark.scenario("content-log", "Characters that cannot be stored")
def test_what_cannot_be_stored_is_replaced_and_all_else_kept(calls: Calls) -> None:
    context_id = calls.create(title=ODD_TEXT, metadata={ODD_TEXT: [ODD_TEXT]})
    context = calls.context(context_id)
    assert (context["title"], context["metadata"]) == (STORED, {STORED: [STORED]})

    # The scripted agent reads a script, so here the odd text stands beside it; below it is the message itself.
    payload = {"type": "text", "content": script(["unclean"]), "display": {"as": ODD_TEXT}}
    body = {"payload": payload, "client_metadata": {"x": ODD_TEXT}}
    posted = calls.call("POST", f"/contexts/{context_id}/messages", body).json
    calls.ended(context_id, posted["reply_message_id"])
    assert calls.message(context_id, posted["message_id"])["client_metadata"] == {"x": STORED}
    assert calls.message(context_id, posted["message_id"])["payload"]["display"] == {"as": STORED}
    assert text_of(calls, context_id, posted["reply_message_id"]) == STORED_UNCLEAN
    call, result = calls.chunks(context_id, posted["reply_message_id"])[1:]
    assert call["data"] == {"id": "1", "name": STORED_UNCLEAN, "arguments": {STORED_UNCLEAN: 1}}
    assert result["data"] == {"id": "1", "result": [STORED_UNCLEAN]}

    odd = calls.post(context_id, ODD_TEXT)
    assert calls.pull(context_id, odd["message_id"])["content"] == STORED
    assert calls.pull(context_id, odd["message_id"])["digest"] == digest_of(STORED)
    assert calls.message(context_id, odd["message_id"])["payload"]["content"] == STORED
    assert calls.ended(context_id, odd["reply_message_id"])["status"] == "failed"  # It was no script.


def test_numbers_that_json_lacks_become_null(calls: Calls) -> None:
    context_id = calls.create()
    data = {"number": float("nan"), "total": [float("inf"), -float("inf"), 1.5]}
    reply = calls.run(context_id, ["data", "step", data])["reply_message_id"]
    calls.ended(context_id, reply)
    assert calls.chunks(context_id, reply)[0]["data"] == {"number": None, "total": [None, None, 1.5]}


@pytest.mark.scenario("content-log", "Read messages")
def test_messages_are_listed_oldest_first_and_read_whole(calls: Calls) -> None:
    context_id = calls.create()
    posted = [calls.run(context_id, ["text", "reply 0"])]
    calls.ended(context_id, posted[0]["reply_message_id"])
    for number in (1, 2):
        posted.append(calls.run(context_id, ["text", f"reply {number}"]))
        calls.ended(context_id, posted[-1]["reply_message_id"])
    expected = [one[key] for one in posted for key in ("message_id", "reply_message_id")]

    listed: list[dict[str, Any]] = []
    cursor: str | None = ""
    while cursor is not None:
        page = calls.call("GET", f"/contexts/{context_id}/messages?limit=4{cursor}").json
        listed += page["items"]
        cursor = page["next_cursor"] and f"&cursor={page['next_cursor']}"
    assert [message["id"] for message in listed] == expected
    assert [message["parent_id"] for message in listed] == [None, *expected[:-1]]
    assert all("content" not in message for message in listed)
    for message in listed:
        whole = calls.message(context_id, message["id"])
        assert message.pop("siblings") == [message["id"]]
        assert {name: value for name, value in whole.items() if name != "content"} == message
        assert whole["content"] == text_of(calls, context_id, message["id"])
    assert [calls.message(context_id, id_)["content"] for id_ in expected[1::2]] == ["reply 0", "reply 1", "reply 2"]
    other = calls.create()
    for path in (f"/contexts/{context_id}/messages/none", f"/contexts/{other}/messages/{expected[0]}"):
        problem(calls.call("GET", path), 404, "message-not-found")
        problem(calls.call("GET", f"{path}/content"), 404, "message-not-found")
        problem(calls.call("GET", f"{path}/events"), 404, "message-not-found")
    for query in ("limit=0", "limit=201", "cursor=x", "cursor=MTo", "cursor=LTE", "include=all", "order=desc"):
        assert wheres(calls.call("GET", f"/contexts/{context_id}/messages?{query}")) == [f"query.{query.split('=')[0]}"]


@pytest.mark.scenario("content-log", "List messages with content")
def test_a_list_with_content_and_pulls_give_every_text(calls: Calls) -> None:
    context_id = calls.create()
    # A first message of almost a page leaves too little room for the first chunk of the reply.
    padded = script(["flood", 300, 4096, "flood-list"]) + " " * 1_000_000
    for text in (script(["text", "short"]), padded, script(["text", "é" * 1000])):
        calls.ended(context_id, calls.post(context_id, text)["reply_message_id"])
    expected = [text_of(calls, context_id, message["id"]) for message in list_all(calls, context_id, "limit=200")]
    assert len(expected[3].encode()) > PAGE_BYTES

    for query in ("limit=200", "limit=2", "limit=1"):
        held = []
        for message in list_all(calls, context_id, f"{query}&include=content"):
            rest = text_of(calls, context_id, message["id"], message["sequence"])
            held.append(message["content"] + rest)
        assert held == expected


def list_all(calls: Calls, context_id: str, query: str) -> list[dict[str, Any]]:
    """Every message of a context by the list's pages, none of which has more text than is allowed."""
    found: list[dict[str, Any]] = []
    cursor: str | None = ""
    while cursor is not None:
        page = calls.call("GET", f"/contexts/{context_id}/messages?{query}{cursor}").json
        assert sum(len(message.get("content", "").encode()) for message in page["items"]) <= PAGE_BYTES
        found += page["items"]
        cursor = page["next_cursor"] and f"&cursor={page['next_cursor']}"
    return found


@pytest.mark.scenario("content-log", "Recent chunks are bounded")
def test_memory_for_recent_chunks_is_bounded(tmp_path: Path) -> None:
    limit = 65_536
    with Server(tmp_path, agent=SCRIPTED, log_format="json", recent_chunk_bytes=limit) as server:
        calls = Calls(server)
        replies = []
        for number in range(3):
            context_id = calls.create()
            replies.append((context_id, calls.run(context_id, ["flood", 300, 2048, f"f{number}"])["reply_message_id"]))
        expected = "".join(f"{number:02047d}\n" for number in range(300))
        seen = []

        def all_written() -> bool:
            seen.append(calls.metric("context_server_recent_bytes"))
            return calls.metric("context_server_bytes_committed_total") == 3 * len(expected)

        eventually(all_written)
        for ids in replies:
            calls.ended(*ids)
        assert 0 < max(seen) <= limit < 3 * len(expected) / 20
        assert [text_of(calls, *ids) for ids in replies] == [expected] * 3
        for ids in replies:
            # The newest chunks come from memory, the older ones from the database: together they are gapless.
            final = pages(calls, *ids)[-1]["final_sequence"]
            chunks = [
                calls.pull(*ids, from_sequence=number, to_sequence=number + 1, view="chunks")["chunks"][0]
                for number in range(final)
            ]
            assert [chunk["sequence"] for chunk in chunks] == list(range(1, final + 1))
            assert "".join(chunk["text"] for chunk in chunks) == expected
        assert faults(server) == []
