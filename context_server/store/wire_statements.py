"""The statements of ``wires``, named as those of ``statements``."""

from typing import Any

from sqlalchemy import Row, bindparam, select

from context_server.records import Role
from context_server.store.statements import Bound
from context_server.store.tables import contexts, messages

_SELECT_ELDER = (
    select(messages.c.id)
    .where(
        messages.c.context_id == bindparam("key_context_id"),
        messages.c.parent_id == bindparam("key_parent_id"),
        messages.c.role == Role.ASSISTANT,
        messages.c.position < bindparam("position"),
    )
    .limit(1)
)
_SELECT_USED_ID = select(contexts.c.id).where(contexts.c.id == bindparam("key_id"))


def select_elder(row: Row[Any]) -> Bound:
    """An older reply to the same message, if there is one; index context, parent."""
    return _SELECT_ELDER, {"key_context_id": row.context_id, "key_parent_id": row.parent_id, "position": row.position}


def select_used_id(context_id: str) -> Bound:
    """Whether a context has this id, whoever it belongs to; by primary key."""
    return _SELECT_USED_ID, {"key_id": context_id}
