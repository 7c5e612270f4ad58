"""The vocabulary as frozen values: what the rooms hand each other. Pure: no I/O, no JSON, no HTTP.

Ids are UUIDv7 strings; times are aware UTC datetimes; sequences and versions are integers from 0 to ``MAX_INTEGER``.
"""

import hashlib
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


class ApprovalStatus(StrEnum):
    """What became of a request for approval; all but the first are final."""

    PENDING = "pending"
    APPROVED = "approved"
    DENIED = "denied"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


class IfBusy(StrEnum):
    """What becomes of a message that is posted while its context is busy."""

    REJECT = "reject"
    QUEUE = "queue"
    INTERRUPT = "interrupt"
    STEER = "steer"


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
    tool: str | None = None
    """The name of the tool that runs, while the context is ``calling_tool``."""


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
    model: str | None = None
    """The model that writes its replies; None for the agent's own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a message or a run failed: a stable ``code``, and never what was said."""

    code: str
    detail: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRef:
    """A file that a message refers to; ``sha256`` is 64 hexadecimal digits."""

    id: str
    name: str
    media_type: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowCall:
    """A workflow that a message starts, with its input."""

    name: str
    input: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a run took from its model and did with tools, so far; ``estimated`` where the provider gave no numbers."""

    input_tokens: int = 0
    output_tokens: int = 0
    requests: int = 0
    tool_calls: int = 0
    estimated: bool = False

    @property
    def total_tokens(self) -> int:
        """Input and output."""
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What one author said. ``content`` and ``content_sequence`` are None unless they were asked for.

    ``mode`` is the context's when it was posted, or when its reply began; ``siblings`` are the ids of all messages with
    its parent, itself among them, oldest first, where they were asked for.
    """

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
    mode: Mode | None = None
    files: tuple[FileRef, ...] = ()
    workflow: WorkflowCall | None = None
    siblings: tuple[str, ...] = ()
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

    ``tool_call`` data is ``{id, name, arguments}``, ``tool_result`` data ``{id, status, result, seconds}`` with status
    ``ok``, ``error``, ``denied``, ``cancelled``, ``expired`` or ``interrupted``, ``step`` data ``{number, total?}``.
    """

    kind: ChunkKind
    text: str | None = None
    data: Mapping[str, Any] | None = None


def unfinished_result(call_id: str, status: str) -> dict[str, Any]:
    """The data of the ``tool_result`` chunk that closes a call nobody answers any more, so that no history dangles.

    ``status`` is ``cancelled``, ``expired`` or ``interrupted``.
    """
    return {"id": call_id, "status": status, "result": None, "seconds": None}


def arguments_digest(arguments: Mapping[str, Any]) -> str:
    """The SHA-256 of a call's arguments as canonical JSON: keys sorted, no spaces, UTF-8."""
    canonical = json.dumps(arguments, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class ApprovalRequest:
    """A call that an agent may make only when a person says so: the tool call's id, the tool, its exact arguments.

    ``editable`` says that the person may change the arguments. The agent yields no ``tool_call`` delta of its own for
    it: the call is added to the log together with the request.
    """

    call_id: str
    tool: str
    arguments: Mapping[str, Any]
    editable: bool = False


@dataclass(frozen=True, slots=True)
class Suspend:
    """What an agent yields last when it cannot go on without decisions: the run is suspended, and nothing of it waits.

    Once all are decided the agent is called again, on any node, with the decisions in ``AgentRun.approvals``.
    """

    requests: tuple[ApprovalRequest, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    """A request for approval and what became of it. ``arguments_sha256`` is of the arguments as canonical JSON."""

    id: str
    context_id: str
    message_id: str
    run_id: str
    call_id: str
    tool: str
    arguments: Mapping[str, Any]
    arguments_sha256: str
    editable: bool
    status: ApprovalStatus
    edited_arguments: Mapping[str, Any] | None
    note: str | None
    created_at: datetime
    expires_at: datetime
    decided_at: datetime | None

    @property
    def final_arguments(self) -> Mapping[str, Any]:
        """What the tool is to be called with."""
        return self.arguments if self.edited_arguments is None else self.edited_arguments


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One execution of an agent for one reply; ``attempt`` fences stale owners.

    ``sequence`` and ``content_bytes`` are what the reply holds already: more than 0 where the run was suspended.
    """

    id: str
    context_id: str
    message_id: str
    owner: str
    attempt: int
    mode: Mode = Mode.ACT
    metadata: Mapping[str, Any] = field(default_factory=dict)
    sequence: int = 0
    content_bytes: int = 0
    model: str | None = None


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


@dataclass(frozen=True, slots=True)
class Phase:
    """A chunk that may move the context's state: its kind, the tool calls open after it, and the tool that it calls."""

    kind: ChunkKind
    open_tools: int = 0
    tool: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Append:
    """What one run adds to the log in one commit.

    ``expected_sequence`` is the head that the run believes in; the append must hit the row that has it, and the run's
    attempt, or the run is fenced. ``phases`` are what may move the context's state, in order. ``content_bytes`` is the
    size of the message after this append. ``usage`` is set where it has changed. With ``approvals``, the run is
    suspended until they are decided on.
    """

    run: Run
    expected_sequence: int
    chunks: tuple[Chunk, ...]
    content_bytes: int
    phases: tuple[Phase, ...] = ()
    ending: Ending | None = None
    usage: Usage | None = None
    approvals: tuple[Approval, ...] = ()

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
    also_ended: tuple[EndedMessage, ...] = ()
    """The replies of messages that waited, and were cancelled with the run."""
    tool: str | None = None
    """The tool that is called, where the state is ``calling_tool``."""
    promoted: "Transition | None" = None
    """What the same transaction did next: the message that waited for longest has its turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What posting a message made: the user's message, the empty reply, and the run that will write it.

    ``disposition`` is None where the reply is the context's next; else what became of the message of a busy context.
    Of one that steers, the reply and the run are those that it was handed to.
    """

    context_id: str
    message_id: str
    reply_message_id: str
    run_id: str
    state: State
    version: int
    disposition: IfBusy | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of the history that an agent is given, with its chunks."""

    role: Role
    status: MessageStatus
    message_id: str
    chunks: tuple[Chunk, ...]
    files: tuple[FileRef, ...] = ()
    workflow: WorkflowCall | None = None
    steers: bool = False
    """Whether it was handed to the run of the reply before it, instead of having one of its own."""

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
    tool: str | None = None


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
    tool: str | None = None
