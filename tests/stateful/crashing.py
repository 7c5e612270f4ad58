"""Databases that die: what a process leaves on disk when it is killed, taken over by the next one."""

import shutil
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

from sqlalchemy import create_engine

from context_server.store.database import parse_url
from context_server.store.dialects.sqlite import open_writer
from context_server.store.maintenance import prepare
from tests.databases import emptied_database, lapse_leases


@cache
def _migrated() -> TemporaryDirectory[str]:
    """An empty database at the newest revision, made once: migrating takes longer than a whole example."""
    folder = TemporaryDirectory()
    engine = open_writer(parse_url(f"sqlite:///{folder.name}/context-server.db"))
    with engine.begin() as connection:
        prepare(connection, migrate=True, shared=False)
    engine.dispose()
    return folder


class CrashingDatabase:
    """A database file that can be found, again and again, as a killed process would have left it."""

    def __init__(self) -> None:
        self._folder = TemporaryDirectory()
        self._lives = 0
        self._path().parent.mkdir()
        shutil.copy(Path(_migrated().name) / "context-server.db", self._path())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def _path(self) -> Path:
        return Path(self._folder.name) / str(self._lives) / "context-server.db"

    @property
    def url(self) -> str:
        return f"sqlite:///{self._path()}"

    def crash(self) -> None:
        """From here on ``url`` names what is on disk now: file and write-ahead log, and nothing of any memory."""
        dead = self._path()
        self._lives += 1
        self._path().parent.mkdir()
        for name in ("context-server.db", "context-server.db-wal"):
            if (dead.parent / name).exists():
                shutil.copy(dead.parent / name, self._path().parent / name)

    def check_integrity(self) -> None:
        """The file is sound and no row refers to nothing."""
        engine = create_engine(f"sqlite+pysqlite:///{self._path()}")
        with engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA integrity_check").scalar() == "ok"
            assert connection.exec_driver_sql("PRAGMA foreign_key_check").all() == []
        engine.dispose()


class OutlivingDatabase:
    """A database of a PostgreSQL server, which outlives the nodes that use it: after a crash their leases run out."""

    def __init__(self) -> None:
        self._holds = ExitStack()
        self.url = self._holds.enter_context(emptied_database("postgresql", Path()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._holds.close()

    def crash(self) -> None:
        """The node is gone, and time passes."""
        lapse_leases(self.url)

    def check_integrity(self) -> None:
        """The server sees to that by itself."""
