"""How the database finds what it reads: by index, and without sorting, whatever else it holds.

What the store executes is recorded and explained, so a statement is checked as it is sent and not as it is written.
"""

import re
import sqlite3
from collections.abc import Callable

import pytest
from sqlalchemy import Engine, event, make_url

from context_server.records import FileRef, IfBusy, Outcome, new_id
from context_server.store import Store
from context_server.store.exchanges import Post
from context_server.store.idempotency import Once
from context_server.store.reading import Subscription
from tests.databases import beside
from tests.store.asking import APPROVE, go_on, request, suspend
from tests.store.writing import OWNER, claim, exchange, post, start

Explain = Callable[[], list[tuple[str, list[str]]]]


@pytest.fixture
def explain(database_url):
    """Explains every statement that was executed since: ``[(statement, [step, …]), …]``."""
    executed: dict[str, object] = {}

    def record(_connection, _cursor, statement, parameters, _context, _many):
        if re.match(r"\s*(SELECT|INSERT|UPDATE|DELETE|WITH)", statement) and "lease_expires_at = 1" not in statement:
            executed[statement] = parameters[0] if _many else parameters

    event.listen(Engine, "before_cursor_execute", record)

    def plans() -> list[tuple[str, list[str]]]:
        if make_url(database_url).get_backend_name() == "postgresql":
            return [(statement, _generic_plan(database_url, statement)) for statement in executed]
        found = []
        connection = sqlite3.connect(make_url(database_url).database or "")
        for statement, parameters in executed.items():
            rows = connection.execute(f"EXPLAIN QUERY PLAN {statement}", parameters).fetchall()
            found.append((statement, [row[3] for row in rows]))
        connection.close()
        return found

    plans.clear = executed.clear
    yield plans
    event.remove(Engine, "before_cursor_execute", record)


def _generic_plan(database_url: str, statement: str) -> list[str]:
    """PostgreSQL's plan for any parameters, where it may read a whole table only if nothing else is possible."""
    count = max([int(number) for number in re.findall(r"\$(\d+)", statement)], default=0)
    values = f"({', '.join(['NULL'] * count)})" if count else ""
    with beside(database_url).begin() as connection:
        for setting in ("enable_seqscan = off", "enable_sort = off", "plan_cache_mode = force_generic_plan"):
            connection.exec_driver_sql(f"SET LOCAL {setting}")
        connection.exec_driver_sql(f"PREPARE asked AS {statement}".replace("%", "%%"))
        lines = [row[0] for row in connection.exec_driver_sql(f"EXPLAIN EXECUTE asked{values}")]
        connection.exec_driver_sql("DEALLOCATE asked")
    return lines


def once(number: int) -> Once:
    return Once(key=f"key-{number}", fingerprint="what", encode=repr, lifetime_ms=1000)


async def live_through_everything(store: Store, lapse: Callable[[], None]) -> None:
    """Every method of the store, on a database with several contexts."""
    for number in range(3):
        context = await store.create_context(OWNER, title=str(number), once=once(number))
        await exchange(store, "Hello", "one", "two", context_id=context.id)
        await store.change_context(OWNER, context.id, {"title": "changed"})
    writer = await start(store)
    await writer.write("one")
    run = writer.run
    await store.history(run, max_bytes=1000)
    await store.standings([writer.take()])
    await store.page(OWNER, run.context_id, run.message_id, from_sequence=0)
    await store.messages(OWNER, run.context_id, include_content=True)
    await store.message(OWNER, run.context_id, run.message_id)
    ids = (OWNER, run.context_id, run.message_id)
    await store.wires.reply(*ids, max_bytes=1000, question=True, content=True, elder=True)
    await store.wires.conversation(OWNER, new_id())
    _, before = await store.contexts(OWNER, limit=1)
    await store.contexts(OWNER, before=before)
    await store.snapshots(OWNER, [Subscription(run.context_id, 1), Subscription(context.id)])
    await store.followed_contexts(OWNER, recent=10, limit=10)
    await store.active_runs()
    await store.request_cancel(OWNER, run.context_id)
    lapse()
    (orphan,) = await store.expired_runs()
    await store.expire_run(orphan)
    await store.post_message(OWNER, context.id, Post(text="Bye"), once=once(9))
    await store.request_cancel(OWNER, context.id)
    await wait_and_steer(store, context.id)
    await ask_for_approval(store, context.id)
    await branch(store, context.id)
    await store.forget_idempotency_keys(0)
    await store.delete_context(OWNER, context.id)
    await live_with_files(store)


async def live_with_files(store: Store) -> None:
    """Every method of the store's files."""
    ids = [new_id() for _ in range(3)]
    for file_id in ids:
        ref = FileRef(id=file_id, name="a", media_type="text/plain", size_bytes=0, sha256="")
        await store.files.add(OWNER, ref, Once(key=file_id, fingerprint="", encode=repr, lifetime_ms=1000))
    _, before = await store.files.page(OWNER, limit=1)
    await store.files.page(OWNER, before=before)
    await store.files.refs(OWNER, ids)
    await store.files.file(OWNER, ids[0])
    await store.files.known(ids)
    await store.files.delete(OWNER, ids[0])


async def wait_and_steer(store: Store, context_id: str) -> None:
    """Everything that may be posted while a context is busy."""
    writer = await start(store, context_id=context_id)
    for if_busy in (IfBusy.QUEUE, IfBusy.QUEUE, IfBusy.STEER):
        receipt, _ = await store.post_message(OWNER, context_id, Post(text="And?", if_busy=if_busy))
        if if_busy is IfBusy.QUEUE:
            queued = receipt
    await store.suspension.waiting(OWNER, context_id)
    await store.suspension.remove_waiting(OWNER, context_id, queued.message_id, if_match=None)
    await store.suspension.look(writer.run)
    await store.post_message(OWNER, context_id, Post(text="Late", if_busy=IfBusy.STEER))
    await writer.write("one", outcome=Outcome.SUCCEEDED)
    await store.post_message(OWNER, context_id, Post(text="Now!", if_busy=IfBusy.INTERRUPT))
    await store.post_message(OWNER, context_id, Post(text="And?", if_busy=IfBusy.STEER))
    await store.request_cancel(OWNER, context_id)


async def ask_for_approval(store: Store, context_id: str) -> None:
    """A run that is suspended, goes on, is suspended again, and expires."""
    writer = await start(store, context_id=context_id)
    asked = request(writer.run)
    await suspend(writer, asked)
    await store.suspension.approvals(OWNER, context_id, only_pending=True)
    await store.suspension.decide(OWNER, context_id, asked.id, APPROVE, if_match=None)
    writer = await go_on(store)
    await store.history(writer.run, max_bytes=1000)
    await suspend(writer, request(writer.run, 2, lifetime=-1))
    await store.unclaimed_runs()
    for owner, overdue in await store.suspension.overdue(10):
        await store.suspension.expire(owner, overdue)


async def branch(store: Store, context_id: str) -> None:
    """Every way through the tree."""
    (first, reply, *_), _ = await store.messages(OWNER, context_id, tree=True)
    await store.messages(OWNER, context_id, after=1)
    fork = await store.fork_context(OWNER, context_id, reply.id, title=None)
    await store.messages(OWNER, fork.id, include_content=True)
    await store.change_context(OWNER, context_id, {"head_message_id": first.id})
    await store.regenerate(OWNER, context_id, reply.id)
    await store.request_cancel(OWNER, context_id)
    await store.delete_context(OWNER, fork.id)


BOUNDED_SORTS = {
    "WITH RECURSIVE line": "one line of a context",
    "messages.steers_run_id =": "what was posted for one run, as many as may wait",
    "AS siblings": "one page of a context's messages",
    "runs.status !=": "at the start of a process, the runs that wait",
    "FROM waiting_runs": "what waits for one context",
    "FROM approvals": "what one run asked for, or one context has pending",
}
"""Statements that may sort, by what is in them, and what they sort at most."""


@pytest.mark.only("sqlite")
async def test_nothing_is_found_by_reading_a_table_or_sorted(store, explain, lapse):
    await live_through_everything(store, lapse)

    for statement, steps in explain():
        for step in steps:
            scans = step.startswith("SCAN") and not re.search(
                r"USING (COVERING )?INDEX|CONSTANT ROW|batch|json_each|SCAN (line|page)$", step
            )
            sorts = "TEMP B-TREE" in step and not any(known in statement for known in BOUNDED_SORTS)
            assert not scans, (statement, steps)
            assert not sorts, (statement, steps)


@pytest.mark.only("postgresql")
async def test_on_postgresql_nothing_is_found_by_reading_a_table_either(store, explain, lapse):
    await live_through_everything(store, lapse)
    for statement, steps in explain():
        assert not [step for step in steps if "Seq Scan" in step], (statement, steps)


@pytest.mark.only("sqlite")
@pytest.mark.parametrize(
    ("what", "statement", "index"),
    [
        ("post", "FROM contexts", r"SEARCH contexts USING INDEX sqlite_autoindex_contexts_1 \(id=\?\)"),
        ("pull", "FROM chunks", r"SEARCH chunks USING PRIMARY KEY \(message_id=\? AND sequence>\? AND sequence<\?\)"),
        ("pull", "FROM messages", r"SEARCH messages USING INDEX sqlite_autoindex_messages_1 \(id=\?\)"),
        ("append", "UPDATE messages", r"SEARCH messages USING INDEX sqlite_autoindex_messages_1 \(id=\?\)"),
        ("append", "FROM contexts", r"SEARCH contexts USING INDEX sqlite_autoindex_contexts_1 \(id=\?\)"),
        ("claim", "FROM runs", r"SEARCH runs USING INDEX ix_runs_queue \(status=\?\)"),
        ("list contexts", "FROM contexts", r"SEARCH contexts USING INDEX ix_contexts_owner_updated_at_id \(owner=\?"),
        ("list a line", "RECURSIVE", r"SEARCH above USING INDEX sqlite_autoindex_messages_1 \(id=\?\)"),
        ("list a line", "RECURSIVE", r"SEARCH messages USING INDEX sqlite_autoindex_messages_1 \(id=\?\)"),
        ("list a line", "RECURSIVE", r"INDEX ix_messages_context_id_parent_id \(context_id=\? AND parent_id=\?\)"),
        ("list all", "position >", r"INDEX sqlite_autoindex_messages_2 \(context_id=\? AND position>\?\)"),
        ("list all", "position >", r"INDEX ix_messages_context_id_parent_id \(context_id=\? AND parent_id=\?\)"),
        ("history", "RECURSIVE", r"SEARCH above USING INDEX sqlite_autoindex_messages_1 \(id=\?\)"),
        ("steer", "steers_run_id", r"INDEX ix_messages_steering \(steers_run_id=\?\)"),
        ("wait", "FROM waiting_runs", r"INDEX ix_waiting_runs_context_id_priority_created_at_run_id \(context_id=\?"),
        ("expire", "FROM approvals", r"INDEX ix_approvals_to_expire \(expires_at<\?\)"),
        ("approvals", "FROM approvals", r"INDEX ix_approvals_context_id_created_at_id \(context_id=\?\)"),
        ("subscribe", "ended_version >=", r"INDEX ix_messages_context_id_ended_version \(context_id=\? AND ended"),
        ("follow", "status IN", r"INDEX (ix_runs_queue|uq_runs_one_active_per_context)"),
        ("recover", "FROM runs", r"SEARCH runs USING INDEX ix_runs_queue \(status=\?\)"),
        ("count", "FROM runs", r"USING (COVERING )?INDEX ix_runs_queue"),
        ("forget", "DELETE FROM idempotency_keys", r"INDEX ix_idempotency_keys_created_at \(created_at<\?\)"),
    ],
)  # fmt: skip
@pytest.mark.scenario("content-pull", "Pull of a long message")
async def test_a_hot_statement_uses_the_index_that_serves_it(store, explain, what, statement, index):
    done = await exchange(store, "Hello", "one", "two")
    context_id, message_id = done.run.context_id, done.run.message_id
    writer = await start(store)
    await post(store)
    explain.clear()
    match what:
        case "post":
            await store.post_message(OWNER, context_id, Post(text="Hello"))
        case "pull":
            await store.page(OWNER, context_id, message_id, from_sequence=1)
        case "append":
            await writer.write("one", outcome=Outcome.SUCCEEDED)
        case "claim":
            await claim(store)
        case "list contexts":
            await store.contexts(OWNER, before=(2**50, "x"))
        case "list a line":
            await store.messages(OWNER, context_id)
        case "list all":
            await store.messages(OWNER, context_id, tree=True)
        case "steer":
            await store.suspension.look(writer.run)
        case "wait":
            await store.suspension.waiting(OWNER, context_id)
        case "expire":
            await store.suspension.overdue(10)
        case "approvals":
            await store.suspension.approvals(OWNER, context_id, only_pending=False)
        case "history":
            await store.history(writer.run, max_bytes=1000)
        case "subscribe":
            await store.snapshots(OWNER, [Subscription(context_id, 1)])
        case "follow":
            await store.followed_contexts(OWNER, recent=10, limit=10)
        case "recover":
            await store.expired_runs()
        case "count":
            await store.active_runs()
        case "forget":
            await store.forget_idempotency_keys(0)

    plans = [steps for sent, steps in explain() if statement in sent]

    assert plans
    for steps in plans:
        assert any(re.search(index, step) for step in steps), steps
