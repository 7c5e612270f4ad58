"""Keeping house: what the keeper has the database do, one method, one transaction, each of them short."""

from functools import partial

from context_server.store import compaction, retention
from context_server.store.compaction import Compacted
from context_server.store.database import Database
from context_server.store.dialects import dialect_of
from context_server.store.keeping_statements import Place
from context_server.store.retention import ExpiredContext


class Housekeeping:
    """The transactions of the keeper; ``Store.house``.

    Raises, from every method: as ``Store``.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def compact(self, min_age_ms: int, after: Place | None) -> Compacted:
        """Merges some chunks of messages that ended so long ago, going on after a place; no pull answers otherwise."""
        return await self._database.write(partial(compaction.compact, min_age_ms=min_age_ms, after=after))

    async def expire_contexts(self, min_age_ms: int) -> list[ExpiredContext]:
        """Some contexts that were without activity for so long, oldest first; they are gone for everybody."""
        return await self._database.write(partial(retention.expire_contexts, min_age_ms=min_age_ms))

    async def clear_contexts(self) -> bool:
        """Deletes some rows of expired contexts; whether there were any."""
        return await self._database.write(retention.clear_contexts)

    async def end_stalled_sessions(self) -> int:
        """Frees what nodes have locked that stand still in the middle of a statement; how many sessions that ended."""
        # By a reader: those who want to write may all be waiting for just these locks.
        return await self._database.read(lambda connection: dialect_of(connection).end_stalled_sessions(connection))
