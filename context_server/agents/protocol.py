"""The contract between the server and whatever writes replies."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from context_server.records import Approval, Delta, Mode, Suspend, Turn, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How the context stands between two steps of an agent.

    ``steering`` are messages that people posted for the running agent since its last look. They are its own from now
    on: whoever looks has to heed them, and says in its next ``step`` delta which, as ``{"messages": [id, …]}``.
    """

    mode: Mode
    steering: Sequence[Turn] = ()


async def _no_file(file_id: str) -> bytes:
    raise FileNotFoundError(file_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentRun:
    """What an agent may know of the run that it writes for.

    A run that was suspended has ``reply``, what it has written so far, and ``approvals``, the decisions by the id of
    the tool call; the calls without a result in ``reply`` are those that were decided on.
    """

    run_id: str
    context_id: str
    message_id: str
    attempt: int
    mode: Mode
    metadata: Mapping[str, Any]
    model: str | None = None
    """The model that the context asks for; None for the agent's own."""
    reply: Turn | None = None
    approvals: Mapping[str, Approval] = field(default_factory=dict)
    look_up: Callable[[], Awaitable[Look]] | None = None
    read_file: Callable[[str], Awaitable[bytes]] = _no_file
    """The content of a file that a turn refers to; raises FileNotFoundError when it was deleted."""

    async def look(self) -> Look:
        """The mode as it is now, and what was posted for this run; to be called at each step, since it may read."""
        return Look(mode=self.mode) if self.look_up is None else await self.look_up()


class AgentFailed(Exception):
    """What an agent raises to end its reply as ``failed`` with a code of its own, which clients can tell apart.

    ``code`` is kebab-case; ``detail`` is shown to clients and must not hold what was said.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code
        self.detail = detail


Yielded = Delta | str | Usage | Suspend


class Agent(Protocol):
    """Turns a history into deltas. A plain ``async def agent(history, run)`` that yields ``str`` is one.

    ``history`` is oldest first and ends with the user's message to be answered. A ``str`` is a text delta. A ``Usage``
    says what it has taken since it was called. A ``Suspend`` is the last thing that it yields. The agent may be
    cancelled at any await. When it raises, the run ends ``failed`` with code ``agent-error``, or with that of an
    ``AgentFailed``; what it yielded before is kept. When it yields quicker than the disk commits, it is slowed at its
    ``yield``.
    """

    def __call__(self, history: Sequence[Turn], run: AgentRun) -> AsyncIterator[Yielded]:
        """Begin one reply."""
        ...
