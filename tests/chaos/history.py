"""What clients did and saw, written down by them as it happened. Times are Unix seconds of this machine's clock."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

_STAMP = re.compile(r"@(\d+)")


class Outcome(StrEnum):
    """What a client knows of something that it asked for."""

    OK = "ok"
    FAILED = "failed"
    """Nothing was done."""
    UNKNOWN = "unknown"
    """Perhaps it was done: the connection broke, or the server itself does not know."""


@dataclass(frozen=True, slots=True)
class Operation:
    """One request, or the life of one stream, which is ok unless it broke."""

    kind: str
    port: int
    began: float
    ended: float
    outcome: Outcome
    detail: str


@dataclass(slots=True)
class Followed:
    """What one client saw of one reply, in order."""

    context_id: str
    message_id: str
    prompt: str
    signalled: list[int] = field(default_factory=list)
    pulls: list[Mapping[str, Any]] = field(default_factory=list)
    endings: list[tuple[str, int]] = field(default_factory=list)
    """``(status, final_sequence)`` of each ``message_completed``; a reconnect may repeat it, and must not change it."""
    text: str = ""
    sequence: int = 0
    ended: bool = False
    ended_at: float | None = None
    ages: list[tuple[float, float]] = field(default_factory=list)
    """``(when, seconds)`` of each pull that gave stamped words: how old the oldest of them was."""

    def pulled(self, page: Mapping[str, Any], at: float) -> None:
        """Notes the answer of a pull that arrived then."""
        self.pulls.append(page)
        self.text += page["content"]
        self.sequence = page["sequence"]
        if stamp := _STAMP.search(page["content"]):
            self.ages.append((at, at - int(stamp[1]) / 1000))
        if self.sequence == page["final_sequence"]:
            self.end(at)

    def end(self, at: float) -> None:
        """Notes that all of it is held, as a pull or a signal said of the final sequence."""
        if not self.ended:
            self.ended = True
            self.ended_at = at


@dataclass(slots=True)
class History:
    """What one client did and saw of one context."""

    context_id: str
    replies: list[Followed] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    posted: dict[str, str] = field(default_factory=dict)
    """The prompt of each idempotency key that was sent, accepted or not."""
    refused: list[str] = field(default_factory=list)
    """Answers that a careful client must never get."""


@dataclass(slots=True)
class Fault:
    """A time in which a node could not be relied on."""

    kind: str
    port: int
    began: float
    ended: float = float("inf")
    only: str | None = None
    """The kind of operations that it concerns; None: all."""

    def explains(self, operation: Operation) -> bool:
        """Whether the operation met the fault."""
        if self.port != operation.port or self.only not in (None, operation.kind):
            return False
        return operation.ended >= self.began and operation.began <= self.ended


def without_stamps(text: str) -> str:
    """The words without the moments of writing: ``7.0@1763719200000 `` → ``7.0 ``."""
    return _STAMP.sub("", text)
