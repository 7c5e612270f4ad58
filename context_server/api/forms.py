"""What requests may hold: bodies and query parameters, every field bounded, nothing guessed, nothing passed over."""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

from context_server.records import MAX_INTEGER, Mode
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
    metadata: SmallObject = Field(default_factory=dict)


class TextPayload(_Request):
    """A message of text."""

    type: Literal["text"]
    content: Annotated[CleanText, Field(min_length=1)]
    display: SmallJson = None


class NewMessage(_Request):
    """A user's message."""

    payload: TextPayload
    client_metadata: SmallObject = Field(default_factory=dict)


class Nothing(_Request):
    """No field: an empty body or ``{}``."""


class PageQuery(_Query):
    """Where a page of a list begins, and how long it is."""

    limit: Limit = 50
    cursor: Annotated[str, Field(max_length=200, description="`next_cursor` of the page before.")] | None = None


class MessagesQuery(PageQuery):
    """A page of messages."""

    include: Annotated[Literal["content"], Field(description="Adds each reply's text so far.")] | None = None


class ContentQuery(_Query):
    """A pull."""

    from_sequence: Annotated[Sequence0, Field(description="The last sequence that the client has.")] = 0
    to_sequence: Annotated[Sequence0, Field(description="Stop here; makes the answer immutable.")] | None = None
    wait: Annotated[float, Field(ge=0, le=30, allow_inf_nan=False, description="Seconds to wait for news.")] = 0.0
    view: Annotated[Literal["content", "chunks"], Field(description="Joined text, or chunks of every kind.")] = (
        "content"
    )


class EventsQuery(_Query):
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


class NoQuery(_Query):
    """No query parameter."""
