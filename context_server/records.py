"""The vocabulary as frozen values: what the rooms hand each other. Pure: no I/O, no JSON, no HTTP.

Ids are UUIDv7 strings; times are aware UTC datetimes; sequences and versions are integers from 0 to ``MAX_INTEGER``.
"""

import json
import secrets
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

MAX_INTEGER = 2**53 - 1
"""The largest integer that every JSON reader keeps exactly (RFC 8259, section 6)."""


def new_id() -> str:
    """A UUIDv7 (RFC 9562, section 5.7): 48 bits of Unix milliseconds, then 74 random bits."""
    value = (time.time_ns() // 1_000_000) << 80 | secrets.randbits(80)
    value = value & ~(0xF << 76) | 0x7 << 76
    value = value & ~(0x3 << 62) | 0x2 << 62
    return str(uuid.UUID(int=value))


def now() -> datetime:
    """The wall clock, aware and in UTC; for people to read, never to order by."""
    return datetime.now(UTC)


class State(StrEnum):
    """Where a context is; ``machine.TRANSITIONS`` says how it moves."""

    IDLE = "idle"
    QUEUED = "queued"
    THINKING = "thinking"
    STREAMING = "streaming"
    CALLING_TOOL = "calling_tool"
    AWAITING_APPROVAL = "awaiting_approval"
    CANCELLING = "cancelling"
    FAILED = "failed"


class Command(StrEnum):
    """What a client may ask of a context."""

    SEND = "send"
    CANCEL = "cancel"
    APPROVE = "approve"
    DENY = "deny"


class Mode(StrEnum):
    """How an agent may act in a context."""

    PLAN = "plan"
    ACT = "act"


class Role(StrEnum):
    """Who said a message."""

    USER = "user"
    ASSISTANT = "assistant"


class MessageStatus(StrEnum):
    """How far a message is; the last three are endings and final."""

    PENDING = "pending"
    STREAMING = "streaming"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether the message can never grow again."""
        return self in (MessageStatus.COMPLETED, MessageStatus.FAILED, MessageStatus.CANCELLED)


class RunStatus(StrEnum):
    """How far a run is; the first three are active, and a context has at most one of those."""

    QUEUED = "queued"
    RUNNING = "running"
    SUSPENDED = "suspended"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


class ChunkKind(StrEnum):
    """What a chunk holds: ``text`` and ``reasoning`` carry text, the others ``data``."""

    TEXT = "text"
    REASONING = "reasoning"
    TOOL_CALL = "tool_call"
    TOOL_RESULT = "tool_result"
    STEP = "step"
    ERROR = "error"

    @property
    def is_textual(self) -> bool:
        """Whether chunks of this kind carry text, and so adjacent ones may be merged."""
        return self is ChunkKind.TEXT or self is ChunkKind.REASONING


@dataclass(frozen=True, slots=True, kw_only=True)
class ActiveRun:
    """The run that a context is busy with."""

    id: str
    message_id: str
    status: RunStatus
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """One conversation: messages, a state, a version."""

    id: str
    owner: str
    epoch: str
    title: str | None
    mode: Mode
    state: State
    version: int
    head_message_id: str | None
    active_run: ActiveRun | None
    metadata: Mapping[str, Any]
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a message or a run failed: a stable ``code``, and never what was said."""

    code: str
    detail: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What one author said. ``content`` and ``content_sequence`` are None unless they were asked for."""

    id: str
    context_id: str
    parent_id: str | None
    role: Role
    status: MessageStatus
    sequence: int
    final_sequence: int | None
    display: Any
    client_metadata: Mapping[str, Any]
    run_id: str | None
    error: Failure | None
    usage: Mapping[str, Any] | None
    digest: str | None
    created_at: datetime
    completed_at: datetime | None
    content: str | None = None
    content_sequence: int | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A durable, immutable piece of a message: ``text`` for textual kinds, ``data`` for the others."""

    sequence: int
    kind: ChunkKind
    text: str | None
    data: Mapping[str, Any] | None = None

    @property
    def size_bytes(self) -> int:
        """What the chunk counts for in pages and limits: its text or its data as UTF-8."""
        content = self.text if self.text is not None else json.dumps(self.data, ensure_ascii=False)
        return len(content) if content.isascii() else len(content.encode())


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece that an agent has just yielded, not yet durable.

    ``tool_call`` data is ``{id, name, arguments}``, ``tool_result`` data ``{id, status, result, seconds}``,
    ``step`` data ``{number, total?}``.
    """

    kind: ChunkKind
    text: str | None = None
    data: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One execution of an agent for one reply; ``attempt`` fences stale owners."""

    id: str
    context_id: str
    message_id: str
    owner: str
    attempt: int
    mode: Mode = Mode.ACT
    metadata: Mapping[str, Any] = field(default_factory=dict)


class Outcome(StrEnum):
    """How an agent's run ended by itself; a run that was told to stop is cancelled whatever it said last."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """The end of a run: how, why, and the SHA-256 of the whole text as 64 hexadecimal digits."""

    outcome: Outcome
    digest: str
    failure: Failure | None = None
    usage: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Append:
    """What one run adds to the log in one commit.

    ``expected_sequence`` is the head that the run believes in; the append must hit the row that has it, and the run's
    attempt, or the run is fenced. ``phases`` are the kinds that may move the context's state, in order, each with the
    number of tool calls open after it. ``content_bytes`` is the size of the message after this append.
    """

    run: Run
    expected_sequence: int
    chunks: tuple[Chunk, ...]
    content_bytes: int
    phases: tuple[tuple[ChunkKind, int], ...] = ()
    ending: Ending | None = None

    @property
    def sequence(self) -> int:
        """The head after this append."""
        return self.expected_sequence + len(self.chunks)


@dataclass(frozen=True, slots=True, kw_only=True)
class EndedMessage:
    """The reply that a transition ended."""

    id: str
    status: MessageStatus
    final_sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """A context's state, moved: what a commit did besides adding chunks."""

    context_id: str
    run_id: str | None
    previous_state: State | None
    previous_version: int | None
    """None, both, where nobody knows: the commit's outcome had to be read."""
    state: State
    version: int
    ended: EndedMessage | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What posting a message made: the user's message, the empty reply, and the run that will write it."""

    context_id: str
    message_id: str
    reply_message_id: str
    run_id: str
    state: State
    version: int


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of the history that an agent is given, with its chunks."""

    role: Role
    status: MessageStatus
    message_id: str
    chunks: tuple[Chunk, ...]

    @property
    def text(self) -> str:
        """What was said, without reasoning and tool chunks."""
        return "".join(chunk.text for chunk in self.chunks if chunk.kind is ChunkKind.TEXT and chunk.text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What a pull answers: the chunks after ``from_sequence`` up to ``sequence``, and how far the message is.

    ``closed`` says that the range can never change (it was bounded by ``to_sequence`` and the log holds all of it).
    """

    context_id: str
    message_id: str
    from_sequence: int
    sequence: int
    chunks: tuple[Chunk, ...]
    status: MessageStatus
    head: int
    final_sequence: int | None
    digest: str | None
    closed: bool

    @property
    def up_to_date(self) -> bool:
        """Whether this page ends where the log does."""
        return self.sequence == self.head


@dataclass(frozen=True, slots=True, kw_only=True)
class StateChanged:
    """Signal: the context moved from ``previous_state`` to ``new_state``."""

    context_id: str
    new_state: State
    previous_state: State | None
    version: int
    run_id: str | None
    timestamp: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextChanged:
    """Signal: title, mode or metadata of the context changed; its state did not."""

    context_id: str
    version: int
    timestamp: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextDeleted:
    """Signal: the context is gone; nothing follows."""

    context_id: str
    version: int
    timestamp: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentDelta:
    """Signal: the log of an open message reaches ``current_sequence``."""

    context_id: str
    message_id: str
    current_sequence: int
    timestamp: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageCompleted:
    """Signal: the message has ended, in whichever way, and holds ``final_sequence`` chunks."""

    context_id: str
    message_id: str
    final_sequence: int
    status: MessageStatus
    version: int
    timestamp: datetime


Signal = StateChanged | ContextChanged | ContextDeleted | ContentDelta | MessageCompleted


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What a subscriber is told on connect: a context as it is, its newest reply, and replies that ended meanwhile."""

    context_id: str
    state: State
    version: int
    run_id: str | None
    newest: MessageCompleted | ContentDelta | None
    newest_sequence: int
    ended: tuple[MessageCompleted, ...]
    at: datetime
