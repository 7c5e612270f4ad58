"""Keeping house in the background: what it does, what it leaves, and what happens to it when the database is ill."""

import asyncio
import sqlite3
from collections.abc import Callable
from contextlib import asynccontextmanager, closing
from typing import Any

import pytest

from context_server.errors import ContextNotFound
from context_server.keeper import Keeper, KeeperLimits, rest_after
from context_server.metrics import Metrics
from context_server.records import Outcome
from context_server.store import Store
from context_server.store.idempotency import Once
from context_server.store.retention import ExpiredContext
from tests.store.compacting import Picture, written
from tests.store.writing import OWNER, claim, post
from tests.unit.rooms import until

HOUR_MS = 3_600_000


class House:
    """A store with its keeper, and a way to look beside them."""

    def __init__(self, store: Store, keeper: Keeper, path: str) -> None:
        self.store = store
        self.keeper = keeper
        self.metrics = keeper._metrics
        self.path = path
        self.expired: list[ExpiredContext] = []

    def rows(self, statement: str) -> list[Any]:
        with closing(sqlite3.connect(self.path)) as beside:
            return beside.execute(statement).fetchall()

    def metric(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(f"context_server_{name}", labels) or 0.0

    async def sees(self, statement: str, expected: Any) -> None:
        async def seen() -> bool:
            return self.rows(statement) == [(expected,)]

        await until(seen)


@pytest.fixture
def kept(tmp_path) -> Callable[..., Any]:
    """A store that is kept as given: ``kept(compact_after_ms=1)``."""

    @asynccontextmanager
    async def keep(**limits: Any):
        path = str(tmp_path / "context-server.db")
        given = {"idempotency_lifetime_ms": HOUR_MS, "compact_after_ms": None, "retain_ms": None, "share": 1.0} | limits
        async with Store.open(f"sqlite:///{path}") as store:
            keeper = Keeper(store, Metrics(), KeeperLimits(**given), lambda gone: house.expired.append(gone))
            house = House(store, keeper, path)
            yield house

    return keep


async def keep_a_key(store: Store) -> None:
    once = Once(key="key", fingerprint="what", encode=repr, lifetime_ms=HOUR_MS)
    await store.create_context(OWNER, once=once)


KEYS = "SELECT count(*) FROM idempotency_keys"
CHUNKS = "SELECT count(*) FROM chunks"
CONTEXTS = "SELECT count(*) FROM contexts"


async def test_old_keys_are_forgotten(kept):
    async with kept(idempotency_lifetime_ms=1) as house:
        await keep_a_key(house.store)
        async with house.keeper:
            await house.sees(KEYS, 0)


@pytest.mark.scenario("retention", "Compaction of old replies")
async def test_replies_are_compacted_while_they_are_read(kept):
    async with kept(compact_after_ms=1) as house:
        runs = [await written(house.store, [f"{number} "] * 300) for number in range(5)]
        pictures = [Picture(house.store, run, 300, seed) for seed, run in enumerate(runs)]
        before = [await picture.take() for picture in pictures]
        async with house.keeper:
            while house.rows(CHUNKS) != [(5,)]:  # Of the users' messages.
                assert [await picture.take() for picture in pictures] == before
        assert [await picture.take() for picture in pictures] == before
        assert house.metric("chunks_compacted_total") == 1500
        assert house.metric("housekeeping_seconds_total", chore="compact") > 0


@pytest.mark.scenario("retention", "Expired context")
async def test_contexts_without_activity_are_deleted_and_told_of(kept):
    async with kept(retain_ms=1) as house:
        run = await written(house.store, list("a reply"))
        version = (await house.store.context(OWNER, run.context_id)).version
        async with house.keeper:
            await house.sees(CONTEXTS, 0)
        (gone,) = house.expired
        assert (gone.owner, gone.context_id, gone.version) == (OWNER, run.context_id, version + 1)
        for table in ("messages", "chunks", "runs", "segments"):
            assert house.rows(f"SELECT count(*) FROM {table}") == [(0,)]
        with pytest.raises(ContextNotFound):
            await house.store.context(OWNER, run.context_id)


@pytest.mark.scenario("retention", "Active context")
async def test_a_context_with_an_active_run_is_kept(kept):
    async with kept(retain_ms=1) as house:
        gone = await written(house.store, list("a reply"))
        queued = await post(house.store)
        running = await post(house.store, owner="bob")
        writer = await claim(house.store)
        async with house.keeper:
            await house.sees(CONTEXTS, 2)
            assert [expired.context_id for expired in house.expired] == [gone.context_id]
            await writer.write("done", outcome=Outcome.SUCCEEDED)
            await house.sees(CONTEXTS, 1)
        assert (await house.store.context("bob", running.context_id)).active_run is not None
        assert queued.context_id == house.expired[1].context_id


@pytest.mark.scenario("retention", "Nothing is deleted by default")
async def test_what_is_switched_off_is_not_done(kept):
    async with kept(idempotency_lifetime_ms=1) as house:
        await written(house.store, list("a longer reply"))
        await keep_a_key(house.store)
        async with house.keeper:
            await house.sees(KEYS, 0)
        assert house.rows(CONTEXTS) == [(2,)]
        assert house.rows(CHUNKS) == [(15,)]


async def test_rows_of_expired_contexts_are_deleted_also_where_nothing_expires_any_more(kept):
    """What a process that ended has left."""
    async with kept() as house:
        await written(house.store, list("a reply"))
        await house.store.house.expire_contexts(-1000)
        assert house.rows(CONTEXTS) == [(1,)]
        async with house.keeper:
            await house.sees(CONTEXTS, 0)


# When something is wrong


async def test_a_locked_database_only_delays_it(kept, capsys):
    async with kept(idempotency_lifetime_ms=1) as house:
        await house.store._write(lambda connection: connection.exec_driver_sql("PRAGMA busy_timeout=1"))
        await keep_a_key(house.store)
        somebody = sqlite3.connect(house.path, isolation_level=None)
        somebody.execute("PRAGMA busy_timeout=5000")
        somebody.execute("BEGIN IMMEDIATE")
        said = ""

        async def delayed() -> bool:
            nonlocal said
            said += capsys.readouterr().out
            return "housekeeping_delayed" in said

        async with house.keeper:
            await until(delayed)
            somebody.execute("ROLLBACK")
            somebody.close()
            await house.sees(KEYS, 0)


async def test_a_broken_disk_ends_it(kept):
    async with kept() as house:
        house.store.fail("the disk is gone")
        async with house.keeper, asyncio.timeout(60):
            await house.keeper._task
        assert (await house.store.contexts(OWNER))[0] == []


async def test_a_defect_of_one_chore_is_logged_and_the_others_go_on(kept, capsys):
    """A table that has vanished stands for whatever nobody has thought of."""
    async with kept(compact_after_ms=1) as house:
        await written(house.store, list("a longer reply"))
        house.rows("ALTER TABLE idempotency_keys RENAME TO lost")
        async with house.keeper:
            await house.sees(CHUNKS, 1)
        assert house.store._database.broken is None
        logged = capsys.readouterr().out
        assert "housekeeping_failed" in logged
        assert "forget_keys" in logged
        assert "no such table" not in logged


async def test_a_message_with_a_defect_is_named_once(kept, capsys):
    async with kept(compact_after_ms=1) as house:
        run = await written(house.store, list("a longer reply"))
        with closing(sqlite3.connect(house.path)) as beside, beside:
            beside.execute("DELETE FROM chunks WHERE sequence = 4")
        looked = house.metrics.housekeeping_seconds.labels("delete_contexts")
        async with house.keeper:
            rounds = []

            async def some_rounds() -> bool:
                rounds.append(looked._value.get())
                return len(set(rounds)) > 3

            await until(some_rounds)
        said = capsys.readouterr().out
        assert said.count("compaction_refused") == 1
        assert run.message_id in said


# The load


@pytest.mark.scenario("retention", "A small part of a core")
@pytest.mark.parametrize(("took", "share", "rest"), [(0.01, 0.05, 0.19), (0.2, 0.5, 0.2), (1, 1, 0), (9, 0.05, 60)])
def test_the_rest_after_a_transaction_is_in_proportion(took, share, rest):
    assert rest_after(took, share) == pytest.approx(rest)


@pytest.mark.parametrize(
    ("limits", "look_seconds"),
    [({}, 60), ({"retain_ms": 86_400_000}, 60), ({"compact_after_ms": 1000}, 0.1), ({"compact_after_ms": 1}, 0.05)],
)
async def test_it_looks_often_enough_for_what_it_is_told(kept, limits, look_seconds):
    async with kept(**limits) as house:
        assert house.keeper._look_seconds == look_seconds
