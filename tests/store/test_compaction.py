"""Compaction: a log in segments answers as it did in chunks, whatever is asked, and however often it is interrupted."""

import asyncio
import json
import zlib
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from context_server.records import Chunk, ChunkKind
from context_server.store import Store, compaction, segments
from context_server.store.segments import SegmentDamaged, decode_segment, encode_segment
from tests.store.compacting import Interrupted, Picture, compact_all, interrupted_at, written
from tests.store.writing import OWNER, call, exchange, reasoning, result, start

TEXTUAL = (ChunkKind.TEXT, ChunkKind.REASONING)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=12)
scalars = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
data = st.dictionaries(texts, st.recursive(scalars | texts, lambda inner: st.lists(inner, max_size=3), max_leaves=4))
chunk = st.one_of(
    st.builds(Chunk, st.just(0), st.sampled_from(TEXTUAL), texts),
    st.builds(Chunk, st.just(0), st.sampled_from([kind for kind in ChunkKind if kind not in TEXTUAL]), st.none(), data),
)
# A pull costs some round trips on a server: there, fewer of them.
EXAMPLES, PULLS = {"sqlite": 15, "postgresql": 5}, {"sqlite": 200, "postgresql": 24}
bounded = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@st.composite
def plans(draw):
    """What is compacted, in how large segments and steps, and where the steps are interrupted."""
    return {
        "chunks": draw(st.lists(chunk, min_size=8, max_size=24)),
        "segment_chunks": draw(st.integers(1, 9)),
        "segment_bytes": draw(st.sampled_from([1, 16, 100, 65_536])),
        "step_chunks": draw(st.integers(1, 12)),
        "interruptions": draw(st.lists(st.none() | st.integers(1, 3), max_size=12)),
    }


class Log:
    """A store on a loop of its own, since what Hypothesis calls is no coroutine."""

    def __init__(self, database_url):
        self.runner = asyncio.Runner()
        self.opened = AsyncExitStack()
        self.store = self.run(self.opened.enter_async_context(Store.open(database_url, connections=4)))

    def run(self, work):
        return self.runner.run(work)

    def close(self):
        with self.runner:
            self.run(self.opened.aclose())


@pytest.fixture
def log(database_url):
    opened = Log(database_url)
    yield opened
    opened.close()


@pytest.fixture
def bounds(monkeypatch):
    def set_bounds(plan):
        monkeypatch.setattr(segments, "MAX_SEGMENT_CHUNKS", plan["segment_chunks"])
        monkeypatch.setattr(segments, "MAX_SEGMENT_BYTES", plan["segment_bytes"])
        monkeypatch.setattr(compaction, "_CHUNKS", plan["step_chunks"])
        monkeypatch.setattr(compaction, "_ROWS", 3)

    return set_bounds


def kind_of(store: Store) -> str:
    return "postgresql" if store.shared else "sqlite"


async def compare_all_the_way(store: Store, plan) -> None:
    """Looks at a message before, after each step of its compaction, whether or not that fails, and at its end."""
    run = await written(store, plan["chunks"])
    length = len(plan["chunks"])
    picture = Picture(store, run, length, seed=length, most=PULLS[kind_of(store)])
    before = await picture.take()
    after, interruptions = None, iter(plan["interruptions"])
    while True:
        try:
            with interrupted_at(next(interruptions, None)):
                done = await store.house.compact(-1000, after)
        except Interrupted:
            assert await picture.take() == before
            continue
        assert not done.refused
        assert await picture.take() == before
        after = done.resume_after
        if after is None:
            break
    reached = await store._read(
        lambda connection: connection.exec_driver_sql(
            f"SELECT compacted_sequence FROM messages WHERE id = '{run.message_id}'"
        ).scalar_one()
    )
    assert reached == length


@pytest.mark.scenario("retention", "Compaction unseen")
@pytest.mark.scenario("retention", "Compaction interrupted")
def test_every_pull_answers_the_same_before_during_and_after(log, bounds):
    @settings(bounded, max_examples=EXAMPLES[kind_of(log.store)])
    @given(plan=plans())
    def compare(plan):
        bounds(plan)
        log.run(compare_all_the_way(log.store, plan))

    compare()


@pytest.mark.only("sqlite")
@pytest.mark.parametrize("loss", ["boundaries", "kinds", "the order of data", "one step is not recorded"])
def test_a_compaction_that_loses_something_is_caught(log, bounds, monkeypatch, loss):
    """The control of the test before: what it compares is what would be lost."""
    bounds({"segment_chunks": 4, "segment_bytes": 1000, "step_chunks": 5})
    plan = {"chunks": ["a", "b", reasoning("c"), call(1), result(1), *"defgh"], "interruptions": []}

    def segment_of(message_id, chunks):
        first, last = chunks[0].sequence, chunks[-1].sequence
        match loss:
            case "boundaries":
                text = "".join(chunk.text or "" for chunk in chunks)
                changed = [Chunk(each.sequence, ChunkKind.TEXT, text if each is chunks[-1] else "") for each in chunks]
            case "kinds":
                changed = [Chunk(each.sequence, ChunkKind.TEXT, each.text or json.dumps(each.data)) for each in chunks]
            case "the order of data":
                changed = [
                    Chunk(each.sequence, each.kind, each.text, each.data and dict(sorted(each.data.items())))
                    for each in chunks
                ]
            case _:
                changed = chunks
                last -= 1
        return {
            "message_id": message_id, "first_sequence": first, "last_sequence": last, "format": 1,
            "body": encode_segment(changed[: last - first + 1]),
        }  # fmt: skip

    monkeypatch.setattr(compaction, "_segment_of", segment_of)
    with pytest.raises(AssertionError):
        log.run(compare_all_the_way(log.store, plan))


# What is compacted


async def lying(rows, run) -> dict[str, int]:
    """How a message lies in the database."""
    where = f"WHERE message_id = '{run.message_id}'"
    ((chunks,),) = rows(f"SELECT count(*) FROM chunks {where}")
    ((made,),) = rows(f"SELECT count(*) FROM segments {where}")
    return {"chunks": chunks, "segments": made}


@pytest.mark.scenario("retention", "Compaction of old replies")
async def test_five_hundred_chunks_become_one_row(store, rows):
    run = await written(store, [f"word {number} " for number in range(1250)])
    assert await lying(rows, run) == {"chunks": 1250, "segments": 0}

    assert await compact_all(store) == 1250

    assert await lying(rows, run) == {"chunks": 0, "segments": 3}
    assert await compact_all(store) == 0


async def test_one_step_is_bounded_and_the_next_goes_on(store, rows):
    run = await written(store, [f"word {number} " for number in range(1250)])
    steps, after = [], None
    while not steps or after is not None:
        done = await store.house.compact(-1000, after)
        steps.append(done.chunks)
        after = done.resume_after
    assert steps == [500, 500, 250]
    assert (await lying(rows, run))["segments"] == 3


@pytest.mark.scenario("retention", "Compaction of old replies")
async def test_what_is_open_young_or_short_is_left_alone(store, rows):
    short = await written(store, list("seven"))
    writer = await start(store)
    await writer.write(*"a long reply that goes on")
    assert await compact_all(store) == 0
    young = await written(store, list("a long one"))
    done = await store.house.compact(3_600_000, None)
    assert (done.chunks, done.resume_after) == (0, None)
    for run, length in ((short, 5), (writer.run, 25), (young, 10)):
        assert await lying(rows, run) == {"chunks": length, "segments": 0}

    await writer.write("!")

    assert (await writer.message()).content == "a long reply that goes on!"


async def test_many_messages_are_done_oldest_first_and_each_once(store, rows, monkeypatch):
    monkeypatch.setattr(compaction, "_MESSAGES", 4)
    runs = [await written(store, [f"{number} "] * 20) for number in range(6)]
    first = await store.house.compact(-1000, None)
    assert first.chunks == 4 * 20
    lies = [await lying(rows, run) for run in runs]
    assert lies == [{"chunks": 0, "segments": 1}] * 4 + [{"chunks": 20, "segments": 0}] * 2
    second = await store.house.compact(-1000, first.resume_after)
    assert (second.chunks, second.resume_after) == (2 * 20, None)


async def test_a_large_chunk_is_a_segment_by_itself(store, rows):
    large = "ä" * 65_536
    run = await written(store, ["a", large, "b", large, *"cdefgh"])
    await compact_all(store)
    made = rows(f"SELECT first_sequence, last_sequence FROM segments WHERE message_id = '{run.message_id}' ORDER BY 1")
    assert made == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 10)]
    assert (await store.message(OWNER, run.context_id, run.message_id)).content == f"a{large}b{large}cdefgh"


async def test_a_message_with_a_defect_is_left_alone_and_named(store, rows):
    broken = await written(store, list("broken one"))
    sound = await written(store, list("a sound one"))
    rows(f"DELETE FROM chunks WHERE message_id = '{broken.message_id}' AND sequence = 4")

    done = await store.house.compact(-1000, None)

    assert done.refused == (broken.message_id,)
    assert await lying(rows, broken) == {"chunks": 9, "segments": 0}
    assert await lying(rows, sound) == {"chunks": 0, "segments": 1}


async def test_what_would_not_read_back_the_same_is_not_written(store, rows, monkeypatch):
    run = await written(store, list("ten chunks"))
    monkeypatch.setattr(segments, "encode_segment", lambda chunks: encode_segment([*chunks[1:], chunks[0]]))
    done = await store.house.compact(-1000, None)
    assert done.refused == (run.message_id,)
    assert await lying(rows, run) == {"chunks": 10, "segments": 0}


@pytest.mark.scenario("retention", "One node for each message")
@pytest.mark.only("postgresql")
async def test_a_message_that_another_node_compacts_is_left_out(store, rows, database_url):
    run = await written(store, list("ten chunks"))
    other_run = await written(store, list("ten others"))
    async with Store.open(database_url, connections=4) as other:
        inside, go_on = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            async with other._database._writers.connect() as connection:
                await connection.exec_driver_sql(f"SELECT 1 FROM messages WHERE id = '{run.message_id}' FOR UPDATE")
                inside.set()
                await go_on.wait()
                await connection.rollback()

        async with asyncio.TaskGroup() as group:
            group.create_task(hold())
            await inside.wait()
            done = await store.house.compact(-1000, None)
            go_on.set()
    assert done.chunks == 10
    assert await lying(rows, run) == {"chunks": 10, "segments": 0}
    assert await lying(rows, other_run) == {"chunks": 0, "segments": 1}


async def test_two_compactions_at_once_do_everything_once(store, rows, monkeypatch):
    monkeypatch.setattr(compaction, "_MESSAGES", 2)
    runs = [await written(store, [f"{number} "] * 50) for number in range(12)]
    pictures = [Picture(store, run, 50, seed) for seed, run in enumerate(runs[::4])]
    before = [await picture.take() for picture in pictures]
    totals = await asyncio.gather(compact_all(store), compact_all(store))
    assert await compact_all(store) + sum(totals) == 12 * 50
    assert [await picture.take() for picture in pictures] == before
    assert [await lying(rows, run) for run in runs] == [{"chunks": 0, "segments": 1}] * 12


async def test_a_history_in_segments_is_that_in_chunks(store):
    done = await exchange(store, "Hello", *"a reply of many chunks", reasoning("why"), call(), result())
    writer = await start(store, "And?", context_id=done.run.context_id)
    before = await store.history(writer.run, max_bytes=100_000)
    assert await compact_all(store) == 25
    assert await store.history(writer.run, max_bytes=100_000) == before
    assert len(before[1].chunks) == 25


# The format


def numbered(*pieces: str | Chunk) -> list[Chunk]:
    chunks = [piece if isinstance(piece, Chunk) else Chunk(0, ChunkKind.TEXT, piece) for piece in pieces]
    return [replace(chunk, sequence=sequence) for sequence, chunk in enumerate(chunks, start=5)]


def test_a_body_is_what_the_format_says():
    chunks = numbered("Hi", Chunk(0, ChunkKind.TOOL_CALL, None, {}))
    assert zlib.decompress(encode_segment(chunks)) == b"tC" + bytes.fromhex("00000002 00000002") + b"Hi{}"


def test_a_range_of_a_segment_is_opened_alone():
    chunks = numbered(*"abcdefghij")
    body = encode_segment(chunks)
    for after in range(20):
        for until in range(after, 20):
            expected = [chunk for chunk in chunks if after < chunk.sequence <= until]
            assert list(decode_segment(body, 5, 14, after, until)) == expected


@pytest.mark.parametrize("damage", [b"", b"not a stream", None, 15, 13])
def test_a_damaged_body_is_said_to_be_so(damage):
    body = encode_segment(numbered(*"abcdefghij"))
    last = damage if isinstance(damage, int) else 14
    wrong = damage if isinstance(damage, bytes) else body if damage else body[:-1] + bytes([body[-1] ^ 1])
    with pytest.raises(SegmentDamaged):
        list(decode_segment(wrong, 5, last, 0, 20))
