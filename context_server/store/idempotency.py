"""Idempotency keys: the first answer is stored in the transaction of what it did, and given again for the same key.

After draft-ietf-httpapi-idempotency-key-header.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from sqlalchemy import Connection

from context_server.errors import IdempotencyKeyReused
from context_server.store import statements
from context_server.store.dialects import dialect_of

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Once(Generic[T]):
    """A request that may be sent again: its key, what it was (a SHA-256), and how its answer is written down."""

    key: str
    fingerprint: str
    encode: Callable[[T], str]
    lifetime_ms: int


class Replayed(Exception):
    """Not a failure: the request was done before, and ``answer`` is what it was answered."""

    def __init__(self, answer: str) -> None:
        super().__init__("the request was done before")
        self.answer = answer


def look_up(connection: Connection, owner: str, once: Once[T], now_ms: int) -> None:
    """Passes when the key is new; nobody else uses it until the transaction ends.

    Raises:
        Replayed: the same request was done before.
        IdempotencyKeyReused: another request used the key.
    """
    dialect_of(connection).lock_key(connection, owner, once.key)
    row = connection.execute(*statements.select_idempotency_key(owner, once.key)).one_or_none()
    if row is None:
        return
    if row.created_at <= now_ms - once.lifetime_ms:
        connection.execute(*statements.delete_idempotency_key(owner, once.key))
        return
    if row.fingerprint != once.fingerprint:
        raise IdempotencyKeyReused
    raise Replayed(row.answer)


def remember(connection: Connection, owner: str, once: Once[T], result: T, now_ms: int) -> None:
    """Stores the answer beside what it did."""
    connection.execute(
        *statements.insert_idempotency_key(
            {
                "owner": owner,
                "key": once.key,
                "fingerprint": once.fingerprint,
                "answer": once.encode(result),
                "created_at": now_ms,
            }
        )
    )
