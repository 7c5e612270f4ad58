"""A database server that is lost at the worst moments: what was done, what is found, and what clients are told."""

import asyncio

import pytest
from sqlalchemy import make_url

from context_server import runner
from context_server.errors import DatabaseBusy, DatabaseUnreachable, OutcomeUnknown
from context_server.records import ChunkKind, Delta, MessageStatus, Outcome
from context_server.store import Store
from context_server.store.database import open_database
from context_server.store.dialects import postgresql
from context_server.store.exchanges import Post
from context_server.store.execution import Lease
from context_server.store.idempotency import Once, Replayed
from tests.chaos.proxy import Proxy
from tests.databases import beside, run_beside
from tests.store.writing import OWNER
from tests.unit.rooms import OWNER as ROOMS_OWNER
from tests.unit.rooms import ledger_limits, open_rooms, until

pytestmark = pytest.mark.only("postgresql")


@pytest.fixture
def network(database_url):
    """The way to the database's server."""
    with Proxy(make_url(database_url).port or 5432) as proxy:
        yield proxy


@pytest.fixture
def far_url(database_url, network):
    """The database by way of ``network``."""
    return make_url(database_url).set(host="127.0.0.1", port=network.port).render_as_string(hide_password=False)


def holds(database_url, query: str):
    """A condition: the query finds something, on a way that nothing breaks."""

    async def is_so() -> bool:
        return bool(await asyncio.to_thread(run_beside, database_url, query))

    return is_so


@pytest.mark.scenario("many-nodes", "Commit with an unknown outcome")
@pytest.mark.parametrize("ends", [False, True])
async def test_a_commit_whose_answer_was_lost_is_found_and_not_repeated(tmp_path, database_url, far_url, network, ends):
    async with open_rooms(tmp_path, database_url=far_url, lease=Lease(node_id="here", lease_ms=600_000)) as rooms:
        reply = await rooms.begin()
        message_id = reply.run.message_id
        await rooms.ledger.append(reply, Delta(ChunkKind.TEXT, "before "))
        await until(holds(database_url, f"SELECT 1 FROM chunks WHERE message_id = '{message_id}'"))

        network.lose_answers_to(b"COMMIT;")
        await rooms.ledger.append(reply, Delta(ChunkKind.TEXT, "lost "))
        ending = asyncio.create_task(rooms.ledger.end(reply, Outcome.SUCCEEDED)) if ends else None
        await until(holds(database_url, f"SELECT 1 FROM chunks WHERE message_id = '{message_id}' AND sequence = 2"))
        network.lose_nothing()
        network.reset()

        if not ends:
            await rooms.ledger.append(reply, Delta(ChunkKind.TEXT, "after"))
        await (ending or rooms.ledger.end(reply, Outcome.SUCCEEDED))
        message = await rooms.message(reply.run)
        page = await rooms.store.page(reply.run.owner, message.context_id, message.id)
        assert (message.status, rooms.fenced) == (MessageStatus.COMPLETED, [])
        assert message.content == ("before lost " if ends else "before lost after")
        assert [chunk.sequence for chunk in page.chunks] == [*range(1, message.sequence + 1)]
        assert rooms.metric("commit_failures_total", code="outcome-unknown") >= 1


@pytest.mark.scenario("many-nodes", "Commit with an unknown outcome")
async def test_a_claim_whose_answer_was_lost_is_run(tmp_path, database_url, far_url, network, monkeypatch):
    monkeypatch.setattr(runner, "_SWEEP_SECONDS", 0.2)
    lease = Lease(node_id="here", lease_ms=600_000)
    async with (
        Store.open(database_url) as other,
        open_rooms(tmp_path, echo, database_url=far_url, lease=lease) as rooms,
    ):
        context = await other.create_context(ROOMS_OWNER)
        network.lose_answers_to(b"COMMIT;")
        receipt, _ = await other.post_message(ROOMS_OWNER, context.id, Post(text="Hello"))
        await until(holds(database_url, "SELECT 1 FROM runs WHERE status = 'running'"))
        network.lose_nothing()
        network.reset()
        message = await rooms.ended(receipt)
        assert (message.status, message.content) == (MessageStatus.COMPLETED, "Hello")


async def echo(history, _run):
    yield history[-1].text


@pytest.mark.scenario("many-nodes", "Locked by another node")
async def test_a_locked_context_costs_the_other_runs_no_lease(tmp_path, database_url):
    lease = Lease(node_id="here", lease_ms=2500)
    async with open_rooms(tmp_path, database_url=database_url, ledger=ledger_limits(renewal=0.8), lease=lease) as rooms:
        held_up, other = await rooms.begin(), await rooms.begin()
        with beside(database_url).begin() as connection:
            connection.exec_driver_sql(f"SELECT 1 FROM contexts WHERE id = '{held_up.run.context_id}' FOR UPDATE")
            await rooms.ledger.append(held_up, Delta(ChunkKind.TEXT, "late"))
            await asyncio.sleep(4.0)  # Longer than the lease, shorter than a forgotten transaction may be.
        await rooms.ledger.append(other, Delta(ChunkKind.TEXT, "word"))
        for reply in (held_up, other):
            await rooms.ledger.end(reply, Outcome.SUCCEEDED)
            assert (await rooms.message(reply.run)).status is MessageStatus.COMPLETED
        assert rooms.fenced == []


@pytest.mark.scenario("many-nodes", "Command with an unknown outcome")
async def test_a_command_whose_answer_was_lost_is_done_once(database_url, far_url, network):
    once = Once(key="key", fingerprint="what", encode=repr, lifetime_ms=1000_000)
    async with Store.open(far_url, connections=4) as store:
        context = await store.create_context(OWNER)
        network.lose_answers_to(b"COMMIT;")
        posting = asyncio.create_task(store.post_message(OWNER, context.id, Post(text="Hello"), once=once))
        await until(holds(database_url, "SELECT 1 FROM runs"))
        network.lose_nothing()
        network.reset()
        with pytest.raises(OutcomeUnknown):
            await posting
        with pytest.raises(Replayed):
            await store.post_message(OWNER, context.id, Post(text="Hello"), once=once)
    assert run_beside(database_url, "SELECT count(*) FROM messages") == [(2,)]


async def test_a_read_whose_last_answer_was_lost_is_read_again(far_url, network):
    reads = 0

    def work(connection):
        nonlocal reads
        reads += 1
        return connection.exec_driver_sql("SELECT 1").scalar_one()

    async with Store.open(far_url, connections=4) as store:
        network.lose_answers_to(b"COMMIT;")
        reading = asyncio.create_task(store._read(work))
        await asyncio.wait([reading], timeout=1.0)
        assert (reading.done(), reads) == (False, 1)
        network.lose_nothing()
        network.reset()
        assert (await reading, reads) == (1, 2)


async def test_a_change_of_the_schema_may_take_long(database_url, monkeypatch):
    monkeypatch.setitem(postgresql._SERVER_SETTINGS, "statement_timeout", "200")
    monkeypatch.setattr(postgresql, "COMMAND_SECONDS", 0.5)

    def work(connection):
        return connection.exec_driver_sql("SELECT 1 FROM pg_sleep(0.8)").scalar_one()

    async with open_database(database_url) as database:
        with pytest.raises(DatabaseBusy):
            await database.write(work)
        assert await database.alter(work) == 1


@pytest.mark.scenario("many-nodes", "Database unreachable")
async def test_a_server_that_refuses_and_comes_back(far_url, network):
    async with Store.open(far_url, connections=4) as store:
        context = await store.create_context(OWNER)
        network.refuse()
        for attempt in (store.create_context(OWNER), store.context(OWNER, context.id), store.readiness()):
            with pytest.raises(DatabaseUnreachable):
                await attempt
        network.mend()
        assert await store.context(OWNER, context.id) == context
        await store.create_context(OWNER)


async def test_stale_connections_are_not_noticed_by_anybody(far_url, network):
    async with Store.open(far_url, connections=4) as store:
        for _ in range(3):
            await asyncio.gather(*(store.create_context(OWNER) for _ in range(4)))
            network.reset()
        contexts, _ = await store.contexts(OWNER)
        assert len(contexts) == 12


async def test_a_server_that_is_not_there_at_the_start(far_url, network):
    network.refuse()
    with pytest.raises(DatabaseUnreachable):
        async with Store.open(far_url):
            pass


async def test_writers_that_wait_for_each_other_are_run_again(database_url):
    """Two transactions that lock the same two rows in opposite orders: the server ends one, and it succeeds later."""
    async with Store.open(database_url, connections=8) as store:
        contexts = [(await store.create_context(OWNER)).id for _ in range(2)]
        tries = 0

        def locking(order):
            def work(connection):
                nonlocal tries
                tries += 1
                for number, context_id in enumerate(order):
                    connection.exec_driver_sql(f"UPDATE contexts SET version = version + 1 WHERE id = '{context_id}'")
                    if number == 0:
                        connection.exec_driver_sql("SELECT pg_sleep(0.3)")

            return work

        await asyncio.gather(store._write(locking(contexts)), store._write(locking(contexts[::-1])))
        assert [(await store.context(OWNER, each)).version for each in contexts] == [3, 3]
        assert tries >= 3  # Whoever is run again may meet the other one again.
