"""Down to the schema before segments and up again: every chunk is in a row of its own, and nothing has changed."""

import pytest

from context_server.store import Store, compaction, retention
from context_server.store.maintenance import change_schema
from tests.databases import run_beside
from tests.store.compacting import Picture, compact_all, written
from tests.store.writing import call, reasoning, result

LENGTH = 40
MIXED = ["ä", call(1), result(1), reasoning("why\n"), "\U0001f600", " x", "", *["word "] * (LENGTH - 7)]


@pytest.mark.new_database
@pytest.mark.scenario("retention", "Compaction undone")
async def test_a_downgrade_expands_the_segments(database_url, monkeypatch):
    monkeypatch.setattr(compaction, "_CHUNKS", 10)
    monkeypatch.setattr("context_server.store.segments.MAX_SEGMENT_CHUNKS", 10)
    monkeypatch.setattr(retention, "_ROWS", 5)
    async with Store.open(database_url, connections=4) as store:
        gone = await written(store, MIXED)
        await compact_all(store)
        await store.house.expire_contexts(-1000)
        await store.house.clear_contexts()
        whole, partly, short = [await written(store, chunks) for chunks in (MIXED, MIXED, MIXED[:5])]
        runs = [(whole, LENGTH), (partly, LENGTH), (short, 5)]
        before = [await Picture(store, *run).take() for run in runs]
        compacted, after = 0, None
        while compacted < LENGTH + 20:
            done = await store.house.compact(-1000, after)
            compacted, after = compacted + done.chunks, done.resume_after

    await change_schema(database_url, "0002", down=True)

    assert run_beside(database_url, "SELECT count(*) FROM chunks") == [(2 * LENGTH + 5 + 3,)]
    assert run_beside(database_url, f"SELECT count(*) FROM contexts WHERE id = '{gone.context_id}'") == [(0,)]
    await change_schema(database_url, "head", down=False)
    run_beside(database_url, "UPDATE messages SET mode = 'act'")  # The old schema has no place for it.
    async with Store.open(database_url, connections=4) as store:
        assert [await Picture(store, *run).take() for run in runs] == before
        assert await compact_all(store) == 2 * LENGTH
        assert [await Picture(store, *run).take() for run in runs] == before
