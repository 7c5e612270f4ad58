"""What the data of server-sent events looks like, for the OpenAPI document.

No model is used to send anything: ``signals.signal_json`` and the tables of ``dialects`` write events, and tests hold
them against these.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, JsonValue, RootModel

from context_server.api.schemas import Posted, Time
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
    tool: str | None = Field(None, description="The name of the tool that runs; left out in other states.")


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
    version: int
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


class RunStarted(BaseModel):
    """The stream begins, after `sequence`; the reply is waiting, being written, or there already."""

    type: Literal["run_started"]
    context_id: str
    message_id: str = Field(description="Id of the reply.")
    sequence: int = Field(description="The chunks after it follow.")
    timestamp: Time
    posted: Posted | None = Field(None, description="What a POST that is answered by a stream would have answered.")


class TextDelta(BaseModel):
    """A chunk of what is said."""

    type: Literal["text_delta"]
    sequence: int
    text: str


class ReasoningDelta(BaseModel):
    """A chunk of what the agent thinks."""

    type: Literal["reasoning_delta"]
    sequence: int
    text: str


class ToolCallStarted(BaseModel):
    """A tool is called: `{id, name, arguments}`."""

    type: Literal["tool_call_started"]
    sequence: int
    data: dict[str, JsonValue]


class ToolCallFinished(BaseModel):
    """What came of the call with this id: `{id, status, result, seconds}`."""

    type: Literal["tool_call_finished"]
    sequence: int
    data: dict[str, JsonValue]


class Step(BaseModel):
    """A step of the agent begins or is done: `{number, total?, status?}`."""

    type: Literal["step"]
    sequence: int
    data: dict[str, JsonValue]


class ApprovalRequested(BaseModel):
    """A call waits for a person: `{id, name, arguments, approval: {id, editable, expires_at}}`."""

    type: Literal["approval_requested"]
    sequence: int
    data: dict[str, JsonValue]


class ErrorReported(BaseModel):
    """What the agent reports as failed, and may go on after."""

    type: Literal["error"]
    sequence: int
    data: dict[str, JsonValue]


class ReplyFailed(BaseModel):
    """Why the reply failed; `run_finished` follows."""

    type: Literal["error"]
    code: str | None
    detail: str | None


class RunFinished(BaseModel):
    """The reply has ended, and the stream with it; you are done when you hold `final_sequence`."""

    type: Literal["run_finished"]
    context_id: str
    message_id: str = Field(description="Id of the reply.")
    run_id: str | None
    status: MessageStatus
    final_sequence: int
    usage: dict[str, JsonValue] | None
    digest: str | None
    timestamp: Time


class DialectData(RootModel[dict[str, JsonValue]]):
    """The payload of an event where a `dialect` was asked for; the event's name says which it is."""


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
    RootModel[
        RunStarted
        | TextDelta
        | ReasoningDelta
        | ToolCallStarted
        | ToolCallFinished
        | Step
        | ApprovalRequested
        | ErrorReported
        | ReplyFailed
        | RunFinished
        | Heartbeat
        | Goodbye
    ]
):
    """The data of one event of the inline view of a message. Pass over types that you do not know."""
