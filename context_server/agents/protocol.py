"""The contract between the server and whatever writes replies."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from context_server.records import Delta, Mode, Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentRun:
    """What an agent may know of the run that it writes for."""

    run_id: str
    context_id: str
    message_id: str
    attempt: int
    mode: Mode
    metadata: Mapping[str, Any]


class Agent(Protocol):
    """Turns a history into deltas. A plain ``async def agent(history, run)`` that yields ``str`` is one.

    ``history`` is oldest first and ends with the user's message to be answered. A ``str`` is a text delta. The agent
    may be cancelled at any await. When it raises, the run ends ``failed`` with code ``agent-error``; what it yielded
    before is kept. When it yields quicker than the disk commits, it is slowed at its ``yield``.
    """

    def __call__(self, history: Sequence[Turn], run: AgentRun) -> AsyncIterator[Delta | str]:
        """Begin one reply."""
        ...
