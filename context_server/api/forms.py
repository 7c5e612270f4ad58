"""What requests may hold: bodies and query parameters, every field bounded, nothing guessed, nothing passed over."""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

from context_server.records import MAX_INTEGER, IfBusy, Mode
from context_server.storable import clean_data, clean_text

MAX_METADATA_BYTES = 16_384
"""Largest metadata of a context or message, as JSON: it is read with every context."""


def _small(value: Any) -> Any:
    # NaN and 1e400 could not be given back as JSON; json.dumps says so by a ValueError.
    if len(json.dumps(value, ensure_ascii=False, allow_nan=False).encode()) > MAX_METADATA_BYTES:
        msg = f"must not exceed {MAX_METADATA_BYTES} bytes as JSON"
        raise ValueError(msg)
    return value


def _clean(value: Any) -> Any:
    return clean_data(value)


def _whole_number(value: object) -> object:
    """A query parameter is a plain run of digits: no sign, point, underscore or space."""
    if isinstance(value, str):
        if not value.isascii() or not value.isdigit() or len(value) > len(str(MAX_INTEGER)):
            msg = f"must be a whole number written in digits, at most {MAX_INTEGER}"
            raise ValueError(msg)
        return int(value)
    return value


CleanText = Annotated[str, AfterValidator(clean_text)]
SmallObject = Annotated[dict[str, JsonValue], AfterValidator(_small), AfterValidator(_clean)]
SmallJson = Annotated[JsonValue, AfterValidator(_small), AfterValidator(_clean)]
Sequence0 = Annotated[int, Field(ge=0, le=MAX_INTEGER), BeforeValidator(_whole_number)]
Limit = Annotated[int, Field(ge=1, le=200), BeforeValidator(_whole_number)]


MAX_FILES = 20
"""Files of one message: each is read for the agent."""
Id = Annotated[CleanText, Field(min_length=1, max_length=64)]


class _Request(BaseModel):
    """Strict: no type is guessed, no unknown field is passed over."""

    model_config = ConfigDict(strict=True, extra="forbid")


class _Query(BaseModel):
    """Query parameters: text that is read as what the field says; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid")


class NewContext(_Request):
    """What a new context may be given."""

    title: Annotated[CleanText, Field(max_length=200)] | None = None
    mode: Annotated[Mode, Field(strict=False)] = Mode.ACT
    metadata: SmallObject = Field(default_factory=dict)


class ContextChange(_Request):
    """What may be changed of a context; fields that are left out stay."""

    title: Annotated[CleanText, Field(max_length=200)] | None = None
    mode: Annotated[Mode, Field(strict=False)] = Mode.ACT
    model: (
        Annotated[CleanText, Field(max_length=200, description="One of those that /config lists; null: the agent's.")]
        | None
    ) = None
    metadata: SmallObject = Field(default_factory=dict)
    head_message_id: (
        Annotated[Id, Field(description="The message to go on from; null: none, a fresh start.")] | None
    ) = None


class TextPayload(_Request):
    """A message of text, with files perhaps."""

    type: Literal["text"]
    content: Annotated[CleanText, Field(min_length=1)]
    display: SmallJson = None
    files: Annotated[list[Id], Field(max_length=MAX_FILES, description="Ids of files that were uploaded.")] = Field(
        default_factory=list
    )


class FilePayload(_Request):
    """A message that is a file, with a word on it perhaps."""

    type: Literal["file"]
    file_id: Id
    content: CleanText = ""
    display: SmallJson = None


class WorkflowPayload(_Request):
    """A message that starts a workflow of the agent."""

    type: Literal["workflow"]
    name: Annotated[CleanText, Field(min_length=1, max_length=200)]
    input: SmallObject = Field(default_factory=dict)
    display: SmallJson = None


class NewMessage(_Request):
    """A user's message."""

    payload: Annotated[TextPayload | FilePayload | WorkflowPayload, Field(discriminator="type")]
    client_metadata: SmallObject = Field(default_factory=dict)
    parent_id: (
        Annotated[Id, Field(description="The message to go on from; null: none. By default the head.")] | None
    ) = None
    if_busy: Annotated[IfBusy, Field(strict=False, description="What is done while the context is busy.")] = (
        IfBusy.REJECT
    )


class NewFork(_Request):
    """Up to where a new context shares the history of another."""

    message_id: Id
    title: Annotated[CleanText, Field(max_length=200)] | None = None


class NewDecision(_Request):
    """What a person says to a call that needs approval."""

    decision: Literal["approve", "deny"]
    note: Annotated[CleanText, Field(max_length=2000)] | None = None
    arguments: (
        Annotated[SmallObject, Field(description="To call the tool with instead; only where the approval is editable.")]
        | None
    ) = None


class NewChat(_Request):
    """A user's message, for the conversation that the server keeps for the caller, or for another context."""

    content: Annotated[CleanText, Field(min_length=1)]
    client_timestamp_utc: Annotated[CleanText, Field(max_length=64)] = ""
    client_timezone_offset: Annotated[int | float, Field(ge=-1440, le=1440)] = 0
    context_id: Annotated[CleanText, Field(max_length=64)] | None = None


class NewCommand(_Request):
    """A command: its name, with or without a slash and arguments behind it, and further arguments."""

    command: Annotated[CleanText, Field(min_length=1, max_length=2000)]
    args: Annotated[list[Annotated[CleanText, Field(max_length=2000)]], Field(max_length=50)] = Field(
        default_factory=list
    )
    context_id: Annotated[Id, Field(description="The context that the command is about.")] | None = None


class Nothing(_Request):
    """No field: an empty body or ``{}``."""


class PageQuery(_Query):
    """Where a page of a list begins, and how long it is."""

    limit: Limit = 50
    cursor: Annotated[str, Field(max_length=200, description="`next_cursor` of the page before.")] | None = None


class MessagesQuery(PageQuery):
    """A page of messages."""

    include: Annotated[Literal["content"], Field(description="Adds each reply's text so far.")] | None = None
    tree: Annotated[Literal["true", "false"], Field(description="All messages, and not the head's line only.")] = (
        "false"
    )


class ApprovalsQuery(_Query):
    """Which approvals."""

    status: Annotated[Literal["pending", "all"], Field(description="Those to be decided on, or all.")] = "pending"


class ContentQuery(_Query):
    """A pull."""

    from_sequence: Annotated[Sequence0, Field(description="The last sequence that the client has.")] = 0
    to_sequence: Annotated[Sequence0, Field(description="Stop here; makes the answer immutable.")] | None = None
    wait: Annotated[float, Field(ge=0, le=30, allow_inf_nan=False, description="Seconds to wait for news.")] = 0.0
    view: Annotated[Literal["content", "chunks"], Field(description="Joined text, or chunks of every kind.")] = (
        "content"
    )


class InlineQuery(_Query):
    """How a reply is told inline."""

    dialect: Annotated[str, Field(max_length=40, description="Whose event names and payloads to send.")] | None = None
    named: Annotated[Literal["true", "false"], Field(description="Send named events.")] = "false"
    types: Annotated[str, Field(max_length=200, description="Comma-separated event types to send.")] | None = None


class EventsQuery(InlineQuery):
    """The inline view."""

    from_sequence: Annotated[Sequence0, Field(description="The last sequence that the client has.")] = 0


class StreamQuery(_Query):
    """A stream of signals."""

    named: Annotated[Literal["true", "false"], Field(description="Send named events.")] = "false"
    types: Annotated[str, Field(max_length=200, description="Comma-separated signal types to send.")] | None = None
    last_event_id: Annotated[str, Field(max_length=64, description="As the header Last-Event-ID.")] | None = None


class StreamsQuery(StreamQuery):
    """A stream of signals of many contexts."""

    context: Annotated[
        tuple[Annotated[str, Field(max_length=64)], ...],
        Field(description="A context's id, or id:version. Repeat it; leave it out for all contexts."),
    ] = ()


class FileQuery(_Query):
    """What a new file is called."""

    name: Annotated[str, Field(max_length=1024, description="Its name; cleaned, and never used as a path.")] | None = (
        None
    )


class UsageQuery(_Query):
    """Whose usage."""

    context: Annotated[str, Field(max_length=64, description="One context; by default all of the caller's.")] | None = (
        None
    )


class NoQuery(_Query):
    """No query parameter."""
