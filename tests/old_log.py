"""A log of replies that ended long ago, with every kind of chunk, and pulls of it; for what tries how it is kept."""

import hashlib
import random
from dataclasses import dataclass
from typing import Any

from context_server.records import ChunkKind, MessageStatus, Mode, Role, State, new_id
from context_server.store import tables
from tests.databases import beside

OWNER = "local"
SHORT = 1000
"""Chunks of each reply but the long one."""
ROWS_AT_ONCE = 20_000


@dataclass(frozen=True, slots=True)
class Reply:
    """An ended reply of ``length`` chunks."""

    context_id: str
    message_id: str
    length: int

    @property
    def path(self) -> str:
        """Where it is pulled."""
        return f"/contexts/{self.context_id}/messages/{self.message_id}/content"


def _chunk(message_id: str, number: int) -> dict[str, Any]:
    """Mostly words, with every other kind among them."""
    row = {"message_id": message_id, "sequence": number, "kind": ChunkKind.TEXT.value, "text": None, "data": None}
    match number % 100:
        case 7:
            row |= {"kind": ChunkKind.REASONING.value, "text": f"thinking of {number}…"}
        case 13:
            row |= {
                "kind": ChunkKind.TOOL_CALL.value,
                "data": {"id": f"call-{number}", "name": "look", "arguments": {}},
            }
        case 14:
            data = {"id": f"call-{number - 1}", "status": "ok", "result": [number, 0.5, None, "ü"], "seconds": 0.25}
            row |= {"kind": ChunkKind.TOOL_RESULT.value, "data": data}
        case 50:
            row |= {"kind": ChunkKind.STEP.value, "data": {"number": number}}
        case 77:
            row |= {"kind": ChunkKind.ERROR.value, "data": {"code": "none"}}
        case _:
            row |= {"text": f"{number}:{hashlib.sha256(str(number).encode()).hexdigest()[:12]} "}
    return row


def fill(url: str, chunks: int) -> list[Reply]:
    """Writes the log into a database with its schema."""
    long = max(SHORT, chunks // 10)
    lengths = [long, *[SHORT] * ((chunks - long) // SHORT)]
    replies = []
    with beside(url).begin() as connection:
        for place, length in enumerate(lengths):
            reply = Reply(new_id(), new_id(), length)
            moment = 1_700_000_000_000 + place
            connection.execute(tables.contexts.insert(), {
                "id": reply.context_id, "owner": OWNER, "mode": Mode.ACT, "state": State.IDLE, "version": 4,
                "message_count": 1, "head_message_id": reply.message_id, "metadata": {}, "created_at": moment,
                "updated_at": moment,
            })  # fmt: skip
            connection.execute(tables.messages.insert(), {
                "id": reply.message_id, "context_id": reply.context_id, "position": 1, "role": Role.ASSISTANT,
                "attempt": 1, "status": MessageStatus.COMPLETED, "sequence": length, "final_sequence": length,
                "content_bytes": 20 * length, "ended_version": 4, "client_metadata": {}, "digest": "0" * 64,
                "created_at": moment, "completed_at": moment,
            })  # fmt: skip
            for first in range(1, length + 1, ROWS_AT_ONCE):
                numbers = range(first, min(first + ROWS_AT_ONCE, length + 1))
                connection.execute(tables.chunks.insert(), [_chunk(reply.message_id, number) for number in numbers])
            replies.append(reply)
    return replies


def choose_pulls(replies: list[Reply], count: int, seed: int) -> list[str]:
    """The paths that are asked for, the same in every phase."""
    chosen = random.Random(seed)
    pulls = []
    for number in range(count):
        reply = replies[0] if number % 4 == 0 else chosen.choice(replies)
        start = chosen.choice([0, reply.length - 10, chosen.randrange(reply.length), chosen.randrange(reply.length)])
        query = f"from_sequence={start}"
        if chosen.random() < 0.6:
            query += f"&to_sequence={min(reply.length, start + chosen.choice([0, 1, 9, 200, 5000]))}"
        if chosen.random() < 0.5:
            query += "&view=chunks"
        pulls.append(f"{reply.path}?{query}")
    return pulls
