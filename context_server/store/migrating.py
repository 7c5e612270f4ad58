"""Runs the migrations of ``migrations/`` (Alembic) on an open connection."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection

from context_server.errors import SchemaMismatch

_PACKAGE = Path(__file__).resolve().parent.parent


def _scripts() -> Path:
    """The migrations: inside the wheel, or beside the package in a checkout."""
    shipped = _PACKAGE / "_migrations"
    return shipped if shipped.is_dir() else _PACKAGE.parent / "migrations"


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_scripts()).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def newest_revision() -> str:
    """The schema revision that this program knows."""
    return ScriptDirectory.from_config(_config()).get_current_head() or ""


def revision_of(connection: Connection) -> str | None:
    """The schema revision of the database; None when it is empty."""
    return MigrationContext.configure(connection).get_current_revision()


def migrate(connection: Connection, target: str = "head", *, down: bool = False) -> None:
    """Brings the schema to ``target`` in the connection's transaction: all of it, or nothing.

    Raises:
        SchemaMismatch: the database is newer than this program, or ``target`` is not a revision of it.
    """
    require_known(connection)
    config = _config(connection)
    try:
        if down:
            command.downgrade(config, target)
        else:
            command.upgrade(config, target)
    except CommandError as error:
        raise SchemaMismatch(f"cannot migrate to {target!r}: {error}") from None


def require_known(connection: Connection) -> None:
    """Refuses a database that a newer program has written.

    Raises:
        SchemaMismatch: its revision is not one of ours.
    """
    current = revision_of(connection)
    known = {script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()}
    if current is not None and current not in known:
        raise SchemaMismatch(
            f"the database has schema revision {current}, which this version does not know (it knows up to "
            f"{newest_revision()}); use the newer context-server that wrote it"
        )


def require_newest(connection: Connection) -> None:
    """Refuses a database that is not at the revision that this program works with.

    Raises:
        SchemaMismatch: it is older, or newer.
    """
    require_known(connection)
    current = revision_of(connection)
    if current != newest_revision():
        raise SchemaMismatch(
            f"the database is at schema revision {current or 'none'}, this version needs {newest_revision()}; "
            "run context-server migrate"
        )
