"""Store: one method, one transaction."""

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from sqlalchemy import Connection

from context_server.errors import StorageBroken
from context_server.records import (
    Append,
    Context,
    Message,
    Mode,
    Page,
    Receipt,
    Run,
    Snapshot,
    State,
    Transition,
    Turn,
    Usage,
    new_id,
)
from context_server.store import (
    branches,
    conversations,
    execution,
    idempotency,
    migrating,
    posting,
    reading,
    statements,
)
from context_server.store.database import Database, open_database
from context_server.store.dialects import dialect_of
from context_server.store.dialects.sqlite import has_wal_bug
from context_server.store.exchanges import Post
from context_server.store.execution import Lease, Standing
from context_server.store.files import StoredFiles
from context_server.store.following import Following
from context_server.store.housekeeping import Housekeeping
from context_server.store.idempotency import Once
from context_server.store.maintenance import prepare, read_epoch
from context_server.store.reading import Draft, Subscription
from context_server.store.suspension import Suspension
from context_server.store.wires import Wires

T = TypeVar("T")

DEFAULT_LEASE_MS = 5000
DEFAULT_MAX_WAITING = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Readiness:
    """What the person on call wants to know of the database."""

    database: str
    """``sqlite`` or ``postgresql``."""
    version: str
    revision: str
    sqlite_has_wal_bug: bool | None
    """None where it is no SQLite."""
    failure: str | None


def _clock_ms() -> int:
    return time.time_ns() // 1_000_000


class Store:
    """The durable log. Open it with ``async with Store.open(url) as store``.

    Every method is one transaction: all of it has happened when the method returns, and none of it when it raises.
    A caller that is cancelled while it waits may find either; never a half.

    Raises, from every method:
        StorageFull, DatabaseBusy, DatabaseUnreachable: nothing was done; the same call may succeed later.
        OutcomeUnknown, where it writes: the database was lost during the commit; all of it has happened, or nothing.
        StorageBroken: the disk failed; from now on every write is refused.
    """

    def __init__(self, database: Database, epoch: str, lease: Lease | None = None) -> None:
        self._database = database
        self._write = database.write
        self._read = database.read
        self._lease = lease if database.shared else None
        self.shared = database.shared
        """Whether other processes may serve the same database: then runs have leases, and wake-ups cross."""
        self.node_id = None if self._lease is None else self._lease.node_id
        """Under which runs are leased here; None where there are no leases."""
        self.epoch = epoch
        self.house = Housekeeping(database)
        self.suspension = Suspension(database)
        self.files = StoredFiles(database)
        self.following = Following(database)
        self.wires = Wires(database, epoch)

    @classmethod
    @contextlib.asynccontextmanager
    async def open(
        cls,
        database_url: str,
        *,
        migrate: bool = True,
        connections: int = 10,
        lease: Lease | None = None,
        on_broken: Callable[[StorageBroken], None] | None = None,
    ) -> AsyncIterator["Store"]:
        """The store of a database, at the newest schema revision.

        No other process serves a SQLite file. Many may serve a PostgreSQL database, each with ``connections`` to it,
        and each claims runs by ``lease`` (by default one of its own). ``on_broken`` is called once, from any thread,
        when the disk has failed.

        Raises:
            DatabaseNotSupported, DatabaseInUse.
            SchemaMismatch: the database is newer than this program, or older and may not be migrated.
        """
        lease = lease or Lease(node_id=new_id(), lease_ms=DEFAULT_LEASE_MS)
        async with open_database(database_url, connections) as database:
            epoch = await database.write(partial(prepare, migrate=migrate, shared=database.shared))
            database.on_broken = on_broken  # From here on: a file that cannot be opened is said by what is raised.
            await database.prepare()
            yield cls(database, epoch, lease)

    async def current_epoch(self) -> str:
        """The epoch as the database has it now: another than ``epoch`` when history may have been lost meanwhile."""
        return await self._read(read_epoch) or ""

    def fail(self, reason: str) -> StorageBroken:
        """Refuses every write from here on, because the log's head is not known any more."""
        return self._database.fail(reason)

    # Contexts

    async def create_context(
        self,
        owner: str,
        *,
        title: str | None = None,
        mode: Mode = Mode.ACT,
        metadata: Mapping[str, Any] | None = None,
        once: Once[Context] | None = None,
    ) -> Context:
        """A new context, idle, at version 1.

        Raises:
            Replayed, IdempotencyKeyReused: ``once`` was used before.
        """

        def work(connection: Connection, now_ms: int) -> Context:
            return conversations.create_context(
                connection,
                owner=owner,
                epoch=self.epoch,
                now_ms=now_ms,
                title=title,
                mode=mode,
                metadata=metadata or {},
            )

        return await self._write(partial(_do_once, owner, once, work, _itself))

    async def context(self, owner: str, context_id: str) -> Context:
        """One context.

        Raises:
            ContextNotFound.
        """
        return await self._read(partial(reading.context, owner=owner, epoch=self.epoch, context_id=context_id))

    async def contexts(
        self, owner: str, *, before: tuple[int, str] | None = None, limit: int = 50
    ) -> tuple[list[Context], tuple[int, str] | None]:
        """A page of the owner's contexts, most recently active first, and the key of the next page."""
        return await self._read(partial(reading.contexts, owner=owner, epoch=self.epoch, before=before, limit=limit))

    async def change_context(
        self, owner: str, context_id: str, changes: Mapping[str, Any], *, if_match: int | None = None
    ) -> Context:
        """The context with ``changes`` of title, mode, metadata and head_message_id, one version on.

        Raises:
            ContextNotFound, VersionMismatch, MessageNotFound (the head).
            CommandNotAllowed: the head cannot be moved while the context is busy.
        """
        return await self._write(
            lambda connection: conversations.change_context(
                connection,
                owner=owner,
                epoch=self.epoch,
                now_ms=_clock_ms(),
                context_id=context_id,
                changes=changes,
                if_match=if_match,
            )
        )

    async def delete_context(self, owner: str, context_id: str, *, if_match: int | None = None) -> Context:
        """The context as it was; it is gone, with its messages.

        Raises:
            ContextNotFound, VersionMismatch.
        """
        return await self._write(
            lambda connection: conversations.delete_context(
                connection, owner=owner, epoch=self.epoch, now_ms=_clock_ms(), context_id=context_id, if_match=if_match
            )
        )

    # Messages and the commands of clients

    async def fork_context(
        self, owner: str, context_id: str, message_id: str, *, title: str | None, once: Once[Context] | None = None
    ) -> Context:
        """A new context with the line up to a message as its history; the text is shared.

        Raises:
            ContextNotFound, MessageNotFound, MessageOpen.
            Replayed, IdempotencyKeyReused: ``once`` was used before.
        """

        def work(connection: Connection, now_ms: int) -> Context:
            return branches.fork(
                connection,
                owner=owner,
                epoch=self.epoch,
                now_ms=now_ms,
                context_id=context_id,
                message_id=message_id,
                title=title,
            )

        return await self._write(partial(_do_once, owner, once, work, _itself))

    async def post_message(
        self,
        owner: str,
        context_id: str,
        post: Post,
        *,
        if_match: int | None = None,
        once: Once[Receipt] | None = None,
        max_waiting: int = DEFAULT_MAX_WAITING,
    ) -> tuple[Receipt, Transition | None]:
        """The user's message, an empty reply and its queued run; no transition where it waits, or steers.

        Raises:
            ContextNotFound, VersionMismatch, MessageNotFound (the parent), CommandNotAllowed, QueueFull.
            Replayed, IdempotencyKeyReused: ``once`` was used before.
        """

        def work(connection: Connection, now_ms: int) -> tuple[Receipt, Transition | None]:
            return posting.post_message(
                connection,
                owner=owner,
                now_ms=now_ms,
                context_id=context_id,
                post=post,
                if_match=if_match,
                max_waiting=max_waiting,
            )

        return await self._write(partial(_do_once, owner, once, work, _first))

    async def regenerate(
        self,
        owner: str,
        context_id: str,
        message_id: str,
        *,
        if_match: int | None = None,
        once: Once[Receipt] | None = None,
    ) -> tuple[Receipt, Transition]:
        """Another reply beside one that is there, or to a user's message, and its queued run.

        Raises:
            ContextNotFound, VersionMismatch, MessageNotFound, CommandNotAllowed.
            Replayed, IdempotencyKeyReused: ``once`` was used before.
        """

        def work(connection: Connection, now_ms: int) -> tuple[Receipt, Transition]:
            return posting.regenerate(
                connection, owner=owner, now_ms=now_ms, context_id=context_id, message_id=message_id, if_match=if_match
            )

        return await self._write(partial(_do_once, owner, once, work, _first))

    async def request_cancel(
        self, owner: str, context_id: str, *, if_match: int | None = None, once: Once[Context] | None = None
    ) -> tuple[Context, Transition | None]:
        """The context, told to stop, and what that moved: None when there was nothing to stop.

        Raises:
            ContextNotFound, VersionMismatch.
            Replayed, IdempotencyKeyReused: ``once`` was used before.
        """

        def work(connection: Connection, now_ms: int) -> tuple[Context, Transition | None]:
            return posting.request_cancel(
                connection, owner=owner, epoch=self.epoch, now_ms=now_ms, context_id=context_id, if_match=if_match
            )

        return await self._write(partial(_do_once, owner, once, work, _first))

    async def message(self, owner: str, context_id: str, message_id: str) -> Message:
        """One message with its whole text.

        Raises:
            ContextNotFound, MessageNotFound.
        """
        return await self._read(partial(reading.message, owner=owner, context_id=context_id, message_id=message_id))

    async def messages(
        self,
        owner: str,
        context_id: str,
        *,
        after: int = 0,
        limit: int = 50,
        include_content: bool = False,
        max_bytes: int = 1_048_576,
        tree: bool = False,
    ) -> tuple[list[Message], int | None]:
        """A page of the head's line, or of all messages, oldest first, and the position that the next one starts after.

        Raises:
            ContextNotFound.
        """
        return await self._read(
            partial(
                reading.messages,
                owner=owner,
                context_id=context_id,
                after=after,
                limit=limit,
                include_content=include_content,
                max_bytes=max_bytes,
                tree=tree,
            )
        )

    async def page(
        self,
        owner: str,
        context_id: str,
        message_id: str,
        *,
        from_sequence: int = 0,
        to_sequence: int | None = None,
        max_bytes: int = 1_048_576,
    ) -> Page:
        """The chunks after ``from_sequence``: ``from_sequence=10`` → 11, 12, 13.

        Raises:
            ContextNotFound, MessageNotFound, SequenceAhead.
        """
        return await self._read(
            partial(
                reading.page,
                owner=owner,
                context_id=context_id,
                message_id=message_id,
                from_sequence=from_sequence,
                to_sequence=to_sequence,
                max_bytes=max_bytes,
            )
        )

    # Subscribers

    async def snapshots(
        self, owner: str, subscriptions: Sequence[Subscription], *, all_must_exist: bool = True
    ) -> list[Snapshot]:
        """What a subscriber is told on connect, for each context.

        Raises:
            ContextNotFound: one of them does not exist, and ``all_must_exist``.
        """
        return await self._read(
            partial(reading.snapshots, owner=owner, subscriptions=subscriptions, all_must_exist=all_must_exist)
        )

    async def followed_contexts(self, owner: str, *, recent: int, limit: int) -> list[str]:
        """The busy contexts of an owner, then the most recently active ones."""
        return await self._read(partial(reading.followed_contexts, owner=owner, recent=recent, limit=limit))

    # Runs

    async def claim_runs(self, limit: int) -> list[tuple[Run, Transition]]:
        """Up to ``limit`` queued runs, oldest first, now running here with their attempt raised."""
        return await self._write(
            lambda connection: execution.claim_runs(connection, now_ms=_clock_ms(), limit=limit, lease=self._lease)
        )

    async def claimed_runs(self) -> list[tuple[Run, Transition]]:
        """Runs that are leased here and that nobody has written for: those of a claim whose outcome was unknown."""
        return await self._read(partial(execution.claimed_runs, lease=self._lease))

    async def history(self, run: Run, *, max_bytes: int) -> list[Turn]:
        """The messages before a run's reply, oldest first: the newest ones that fit ``max_bytes``."""
        return await self._read(partial(reading.history, run=run, max_bytes=max_bytes))

    async def draft(self, run: Run) -> Draft | None:
        """What a run that was suspended goes on from; None where its reply is gone."""
        return await self._read(partial(reading.draft, run=run))

    async def append(self, batch: Sequence[Append]) -> list[Transition | None]:
        """Adds a batch of many runs to the log; for each, the transition that it caused.

        Raises:
            BatchRefused: a message is not where its run believes; nothing was written.
        """
        transitions, _ = await self.append_and_renew(batch, ())
        return transitions

    async def append_and_renew(
        self, batch: Sequence[Append], run_ids: Sequence[str]
    ) -> tuple[list[Transition | None], frozenset[str]]:
        """Adds a batch to the log and renews the leases of runs; the transitions, and the ids of runs that were lost.

        Raises:
            BatchRefused: a message is not where its run believes; nothing was written, and nothing renewed.
        """

        def work(connection: Connection) -> tuple[list[Transition | None], frozenset[str]]:
            transitions = execution.append(connection, now_ms=_clock_ms(), batch=batch) if batch else []
            lost: frozenset[str] = frozenset()
            if run_ids and self._lease is not None:
                lost = execution.renew_leases(connection, run_ids=run_ids, lease=self._lease)
            return transitions, lost

        return await self._database.append(work)

    async def standings(self, batch: Sequence[Append]) -> list[tuple[Standing, Transition | None]]:
        """Where each append stands whose batch was refused, or whose commit has an unknown outcome."""
        return await self._database.append(partial(execution.standings, batch=batch))

    async def expired_runs(self, limit: int = 1000) -> list[Run]:
        """Runs marked as running that nobody holds; on SQLite, where there are no leases, all that are so marked."""
        return await self._read(partial(execution.expired_runs, limit=limit))

    async def running_states(self, run_ids: Sequence[str]) -> dict[str, State]:
        """The context's state of those of these runs that are marked as running here, by the run's id."""
        return await self._read(partial(execution.running_states, run_ids=run_ids, lease=self._lease))

    async def expire_run(self, run: Run) -> Transition | None:
        """Ends a run that nobody holds; what it appended is kept. None where somebody else does so, or holds it."""
        return await self._write(lambda connection: execution.expire_run(connection, run=run, now_ms=_clock_ms()))

    async def usage(self, owner: str, context_id: str | None) -> tuple[Usage, int]:
        """What an owner's replies, or those of one context, have used, and how many they are.

        Raises:
            ContextNotFound.
        """
        return await self._read(partial(reading.usage, owner=owner, context_id=context_id))

    async def active_runs(self) -> dict[str, int]:
        """How many runs are queued, running, suspended."""
        return await self._read(reading.active_runs)

    async def unclaimed_runs(self) -> list[Run]:
        """Every run that waits for a runner, or for a person."""
        return await self._read(execution.unclaimed_runs)

    # Keeping house

    async def forget_idempotency_keys(self, lifetime_ms: int, limit: int = 1000) -> int:
        """Forgets up to ``limit`` keys older than their lifetime; how many."""

        def work(connection: Connection) -> int:
            before = statements.delete_idempotency_keys_before(_clock_ms() - lifetime_ms, limit)
            return connection.execute(*before).rowcount

        return await self._write(work)

    async def readiness(self) -> Readiness:
        """Whether the database answers, and what it is.

        Raises:
            Only what every method raises; a broken disk is in the answer.
        """

        def work(connection: Connection) -> tuple[str | None, str]:
            return migrating.revision_of(connection), dialect_of(connection).version_of(connection)

        revision, version = await self._read(work)
        return Readiness(
            database=self._database.name,
            version=version,
            revision=revision or "",
            sqlite_has_wal_bug=None if self.shared else has_wal_bug(),
            failure=None if self._database.broken is None else str(self._database.broken),
        )


def _itself(result: T) -> T:
    return result


def _first(result: tuple[T, Any]) -> T:
    return result[0]


def _do_once(
    owner: str,
    once: Once[Any] | None,
    work: Callable[[Connection, int], T],
    answer_of: Callable[[T], Any],
    connection: Connection,
) -> T:
    """Does ``work`` unless its idempotency key was used before; key and work are one transaction."""
    now_ms = _clock_ms()
    if once is None:
        return work(connection, now_ms)
    idempotency.look_up(connection, owner, once, now_ms)
    result = work(connection, now_ms)
    idempotency.remember(connection, owner, once, answer_of(result), now_ms)
    return result
