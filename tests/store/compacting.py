"""How the tests of compaction look at a log, and how they have it compacted: in steps, which may fail in the middle."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from sqlalchemy import Connection, Engine, event

from context_server.api.content import etag_of
from context_server.api.schemas import content_body
from context_server.records import MAX_INTEGER, Chunk, Outcome, Run
from context_server.store import Store, reading
from tests.store.writing import OWNER, claim, post

PAGE_BYTES = (1, 7, 40, 1_048_576)
"""Sizes of pages with which a log is read: nearly every boundary of pages is met with one of them."""


async def written(store: Store, chunks: Sequence[Chunk | str]) -> Run:
    """An ended reply of exactly these chunks."""
    await post(store)
    writer = await claim(store)
    await writer.write(*chunks, outcome=Outcome.SUCCEEDED)
    return writer.run


def pulls_of(length: int, seed: int, most: int) -> list[tuple[int, int | None, int]]:
    """``(from_sequence, to_sequence, max_bytes)``: every range of a short message, or at most so many of a long one.

    With pages too small for a range, some of them.
    """
    ranges = [(first, last) for first in range(length + 1) for last in (None, *range(first, length + 1), MAX_INTEGER)]
    chosen = random.Random(seed)
    whole = ranges if len(ranges) <= most else chosen.sample(ranges, most)
    return [(*limits, PAGE_BYTES[-1]) for limits in whole] + [
        (*limits, size) for size in PAGE_BYTES[:-1] for limits in chosen.sample(ranges, most // 8)
    ]


class Picture:
    """All that clients and agents can read of one message."""

    def __init__(self, store: Store, run: Run, length: int, seed: int = 0, most: int = 40) -> None:
        self._store = store
        self._run = run
        self._pulls = pulls_of(length, seed, most)

    async def take(self) -> dict[Any, Any]:
        """Every answer, by what was asked for."""
        return await self._store._read(self._look)

    def _look(self, connection: Connection) -> dict[Any, Any]:
        run, epoch = self._run, self._store.epoch
        of_message = {"owner": OWNER, "context_id": run.context_id}
        seen: dict[Any, Any] = {}
        for first, last, size in self._pulls:
            limits = {"from_sequence": first, "to_sequence": last, "max_bytes": size}
            page = reading.page(connection, **of_message, message_id=run.message_id, **limits)
            for view in ("content", "chunks"):
                seen["pull", first, last, size, view] = (etag_of(page, view, epoch), content_body(page, view, epoch))
        for size in PAGE_BYTES:
            limits = {"limit": 10, "max_bytes": size, "tree": False}
            listed = partial(reading.messages, connection, **of_message, **limits, include_content=True)
            seen["list", size] = [listed(after=after) for after in range(3)]
        seen["message"] = reading.message(connection, **of_message, message_id=run.message_id)
        # As for an agent that is to answer after this message.
        following = Run(id="next", context_id=run.context_id, message_id="next", owner=OWNER, attempt=1)
        seen["history"] = _history(connection, following)
        return seen


def _history(connection: Connection, run: Run) -> list[list[Chunk]]:
    """The chunks of every message of the context, as ``reading.history`` hands them to an agent."""
    rows = connection.exec_driver_sql(
        f"SELECT * FROM messages WHERE context_id = '{run.context_id}' ORDER BY position"
    ).all()
    return [list(reading.chunks_after(connection, row, 0, row.sequence)) for row in rows]


class Interrupted(Exception):
    """The process would have died here."""


@contextmanager
def interrupted_at(statement: int | None) -> Iterator[None]:
    """Has the transaction fail before its n-th statement that writes; None: not at all."""
    count = 0

    def before(_connection: Any, _cursor: Any, sql: str, *_: Any) -> None:
        nonlocal count
        if sql.lstrip().startswith(("INSERT", "UPDATE", "DELETE")):
            count += 1
            if count == statement:
                raise Interrupted

    if statement is None:
        yield
        return
    event.listen(Engine, "before_cursor_execute", before)
    try:
        yield
    finally:
        event.remove(Engine, "before_cursor_execute", before)


async def compact_all(store: Store) -> int:
    """Compacts whatever has ended, to the end; how many chunks that were."""
    total, after = 0, None
    while True:
        done = await store.house.compact(-1000, after)  # What ends now has ended before then, whatever the clocks say.
        assert not done.refused
        total += done.chunks
        after = done.resume_after
        if after is None:
            return total
