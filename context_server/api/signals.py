"""How server-sent events are written. ``events`` describes them; tests hold the two together.

Their data is JSON in ASCII on one line, so that no character of it can end a line or an event early.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from context_server import records
from context_server.api import schemas

SIGNAL_TYPES: dict[type, str] = {
    records.StateChanged: "state_changed",
    records.ContentDelta: "content_delta",
    records.MessageCompleted: "message_completed",
    records.ContextChanged: "context_changed",
    records.ContextDeleted: "context_deleted",
}


@lru_cache(maxsize=64)
def _time_of_commit(moment: datetime) -> str:
    """``schemas.format_time`` for the time of a commit, which all its signals share."""
    return schemas.format_time(moment)


def _content_delta_json(signal: records.ContentDelta) -> str:
    """The most frequent signal, written without a dictionary; ids are UUIDs and need no escaping."""
    return (
        f'{{"type":"content_delta","context_id":"{signal.context_id}","message_id":"{signal.message_id}",'
        f'"current_sequence":{signal.current_sequence},"timestamp":"{_time_of_commit(signal.timestamp)}"}}'
    )


def signal_json(signal: records.Signal, epoch: str) -> str:
    """A signal as JSON in ASCII."""
    if isinstance(signal, records.ContentDelta):
        return _content_delta_json(signal)
    return json.dumps(_signal_fields(signal, epoch), separators=(",", ":"))


def _signal_fields(
    signal: records.StateChanged | records.MessageCompleted | records.ContextChanged | records.ContextDeleted,
    epoch: str,
) -> dict[str, Any]:
    """A signal as JSON values, ``type`` first."""
    match signal:
        case records.StateChanged():
            fields = {
                "type": "state_changed",
                "context_id": signal.context_id,
                "new_state": signal.new_state,
                "previous_state": signal.previous_state,
                "version": signal.version,
                "epoch": epoch,
                "run_id": signal.run_id,
                "timestamp": schemas.format_time(signal.timestamp),
            }
            return fields if signal.tool is None else {**fields, "tool": signal.tool}
        case records.MessageCompleted():
            return {
                "type": "message_completed",
                "context_id": signal.context_id,
                "message_id": signal.message_id,
                "final_sequence": signal.final_sequence,
                "status": signal.status,
                "version": signal.version,
                "timestamp": schemas.format_time(signal.timestamp),
            }
    return {
        "type": SIGNAL_TYPES[type(signal)],
        "context_id": signal.context_id,
        "version": signal.version,
        "timestamp": schemas.format_time(signal.timestamp),
    }


def heartbeat_fields(heads: Sequence[tuple[str, str, int]]) -> dict[str, Any]:
    """The heartbeat: the open messages of the subscribed contexts, and how far each is."""
    return {
        "type": "heartbeat",
        "timestamp": schemas.format_time(records.now()),
        "heads": [
            {"context_id": context_id, "message_id": message_id, "current_sequence": sequence}
            for context_id, message_id, sequence in heads
        ],
    }


def goodbye_fields(retry_ms: int) -> dict[str, Any]:
    """The last event of a stream that ends because the server does."""
    return {"type": "goodbye", "retry_ms": retry_ms, "timestamp": schemas.format_time(records.now())}


def frame_event(data: str, *, name: str | None = None, event_id: str | None = None, retry_ms: int | None = None) -> str:
    """One server-sent event with ``data`` of one line, and an id that holds only ``[0-9A-Za-z:._-]``."""
    head = "" if event_id is None else f"id: {event_id}\n"
    if name is not None:
        head += f"event: {name}\n"
    if retry_ms is not None:
        head += f"retry: {retry_ms}\n"
    return f"{head}data: {data}\n\n"


def encode_event(
    fields: Mapping[str, Any], *, named: bool = False, event_id: str | None = None, retry_ms: int | None = None
) -> bytes:
    """One server-sent event; its name, where it has one, is its type."""
    data = json.dumps(fields, separators=(",", ":"))
    name = fields["type"] if named else None
    return frame_event(data, name=name, event_id=event_id, retry_ms=retry_ms).encode("ascii")
