"""What is done to a whole database: its schema and its epoch."""

from sqlalchemy import Connection

from context_server.records import new_id
from context_server.store import migrating, statements
from context_server.store.database import open_database
from context_server.store.dialects import dialect_of

_EPOCH = "epoch"


def prepare(connection: Connection, *, migrate: bool, shared: bool) -> str:
    """Brings the schema up to date, and gives the epoch: a new one to a new database.

    A database that other processes may be serving is not migrated by the way; an empty one is created.

    Raises:
        SchemaMismatch: the database is newer than this program, or older and may not be migrated here.
    """
    dialect_of(connection).lock_schema(connection)
    migrating.require_known(connection)
    if migrate and (not shared or migrating.revision_of(connection) is None):
        migrating.migrate(connection)
    migrating.require_newest(connection)
    epoch = read_epoch(connection)
    if epoch is None:
        epoch = new_id()
        connection.execute(*statements.insert_fact(_EPOCH, epoch))
    return epoch


def read_epoch(connection: Connection) -> str | None:
    """The epoch of the database, if it has one."""
    epoch: str | None = connection.execute(*statements.select_fact(_EPOCH)).scalar_one_or_none()
    return epoch


async def change_schema(database_url: str, target: str, *, down: bool) -> tuple[str | None, str | None]:
    """The schema's revision before and after moving it to ``target``.

    No server may be running on a SQLite file; on PostgreSQL nodes may, where the newer schema still serves them.

    Raises:
        DatabaseNotSupported, DatabaseInUse, DatabaseUnreachable, SchemaMismatch.
    """

    def work(connection: Connection) -> tuple[str | None, str | None]:
        dialect_of(connection).lock_schema(connection)
        before = migrating.revision_of(connection)
        migrating.migrate(connection, target, down=down)
        return before, migrating.revision_of(connection)

    async with open_database(database_url) as database:
        return await database.alter(work)


async def renew_epoch(database_url: str) -> str:
    """A new epoch for a database whose history may have been lost; servers that run on it end themselves.

    Raises:
        DatabaseNotSupported, DatabaseInUse, DatabaseUnreachable, SchemaMismatch.
    """

    def work(connection: Connection) -> str:
        migrating.require_newest(connection)
        epoch = new_id()
        connection.execute(*statements.update_fact(_EPOCH, epoch))
        return epoch

    async with open_database(database_url) as database:
        return await database.write(work)
