"""Moves a context from one version to the next."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Connection

from context_server.store import statements


class ContextMoved(Exception):
    """A context was moved by somebody else between the read and the write of one transaction: a lock is missing."""


def move_context(connection: Connection, context_id: str, version: int, values: Mapping[str, Any]) -> None:
    """Changes a context that this transaction has read at ``version``, and locked: a compare-and-set that must hit.

    Raises:
        ContextMoved: it did not; a defect, after which nothing of the transaction may stand.
    """
    if connection.execute(*statements.update_context(context_id, version, values)).rowcount != 1:
        raise ContextMoved(context_id)
