"""Which files there are: their rows, one method, one transaction. Their bytes lie elsewhere (``files``)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row

from context_server.errors import FileUnknown
from context_server.records import FileRef, now
from context_server.store import file_statements, idempotency
from context_server.store.database import Database
from context_server.store.idempotency import Once
from context_server.store.rows import from_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """A file that can be referred to, and when it came."""

    ref: FileRef
    created_at: datetime


class StoredFiles:
    """The rows of files; ``Store.files``.

    Raises, from every method: as ``Store``.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, owner: str, ref: FileRef, once: Once[StoredFile] | None = None) -> StoredFile:
        """A new file of an owner, whose bytes are durable already.

        Raises:
            Replayed, IdempotencyKeyReused: ``once`` was used before.
        """

        def work(connection: Connection) -> StoredFile:
            now_ms = int(now().timestamp() * 1000)
            if once is not None:
                idempotency.look_up(connection, owner, once, now_ms)
            connection.execute(*file_statements.insert_file({**asdict(ref), "owner": owner, "created_at": now_ms}))
            file = StoredFile(ref=ref, created_at=from_ms(now_ms))
            if once is not None:
                idempotency.remember(connection, owner, once, file, now_ms)
            return file

        return await self._database.write(work)

    async def file(self, owner: str, file_id: str) -> StoredFile:
        """One file.

        Raises:
            FileUnknown: there is none, or it belongs to another owner.
        """

        def work(connection: Connection) -> StoredFile:
            row = connection.execute(*file_statements.select_file(owner, file_id)).one_or_none()
            if row is None:
                raise FileUnknown(file_id)
            return _to_file(row)

        return await self._database.read(work)

    async def page(
        self, owner: str, *, before: tuple[int, str] | None = None, limit: int = 50
    ) -> tuple[list[StoredFile], tuple[int, str] | None]:
        """A page of the owner's files, newest first, and the key of the next page."""

        def work(connection: Connection) -> tuple[list[StoredFile], tuple[int, str] | None]:
            rows = connection.execute(*file_statements.select_files(owner, before, limit + 1)).all()
            following = (rows[limit - 1].created_at, rows[limit - 1].id) if len(rows) > limit else None
            return [_to_file(row) for row in rows[:limit]], following

        return await self._database.read(work)

    async def refs(self, owner: str, file_ids: Sequence[str]) -> tuple[FileRef, ...]:
        """What a message holds of the files that it refers to, in their order; one that is named twice, twice.

        Raises:
            FileUnknown: one of them is not there, or belongs to another owner.
        """
        for file_id in file_ids:
            if "\x00" in file_id or not file_id.isascii():  # Which no database has to be asked about.
                raise FileUnknown(file_id)
        if not file_ids:
            return ()

        def work(connection: Connection) -> dict[str, FileRef]:
            rows = connection.execute(*file_statements.select_named_files(owner, set(file_ids)))
            return {row.id: _to_file(row).ref for row in rows}

        found = await self._database.read(work)
        for file_id in file_ids:
            if file_id not in found:
                raise FileUnknown(file_id)
        return tuple(found[file_id] for file_id in file_ids)

    async def known(self, file_ids: Sequence[str]) -> frozenset[str]:
        """Those of these ids that have a row, whoever's."""
        return await self._database.read(
            lambda connection: frozenset(connection.scalars(*file_statements.select_known_ids(file_ids)))
        )

    async def delete(self, owner: str, file_id: str) -> None:
        """Deletes the row of a file; nobody finds its bytes any more.

        Raises:
            FileUnknown: there is none, or it belongs to another owner.
        """

        def work(connection: Connection) -> None:
            if not connection.execute(*file_statements.delete_file(owner, file_id)).rowcount:
                raise FileUnknown(file_id)

        await self._database.write(work)


def _to_file(row: Row[Any]) -> StoredFile:
    ref = FileRef(id=row.id, name=row.name, media_type=row.media_type, size_bytes=row.size_bytes, sha256=row.sha256)
    return StoredFile(ref=ref, created_at=from_ms(row.created_at))
