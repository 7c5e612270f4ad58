"""How the keeper finds what to do: by index, in order, and without looking at what is done already."""

import re
from contextlib import contextmanager

import pytest
from sqlalchemy import Engine, event

from context_server.store import Store
from tests.store.compacting import compact_all, written
from tests.store.writing import OWNER, start

PLANS = {
    "find messages to compact": {
        "statement": r"SELECT messages\.id, messages\.completed_at",
        "sqlite": r"SEARCH messages USING INDEX ix_messages_to_compact",
        "postgresql": r"Index Scan using ix_messages_to_compact on messages",
    },
    "delete compacted chunks": {
        "statement": r"DELETE FROM chunks WHERE chunks\.message_id = \S+ AND chunks\.sequence >",
        "sqlite": r"SEARCH chunks USING PRIMARY KEY \(message_id=\? AND sequence>\? AND sequence<\?\)",
        "postgresql": r"Index Scan using pk_chunks on chunks",
    },
    "pull from segments": {
        "statement": r"SELECT segments\.first_sequence",
        "sqlite": r"SEARCH segments USING INDEX sqlite_autoindex_segments_1 \(message_id=\? AND last_sequence>\?\)",
        "postgresql": r"Index Scan using pk_segments on segments",
    },
    "find inactive contexts": {
        "statement": r"SELECT contexts\.id, contexts\.owner, contexts\.version",
        "sqlite": r"SEARCH contexts USING INDEX ix_contexts_inactive \(updated_at<\?\)",
        "postgresql": r"Index Scan using ix_contexts_inactive on contexts",
    },
    "find contexts of nobody": {
        "statement": r"SELECT contexts\.id\s+FROM contexts\s+WHERE contexts\.owner =",
        "sqlite": r"SEARCH contexts USING (COVERING )?INDEX ix_contexts_owner_updated_at_id \(owner=\?\)",
        "postgresql": r"Index (Only )?Scan using ix_contexts_owner_updated_at_id on contexts",
    },
    "delete first chunks": {
        "statement": r"DELETE FROM chunks WHERE chunks\.message_id = \S+ AND chunks\.sequence IN",
        "sqlite": r"SEARCH chunks USING PRIMARY KEY \(message_id=\?\)",
        "postgresql": r"Index (Only )?Scan using pk_chunks on chunks",
    },
}  # fmt: skip


@contextmanager
def recorded():
    """Every statement that is executed meanwhile, with its parameters."""
    executed: dict[str, object] = {}

    def record(_connection, _cursor, statement, parameters, _context, many):
        executed[statement] = parameters[0] if many else parameters

    event.listen(Engine, "before_cursor_execute", record)
    try:
        yield executed
    finally:
        event.remove(Engine, "before_cursor_execute", record)


async def explained(store: Store, statement: str, parameters: object) -> str:
    """The plan of a statement; on PostgreSQL as with tables that are too large to be read or sorted."""

    def explain(connection) -> str:
        if not store.shared:
            rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
            return "\n".join(row[3] for row in rows)
        for way in ("seqscan", "bitmapscan", "sort"):
            connection.exec_driver_sql(f"SET LOCAL enable_{way} = off")
        return "\n".join(row[0] for row in connection.exec_driver_sql(f"EXPLAIN {statement}", parameters))

    return await store._write(explain)


@pytest.mark.scenario("retention", "Compaction of old replies")
async def test_everything_is_found_by_its_index(store):
    run = await written(store, list("a reply of some chunks"))
    await start(store)
    with recorded() as executed:
        await compact_all(store)
        await store.page(OWNER, run.context_id, run.message_id, from_sequence=1)
        await store.house.expire_contexts(-1000)
        while await store.house.clear_contexts():
            pass
    kind = "postgresql" if store.shared else "sqlite"
    for what, expected in PLANS.items():
        ((statement, parameters),) = [each for each in executed.items() if re.search(expected["statement"], each[0])]
        plan = await explained(store, statement, parameters)
        assert re.search(expected[kind], plan), (what, plan)
        assert "TEMP B-TREE" not in plan, (what, plan)
        assert not re.search(r"^\s*(-> +)?Sort|SCAN (?!CONSTANT)", plan, re.MULTILINE), (what, plan)


async def test_messages_that_are_done_or_open_are_not_in_the_index(store, rows):
    for length in (3, 20, 30):
        await written(store, ["word "] * length)
    writer = await start(store)
    await writer.write(*["word "] * 20)
    found = "SELECT count(*) FROM messages WHERE final_sequence >= 8 AND compacted_sequence < final_sequence"
    assert rows(found) == [(2,)]
    await compact_all(store)
    assert rows(found) == [(0,)]
