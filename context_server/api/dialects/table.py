"""What a dialect is: a table of event names and of functions that give their payloads.

A stream has a begin, chunks and an end. Each of these moments has rows in the table of a dialect, and each row is one
event: its name, and a function of what there is to tell. A moment without rows is passed over. Nothing here knows how
events are framed or sent; ``speaking`` does that for every dialect alike.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Generic, TypeVar

from context_server.records import Chunk, ChunkKind, Message

T = TypeVar("T")
Payload = Mapping[str, Any]


class Begin(StrEnum):
    """How a reply begins. A dialect without rows for a regenerated one begins it as any other."""

    STARTED = "started"
    REGENERATING = "regenerating"


class Moment(StrEnum):
    """What a chunk says. A dialect without rows for an approval tells of the tool call alone."""

    TEXT = "text"
    REASONING = "reasoning"
    TOOL_CALL = "tool_call"
    APPROVAL = "approval"
    TOOL_RESULT = "tool_result"
    STEP_STARTED = "step_started"
    STEP_FINISHED = "step_finished"
    ERROR = "error"


class End(StrEnum):
    """How a reply ends; one that was cancelled is finished, as far as it came."""

    FINISHED = "finished"
    REGENERATED = "regenerated"
    FAILED = "failed"


INSTEAD: Mapping[Begin | Moment | End, Begin | Moment | End] = {
    Begin.REGENERATING: Begin.STARTED,
    Moment.APPROVAL: Moment.TOOL_CALL,
    End.REGENERATED: End.FINISHED,
}
"""Whose rows are taken for a moment that a dialect does not tell apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The reply that a stream is about. ``sequence`` is the one that the stream starts after.

    ``path`` is that of the message, with what the routes lie below. ``question`` is the text that it answers, where the
    dialect asks for it. ``posted`` is the 202 answer of the POST that the stream answers in place of it.
    """

    context_id: str
    message_id: str
    path: str
    owner_key: str
    run_id: str | None = None
    sequence: int = 0
    question: str | None = None
    is_regenerated: bool = False
    posted: Payload | None = None


@dataclass(slots=True, kw_only=True)
class Told:
    """One chunk: ``text`` of a textual kind, else ``data`` as a pull shows it; ``tool`` is the name for a result."""

    sequence: int
    text: str = ""
    data: Payload
    tool: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A reply that has ended. ``content`` is its text, where the dialect asks for it and it fits one page."""

    reply: Reply
    message: Message
    content: str | None = None

    @property
    def seconds(self) -> float:
        """From the post to the end."""
        ended = self.message.completed_at or self.message.created_at
        return (ended - self.message.created_at).total_seconds()


@dataclass(frozen=True, slots=True)
class Row(Generic[T]):
    """One event of a dialect: its name, and its payload for what there is to tell."""

    name: str
    payload: Callable[[T], Payload]


def bare(_name: str, _reply: Reply, payload: Payload) -> Payload:
    """The payload is the event's data, and the event's name says what it is."""
    return payload


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """The events of one kind of client.

    ``frame`` makes an event's data of its name and payload. ``always_named`` gives each event its name, asked for or
    not. ``names_tools``, ``asks_question`` and ``asks_content`` say what has to be found out for the payloads.
    """

    name: str
    begins: Mapping[Begin, tuple[Row[Reply], ...]]
    chunks: Mapping[Moment, tuple[Row[Told], ...]]
    ends: Mapping[End, tuple[Row[Ended], ...]]
    frame: Callable[[str, Reply, Payload], Payload] = bare
    always_named: bool = True
    names_tools: bool = False
    asks_question: bool = False
    asks_content: bool = False

    @property
    def tells_regenerated(self) -> bool:
        """Whether it tells a regenerated reply apart."""
        return Begin.REGENERATING in self.begins

    @property
    def asks_facts(self) -> bool:
        """Whether something of the reply has to be read before a stream of it begins."""
        return self.asks_question or self.tells_regenerated

    @property
    def types(self) -> tuple[str, ...]:
        """The names of its events, each once."""
        tables: tuple[Mapping[Any, tuple[Row[Any], ...]], ...] = (self.begins, self.chunks, self.ends)
        rows = (row for table in tables for rows in table.values() for row in rows)
        return tuple(dict.fromkeys(row.name for row in rows))


_TEXTUAL = {ChunkKind.TEXT: Moment.TEXT, ChunkKind.REASONING: Moment.REASONING}


def moment_of(chunk: Chunk) -> Moment:
    """What a chunk says: a tool call that waits for a person is an approval, a step begins unless it says otherwise."""
    found = _TEXTUAL.get(chunk.kind)
    if found is not None:
        return found
    data = chunk.data or {}
    if chunk.kind is ChunkKind.TOOL_CALL and data.get("approval"):
        return Moment.APPROVAL
    if chunk.kind is ChunkKind.STEP:
        return Moment.STEP_FINISHED if data.get("status") == "finished" else Moment.STEP_STARTED
    return Moment(chunk.kind)


def usage_of(message: Message) -> dict[str, Any] | None:
    """What the reply took, as JSON values."""
    return None if message.usage is None else dict(message.usage)
