"""How a transaction runs: on which connection, in which thread or task, and what a failure means."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Connection, Engine, make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from context_server.errors import DatabaseNotSupported, DatabaseUnreachable, OutcomeUnknown, StorageBroken
from context_server.store.dialects import postgresql, sqlite

if TYPE_CHECKING:  # It needs greenlet, which only the extra brings.
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

T = TypeVar("T")


def parse_url(database_url: str) -> URL:
    """The URL of a database that this program can use, with the driver that it uses.

    Raises:
        DatabaseNotSupported: no URL, another database, or a driver that is not installed.
    """
    try:
        url = make_url(database_url)
    except ArgumentError:
        raise DatabaseNotSupported(f"database {database_url!r} is neither a path nor a SQLAlchemy URL") from None
    match url.drivername.partition("+")[0]:
        case "sqlite":
            return sqlite.file_url(url)
        case "postgresql" | "postgres":
            return postgresql.server_url(url)
        case other:
            raise DatabaseNotSupported(
                f"database {other!r} is not supported; use the path of a SQLite file, or postgresql+asyncpg://…"
            )


def file_of(database_url: str) -> Path | None:
    """The SQLite file of a URL; None where the database is on a server.

    Raises:
        DatabaseNotSupported.
    """
    url = parse_url(database_url)
    return Path(url.database or "").absolute() if url.get_backend_name() == "sqlite" else None


class Database(ABC):
    """A database, open: runs functions of a connection as transactions."""

    shared = False
    """Whether other processes may serve the same database."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.broken: StorageBroken | None = None
        self.on_broken: Callable[[StorageBroken], None] | None = None

    @abstractmethod
    async def write(self, work: Callable[[Connection], T]) -> T:
        """Runs ``work`` in a write transaction; ``work`` may be run again when nothing of it was done.

        A caller that is cancelled leaves a transaction that has begun to finish by itself.

        Raises:
            StorageFull, DatabaseBusy, DatabaseUnreachable: nothing was done.
            OutcomeUnknown: all of it was done, or nothing.
            StorageBroken: the disk failed, now or before.
        """

    @abstractmethod
    async def read(self, work: Callable[[Connection], T]) -> T:
        """Runs ``work`` in a read transaction: one consistent picture of the log.

        Raises:
            DatabaseBusy, DatabaseUnreachable, StorageBroken.
        """

    async def append(self, work: Callable[[Connection], T]) -> T:
        """As ``write``, for the group commit, which must not queue behind everybody's commands."""
        return await self.write(work)

    async def alter(self, work: Callable[[Connection], T]) -> T:
        """As ``write``, once, for a change of the schema, which may take as long as the tables are large."""
        return await self.write(work)

    @abstractmethod
    async def prepare(self) -> None:
        """Opens what is needed for reading, so that nothing is opened in the middle of work."""

    def fail(self, reason: str) -> StorageBroken:
        """Refuses every write from here on: nobody knows what the disk holds, so nothing may be acknowledged."""
        if self.broken is None:
            self.broken = StorageBroken(reason)
            if self.on_broken is not None:
                self.on_broken(self.broken)
        return self.broken


@asynccontextmanager
async def open_database(database_url: str, connections: int = 10) -> AsyncIterator[Database]:
    """The database of a URL: a SQLite file, locked against other processes, or a PostgreSQL server.

    Raises:
        DatabaseNotSupported, DatabaseInUse.
    """
    url = parse_url(database_url)
    if url.get_backend_name() == "postgresql":
        server = PostgresDatabase(url, connections)
        try:
            yield server
        finally:
            await server.close()
        return
    with sqlite.FileLock(url):
        file = SqliteDatabase(url)
        try:
            yield file
        finally:
            await asyncio.to_thread(file.close)


# SQLite


def run_transaction(engine: Engine, work: Callable[[Connection], T]) -> T:
    """Runs ``work`` in a transaction: all of it, or nothing.

    Raises:
        StorageFull, DatabaseBusy, StorageBroken: what the driver's error means.
    """
    try:
        with engine.begin() as connection:
            return work(connection)
    except DBAPIError as error:
        raise sqlite.named_failure(error) or error from error


class SqliteDatabase(Database):
    """A file that this process alone serves: one writer, a few readers, each in threads of its own."""

    def __init__(self, url: URL) -> None:
        super().__init__("sqlite")
        self._writer = sqlite.open_writer(url)
        self._readers = sqlite.open_readers(url)
        self._writer_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="context-server-writer")
        self._reader_threads = ThreadPoolExecutor(
            max_workers=sqlite.READERS, thread_name_prefix="context-server-reader"
        )

    def close(self) -> None:
        """Waits for what is under way: a transaction that was begun is finished."""
        self._writer_thread.shutdown(wait=True)
        self._reader_threads.shutdown(wait=True)
        self._readers.dispose()
        self._writer.dispose()

    async def prepare(self) -> None:
        """Opens every reader's connection."""

        def work() -> None:
            for connection in [self._readers.connect() for _ in range(sqlite.READERS)]:
                connection.close()

        await asyncio.to_thread(work)

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Runs ``work`` in the writer's thread; a caller that is cancelled drops one that has not begun."""
        return await asyncio.get_running_loop().run_in_executor(self._writer_thread, self._write, work)

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Runs ``work`` in a reader's thread."""
        return await asyncio.get_running_loop().run_in_executor(
            self._reader_threads, run_transaction, self._readers, work
        )

    def _write(self, work: Callable[[Connection], T]) -> T:
        if self.broken is not None:
            raise self.broken
        try:
            return run_transaction(self._writer, work)
        except StorageBroken as failure:
            raise self.fail(failure.reason) from failure


# PostgreSQL

_TRIES = 4
_TRANSACTION_SECONDS = 15.0
"""Time for a transaction, its repetitions included, whatever the network does."""
_LOST = (OSError, TimeoutError, PoolTimeoutError)
"""How the driver and the pool say that there is no connection; ``TimeoutError`` is asyncio's own too."""


class PostgresDatabase(Database):
    """A server that other processes use too.

    A transaction is a task that nobody cancels: cancelling one would drop its connection, and leave it open whether it
    has happened. The group commit has a connection of its own.
    """

    shared = True

    def __init__(self, url: URL, connections: int) -> None:
        super().__init__("postgresql")
        self._url = url
        writers = max(1, (connections - 1) // 2)
        self._appender = postgresql.open_appender(url)
        self._writers = postgresql.open_writers(url, writers)
        self._readers = postgresql.open_readers(url, max(1, connections - 1 - writers))
        self._tasks: set[asyncio.Task[Any]] = set()
        self._has_been_open = False

    async def close(self) -> None:
        """Waits for what is under way, then closes every connection."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_TRANSACTION_SECONDS)
        for engine in (self._appender, self._writers, self._readers):
            with suppress(SQLAlchemyError, *_LOST):
                await engine.dispose()

    async def prepare(self) -> None:
        """Opens one connection for reading; the others open when they are needed."""
        await self.read(lambda _connection: None)
        self._has_been_open = True

    async def write(self, work: Callable[[Connection], T]) -> T:
        """Runs ``work`` on one of the writers' connections."""
        return await self._write(self._writers, work)

    async def append(self, work: Callable[[Connection], T]) -> T:
        """Runs ``work`` on the connection of the group commit."""
        return await self._write(self._appender, work)

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Runs ``work`` on one of the readers' connections."""
        try:
            return await self._finished(self._run(self._readers, work))
        except OutcomeUnknown as error:  # It has changed nothing, whatever became of its COMMIT.
            raise DatabaseUnreachable("the connection was lost") from error

    async def alter(self, work: Callable[[Connection], T]) -> T:
        """Runs ``work`` on a connection of its own, without a limit of time but for locks."""
        engine = postgresql.open_alterer(self._url)
        try:
            return await self._finished(_transaction(engine, work))
        except _LOST as error:
            raise DatabaseUnreachable(postgresql.reason_of(error)) from error
        except DBAPIError as error:
            raise postgresql.named_failure(error) or error from error
        finally:
            await engine.dispose()

    async def _write(self, engine: "AsyncEngine", work: Callable[[Connection], T]) -> T:
        if self.broken is not None:
            raise self.broken
        return await self._finished(self._run(engine, work))

    async def _finished(self, transaction: Coroutine[Any, Any, T]) -> T:
        task = asyncio.create_task(transaction)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)

    def _done(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # Marks it as seen: whoever waited for it may be gone.

    async def _run(self, engine: "AsyncEngine", work: Callable[[Connection], T]) -> T:
        """Runs ``work`` as a transaction, again where others or a stale connection had it rolled back."""
        try:
            async with asyncio.timeout(_TRANSACTION_SECONDS):
                for _ in range(_TRIES - 1):
                    try:
                        return await _transaction(engine, work)
                    except DBAPIError as error:
                        if not (postgresql.is_repeatable(error) or postgresql.is_disconnect(error)):
                            raise
                    except OutcomeUnknown as error:
                        if engine is not self._readers or isinstance(error.__cause__, asyncio.CancelledError):
                            raise
                return await _transaction(engine, work)
        except _LOST as error:
            raise DatabaseUnreachable(postgresql.reason_of(error)) from error
        except Exception as error:
            raise self._named(error) from error

    def _named(self, error: Exception) -> Exception:
        failure = postgresql.named_failure(error)
        if self._has_been_open and isinstance(failure, DatabaseNotSupported):
            # A password that is being changed, a failover that is not over: what was right once may be so again.
            return DatabaseUnreachable(postgresql.reason_of(error))
        return failure or error


async def _transaction(engine: "AsyncEngine", work: Callable[[Connection], T]) -> T:
    """Runs ``work`` in one transaction.

    Raises:
        DBAPIError, OSError, TimeoutError: nothing was done.
        OutcomeUnknown: the connection was lost while the transaction was being committed.
    """
    done: list[T] = []
    try:
        async with engine.connect() as connection:
            try:
                result = await connection.run_sync(work)
            except BaseException:
                await _roll_back(connection)
                raise
            await _commit(connection)
            done.append(result)
    except (DBAPIError, asyncio.CancelledError, *_LOST):
        if not done:  # Else only the connection's return to its pool failed.
            raise
    return done[0]


async def _commit(connection: "AsyncConnection") -> None:
    try:
        await connection.commit()
    except (DBAPIError, asyncio.CancelledError, *_LOST) as error:  # Cancelled: by the time-out of ``_run`` alone.
        await _roll_back(connection)
        if isinstance(error, DBAPIError) and postgresql.is_repeatable(error):
            raise
        raise OutcomeUnknown from error


async def _roll_back(connection: "AsyncConnection") -> None:
    """Gives up the transaction; a connection on which even that fails is dropped."""
    try:
        async with asyncio.timeout(1.0):
            await connection.rollback()
    except (SQLAlchemyError, *_LOST):
        with suppress(SQLAlchemyError, *_LOST):
            await connection.invalidate()
