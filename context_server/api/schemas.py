"""What answers look like: with ``forms`` and ``signals``, the only place that knows JSON.

The models of answers are what the OpenAPI document is made from. The pull is too hot for a model: ``content_body``
writes it from the record, and tests hold it against ``Content``.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PlainSerializer,
    RootModel,
    WithJsonSchema,
)

from context_server import records
from context_server.machine import ALLOWED_COMMANDS, TRANSITIONS
from context_server.records import (
    ApprovalStatus,
    Chunk,
    ChunkKind,
    Command,
    IfBusy,
    MessageStatus,
    Mode,
    Role,
    RunStatus,
    State,
)
from context_server.store.files import StoredFile


def format_time(moment: datetime) -> str:
    """RFC 3339, UTC, milliseconds: ``2026-11-21T10:00:00.123Z``."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


Time = Annotated[
    datetime,
    PlainSerializer(format_time, return_type=str),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]


class ActiveRun(BaseModel):
    """The run that a context is busy with."""

    id: str
    message_id: str
    status: RunStatus
    attempt: int
    tool: str | None = Field(description="The tool that runs, while the state is calling_tool.")


class Context(BaseModel):
    """One conversation: messages, a state, a version."""

    id: str
    epoch: str
    title: str | None
    mode: Mode
    model: str | None = Field(description="The model that writes its replies; null for the agent's own.")
    state: State
    version: int
    head_message_id: str | None
    active_run: ActiveRun | None
    allowed_commands: tuple[Command, ...]
    metadata: dict[str, JsonValue]
    created_at: Time
    updated_at: Time

    @classmethod
    def of(cls, context: records.Context) -> "Context":
        """The answer for a record."""
        run = context.active_run
        return cls(
            id=context.id,
            epoch=context.epoch,
            title=context.title,
            mode=context.mode,
            model=context.model,
            state=context.state,
            version=context.version,
            head_message_id=context.head_message_id,
            active_run=None
            if run is None
            else ActiveRun(id=run.id, message_id=run.message_id, status=run.status, attempt=run.attempt, tool=run.tool),
            allowed_commands=ALLOWED_COMMANDS[context.state],
            metadata=dict(context.metadata),
            created_at=context.created_at,
            updated_at=context.updated_at,
        )


class ContextPage(BaseModel):
    """A page of contexts, most recently active first."""

    items: list[Context]
    next_cursor: str | None


class RunError(BaseModel):
    """Why a reply failed."""

    code: str
    detail: str | None


class FileOfMessage(BaseModel):
    """A file that a message refers to; its content is at `/files/{id}`."""

    id: str
    name: str
    media_type: str
    size_bytes: int
    sha256: str


class MessagePayload(BaseModel):
    """What a user posted. `name` and `input` are of a workflow, and null in other messages."""

    type: Literal["text", "workflow"] = "text"
    content: str
    display: JsonValue
    files: list[FileOfMessage]
    name: str | None
    input: dict[str, JsonValue] | None

    @classmethod
    def of(cls, message: records.Message) -> "MessagePayload":
        """The answer for a user's message."""
        workflow = message.workflow
        return cls(
            type="text" if workflow is None else "workflow",
            content=message.content or "",
            display=message.display,
            files=[FileOfMessage(**asdict(each)) for each in message.files],
            name=None if workflow is None else workflow.name,
            input=None if workflow is None else dict(workflow.input),
        )


class Message(BaseModel):
    """What one author said. With `content`, `sequence` is the sequence that `content` reaches.

    `siblings` stands in lists: the ids of all messages with this parent, this one among them, oldest first.
    """

    id: str
    context_id: str
    parent_id: str | None
    role: Role
    status: MessageStatus
    sequence: int
    final_sequence: int | None
    payload: MessagePayload | None
    run_id: str | None
    error: RunError | None
    usage: dict[str, JsonValue] | None
    digest: str | None
    client_metadata: dict[str, JsonValue]
    mode: Mode | None
    created_at: Time
    completed_at: Time | None
    siblings: list[str] | None = None
    content: str | None = None

    @classmethod
    def of(cls, message: records.Message, *, with_content: bool) -> "Message":
        """The answer for a record; ``content`` stays unset unless it was asked for."""
        payload = None
        if message.role is Role.USER:
            payload = MessagePayload.of(message)
        answer = cls(
            id=message.id,
            context_id=message.context_id,
            parent_id=message.parent_id,
            role=message.role,
            status=message.status,
            sequence=message.sequence,
            final_sequence=message.final_sequence,
            payload=payload,
            run_id=message.run_id,
            error=None if message.error is None else RunError(code=message.error.code, detail=message.error.detail),
            usage=None if message.usage is None else dict(message.usage),
            digest=message.digest,
            client_metadata=dict(message.client_metadata),
            mode=message.mode,
            created_at=message.created_at,
            completed_at=message.completed_at,
            siblings=list(message.siblings) or None,
        )
        if with_content and message.content is not None and message.content_sequence is not None:
            answer.content = message.content
            answer.sequence = message.content_sequence
        return answer


class MessagePage(BaseModel):
    """A page of messages, oldest first."""

    items: list[Message]
    next_cursor: str | None


class Posted(BaseModel):
    """What posting a message made."""

    context_id: str
    message_id: str
    reply_message_id: str
    run_id: str
    state: State
    version: int
    disposition: IfBusy | None = Field(None, description="What became of a message that was posted to a busy context.")

    @classmethod
    def of(cls, receipt: records.Receipt) -> "Posted":
        """The answer for a record."""
        return cls(
            context_id=receipt.context_id,
            message_id=receipt.message_id,
            reply_message_id=receipt.reply_message_id,
            run_id=receipt.run_id,
            state=receipt.state,
            version=receipt.version,
            disposition=receipt.disposition,
        )


class Approval(BaseModel):
    """A call that a run may make only when a person says so, and what was decided."""

    id: str
    context_id: str
    message_id: str
    run_id: str
    tool_call_id: str
    tool: str
    arguments: dict[str, JsonValue]
    arguments_sha256: str
    editable: bool
    status: ApprovalStatus
    edited_arguments: dict[str, JsonValue] | None
    note: str | None
    created_at: Time
    expires_at: Time
    decided_at: Time | None

    @classmethod
    def of(cls, approval: records.Approval) -> "Approval":
        """The answer for a record."""
        fields = {name: getattr(approval, name) for name in cls.model_fields if name != "tool_call_id"}
        return cls(tool_call_id=approval.call_id, **fields)


class Approvals(BaseModel):
    """Calls that runs of a context have asked for, oldest first."""

    items: list[Approval]


class Waiting(BaseModel):
    """A message that waits for its turn, and the reply that it will get."""

    message_id: str
    reply_message_id: str
    payload: MessagePayload
    created_at: Time


class Queue(BaseModel):
    """What waits in a context, in the order of its turns."""

    items: list[Waiting]


class CommandAnswer(BaseModel):
    """What a command answers."""

    status: Literal["success", "error"]
    message: str
    data: dict[str, JsonValue]


class UsageTotal(BaseModel):
    """What replies have used; `estimated` where a provider gave no numbers for some."""

    context_id: str | None
    replies: int
    input_tokens: int
    output_tokens: int
    requests: int
    tool_calls: int
    estimated: bool


class TextChunk(BaseModel):
    """A chunk of a textual kind."""

    sequence: int
    kind: Literal[ChunkKind.TEXT, ChunkKind.REASONING]
    text: str


class DataChunk(BaseModel):
    """A chunk of another kind."""

    sequence: int
    kind: Literal[ChunkKind.TOOL_CALL, ChunkKind.TOOL_RESULT, ChunkKind.STEP, ChunkKind.ERROR]
    data: dict[str, JsonValue]


class WholeChunk(RootModel[TextChunk | DataChunk]):
    """One chunk, whole however long its data is."""


class Content(BaseModel):
    """What a pull answers. Of a range that `to_sequence` closed, nothing that can still change: null and false."""

    context_id: str
    message_id: str
    from_sequence: int
    sequence: int
    content: str | None = Field(None, description="The text, joined; with view=content.")
    chunks: list[TextChunk | DataChunk] | None = Field(None, description="The chunks; with view=chunks.")
    status: MessageStatus | None
    final_sequence: int | None
    digest: str | None
    up_to_date: bool
    epoch: str


class File(BaseModel):
    """A file that messages can refer to."""

    id: str
    name: str
    media_type: str
    size_bytes: int
    sha256: str
    created_at: Time

    @classmethod
    def of(cls, file: StoredFile) -> "File":
        """The answer for a record."""
        return cls(**asdict(file.ref), created_at=file.created_at)


class FilePage(BaseModel):
    """A page of files, newest first."""

    items: list[File]
    next_cursor: str | None


class Machine(BaseModel):
    """The state machine as an XState v5 machine configuration."""

    id: str
    initial: State
    states: dict[str, dict[str, JsonValue]]


class Health(BaseModel):
    """The process answers."""

    status: Literal["ok"] = "ok"
    version: str


class SQLiteFacts(BaseModel):
    """The SQLite library in use."""

    version: str
    has_wal_bug: bool = Field(description="Whether two writing connections could corrupt a file; there is only one.")


class BusFacts(BaseModel):
    """What carries wake-ups between nodes."""

    kind: Literal["in-process", "postgresql", "redis"]
    state: Literal["connected", "polling"] = Field(
        description="polling: other nodes are not heard now, and this one looks by itself every second."
    )


class ActiveRuns(BaseModel):
    """How many runs there are, by status."""

    queued: int = 0
    running: int = 0
    suspended: int = 0


class Ready(BaseModel):
    """The process can do its work."""

    status: Literal["ready"] = "ready"
    database: str
    database_version: str
    schema_revision: str
    epoch: str
    agent: str
    runs: ActiveRuns
    bus: BusFacts
    node_id: str | None = Field(description="Under which this process holds its runs; null on SQLite.")
    sqlite: SQLiteFacts | None = Field(description="Only where the database is SQLite.")
    worker: int | None = Field(description="Which of several processes on the port answers; null where there is one.")


class ProblemError(BaseModel):
    """One thing wrong with a request."""

    where: str
    detail: str


class Problem(BaseModel):
    """A problem document (RFC 9457)."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    code: str
    errors: list[ProblemError] | None = None


# How answers are written


def dump(answer: BaseModel) -> bytes:
    """An answer as JSON."""
    return answer.model_dump_json().encode()


def dump_message(message: Message) -> str:
    """A message as JSON, without ``content`` and ``siblings`` where they were not asked for."""
    optional = {"content": message.content, "siblings": message.siblings}
    return message.model_dump_json(exclude={name for name, value in optional.items() if value is None})


def dump_messages(messages: Sequence[Message], next_cursor: str | None) -> bytes:
    """A page of messages as JSON."""
    items = ",".join(map(dump_message, messages))
    return f'{{"items":[{items}],"next_cursor":{json.dumps(next_cursor)}}}'.encode()


LONG_DATA_BYTES = 16_384
"""Data of a tool that is larger is shown cut: a client that follows a reply should not have to load every page that an
agent has read."""
_SHOWN_CHARACTERS = 2_000
_SHOWN_FIELDS = 8
_TOOL_KINDS = frozenset({ChunkKind.TOOL_CALL, ChunkKind.TOOL_RESULT})


def shown_data(chunk: Chunk, message_path: str) -> Mapping[str, Any] | None:
    """The data of a chunk where it is one of many: as it is, or of a long one the beginning and where all of it is.

    ``message_path`` is the path of its message, with what the routes lie below.
    """
    if chunk.kind not in _TOOL_KINDS or chunk.data is None or (size := chunk.size_bytes) <= LONG_DATA_BYTES:
        return chunk.data
    shown = {name[:_SHOWN_CHARACTERS]: _beginning(value) for name, value in list(chunk.data.items())[:_SHOWN_FIELDS]}
    url = f"{message_path}/chunks/{chunk.sequence}"
    return {**shown, "truncated": True, "size_bytes": size, "url": url}


def _beginning(value: Any) -> Any:
    """A value, or where it is long as JSON, its first characters as text."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return value if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS]


def chunk_body(chunk: Chunk, message_path: str) -> dict[str, Any]:
    """A chunk as JSON values; long data as ``shown_data`` says."""
    if chunk.text is not None:
        return {"sequence": chunk.sequence, "kind": chunk.kind, "text": chunk.text}
    return {"sequence": chunk.sequence, "kind": chunk.kind, "data": shown_data(chunk, message_path)}


def whole_chunk_body(chunk: Chunk) -> bytes:
    """A chunk as JSON, whole; see ``WholeChunk``."""
    held = {"text": chunk.text} if chunk.text is not None else {"data": chunk.data}
    body = {"sequence": chunk.sequence, "kind": chunk.kind, **held}
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def content_body(page: records.Page, view: str, epoch: str, message_path: str = "") -> bytes:
    """The answer of a pull as JSON; see ``Content``. ``message_path`` is needed for chunks alone."""
    body: dict[str, Any] = {
        "context_id": page.context_id,
        "message_id": page.message_id,
        "from_sequence": page.from_sequence,
        "sequence": page.sequence,
    }
    if view == "content":
        body["content"] = "".join(
            [chunk.text for chunk in page.chunks if chunk.kind is ChunkKind.TEXT and chunk.text is not None]
        )
    else:
        body["chunks"] = [chunk_body(chunk, message_path) for chunk in page.chunks]
    body["status"] = None if page.closed else page.status
    body["final_sequence"] = None if page.closed else page.final_sequence
    body["digest"] = None if page.closed else page.digest
    body["up_to_date"] = not page.closed and page.up_to_date
    body["epoch"] = epoch
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()


def machine_body() -> Machine:
    """The state machine for clients: states, their events, and in ``meta`` the commands allowed in each."""
    states: dict[str, dict[str, JsonValue]] = {}
    for state in State:
        moves: dict[str, JsonValue] = {
            str(event): str(target) for (source, event), target in TRANSITIONS.items() if source is state
        }
        commands: list[JsonValue] = [str(command) for command in ALLOWED_COMMANDS[state]]
        states[state] = {"on": moves, "meta": {"allowed_commands": commands}}
    return Machine(id="context", initial=State.IDLE, states=states)


# Cursors are opaque to clients


def encode_cursor(*parts: object) -> str:
    """A cursor for the next page."""
    return base64.urlsafe_b64encode(":".join(map(str, parts)).encode()).decode().rstrip("=")


def decode_cursor(cursor: str) -> list[str]:
    """The parts of a cursor.

    Raises:
        ValueError: it is none of ours.
    """
    try:
        return base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True).decode().split(":")
    except (ValueError, UnicodeDecodeError):
        msg = "is not a cursor of this server; use next_cursor of the page before"
        raise ValueError(msg) from None
