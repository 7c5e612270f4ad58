"""What the server answers, as frozen values. What it says besides is ignored, since the contract may grow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextInfo:
    """One conversation. ``active_run`` is ``{id, message_id, status, attempt}`` or None."""

    id: str
    state: str
    version: int
    epoch: str | None = None
    title: str | None = None
    mode: str | None = None
    model: str | None = None
    head_message_id: str | None = None
    allowed_commands: Sequence[str] = ()
    active_run: Mapping[str, Any] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageInfo:
    """What one author said. ``content`` reaches ``sequence``; ``final_sequence`` is None while the message is open.

    ``siblings`` are the ids of all messages with the same parent, oldest first; ``payload`` is of a user's message.
    """

    id: str
    role: str
    status: str
    sequence: int
    final_sequence: int | None = None
    parent_id: str | None = None
    content: str | None = None
    digest: str | None = None
    run_id: str | None = None
    mode: str | None = None
    siblings: Sequence[str] = ()
    payload: Mapping[str, Any] | None = None
    error: Mapping[str, Any] | None = None
    usage: Mapping[str, Any] | None = None
    client_metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Posted:
    """The answer to a post: the user's message, and the reply to it, which exists from now on.

    ``disposition`` says what became of a message to a busy context; a steering one's reply is the one being written.
    """

    context_id: str
    message_id: str
    reply_message_id: str
    run_id: str
    state: str
    version: int
    disposition: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of a message. ``text`` and ``reasoning`` have ``text``; the other kinds have ``data``.

    Of a tool's long output ``data`` has the beginning, and ``truncated``: ``ContextClient.chunk`` reads all of it.
    """

    sequence: int
    kind: str
    text: str | None = None
    data: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What one pull brought: what is after the sequence that was held, up to ``sequence``.

    ``chunks`` are there when they were asked for; ``content`` is the text that they hold.
    """

    sequence: int
    content: str
    status: str
    up_to_date: bool
    final_sequence: int | None = None
    digest: str | None = None
    epoch: str | None = None
    chunks: Sequence[Chunk] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ApprovalInfo:
    """A call that a run may make only when a person says so. ``status`` is ``pending`` until somebody has decided."""

    id: str
    context_id: str
    message_id: str
    tool_call_id: str
    tool: str
    arguments: Mapping[str, Any]
    editable: bool
    status: str
    arguments_sha256: str | None = None
    edited_arguments: Mapping[str, Any] | None = None
    note: str | None = None
    created_at: str | None = None
    expires_at: str | None = None
    decided_at: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """A message that waits for its turn, and the reply that it will get."""

    message_id: str
    reply_message_id: str
    payload: Mapping[str, Any]
    created_at: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInfo:
    """A file that messages can refer to."""

    id: str
    name: str
    media_type: str
    size_bytes: int
    sha256: str
    created_at: str | None = None


@dataclass(frozen=True, slots=True)
class WorkflowCall:
    """A workflow of the agent to be started: its name, and what it is given."""

    name: str
    input: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandAnswer:
    """What a slash command answers: ``success`` or ``error``, a message for people, and data for programs."""

    status: str
    message: str
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageTotal:
    """What replies have used; ``estimated`` where a provider gave no numbers for some."""

    replies: int
    input_tokens: int
    output_tokens: int
    requests: int
    tool_calls: int
    estimated: bool
    context_id: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """One signal; a field that its ``type`` does not have is None. ``data`` is all of it, as it came."""

    type: str
    context_id: str | None = None
    message_id: str | None = None
    current_sequence: int | None = None
    final_sequence: int | None = None
    new_state: str | None = None
    tool: str | None = None
    status: str | None = None
    version: int | None = None
    epoch: str | None = None
    heads: Sequence[Mapping[str, Any]] | None = None
    data: Mapping[str, Any] = field(default_factory=dict, compare=False)
