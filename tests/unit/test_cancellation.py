"""A caller that is cancelled at any of its awaits leaves the old state or the new one, and nothing held.

An operation is driven by hand, and cancelled at its k-th suspension, for each k. Each operation is tried alone, and
while the writer is busy with something else, so that it is cancelled both before and after its transaction has begun.
"""

import asyncio
import re
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from context_server.hub import Hub
from context_server.ledger import Ledger, LedgerLimits
from context_server.mailbox import Pacing
from context_server.metrics import Metrics
from context_server.recent import RecentChunks
from context_server.records import Approval, ChunkKind, Delta, IfBusy, Outcome, Receipt
from context_server.store import Store
from context_server.store.exchanges import Post
from context_server.store.idempotency import Once
from context_server.store.reading import Subscription
from tests.store.asking import APPROVE, request, suspend, suspended
from tests.store.writing import OWNER, Writer, claim, exchange, post

PENDING_BYTES = 65_536
TABLES = {
    "contexts": "rowid",
    "messages": "rowid",
    "chunks": "(SELECT rowid FROM messages WHERE id = message_id), sequence",
    "runs": "rowid",
    "waiting_runs": "rowid",
    "approvals": "rowid",
    "idempotency_keys": "key",
}
"""Each table, and the order in which its rows were made."""
_TIME = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z")
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class How(Enum):
    """``ONCE`` and ``ALWAYS`` throw into the operation, at one await or at it and every later one, as AnyIO does;
    ``TASK`` cancels the task that it runs in, which also cancels what is awaited."""

    ONCE = "once"
    ALWAYS = "always"
    TASK = "task"


class CancelAt:
    """Awaits a coroutine, and cancels it at its k-th suspension."""

    def __init__(self, operation: Coroutine[Any, Any, Any], at: int, how: How) -> None:
        self._operation = operation
        self._at = at
        self._how = how
        self.suspensions = 0

    def __await__(self) -> Generator[Any, Any, Any]:
        error: BaseException | None = None
        while True:
            try:
                awaited = self._operation.send(None) if error is None else self._operation.throw(error)
            except StopIteration as end:
                return end.value
            self.suspensions += 1
            error = None
            if self._how is not How.TASK and self._is_due():
                error = asyncio.CancelledError()
                continue
            if self._how is How.TASK and self._is_due():
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
            try:
                yield awaited
            except asyncio.CancelledError as cancelled:
                error = cancelled

    def _is_due(self) -> bool:
        return self.suspensions == self._at or (self._how is How.ALWAYS and self.suspensions > self._at)


async def suspensions_of(operation: Coroutine[Any, Any, Any]) -> int:
    """How often an operation waits when nobody disturbs it."""
    driven = CancelAt(operation, 0, How.ONCE)
    await driven
    return driven.suspensions


async def cancelled_at(operation: Coroutine[Any, Any, Any], at: int, how: How) -> bool:
    """Runs an operation with a cancellation; False when it ended before it."""
    driven = CancelAt(operation, at, how)

    async def drive() -> None:
        await driven

    await asyncio.wait({asyncio.create_task(drive())})
    return driven.suspensions >= at


@dataclass
class Scene:
    """A store with a context in each state that matters."""

    store: Store
    file: Path
    idle: str
    queued: str
    running: Writer
    asked: Approval
    waiting: Receipt

    def picture(self) -> list[tuple[Any, ...]]:
        """Everything in the database but times; ids by the order in which they appear."""
        names: dict[str, str] = {}

        def shown(value: Any) -> Any:
            if isinstance(value, str):
                return _UUID.sub(lambda found: names.setdefault(found[0], f"#{len(names)}"), _TIME.sub("", value))
            return None if isinstance(value, int) and value > 10**12 else value

        connection = sqlite3.connect(self.file)
        try:
            return [
                (table, *map(shown, row))
                for table, order in TABLES.items()
                for row in connection.execute(f"SELECT * FROM {table} ORDER BY {order}")
            ]
        finally:
            connection.close()

    def check_gapless(self) -> None:
        """The log of each message is 1 to its head, and an ended message is as long as it says."""
        connection = sqlite3.connect(self.file)
        try:
            heads = "SELECT coalesce(content_id, id), sequence, final_sequence FROM messages"
            for message_id, head, final in connection.execute(heads):
                rows = connection.execute("SELECT sequence FROM chunks WHERE message_id = ? ORDER BY 1", (message_id,))
                assert [number for (number,) in rows] == list(range(1, head + 1))
                assert final in (None, head)
        finally:
            connection.close()

    async def check_free(self) -> None:
        """The next write and reads succeed, and no connection is held."""
        async with asyncio.timeout(60):
            await self.store.delete_context(OWNER, (await self.store.create_context(OWNER)).id)
            await asyncio.gather(*(self.store.contexts(OWNER) for _ in range(8)))
            while self.held():  # noqa: ASYNC110  # The threads that let go of them tell nobody.
                await asyncio.sleep(0)

    def held(self) -> int:
        """Connections that are checked out."""
        database = self.store._database
        return sum(engine.pool.checkedout() for engine in (database._writer, database._readers))  # type: ignore[attr-defined]  # both pools count


@asynccontextmanager
async def scene(file: Path) -> AsyncIterator[Scene]:
    async with Store.open(f"sqlite:///{file}") as store:
        idle = (await exchange(store, "Hello", "One ", "two.")).run.context_id
        _, (asked,) = await suspended(store)
        await post(store)
        running = await claim(store)
        await running.write("So ")
        queued = (await post(store)).context_id
        steering = await send(store, running.run.context_id, IfBusy.STEER)
        assert steering.disposition is IfBusy.STEER
        waiting = await send(store, queued, IfBusy.QUEUE)
        yield Scene(store, file, idle, queued, running, asked, waiting)


async def send(store: Store, context_id: str, if_busy: IfBusy) -> Receipt:
    receipt, _ = await store.post_message(OWNER, context_id, Post(text="And?", if_busy=if_busy))
    return receipt


def once() -> Once[Any]:
    return Once(key="key", fingerprint="print", encode=lambda _: "answer", lifetime_ms=1000)


def _reply_of(at: Scene) -> str:
    """The reply of the idle context."""
    connection = sqlite3.connect(at.file)
    try:
        rows = connection.execute("SELECT head_message_id FROM contexts WHERE id = ?", (at.idle,))
        return str(rows.fetchone()[0])
    finally:
        connection.close()


Operation = Callable[[Scene], Coroutine[Any, Any, Any]]

WRITES: dict[str, Operation] = {
    "create_context": lambda at: at.store.create_context(OWNER, title="New", once=once()),
    "change_context": lambda at: at.store.change_context(OWNER, at.idle, {"title": "New"}),
    "delete_context": lambda at: at.store.delete_context(OWNER, at.idle),
    "post_message": lambda at: at.store.post_message(OWNER, at.idle, Post(text="Again"), once=once()),
    "post that queues": lambda at: send(at.store, at.queued, IfBusy.QUEUE),
    "post that steers": lambda at: send(at.store, at.running.run.context_id, IfBusy.STEER),
    "post that interrupts a queued run": lambda at: send(at.store, at.queued, IfBusy.INTERRUPT),
    "post that interrupts a running run": lambda at: send(at.store, at.running.run.context_id, IfBusy.INTERRUPT),
    "remove_waiting": lambda at: at.store.suspension.remove_waiting(
        OWNER, at.queued, at.waiting.message_id, if_match=None
    ),
    "look": lambda at: at.store.suspension.look(at.running.run),
    "regenerate": lambda at: at.store.regenerate(OWNER, at.idle, _reply_of(at), once=once()),
    "fork_context": lambda at: at.store.fork_context(OWNER, at.idle, _reply_of(at), title=None, once=once()),
    "decide": lambda at: at.store.suspension.decide(OWNER, at.asked.context_id, at.asked.id, APPROVE, if_match=None),
    "expire of what is not overdue": lambda at: at.store.suspension.expire(OWNER, at.asked.context_id),
    "append that suspends": lambda at: suspend(at.running, request(at.running.run, 9)),
    "cancel of a suspended run": lambda at: at.store.request_cancel(OWNER, at.asked.context_id),
    "cancel of a queued run": lambda at: at.store.request_cancel(OWNER, at.queued),
    "cancel of a running run": lambda at: at.store.request_cancel(OWNER, at.running.run.context_id),
    "claim_runs": lambda at: at.store.claim_runs(5),
    "append": lambda at: at.store.append([at.running.take("it ", "goes ")]),
    "append that ends": lambda at: at.store.append([at.running.take("on.", outcome=Outcome.SUCCEEDED)]),
    "expire_run": lambda at: at.store.expire_run(at.running.run),
    "standings": lambda at: at.store.standings([at.running.take()]),
    "forget_idempotency_keys": lambda at: at.store.forget_idempotency_keys(0),
}

READS: dict[str, Operation] = {
    "context": lambda at: at.store.context(OWNER, at.idle),
    "contexts": lambda at: at.store.contexts(OWNER),
    "message": lambda at: at.store.message(OWNER, at.running.run.context_id, at.running.run.message_id),
    "messages": lambda at: at.store.messages(OWNER, at.idle, include_content=True),
    "messages of a tree": lambda at: at.store.messages(OWNER, at.idle, tree=True),
    "approvals": lambda at: at.store.suspension.approvals(OWNER, at.asked.context_id, only_pending=True),
    "waiting": lambda at: at.store.suspension.waiting(OWNER, at.queued),
    "overdue": lambda at: at.store.suspension.overdue(10),
    "draft": lambda at: at.store.draft(at.running.run),
    "page": lambda at: at.store.page(OWNER, at.running.run.context_id, at.running.run.message_id),
    "snapshots": lambda at: at.store.snapshots(OWNER, [Subscription(at.idle, 1), Subscription(at.queued, None)]),
    "followed_contexts": lambda at: at.store.followed_contexts(OWNER, recent=10, limit=10),
    "history": lambda at: at.store.history(at.running.run, max_bytes=1000),
    "expired_runs": lambda at: at.store.expired_runs(),
    "active_runs": lambda at: at.store.active_runs(),
    "readiness": lambda at: at.store.readiness(),
}


async def cancelled_behind(store: Store, operation: Coroutine[Any, Any, Any], at: int, how: How) -> bool:
    """As ``cancelled_at``, while the writer is in another transaction until the operation waits or has ended."""
    free = threading.Event()
    other = asyncio.create_task(store._write(lambda _: free.wait(60)))
    await asyncio.sleep(0)
    cancelling = asyncio.create_task(cancelled_at(operation, at, how))
    for _ in range(at + 5):
        await asyncio.sleep(0)
    free.set()
    await other
    return await cancelling


@pytest.mark.scenario("content-log", "Cancelled write")
@pytest.mark.parametrize("name", WRITES)
async def test_a_write_that_is_cancelled_has_happened_or_not(tmp_path: Path, name: str) -> None:
    operation = WRITES[name]
    async with scene(tmp_path / "undisturbed.db") as undisturbed:
        old = undisturbed.picture()
        suspensions = await suspensions_of(operation(undisturbed))
        new = undisturbed.picture()
    assert suspensions >= 1

    for busy, how, at in product((False, True), How, range(1, suspensions + 1)):
        async with scene(tmp_path / f"{busy}-{how.value}-{at}.db") as place:
            if busy:
                assert await cancelled_behind(place.store, operation(place), at, how)
            else:
                assert await cancelled_at(operation(place), at, how)
            await place.check_free()
            assert place.picture() in (old, new)
            place.check_gapless()


@pytest.mark.parametrize("name", READS)
async def test_a_read_that_is_cancelled_holds_nothing(tmp_path: Path, name: str) -> None:
    async with scene(tmp_path / "scene.db") as place:
        before = place.picture()
        suspensions = await suspensions_of(READS[name](place))
        assert suspensions >= 1
        for how, at in product(How, range(1, suspensions + 1)):
            assert await cancelled_at(READS[name](place), at, how)
            await place.check_free()
        assert place.picture() == before


@asynccontextmanager
async def writing(place: Scene) -> AsyncIterator[Ledger]:
    """The ledger over a scene's store."""
    metrics = Metrics()
    hub = Hub(Pacing(), metrics, asyncio.get_running_loop().time)
    limits = LedgerLimits(
        commit_interval=0,
        max_commit_interval=0,
        max_pending_bytes=PENDING_BYTES,
        max_reply_bytes=100 * PENDING_BYTES,
    )
    async with Ledger(place.store, hub, RecentChunks(PENDING_BYTES, metrics), metrics, limits) as ledger:
        yield ledger


@pytest.mark.scenario("content-log", "Cancelled write")
@pytest.mark.parametrize("how", How)
async def test_a_reply_whose_writer_is_cancelled_is_gapless(tmp_path: Path, how: How) -> None:
    words = [f"{number}" * PENDING_BYTES for number in range(4)]  # Each makes the writer wait for the disk.
    was_cancelled, at = True, 0
    while was_cancelled:
        at += 1
        async with scene(tmp_path / f"{at}.db") as place, writing(place) as ledger:
            ((run, _),) = await place.store.claim_runs(1)
            reply = ledger.begin(run, lambda: None)

            async def write_all(ledger: Ledger = ledger, reply: Any = reply) -> None:
                for word in words:
                    await ledger.append(reply, Delta(ChunkKind.TEXT, word))
                await ledger.end(reply, Outcome.SUCCEEDED)

            was_cancelled = await cancelled_at(write_all(), at, how)
            if reply.ending is None:
                await ledger.end(reply, Outcome.STOPPED)
            await reply.ended
            await place.check_free()
            message = await place.store.message(OWNER, run.context_id, run.message_id)
            assert message.final_sequence == message.sequence
            assert "".join(words).startswith(message.content or "")
            assert len(message.content or "") >= len("".join(words[:at]))
            place.check_gapless()
    assert at > len(words)
