"""What differs between databases: how an append is written, what has to be locked, what errors mean.

``dialect_of(connection)`` gives the functions for the database of a connection; each dialect is a module of them.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

from sqlalchemy import Connection

from context_server.records import Append, Chunk
from context_server.store.dialects import postgresql, sqlite


class Dialect(Protocol):
    """What each database does in its own way."""

    def lock_context(self, connection: Connection, owner: str, context_id: str) -> None:
        """Keeps other transactions from moving the context until this one ends."""
        ...

    def lock_key(self, connection: Connection, owner: str, key: str) -> None:
        """Keeps other transactions from using the idempotency key until this one ends."""
        ...

    def lock_schema(self, connection: Connection) -> None:
        """Keeps other transactions from migrating until this one ends."""
        ...

    def advance_messages(self, connection: Connection, appends: Sequence[Append]) -> bool:
        """Moves the head of each message of a batch; False when a row was not hit, so that some run has been fenced.

        A row is hit by message, attempt and expected sequence, only while it is open, and where runs have leases only
        while the lease lives.
        """
        ...

    def insert_chunks(self, connection: Connection, message_id_and_chunk: Iterable[tuple[str, Chunk]]) -> None:
        """Adds the chunks of a batch, in one statement."""
        ...

    def end_stalled_sessions(self, connection: Connection) -> int:
        """Ends sessions of nodes that stand still in the middle of a statement, and hold locks; how many."""
        ...

    def version_of(self, connection: Connection) -> str:
        """The version of the database: ``3.40.1``, ``15.8``."""
        ...


_DIALECTS: dict[str, Dialect] = {"sqlite": sqlite, "postgresql": postgresql}


def dialect_of(connection: Connection) -> Dialect:
    """The functions for the database of a connection."""
    return _DIALECTS[connection.dialect.name]
