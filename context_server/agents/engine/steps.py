"""A reply's chunks as the steps that wrote them: what the model said at once, what it called, and what came back."""

import re
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from context_server.records import Chunk, ChunkKind

STARTED = "started"
FINISHED = "finished"

_ODD_IN_A_NAME = re.compile(r"[^\w.:/-]+")
_MAX_NAME = 64
"""Characters of a tool's name that providers accept. Agents that are no engine name tools as they please."""


@dataclass(slots=True, kw_only=True)
class LoggedCall:
    """A tool call in the log; ``result`` is the data of its ``tool_result`` chunk, or None."""

    id: str
    name: str
    arguments: Mapping[str, Any]
    result: Mapping[str, Any] | None = None


@dataclass(slots=True)
class LoggedStep:
    """One response of a model in the log; ``messages`` are the ids of those that were handed to it when it began."""

    messages: tuple[str, ...] = ()
    text: str = ""
    reasoning: str = ""
    calls: list[LoggedCall] = field(default_factory=list)
    provider: Mapping[str, Any] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was said or called in it."""
        return not (self.text or self.reasoning or self.calls)


def steps_of(chunks: Sequence[Chunk]) -> list[LoggedStep]:
    """The steps of a reply, each call with its result, wherever that stands after it.

    Steps are parted by ``step`` chunks with status ``started``. In a reply that has none, a step ends where something
    follows a result.
    """
    is_marked = any(chunk.kind is ChunkKind.STEP and _data(chunk).get("status") == STARTED for chunk in chunks)
    reader = _Reader(is_marked=is_marked)
    for chunk in chunks:
        reader.take(chunk)
    return reader.steps


def last_number(chunks: Iterable[Chunk]) -> int:
    """The number of the last step of a reply, 0 without any."""
    numbers = (_data(chunk).get("number") for chunk in chunks if chunk.kind is ChunkKind.STEP)
    return max((number for number in numbers if type(number) is int), default=0)


class _Reader:
    def __init__(self, *, is_marked: bool) -> None:
        self.steps = [LoggedStep()]
        self._is_marked = is_marked
        self._open: dict[str, deque[LoggedCall]] = defaultdict(deque)
        self._has_result = False

    def take(self, chunk: Chunk) -> None:
        match chunk.kind:
            case ChunkKind.TEXT:
                self._step().text += chunk.text or ""
            case ChunkKind.REASONING:
                self._step().reasoning += chunk.text or ""
            case ChunkKind.TOOL_CALL:
                self._call(_data(chunk), chunk.sequence)
            case ChunkKind.TOOL_RESULT:
                self._result(_data(chunk))
            case ChunkKind.STEP:
                self._mark(_data(chunk))
            case ChunkKind.ERROR:
                pass

    def _step(self) -> LoggedStep:
        """The step that what is said now belongs to."""
        if self._has_result and not self._is_marked:
            self._begin()
        return self.steps[-1]

    def _begin(self) -> None:
        self.steps.append(LoggedStep())
        self._has_result = False

    def _call(self, data: Mapping[str, Any], sequence: int) -> None:
        given = data.get("id")
        call_id = given if isinstance(given, str) and given else f"call-{sequence}"
        if self._open[call_id]:
            return  # It is the same one: it had begun when it asked for an approval.
        name, arguments = data.get("name"), data.get("arguments")
        call = LoggedCall(
            id=call_id,
            name=(_ODD_IN_A_NAME.sub("_", name)[:_MAX_NAME] if isinstance(name, str) else "") or "tool",
            arguments=arguments if isinstance(arguments, Mapping) else {},
        )
        self._step().calls.append(call)
        self._open[call_id].append(call)

    def _result(self, data: Mapping[str, Any]) -> None:
        call_id = data.get("id")
        if isinstance(call_id, str) and self._open[call_id]:
            self._open[call_id].popleft().result = data
            self._has_result = True

    def _mark(self, data: Mapping[str, Any]) -> None:
        match data.get("status"):
            case "started":
                self._begin()
                messages = data.get("messages")
                if isinstance(messages, list | tuple):
                    self.steps[-1].messages = tuple(each for each in messages if isinstance(each, str))
            case "finished":
                provider = data.get("provider")
                self.steps[-1].provider = provider if isinstance(provider, Mapping) else None
            case _:
                pass


def _data(chunk: Chunk) -> Mapping[str, Any]:
    return chunk.data or {}
