"""The statements of the tree that the messages of a context form, named as those of ``statements``.

A line is a message and everything before it, by ``parent_id``: the database climbs it by primary key, from its end.
"""

from typing import Any

from sqlalchemy import CTE, Integer, Text, bindparam, case, cast, exists, func, literal, select
from sqlalchemy.sql.expression import Select

from context_server.records import Role
from context_server.store.statements import Bound
from context_server.store.tables import contexts, messages, runs


def _line(start: Select[Any], *, after: bool) -> CTE:
    """The ids of a line, newest first, each with its distance from the end; no further back than asked for."""
    line = start.cte("line", recursive=True)
    above = messages.alias("above")
    climbed = select(above.c.id, above.c.parent_id, above.c.position, line.c.depth + 1).join(
        line, above.c.id == line.c.parent_id
    )
    is_wanted = line.c.position > bindparam("after") if after else line.c.depth < bindparam("rows")
    return line.union_all(climbed.where(is_wanted))


_HEAD = (
    select(messages.c.id, messages.c.parent_id, messages.c.position, literal(1, Integer).label("depth"))
    .join(contexts, contexts.c.head_message_id == messages.c.id)
    .where(contexts.c.id == bindparam("key_context_id"))
)
_PARENT = messages.alias("reply")
_ASKED = (
    select(messages.c.id, messages.c.parent_id, messages.c.position, literal(1, Integer).label("depth"))
    .join(_PARENT, _PARENT.c.parent_id == messages.c.id)
    .where(_PARENT.c.id == bindparam("key_id"))
)
_GIVEN = select(messages.c.id, messages.c.parent_id, messages.c.position, literal(1, Integer).label("depth")).where(
    messages.c.id == bindparam("key_id"), messages.c.context_id == bindparam("key_context_id")
)

_HEAD_LINE = _line(_HEAD, after=True)
_PAGE = (
    select(messages)
    .join(_HEAD_LINE, _HEAD_LINE.c.id == messages.c.id)
    .where(messages.c.position > bindparam("after"))
    .order_by(messages.c.position)
    .limit(bindparam("rows"))
    .subquery("page")
)
_ALL_PAGE = (
    select(messages)
    .where(messages.c.context_id == bindparam("key_context_id"), messages.c.position > bindparam("after"))
    .order_by(messages.c.position)
    .limit(bindparam("rows"))
    .subquery("page")
)
_SIBLING = messages.alias("sibling")


def _with_siblings(page: Any) -> Select[Any]:
    """The rows of a page, each with ``siblings``: ``position:id`` of every message with its parent, by commas."""
    named = cast(_SIBLING.c.position, Text) + literal(":") + _SIBLING.c.id
    siblings = (
        select(func.aggregate_strings(named, ","))
        .where(
            _SIBLING.c.context_id == page.c.context_id,
            _SIBLING.c.parent_id.is_not_distinct_from(page.c.parent_id),
            _SIBLING.c.steers_run_id.is_(None),
        )
        .correlate(page)
        .scalar_subquery()
    )
    return select(page, siblings.label("siblings")).order_by(page.c.position)


_SELECT_LINE = _with_siblings(_PAGE)
_SELECT_TREE = _with_siblings(_ALL_PAGE)
_HISTORY_LINE = _line(_ASKED, after=False)
_SELECT_HISTORY = (
    select(messages).join(_HISTORY_LINE, _HISTORY_LINE.c.id == messages.c.id).order_by(_HISTORY_LINE.c.depth)
)
_FORKED_LINE = _line(_GIVEN, after=True)
_SELECT_FORKED = select(messages).join(_FORKED_LINE, _FORKED_LINE.c.id == messages.c.id).order_by(messages.c.position)
_SELECT_STEERED = (
    select(messages)
    .where(
        messages.c.steers_run_id == bindparam("key_run_id"),
        messages.c.steered_at.is_not(None),
        messages.c.content_id.is_(None),  # In a fork it steers nothing any more.
    )
    .order_by(messages.c.position)
)
_STEERED = runs.alias("steered")
_ACTIVE = runs.alias("active")
_TIP = messages.alias("tip")
_SELECT_NEWEST_REPLIES = (
    select(messages)
    .select_from(contexts)
    .outerjoin(_ACTIVE, _ACTIVE.c.id == contexts.c.active_run_id)
    .outerjoin(_TIP, _TIP.c.id == contexts.c.head_message_id)
    .outerjoin(_STEERED, _STEERED.c.id == _TIP.c.steers_run_id)
    .join(
        messages,
        messages.c.id
        == func.coalesce(_ACTIVE.c.message_id, case((_TIP.c.role == Role.ASSISTANT, _TIP.c.id)), _STEERED.c.message_id),
    )
    .where(
        contexts.c.id.in_(bindparam("key_ids", expanding=True)),
        messages.c.context_id == contexts.c.id,  # What stands last in a fork may have steered a run of another context.
    )
)
_SHARING = messages.alias("sharing")
_SELECT_SHARED = (
    select(_SHARING.c.id)
    .join(messages, messages.c.id == _SHARING.c.content_id)
    .where(messages.c.context_id == bindparam("key_context_id"), _SHARING.c.context_id != messages.c.context_id)
    .limit(1)
)
_SELECT_CONTENT = select(messages).where(messages.c.id == bindparam("key_id"))
IS_SHARED = exists(select(_SHARING.c.id).where(_SHARING.c.content_id == messages.c.id))
"""Whether a fork has a share of a message's text."""


def select_line(context_id: str, after: int, limit: int) -> Bound:
    """Messages of the head's line after a position, oldest first, with their siblings; primary keys, and by parent."""
    return _SELECT_LINE, {"key_context_id": context_id, "after": after, "rows": limit}


def select_tree(context_id: str, after: int, limit: int) -> Bound:
    """All messages of a context after a position, oldest first, with their siblings; index context, position."""
    return _SELECT_TREE, {"key_context_id": context_id, "after": after, "rows": limit}


def select_history(reply_message_id: str, limit: int) -> Bound:
    """The line that a reply goes on from, newest first; primary keys."""
    return _SELECT_HISTORY, {"key_id": reply_message_id, "rows": limit}


def select_forked(context_id: str, message_id: str) -> Bound:
    """The whole line up to a message, oldest first; primary keys."""
    return _SELECT_FORKED, {"key_context_id": context_id, "key_id": message_id, "after": 0}


def select_steered(run_id: str) -> Bound:
    """The messages that a run has taken, oldest first; partial index of those."""
    return _SELECT_STEERED, {"key_run_id": run_id}


def select_newest_replies(context_ids: list[str]) -> Bound:
    """The reply that each context is busy with, or that stands last on its line; primary keys."""
    return _SELECT_NEWEST_REPLIES, {"key_ids": context_ids}


def select_shared(context_id: str) -> Bound:
    """A message of another context that shares the text of one of this; index context, position, and by content."""
    return _SELECT_SHARED, {"key_context_id": context_id}


def select_content(message_id: str) -> Bound:
    """The message that holds the chunks which a message of a fork shares, by primary key."""
    return _SELECT_CONTENT, {"key_id": message_id}
