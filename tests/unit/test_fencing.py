"""Stale attempts and ended replies: what is written by whoever does not own the reply any more is refused."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from context_server.errors import Fenced
from context_server.hub import Hub
from context_server.ledger import Ledger, LedgerLimits
from context_server.mailbox import Pacing
from context_server.metrics import Metrics
from context_server.recent import RecentChunks
from context_server.records import ChunkKind, Delta, Mode, Outcome, Run
from context_server.store import Store
from context_server.store.exchanges import Post

OWNER = "owner"


@dataclass
class Writers:
    """A store and a ledger on it, and a way into the database beside them."""

    store: Store
    ledger: Ledger
    database: Path
    fenced: asyncio.Event = field(default_factory=asyncio.Event)

    async def claimed_run(self) -> Run:
        context = await self.store.create_context(OWNER, title=None, mode=Mode.ACT, metadata={}, once=None)
        await self.store.post_message(OWNER, context.id, Post(text="hello"), if_match=None, once=None)
        ((run, _),) = await self.store.claim_runs(1)
        return run

    def rows(self) -> dict[str, list[Any]]:
        """Everything that a writer of a reply may change."""
        with closing(sqlite3.connect(self.database)) as database:
            return {
                table: database.execute(f"SELECT * FROM {table}").fetchall()
                for table in ("contexts", "messages", "chunks", "runs")
            }

    def take_over(self, run: Run) -> None:
        """What another process does that believes this one to be dead."""
        with closing(sqlite3.connect(self.database)) as database, database:
            database.execute("UPDATE runs SET attempt = attempt + 1 WHERE id = ?", (run.id,))
            database.execute("UPDATE messages SET attempt = attempt + 1 WHERE id = ?", (run.message_id,))


@pytest.fixture
async def writers(tmp_path: Path) -> AsyncIterator[Writers]:
    database = tmp_path / "context-server.db"
    metrics = Metrics()
    limits = LedgerLimits(
        commit_interval=0.0,
        max_commit_interval=0.0,
        max_pending_bytes=1024,
        max_reply_bytes=1_000_000,
    )
    async with Store.open(f"sqlite:///{database}") as store:
        hub = Hub(Pacing(), metrics, asyncio.get_running_loop().time)
        async with Ledger(store, hub, RecentChunks(1_000_000, metrics), metrics, limits) as ledger:
            yield Writers(store, ledger, database)


def text(words: str) -> Delta:
    return Delta(ChunkKind.TEXT, words)


@pytest.mark.scenario("runs", "Stale attempt is fenced")
async def test_a_stale_attempt_writes_nothing(writers: Writers) -> None:
    run = await writers.claimed_run()
    reply = writers.ledger.begin(run, on_fenced=writers.fenced.set)
    await writers.ledger.append(reply, text("x" * 1024))  # Returns when it is durable: as much as may wait.
    writers.take_over(run)
    before = writers.rows()
    await writers.ledger.append(reply, text("late"))
    await asyncio.wait_for(writers.fenced.wait(), 60)
    with pytest.raises(Fenced):
        await writers.ledger.append(reply, text("later"))
    with pytest.raises(Fenced):
        await writers.ledger.end(reply, Outcome.SUCCEEDED)
    assert writers.rows() == before


@pytest.mark.scenario("runs", "Stale attempt is fenced")
async def test_a_stale_attempt_ends_nothing(writers: Writers) -> None:
    run = await writers.claimed_run()
    reply = writers.ledger.begin(run, on_fenced=writers.fenced.set)
    writers.take_over(run)
    before = writers.rows()
    with pytest.raises(Fenced):
        await writers.ledger.end(reply, Outcome.SUCCEEDED)
    assert writers.fenced.is_set()
    assert writers.rows() == before


@pytest.mark.scenario("runs", "Stale attempt is fenced")
@pytest.mark.parametrize("outcome", [None, Outcome.SUCCEEDED, Outcome.FAILED])
async def test_nothing_is_written_to_a_reply_that_has_ended(writers: Writers, outcome: Outcome | None) -> None:
    run = await writers.claimed_run()
    reply = writers.ledger.begin(run, on_fenced=writers.fenced.set)
    await writers.ledger.append(reply, text("whole"))
    await writers.ledger.end(reply, Outcome.SUCCEEDED)
    before = writers.rows()
    with pytest.raises(Fenced):
        await writers.ledger.append(reply, text("late"))
    # Another writer of the same attempt, which does not know of the end.
    other = writers.ledger.begin(replace(run, sequence=1), on_fenced=writers.fenced.set)
    if outcome is None:
        await writers.ledger.append(other, text("late"))
        await asyncio.wait_for(writers.fenced.wait(), 60)
    else:
        with pytest.raises(Fenced):
            await writers.ledger.end(other, outcome)
    assert writers.rows() == before


async def test_a_fenced_run_takes_no_other_with_it(writers: Writers) -> None:
    stale, sound = await writers.claimed_run(), await writers.claimed_run()
    replies = [writers.ledger.begin(run, on_fenced=writers.fenced.set) for run in (stale, sound)]
    writers.take_over(stale)
    for reply in replies:
        await writers.ledger.append(reply, text("word"))  # Both are in one batch.
    with pytest.raises(Fenced):
        await writers.ledger.end(replies[0], Outcome.SUCCEEDED)
    await writers.ledger.end(replies[1], Outcome.SUCCEEDED)
    page = await writers.store.page(OWNER, sound.context_id, sound.message_id)
    assert [chunk.text for chunk in page.chunks] == ["word"]
    assert page.final_sequence == 1
    assert [row[0] for row in writers.rows()["chunks"]].count(stale.message_id) == 0
