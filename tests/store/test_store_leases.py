"""Leases: who may write a reply when several nodes share a database."""

import asyncio
import contextlib

import pytest

from context_server.records import Outcome
from context_server.store import Store
from context_server.store.execution import BatchRefused, Lease, Standing
from tests.databases import beside
from tests.store.writing import OWNER, Writer, post, start

pytestmark = pytest.mark.only("postgresql")


@pytest.fixture
async def other(database_url):
    """Another node on the same database."""
    async with Store.open(database_url, connections=4) as opened:
        yield opened


async def test_what_is_leased_is_renewed_by_its_node_alone(store, other, rows):
    writer = await start(store)
    (before,) = rows("SELECT node_id, lease_expires_at FROM runs")
    await asyncio.sleep(0.01)  # The clock is the database's, in milliseconds.

    assert await store.append_and_renew([], [writer.run.id]) == ([], frozenset())
    (after,) = rows("SELECT node_id, lease_expires_at FROM runs")
    assert after[0] == before[0]
    assert after[1] > before[1]

    assert await other.append_and_renew([], [writer.run.id]) == ([], {writer.run.id})
    assert rows("SELECT node_id, lease_expires_at FROM runs") == [after]


async def test_a_renewal_and_an_append_are_one_transaction(store, rows):
    writer, stale = await start(store), await start(store)
    append = stale.take("one")
    await store.append([append])
    before = rows("SELECT lease_expires_at FROM runs ORDER BY id")
    with pytest.raises(BatchRefused):
        await store.append_and_renew([append, writer.take("one")], [writer.run.id])
    assert rows("SELECT lease_expires_at FROM runs ORDER BY id") == before


@pytest.mark.scenario("many-nodes", "Paused past its lease")
@pytest.mark.parametrize("outcome", [None, Outcome.SUCCEEDED])
async def test_after_its_lease_a_run_cannot_append_even_if_nobody_took_it_over(store, lapse, outcome):
    writer = await start(store)
    await writer.write("one")
    lapse()
    late = writer.take("late", outcome=outcome)
    with pytest.raises(BatchRefused):
        await store.append([late])
    assert await store.standings([late]) == [(Standing.FENCED, None)]
    assert await store.append_and_renew([], [writer.run.id]) == ([], {writer.run.id})
    assert (await writer.message()).content == "one"


@pytest.mark.scenario("many-nodes", "Node killed")
async def test_a_run_is_taken_over_once_and_only_after_its_lease(store, other, lapse):
    writer = await start(store)
    await writer.write("one")
    assert await other.expired_runs() == []
    assert await other.expire_run(writer.run) is None

    lapse()
    takers = [asyncio.create_task(node.expire_run(writer.run)) for node in (store, other) for _ in range(4)]
    taken = [transition for transition in await asyncio.gather(*takers) if transition is not None]

    assert len(taken) == 1
    with pytest.raises(BatchRefused):
        await writer.write("late")
    assert (await writer.message()).content == "one"


async def test_a_lapsed_lease_is_judged_by_the_databases_clock(database_url, other):
    lease = Lease(node_id="short", lease_ms=1)
    async with Store.open(database_url, connections=4, lease=lease) as hasty:
        writer = await start(hasty)
        async with asyncio.timeout(60):
            expired = []
            while not expired:
                expired = await other.expired_runs()
        assert [run.id for run in expired] == [writer.run.id]


@pytest.mark.scenario("many-nodes", "Runs are claimed once")
async def test_nodes_that_claim_at_once_share_the_queue_without_waiting_for_each_other(store, other):
    receipts = [await post(store) for _ in range(40)]
    claims = [asyncio.create_task(node.claim_runs(3)) for _ in range(20) for node in (store, other)]
    claimed = [run for each in await asyncio.gather(*claims) for run, _ in each]
    while rest := await store.claim_runs(10):
        claimed += [run for run, _ in rest]
    assert sorted(run.id for run in claimed) == sorted(receipt.run_id for receipt in receipts)
    assert {run.attempt for run in claimed} == {1}


async def test_a_claim_does_not_wait_for_a_context_that_somebody_changes(store, rows, held):
    first, second = await post(store), await post(store)
    with held(f"SELECT 1 FROM contexts WHERE id = '{first.context_id}' FOR UPDATE"):
        assert [run.id for run, _ in await store.claim_runs(5)] == [second.run_id]
    assert [run.id for run, _ in await store.claim_runs(5)] == [first.run_id]


async def test_a_take_over_does_not_wait_for_a_transaction_that_was_stopped(store, lapse, held):
    """It is left for the next look: the database ends such a transaction after a while."""
    writer = await start(store)
    lapse()
    with held(f"SELECT 1 FROM messages WHERE id = '{writer.run.message_id}' FOR UPDATE"):
        assert await store.expire_run(writer.run) is None
    assert await store.expire_run(writer.run) is not None


@pytest.fixture
def held(database_url):
    """Holds the rows of a query for a while, as a transaction that was stopped would."""

    @contextlib.contextmanager
    def hold(query: str):
        with beside(database_url).connect() as connection:
            connection.exec_driver_sql(query)
            yield

    return hold


@pytest.mark.scenario("many-nodes", "Commands at once on two nodes")
async def test_of_many_cancels_and_posts_at_once_on_two_nodes_each_moves_the_context_by_one(store, other, rows):
    context = await store.create_context(OWNER)
    receipt = await post(store, context_id=context.id)
    ((run, _),) = await store.claim_runs(1)
    writer = Writer(store, run)

    async def write() -> None:
        for number in range(20):
            await writer.write(f"{number} ")

    changes = [
        node.change_context(OWNER, context.id, {"title": f"{number}"})
        for number in range(20)
        for node in (store, other)
    ]
    cancels = [node.request_cancel(OWNER, context.id) for node in (store, other) for _ in range(3)]
    await asyncio.gather(write(), *changes, *cancels)
    await writer.write(outcome=Outcome.STOPPED)

    found = await store.context(OWNER, context.id)
    # Posted and created are 2, claimed and its first words or the cancelling 1 or 2, the ending 1.
    moves = found.version - 40
    assert moves in (5, 6)
    assert (found.state, found.active_run) == ("idle", None)
    assert (await store.message(OWNER, context.id, receipt.reply_message_id)).content == writer.text
