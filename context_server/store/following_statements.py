"""The statements of following what other nodes write, named as those of ``statements``.

What is asked for travels as one JSON object, ``{id: [number, …], …}``, however much it is: each statement is then the
same text every time, which is built and prepared once. Each finds by itself whatever belongs together, for a node that
follows much reads often, and every round trip counts.
"""

from collections.abc import Mapping

from sqlalchemy import JSON, BigInteger, Text, and_, bindparam, case, cast, func, literal_column, select

from context_server.records import Role
from context_server.store.statements import Bound
from context_server.store.tables import NOBODY, chunks, contexts, messages, runs

_ASKED = func.json_each(bindparam("asked", type_=JSON)).table_valued("key", "value", name="asked")
_KEY = _ASKED.c.key
_FIRST, _SECOND, _THIRD = (
    cast(_ASKED.c.value.op("->>", return_type=Text)(literal_column(place)), BigInteger) for place in ("0", "1", "2")
)

_REPLY, _ENDED = messages.alias("reply"), messages.alias("ended")
_HAS_MOVED = contexts.c.version != _FIRST
_SELECT_MOVEMENTS = (
    select(
        contexts.c.id,
        contexts.c.owner,
        contexts.c.state,
        contexts.c.version,
        contexts.c.active_run_id,
        runs.c.tool,
        _HAS_MOVED.label("has_moved"),
        case((_HAS_MOVED, contexts.c.title)).label("title"),
        case((_HAS_MOVED, contexts.c.mode)).label("mode"),
        case((_HAS_MOVED, contexts.c.metadata)).label("metadata"),
        _REPLY.c.id.label("reply_id"),
        _REPLY.c.sequence.label("reply_sequence"),
        _ENDED.c.id.label("ended_id"),
        _ENDED.c.status.label("ended_status"),
        _ENDED.c.final_sequence.label("ended_sequence"),
        _ENDED.c.ended_version,
    )
    .select_from(_ASKED)
    .join(contexts, contexts.c.id == _KEY)
    .outerjoin(runs, runs.c.id == contexts.c.active_run_id)
    .outerjoin(_REPLY, _REPLY.c.id == runs.c.message_id)
    .outerjoin(
        _ENDED,
        and_(
            _ENDED.c.context_id == _KEY,
            _ENDED.c.ended_version > _SECOND,
            _ENDED.c.completed_at >= _THIRD,
            _ENDED.c.role == Role.ASSISTANT,
        ),
    )
    .where(contexts.c.owner != NOBODY)
)
# The chunks of a message are taken to be of one size: so many of them are read as fit its share of the bytes.
_COUNT_THAT_FITS = (
    (messages.c.sequence - _FIRST)
    * bindparam("share_bytes", type_=BigInteger)
    // (1 + messages.c.content_bytes - _SECOND)
)
_SELECT_GROWTH = (
    select(
        messages.c.id,
        messages.c.context_id,
        contexts.c.owner,
        messages.c.status,
        messages.c.sequence.label("head"),
        messages.c.content_bytes,
        messages.c.final_sequence,
        messages.c.digest,
        chunks.c.sequence,
        chunks.c.kind,
        chunks.c.text,
        chunks.c.data,
    )
    .select_from(_ASKED)
    .join(messages, messages.c.id == _KEY)
    .join(contexts, contexts.c.id == messages.c.context_id)
    .outerjoin(
        chunks,
        and_(
            chunks.c.message_id == messages.c.id,
            chunks.c.sequence > _FIRST,
            chunks.c.sequence <= _FIRST + bindparam("share_rows", type_=BigInteger),
            chunks.c.sequence <= _FIRST + 1 + _COUNT_THAT_FITS,
        ),
    )
    .where(contexts.c.owner != NOBODY)
    .order_by(messages.c.id, chunks.c.sequence)
)


def select_movements(asked: Mapping[str, tuple[int, int, int]]) -> Bound:
    """How contexts stand, with what they are busy with, and replies that have ended: a row for each of those, or one.

    For ``{id: (version, ended_version, ended_ms)}``: what a client may change, where the context is at another version;
    replies that ended after a version, at a time or later. Primary keys, and the index context, ended_version.
    """
    return _SELECT_MOVEMENTS, {"asked": asked}


def select_growth(asked: Mapping[str, tuple[int, int]], share_rows: int, share_bytes: int) -> Bound:
    """How far messages are, and the next chunks of each: a row for each chunk, or one.

    For ``{id: (sequence, content_bytes)}`` of what is known of each. Primary keys, and ranges of that of the chunks.
    """
    return _SELECT_GROWTH, {"asked": asked, "share_rows": share_rows, "share_bytes": share_bytes}
