"""Recent chunks: bounded memory, and pages that are those of the database."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from context_server.errors import SequenceAhead
from context_server.metrics import Metrics
from context_server.recent import RecentChunks, cost_of
from context_server.records import Chunk, ChunkKind, Delta, MessageStatus, Outcome, Page
from tests.unit.rooms import OWNER, Rooms, open_rooms

CHUNKS = 60


def chunk(sequence: int, size: int = 10) -> Chunk:
    return Chunk(sequence, ChunkKind.TEXT, "x" * size)


def page(
    recent: RecentChunks, message_id: str, start: int, stop: int | None = None, *, owner: str = OWNER
) -> Page | None:
    return recent.page(owner, "context", message_id, from_sequence=start, to_sequence=stop, max_bytes=10_000)


def sequences(found: Page | None) -> list[int] | None:
    return None if found is None else [each.sequence for each in found.chunks]


@pytest.fixture
def recent() -> RecentChunks:
    """Room for three chunks of ten bytes."""
    return RecentChunks(3 * cost_of(chunk(1)), Metrics())


# Pages


def test_memory_answers_what_it_holds_and_passes_on_the_rest(recent):
    recent.open(OWNER, "context", "m", 0)
    assert sequences(page(recent, "m", 0)) == []
    recent.add("m", tuple(chunk(number) for number in range(1, 6)))
    assert [sequences(page(recent, "m", start)) for start in range(6)] == [None, None, [3, 4, 5], [4, 5], [5], []]
    assert sequences(page(recent, "m", 2, 4)) == [3, 4]
    assert sequences(page(recent, "m", 4, 2)) == []
    assert page(recent, "m", 6) is None  # Only the database can say that there is no such sequence.


def test_memory_says_how_far_the_message_is(recent):
    recent.open(OWNER, "context", "m", 0)
    assert page(recent, "m", 0).status is MessageStatus.PENDING
    recent.add("m", (chunk(1),))
    streaming = page(recent, "m", 0)
    assert (streaming.status, streaming.head, streaming.final_sequence) == (MessageStatus.STREAMING, 1, None)
    recent.end("m", MessageStatus.COMPLETED, "digest")
    ended = page(recent, "m", 0)
    assert (ended.status, ended.final_sequence, ended.digest) == (MessageStatus.COMPLETED, 1, "digest")


def test_a_tail_may_begin_in_the_middle(recent):
    recent.open(OWNER, "context", "m", 7)
    recent.add("m", (chunk(8),))
    assert [sequences(page(recent, "m", start)) for start in (6, 7, 8)] == [None, [8], []]


def test_memory_answers_for_its_own_context_and_owner_only(recent):
    recent.open(OWNER, "context", "m", 0)
    assert page(recent, "m", 0, owner="mallory") is None
    assert recent.page(OWNER, "elsewhere", "m", from_sequence=0, to_sequence=None, max_bytes=1) is None
    assert page(recent, "unknown", 0) is None


# Bounds


def test_the_oldest_chunk_of_all_goes_first(recent):
    recent.open(OWNER, "context", "a", 0)
    recent.open(OWNER, "context", "b", 0)
    recent.add("a", (chunk(1),))
    recent.add("b", (chunk(1),))
    recent.add("a", (chunk(2), chunk(3)))
    assert (sequences(page(recent, "a", 0)), sequences(page(recent, "b", 0))) == (None, [1])
    recent.add("a", (chunk(4),))
    assert (sequences(page(recent, "a", 1)), sequences(page(recent, "b", 0))) == ([2, 3, 4], None)


def test_an_ended_message_goes_with_its_last_chunk(recent):
    recent.open(OWNER, "context", "a", 0)
    recent.add("a", (chunk(1),))
    recent.end("a", MessageStatus.COMPLETED, "digest")
    recent.open(OWNER, "context", "b", 0)
    recent.add("b", tuple(chunk(number) for number in range(1, 4)))
    assert page(recent, "a", 1) is None


def test_without_room_only_the_head_is_known():
    recent = RecentChunks(0, Metrics())
    recent.open(OWNER, "context", "m", 0)
    recent.add("m", (chunk(1), chunk(2)))
    assert [sequences(page(recent, "m", start)) for start in (0, 1, 2)] == [None, None, []]
    recent.end("m", MessageStatus.COMPLETED, "digest")
    assert page(recent, "m", 2) is None


def test_what_is_not_followed_is_not_kept(recent):
    recent.add("unknown", (chunk(1),))
    recent.end("unknown", MessageStatus.COMPLETED, "digest")
    recent.forget("unknown")
    assert page(recent, "unknown", 0) is None


def test_a_forgotten_message_leaves_its_room_to_others():
    metrics = Metrics()
    recent = RecentChunks(3 * cost_of(chunk(1)), metrics)
    for message_id in ("a", "b"):
        recent.open(OWNER, "context" if message_id == "a" else "other", message_id, 0)
        recent.add(message_id, (chunk(1),))
    recent.forget_context("context")
    assert metrics.registry.get_sample_value("context_server_recent_bytes") == cost_of(chunk(1))
    recent.open(OWNER, "context", "c", 0)
    recent.add("c", (chunk(1), chunk(2)))
    assert sequences(page(recent, "c", 0)) == [1, 2]
    assert page(recent, "a", 1) is None


def test_the_places_of_a_forgotten_message_are_passed_over(recent):
    for message_id in "abc":
        recent.open(OWNER, "context", message_id, 0)
        recent.add(message_id, (chunk(1),))
    recent.forget("a")
    recent.add("b", (chunk(2), chunk(3)))
    assert (sequences(page(recent, "b", 1)), sequences(page(recent, "c", 0))) == ([2, 3], [1])
    recent.add("b", (chunk(4),))
    assert (sequences(page(recent, "b", 1)), sequences(page(recent, "c", 0))) == ([2, 3, 4], None)


def test_a_message_that_is_opened_again_begins_anew(recent):
    recent.open(OWNER, "context", "m", 0)
    recent.add("m", (chunk(1), chunk(2)))
    recent.open(OWNER, "context", "m", 2)
    recent.add("m", tuple(chunk(number) for number in range(3, 9)))
    assert [sequences(page(recent, "m", start)) for start in (4, 5)] == [None, [6, 7, 8]]


@pytest.mark.scenario("content-log", "Recent chunks are bounded")
@given(
    limit=st.integers(0, 4000),
    adds=st.lists(
        st.tuples(st.sampled_from("abc"), st.none() | st.lists(st.integers(0, 700), max_size=90)), max_size=12
    ),
)
def test_memory_is_bounded_and_holds_an_unbroken_tail(limit, adds):
    """``adds`` are sizes of chunks for a message, or None: it is forgotten, and opened again where it was."""
    metrics = Metrics()
    recent = RecentChunks(limit, metrics)
    written: dict[str, list[Chunk]] = {"a": [], "b": [], "c": []}
    for message_id in written:
        recent.open(OWNER, "context", message_id, 0)
    for message_id, added in adds:
        head = len(written[message_id])
        sizes = added or []
        if added is None:
            recent.forget(message_id)
            assert page(recent, message_id, head) is None
            recent.open(OWNER, "context", message_id, head)
        new = tuple(chunk(head + number, size) for number, size in enumerate(sizes, start=1))
        written[message_id] += new
        recent.add(message_id, new)

        held = 0
        for other, chunks in written.items():
            answers = [page(recent, other, start) for start in range(len(chunks) + 1)]
            known = [start for start, answer in enumerate(answers) if answer is not None]
            assert known == [*range(known[0], len(chunks) + 1)]
            held += sum(map(cost_of, chunks[known[0] :]))
            for start in (known[0], len(chunks)):
                whole = recent.page(OWNER, "context", other, from_sequence=start, to_sequence=None, max_bytes=1_000_000)
                assert list(whole.chunks) == chunks[start:]
        assert held <= limit
        assert held == (metrics.registry.get_sample_value("context_server_recent_bytes") or 0)


# Memory and database


class Written:
    """A reply in a store and in memory, with all kinds of chunks; its loop is held here, since examples are not."""

    def __init__(self, folder, *, ended: bool) -> None:
        self.loop = asyncio.Runner()
        self._opened = open_rooms(folder)
        self.rooms: Rooms = self.loop.run(self._opened.__aenter__())
        self.loop.run(self._write(ended=ended))

    async def _write(self, *, ended: bool) -> None:
        reply = await self.rooms.begin()
        self.run = reply.run
        for number in range(CHUNKS // 2):
            await self.rooms.ledger.append(reply, Delta(ChunkKind.TEXT, "ä" * (number * 7 % 40 + 1)))
            await self.rooms.ledger.append(reply, Delta(ChunkKind.STEP, data={"number": number}))
        if ended:
            await self.rooms.ledger.end(reply, Outcome.SUCCEEDED)
        else:
            await self._all_is_durable()

    async def _all_is_durable(self) -> None:
        with self.rooms.hub.watch(self.run.message_id) as watch:
            while self.rooms.metric("chunks_committed_total") < CHUNKS:
                watch.clear()
                if self.rooms.metric("chunks_committed_total") < CHUNKS:
                    await watch.wait(5)

    def close(self) -> None:
        self.loop.run(self._opened.__aexit__(None, None, None))
        self.loop.close()


@pytest.fixture(scope="module")
def replies(tmp_path_factory) -> Iterator[dict[bool, Written]]:
    """An ended reply and an open one."""
    with ExitStack() as stack:
        made = {}
        for ended in (True, False):
            made[ended] = Written(tmp_path_factory.mktemp("reply"), ended=ended)
            stack.callback(made[ended].close)
        yield made


@pytest.mark.scenario("content-pull", "Memory and database agree")
@given(
    ended=st.booleans(),
    start=st.integers(0, CHUNKS + 1),
    stop=st.none() | st.integers(0, CHUNKS + 5),
    max_bytes=st.integers(1, 2000),
)
def test_a_page_is_the_same_from_memory_and_from_the_database(replies, ended, start, stop, max_bytes):
    written = replies[ended]
    run, bounds = written.run, {"from_sequence": start, "to_sequence": stop, "max_bytes": max_bytes}
    store, recent = written.rooms.store, written.rooms.recent
    if start > CHUNKS:
        assert recent.page(OWNER, run.context_id, run.message_id, **bounds) is None  # So the database is asked.
        with pytest.raises(SequenceAhead, match=f"reaches {CHUNKS};"):
            written.loop.run(store.page(OWNER, run.context_id, run.message_id, **bounds))
        return
    from_database = written.loop.run(store.page(OWNER, run.context_id, run.message_id, **bounds))
    assert recent.page(OWNER, run.context_id, run.message_id, **bounds) == from_database
