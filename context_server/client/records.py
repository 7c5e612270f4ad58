"""What the server answers, as frozen values. Unknown keys are ignored, since the contract may grow."""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, TypeVar, get_type_hints

from context_server.client.errors import UnexpectedAnswer


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextInfo:
    """One conversation. ``active_run`` is ``{id, message_id, status, attempt}`` or None."""

    id: str
    state: str
    version: int
    epoch: str | None = None
    title: str | None = None
    mode: str | None = None
    allowed_commands: Sequence[str] = ()
    active_run: Mapping[str, Any] | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageInfo:
    """What one author said. ``content`` reaches ``sequence``; ``final_sequence`` is None while the message is open."""

    id: str
    role: str
    status: str
    sequence: int
    final_sequence: int | None = None
    content: str | None = None
    digest: str | None = None
    run_id: str | None = None
    error: Mapping[str, Any] | None = None
    client_metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Posted:
    """The answer to a post: the user's message, and the reply to it, which exists from now on."""

    context_id: str
    message_id: str
    reply_message_id: str
    run_id: str
    state: str
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What one pull brought: the text after the sequence that was held, up to ``sequence``."""

    sequence: int
    content: str
    status: str
    up_to_date: bool
    final_sequence: int | None = None
    digest: str | None = None
    epoch: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Signal:
    """One signal; a field that its ``type`` does not have is None. ``data`` is all of it, as it came."""

    type: str
    context_id: str | None = None
    message_id: str | None = None
    current_sequence: int | None = None
    final_sequence: int | None = None
    new_state: str | None = None
    status: str | None = None
    version: int | None = None
    epoch: str | None = None
    heads: Sequence[Mapping[str, Any]] | None = None
    data: Mapping[str, Any] = field(default_factory=dict, compare=False)


Record = TypeVar("Record", ContextInfo, MessageInfo, Posted, Page, Signal)


def _required(cls: Any) -> dict[str, type]:
    """The type of each field that must be there."""
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}


_REQUIRED = {cls: _required(cls) for cls in (ContextInfo, MessageInfo, Posted, Page, Signal)}


def parse(cls: type[Record], data: Any) -> Record:
    """A record from decoded JSON.

    Raises:
        UnexpectedAnswer: it is no object, or a key that must be there is missing or of another type.
    """
    given = data if isinstance(data, dict) else {}
    for name, kind in _REQUIRED[cls].items():
        if not isinstance(given.get(name), kind):
            raise UnexpectedAnswer(f"the answer is not a {cls.__name__}: {name!r} is missing or wrong")
    return cls(**{f.name: given[f.name] for f in fields(cls) if given.get(f.name) is not None})
