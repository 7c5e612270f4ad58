"""Databases for tests, made empty and dropped afterwards: SQLite files, and databases of a PostgreSQL server.

The server is the one at ``CONTEXT_SERVER_TEST_POSTGRES`` (``postgresql://postgres@127.0.0.1:5432`` if it is not set);
where none answers there, a private one is started. Where its programs are not installed either, the test is skipped; in
CI it fails.
"""

import asyncio
import atexit
import functools
import itertools
import os
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Engine, NullPool, create_engine, make_url
from sqlalchemy.exc import OperationalError

from context_server.store.maintenance import change_schema
from tests.engines import Postgres

KINDS = ("sqlite", "postgresql")
_SERVER = "postgresql://postgres@127.0.0.1:5432"
_PRIVATE = ExitStack()  # Held for the life of the process that runs the tests.
atexit.register(_PRIVATE.close)
_numbers = itertools.count()


@contextmanager
def emptied_database(kind: str, folder: Path) -> Iterator[str]:
    """The URL of a database without contexts; on PostgreSQL the same one each time, since making one takes long."""
    if kind == "sqlite":
        with new_database(kind, folder) as url:
            yield url
        return
    url = _migrated()
    run_beside(url, "TRUNCATE contexts, files, idempotency_keys, server_facts CASCADE")
    yield url


@functools.cache
def _migrated() -> str:
    url = _PRIVATE.enter_context(new_database("postgresql", Path()))
    asyncio.run(change_schema(url, "head", down=False))
    return url


@contextmanager
def new_database(kind: str, folder: Path) -> Iterator[str]:
    """The URL of an empty database, which is gone afterwards."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'context-server.db'}"
        return
    name = f"context_server_test_{uuid.uuid4().hex[:12]}_{next(_numbers)}"
    _on_server(f'CREATE DATABASE "{name}"')
    try:
        yield str(_server().set(drivername="postgresql+asyncpg", database=name).render_as_string(hide_password=False))
    finally:
        _on_server(f'DROP DATABASE "{name}" WITH (FORCE)')


def beside(database_url: str) -> Engine:
    """A synchronous engine on a database, beside whoever serves it."""
    url = make_url(database_url)
    driver = "sqlite+pysqlite" if url.get_backend_name() == "sqlite" else "postgresql+psycopg"
    return create_engine(url.set(drivername=driver), poolclass=NullPool)


def run_beside(database_url: str, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
    """Runs one statement with ``?`` for its parameters on a connection of its own; its rows, if it has some."""
    with beside(database_url).begin() as connection:
        if connection.dialect.name == "postgresql":
            statement = statement.replace("?", "%s")
        result = connection.exec_driver_sql(statement, parameters)
        return [tuple(row) for row in result] if result.returns_rows else []


def lapse_leases(database_url: str) -> None:
    """Lets the time of every lease run out, as when nothing was heard of its node for long."""
    run_beside(database_url, "UPDATE runs SET lease_expires_at = 1 WHERE lease_expires_at IS NOT NULL")


def _on_server(statement: str) -> None:
    engine = create_engine(_server().set(database="postgres"), poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(statement)


@functools.cache
def _server() -> URL:
    """The server that answers, or a private one."""
    url = make_url(os.environ.get("CONTEXT_SERVER_TEST_POSTGRES", _SERVER)).set(drivername="postgresql+psycopg")
    try:
        with create_engine(url.set(database="postgres"), poolclass=NullPool).connect():
            return url
    except OperationalError:
        private = _PRIVATE.enter_context(Postgres())
        return make_url(private.url("postgres")).set(drivername="postgresql+psycopg")
