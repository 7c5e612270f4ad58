"""What the data of server-sent events looks like, for the OpenAPI document.

No model is used to send anything: ``signals.signal_json`` and its neighbours write events, and tests hold them
against these.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, RootModel

from context_server.api.schemas import DataChunk, Posted, TextChunk, Time
from context_server.records import MessageStatus, State


class StateChanged(BaseModel):
    """The context's state, now and, where it just changed, before."""

    type: Literal["state_changed"]
    context_id: str
    new_state: State
    previous_state: State | None = Field(description="Null in the snapshot that a stream begins with.")
    version: int
    epoch: str
    run_id: str | None
    timestamp: Time


class ContentDelta(BaseModel):
    """The log of a message now reaches `current_sequence`: pull what you lack."""

    type: Literal["content_delta"]
    context_id: str
    message_id: str
    current_sequence: int
    timestamp: Time


class MessageCompleted(BaseModel):
    """A message has ended; you are done when you hold `final_sequence`."""

    type: Literal["message_completed"]
    context_id: str
    message_id: str
    final_sequence: int
    status: MessageStatus
    version: int | None = Field(None, description="The context's version; left out in the inline view of a message.")
    timestamp: Time


class ContextChanged(BaseModel):
    """Title, mode or metadata of the context changed: read it again."""

    type: Literal["context_changed"]
    context_id: str
    version: int
    timestamp: Time


class ContextDeleted(BaseModel):
    """The context is gone; a stream of this one context ends with it."""

    type: Literal["context_deleted"]
    context_id: str
    version: int
    timestamp: Time


class Head(BaseModel):
    """How far the log of an open message reaches."""

    context_id: str
    message_id: str
    current_sequence: int


class Heartbeat(BaseModel):
    """The stream lives. A message that you hold for open and that is not in `heads` has ended: pull it."""

    type: Literal["heartbeat"]
    timestamp: Time
    heads: list[Head] = Field(description="The open messages of the subscribed contexts.")


class Goodbye(BaseModel):
    """The server is stopping, and the stream ends: come back after `retry_ms`."""

    type: Literal["goodbye"]
    retry_ms: int
    timestamp: Time


class TextChunkEvent(TextChunk):
    """A chunk with text, in the inline view of a message."""

    type: Literal["chunk"]


class DataChunkEvent(DataChunk):
    """A chunk with data, in the inline view of a message."""

    type: Literal["chunk"]


class MessageAccepted(Posted):
    """The message was posted, and its reply follows on this stream."""

    type: Literal["message_accepted"]


class Signal(
    RootModel[
        Annotated[
            StateChanged | ContentDelta | MessageCompleted | ContextChanged | ContextDeleted | Heartbeat | Goodbye,
            Field(discriminator="type"),
        ]
    ]
):
    """The data of one event of a stream of signals. Pass over types that you do not know."""


class InlineSignal(
    RootModel[TextChunkEvent | DataChunkEvent | MessageAccepted | MessageCompleted | Heartbeat | Goodbye]
):
    """The data of one event of the inline view of a message. Pass over types that you do not know."""
