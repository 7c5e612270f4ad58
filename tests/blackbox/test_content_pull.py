"""The pull: what comes after a sequence, how it is cached, bounded and waited for, and the inline view."""

import asyncio
import hashlib
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event

from context_server.store import Store
from tests.blackbox.calls import SCRIPTED, Answer, Calls, eventually, faults, release, script
from tests.blackbox.wire import (
    PAGE_BYTES,
    STEPS,
    TEXT,
    begin,
    digest_of,
    pages,
    problem,
    pull,
    reached,
    text_of,
    wheres,
    written,
)
from tests.databases import KINDS
from tests.server import Server

DATABASES = KINDS

WAIT_SECONDS = 30
"""The longest that a pull may wait. One that is over in half of it was told, and did not wait to its end."""

IMMUTABLE = "private, max-age=31536000, immutable"
REVALIDATE = "private, no-cache"
FIELDS = {
    "context_id", "message_id", "from_sequence", "sequence", "content", "status", "final_sequence", "digest",
    "up_to_date", "epoch",
}  # fmt: skip


@pytest.fixture(scope="module")
def calls(database_kind: str | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    with Server(tmp_path_factory.mktemp("pull"), agent=SCRIPTED, log_format="json") as server:
        yield Calls(server)
        assert faults(server) == [line for line in faults(server) if '"agent_failed"' in line]


@pytest.mark.scenario("content-pull", "Pull from the start")
def test_a_pull_without_a_sequence_starts_at_the_start(calls: Calls) -> None:
    ids = written(calls, *STEPS)
    answers = [pull(calls, *ids), pull(calls, *ids, "from_sequence=0")]
    assert answers[0].body == answers[1].body
    page = answers[0].json
    assert set(page) == FIELDS
    assert (page["context_id"], page["message_id"]) == ids
    assert (page["from_sequence"], page["sequence"], page["content"]) == (0, len(STEPS), TEXT)
    assert (page["status"], page["final_sequence"], page["up_to_date"]) == ("completed", len(STEPS), True)
    assert page["digest"] == digest_of(TEXT)
    assert page["epoch"] == calls.context(ids[0])["epoch"]
    for answer in answers:
        assert (answer.headers["content-type"], answer.headers["cache-control"]) == ("application/json", REVALIDATE)
    assert (
        calls.call("HEAD", f"/contexts/{ids[0]}/messages/{ids[1]}/content").headers["etag"]
        == (answers[0].headers["etag"])
    )


@pytest.mark.scenario("content-pull", "Resume after a gap")
def test_what_is_held_joined_with_the_rest_is_the_whole(calls: Calls) -> None:
    ids = written(calls, ["words", 60, 0.3])
    whole = text_of(calls, *ids)
    chunks = calls.chunks(*ids)
    assert len(chunks) > 10
    assert whole == "".join(f"{number} " for number in range(60))
    for held in range(len(chunks) + 1):
        rest = calls.pull(*ids, from_sequence=held)
        assert "".join(chunk["text"] for chunk in chunks[:held]) + rest["content"] == whole
        assert (rest["from_sequence"], rest["sequence"]) == (held, len(chunks))


@pytest.mark.scenario("content-pull", "Nothing new")
def test_nothing_new_is_said_at_once_or_when_the_wait_is_over(calls: Calls) -> None:
    ids = begin(calls, gate="nothing-new")
    at_once = pull(calls, *ids, "from_sequence=8").json
    begun = time.monotonic()
    waited = pull(calls, *ids, "from_sequence=8&wait=0.4").json
    seconds = time.monotonic() - begun
    release(calls.server, "nothing-new")
    for page in (at_once, waited):
        assert (page["content"], page["sequence"], page["from_sequence"]) == ("", 8, 8)
        assert (page["up_to_date"], page["status"], page["final_sequence"]) == (True, "streaming", None)
    assert 0.4 <= seconds < 20


@pytest.mark.scenario("content-pull", "Reply that has ended")
@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
def test_the_end_of_a_reply_can_be_proved(calls: Calls, status: str) -> None:
    gate = f"ended-{status}"
    ids = begin(calls, *([["fail", "no"]] if status == "failed" else []), gate=gate)
    held = calls.pull(*ids)
    if status == "cancelled":
        calls.cancel(ids[0])
    else:
        release(calls.server, gate)
    calls.ended(*ids)
    rest = calls.pull(*ids, from_sequence=held["sequence"])
    assert (held["final_sequence"], held["digest"], held["status"]) == (None, None, "streaming")
    assert rest["sequence"] == rest["final_sequence"]
    assert rest["status"] == status
    assert rest["digest"] == digest_of(held["content"] + rest["content"])


@pytest.mark.scenario("content-pull", "Closed range")
def test_a_closed_range_never_changes(calls: Calls) -> None:
    ids = begin(calls, ["textual", "reasoning", "more"], gate="closed-range")
    queries = ["to_sequence=8", "from_sequence=2&to_sequence=6", "from_sequence=8&to_sequence=8", "to_sequence=0"]
    queries += [f"{query}&view=chunks" for query in queries]
    open_ones = [pull(calls, *ids, query) for query in queries]
    release(calls.server, "closed-range")
    calls.ended(*ids)
    ended = [pull(calls, *ids, query) for query in queries]
    calls.server.stop()
    calls.server.start()
    stored = [pull(calls, *ids, query) for query in queries]
    for before, after, later in zip(open_ones, ended, stored, strict=True):
        assert before.body == after.body == later.body
        assert before.headers["etag"] == after.headers["etag"] == later.headers["etag"]
        assert before.headers["etag"].startswith('"')
        for answer in (before, after, later):
            assert (answer.status, answer.headers["cache-control"]) == (200, IMMUTABLE)
            page = answer.json
            assert (page["status"], page["final_sequence"], page["digest"]) == (None, None, None)
            assert page["up_to_date"] is False
    assert open_ones[1].json["content"] == "First, naïve \U0001f600 "
    assert len({answer.headers["etag"] for answer in open_ones}) == len(queries)
    etag = {"If-None-Match": open_ones[0].headers["etag"]}
    assert (pull(calls, *ids, queries[0], etag).status, pull(calls, *ids, queries[1], etag).status) == (304, 200)


@pytest.mark.scenario("content-pull", "Range not yet reached")
def test_a_range_beyond_the_head_is_an_open_answer(calls: Calls) -> None:
    ids = begin(calls, gate="range-not-reached")
    answer = pull(calls, *ids, "from_sequence=3&to_sequence=9")
    largest = pull(calls, *ids, f"to_sequence={2**53 - 1}")
    release(calls.server, "range-not-reached")
    assert (answer.json["sequence"], answer.json["status"], answer.json["up_to_date"]) == (8, "streaming", True)
    assert answer.json["content"] == largest.json["content"] == TEXT
    assert {answer.headers["cache-control"], largest.headers["cache-control"]} == {REVALIDATE}


@pytest.mark.scenario("content-pull", "Pull unchanged")
def test_an_answer_that_has_not_changed_is_304(calls: Calls) -> None:
    ids = begin(calls, ["textual", "reasoning", "hm"], ["text", "new"], ["wait", "unchanged-2"], gate="unchanged")
    seen = []
    for gate, news in (("unchanged", 10), ("unchanged-2", None)):
        first = pull(calls, *ids, "from_sequence=4")
        seen.append(first.headers["etag"])
        again = pull(calls, *ids, "from_sequence=4", {"If-None-Match": f'"other", {first.headers["etag"]}'})
        assert (again.status, again.body, again.headers["etag"]) == (304, b"", first.headers["etag"])
        release(calls.server, gate)
        reached(calls, *ids, news) if news else calls.ended(*ids)
        changed = pull(calls, *ids, "from_sequence=4", {"If-None-Match": first.headers["etag"]})
        assert (changed.status, changed.json["sequence"]) == (200, 10)
        assert changed.json["content"] == TEXT.removeprefix("First, ") + "new"
        seen.append(changed.headers["etag"])
    # The second kind of news is the end of the message: the same text, and another answer.
    assert (len(set(seen)), seen[1] == seen[2]) == (3, True)


def waiting(calls: Calls, pool: ThreadPoolExecutor, ids: tuple[str, str], sequence: int, clients: int) -> list[Any]:
    """Pulls that wait for what comes after a sequence: each has looked twice and found nothing."""
    name = 'context_server_pulls_total{source="memory"}'
    before = calls.metric(name)
    query = f"from_sequence={sequence}&wait={WAIT_SECONDS}"
    begun = [pool.submit(lambda: (pull(calls, *ids, query), time.monotonic())) for _ in range(clients)]
    eventually(lambda: calls.metric(name) >= before + 2 * clients, "waiting pulls")
    return begun


@pytest.mark.scenario("content-pull", "Wait for the next chunk")
def test_a_wait_ends_with_the_next_chunk_and_with_the_end(calls: Calls) -> None:
    ids = begin(calls, ["text", "news"], ["wait", "wait-end"], gate="wait-news")
    with ThreadPoolExecutor(10) as pool:
        for gate, held, status, content in (
            ("wait-news", 8, "streaming", "news"),
            ("wait-end", 8, "completed", ""),
        ):
            head = held if gate == "wait-news" else calls.pull(*ids)["sequence"]
            pulls = waiting(calls, pool, ids, head, 10)
            released = time.monotonic()
            release(calls.server, gate)
            answers = [pulled.result() for pulled in pulls]
            assert {answer.body for answer, _ in answers} == {answers[0][0].body}
            page = answers[0][0].json
            assert (page["content"], page["status"], page["from_sequence"]) == (content, status, head)
            assert all(released <= at < released + WAIT_SECONDS / 2 for _, at in answers)
    ended = page["final_sequence"]
    begun = time.monotonic()
    assert pull(calls, *ids, f"from_sequence={ended}&wait={WAIT_SECONDS}").json["final_sequence"] == ended
    assert pull(calls, *ids, f"from_sequence=0&wait={WAIT_SECONDS}").json["sequence"] == ended
    assert time.monotonic() - begun < WAIT_SECONDS / 2
    for wait in ("30.1", "31", "-1", "-0.1", "nan", "inf", "x", "", "1e400", "5s"):
        assert wheres(pull(calls, *ids, f"wait={wait}")) == ["query.wait"]


@pytest.mark.scenario("content-pull", "Wait for the next chunk")
def test_a_wait_ends_when_the_context_is_deleted(calls: Calls) -> None:
    ids = begin(calls, gate="never")
    with ThreadPoolExecutor(2) as pool:
        pulls = waiting(calls, pool, ids, 8, 2)
        begun = time.monotonic()
        assert calls.call("DELETE", f"/contexts/{ids[0]}").status == 204
        for pulled in pulls:
            answer, at = pulled.result()
            problem(answer, 404, "context-not-found")
            assert at < begun + WAIT_SECONDS / 2


@pytest.mark.scenario("content-pull", "Chunks view")
def test_chunks_have_text_or_data_by_their_kind(calls: Calls) -> None:
    ids = written(calls, *STEPS)
    joined, view = calls.pull(*ids), calls.pull(*ids, view="chunks")
    expected = []
    for sequence, (verb, kind, content) in enumerate(STEPS, start=1):
        expected.append({"sequence": sequence, "kind": kind, "data" if verb == "data" else "text": content})
    assert view["chunks"] == expected
    assert "content" not in view
    assert joined["content"] == "".join(chunk["text"] for chunk in view["chunks"] if chunk["kind"] == "text")
    assert {name: view[name] for name in view if name != "chunks"} == {
        name: joined[name] for name in joined if name != "content"
    }


@pytest.mark.scenario("content-pull", "Page of bounded size")
def test_a_long_message_is_pulled_page_by_page(calls: Calls) -> None:
    ids = written(calls, ["flood", 700, 4096, "flood-pages"], ["text", "the end"])
    calls.server.stop()
    calls.server.start()
    found = pages(calls, *ids)
    text = "".join(page["content"] for page in found)
    assert text == "".join(f"{number:04095d}\n" for number in range(700)) + "the end"
    assert digest_of(text) == found[-1]["digest"]
    assert len(found) >= 3
    for page, following in zip(found, [*found[1:], None], strict=True):
        assert 0 < len(page["content"].encode()) <= PAGE_BYTES
        assert page["up_to_date"] is (following is None)
        assert following is None or following["from_sequence"] == page["sequence"]
        assert (page["status"], page["final_sequence"]) == ("completed", found[-1]["sequence"])


@pytest.mark.scenario("content-pull", "Sequence ahead of the log")
def test_a_client_with_another_history_is_told_so(calls: Calls) -> None:
    open_ids = begin(calls, gate="ahead")
    context_id, reply = written(calls, *STEPS)
    user = calls.messages(context_id)[0]["id"]
    try:
        for ids, head in ((open_ids, 8), ((context_id, reply), 8), ((context_id, user), 1)):
            for query in (f"from_sequence={head + 1}", f"from_sequence={head + 1}&wait=30&view=chunks"):
                assert problem(pull(calls, *ids, query), 409, "sequence-ahead")["sequence"] == head
            path = f"/contexts/{ids[0]}/messages/{ids[1]}/events?from_sequence={2**53 - 1}"
            assert problem(calls.call("GET", path), 409, "sequence-ahead")["sequence"] == head
    finally:
        release(calls.server, "ahead")


@pytest.mark.scenario("content-pull", "Invalid sequence")
@pytest.mark.parametrize(
    "number",
    [
        *("-1", "x", "1.5", "1.0", "9007199254740992", str(2**63), str(2**64), "1" + "0" * 400, "%201", "1%20", "1_0"),
        *("%2B1", "", "0x1", "1e1", "%D9%A1", "nan", "null", "true", "1,2", "%00", "%ED%A0%80", "%ff"),
    ],
)
def test_what_is_no_sequence_is_refused(calls: Calls, number: str) -> None:
    ids = user_message(calls)
    for name in ("from_sequence", "to_sequence"):
        assert wheres(pull(calls, *ids, f"{name}={number}")) == [f"query.{name}"]
    path = f"/contexts/{ids[0]}/messages/{ids[1]}/events?from_sequence={number}"
    assert wheres(calls.call("GET", path)) == ["query.from_sequence"]


@pytest.mark.scenario("content-pull", "Invalid sequence")
def test_a_range_that_runs_backwards_is_refused(calls: Calls) -> None:
    ids = user_message(calls)
    assert wheres(pull(calls, *ids, "from_sequence=1&to_sequence=0")) == ["query.to_sequence"]
    assert wheres(pull(calls, *ids, "from_sequence=0&from_sequence=1")) == ["query.from_sequence"]
    assert wheres(pull(calls, *ids, "view=raw")) == ["query.view"]
    assert wheres(pull(calls, *ids, "from=1")) == ["query.from"]
    assert pull(calls, *ids, f"to_sequence={2**53 - 1}").json["content"] == script(["text", "a"])


def user_message(calls: Calls) -> tuple[str, str]:
    """Ids of a context and of the message that its user posted."""
    context_id, _ = written(calls, ["text", "a"])
    return context_id, calls.messages(context_id)[0]["id"]


def every_pull(calls: Calls, ids: tuple[str, str]) -> dict[str, tuple[int, str | None, str | None, bytes]]:
    """Every range in every view: status, ETag, caching and body by query."""
    head = calls.pull(*ids)["final_sequence"]
    found = {}
    for view in ("content", "chunks"):
        for start in range(head + 2):
            for stop in (None, *range(start, head + 2)):
                query = f"from_sequence={start}&view={view}" + ("" if stop is None else f"&to_sequence={stop}")
                answer: Answer = pull(calls, *ids, query)
                headers = answer.headers
                found[query] = (answer.status, headers.get("etag"), headers.get("cache-control"), answer.body)
    return found


def pulls_by_source(calls: Calls) -> Counter[str]:
    """How many pulls were answered from memory and from the database, so far."""
    return Counter(
        {
            source: int(calls.metric(f'context_server_pulls_total{{source="{source}"}}'))
            for source in ("memory", "database")
        }
    )


@pytest.mark.scenario("content-pull", "Memory and database agree")
@pytest.mark.parametrize(
    ("recent_chunk_bytes", "sources"), [(67_108_864, {"memory"}), (2000, {"memory", "database"}), (0, {"database"})]
)
def test_every_pull_is_the_same_from_memory_and_from_the_database(
    tmp_path: Path, recent_chunk_bytes: int, sources: set[str]
) -> None:
    with Server(tmp_path, agent=SCRIPTED, log_format="json", recent_chunk_bytes=recent_chunk_bytes) as server:
        calls = Calls(server)
        ids = written(calls, *STEPS, ["unclean"])
        before = pulls_by_source(calls)
        first = every_pull(calls, ids)
        by_source = pulls_by_source(calls) - before
        # Memory refuses nothing: what is ahead of the log was asked of the database.
        by_source["database"] -= sum(status == 409 for status, *_ in first.values())
        assert {source for source, count in by_source.items() if count > 0} == sources
        server.kill()
        server.start()
        assert every_pull(calls, ids) == first
        assert calls.metric('context_server_pulls_total{source="memory"}') == 0
        assert {status for status, *_ in first.values()} == {200, 409}
        assert faults(server) == []


def lengthened(server: Server, ids: tuple[str, str], length: int) -> None:
    """Makes an ended message of one chunk one of very many, in the file of a server that is not running."""
    digest = hashlib.sha256("".join(f"{number} " for number in range(1, length + 1)).encode()).hexdigest()
    with closing(sqlite3.connect(server.database)) as connection, connection:
        connection.execute("DELETE FROM chunks WHERE message_id = ?", ids[1:])
        connection.executemany(
            "INSERT INTO chunks (message_id, sequence, kind, text) VALUES (?, ?, 'text', ?)",
            ((ids[1], number, f"{number} ") for number in range(1, length + 1)),
        )
        values = (length, length, digest, ids[1])
        connection.execute("UPDATE messages SET sequence = ?, final_sequence = ?, digest = ? WHERE id = ?", values)


async def reads_of_a_pull(server: Server, ids: tuple[str, str], after: int) -> list[tuple[str, Any]]:
    """The statements, with their parameters, that read chunks for a pull."""
    seen: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "FROM chunks" in statement:
            seen.append((statement, parameters))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        async with Store.open(f"sqlite:///{server.database}") as store:
            await store.page("local", *ids, from_sequence=after)
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    return seen


def cost_of(server: Server, statement: str, parameters: Any) -> tuple[int, list[str]]:
    """How many steps SQLite's machine takes for a statement, and its plan."""
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1
        return 0

    with closing(sqlite3.connect(server.database)) as connection:
        plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters)]
        connection.set_progress_handler(count, 1)
        assert len(connection.execute(statement, parameters).fetchall()) == 10
    return steps, plan


@pytest.mark.only("sqlite")
@pytest.mark.scenario("content-pull", "Pull of a long message")
def test_a_pull_reads_nothing_before_what_is_asked_for(tmp_path: Path) -> None:
    server = Server(tmp_path, agent=SCRIPTED, log_format="json")
    with server:
        calls = Calls(server)
        short, long = written(calls, ["text", "a"]), written(calls, ["text", "a"])
        server.stop()
        lengthened(server, short, 20)
        lengthened(server, long, 20_000)
        server.start()
        for ids, length in ((short, 20), (long, 20_000)):
            page = calls.pull(*ids, from_sequence=length - 10)
            assert page["content"] == "".join(f"{number} " for number in range(length - 9, length + 1))
            assert (page["sequence"], page["up_to_date"]) == (length, True)
        assert calls.metric('context_server_pulls_total{source="database"}') == 2
        assert digest_of(text_of(calls, *long)) == calls.pull(*long)["digest"]
        server.stop()
    ((of_short,), (of_long,)) = (
        asyncio.run(reads_of_a_pull(server, ids, length - 10)) for ids, length in ((short, 20), (long, 20_000))
    )
    steps, plan = cost_of(server, *of_long)
    steps_of_short, _ = cost_of(server, *of_short)
    assert abs(steps - steps_of_short) <= 3  # The last row of the table ends a range a step sooner than another.
    assert plan == ["SEARCH chunks USING PRIMARY KEY (message_id=? AND sequence>? AND sequence<?)"]
