"""What the log of a reply has of a workflow's steps, and how it holds what an agent says in one of them.

    {number, total?, status: "started", name, workflow}                        a step begins
    {within: number, …}                                                        a step of the agent that answers a prompt
    {within: number, status: "finished", hidden: [["reasoning", 80], ["text", 20]]}
    {number, status: "finished", name, workflow, outcome: "ok", result}        a step is over
    {number, status: "finished", name, workflow, outcome: "denied", note}
    {number, status: "finished", name, workflow, outcome: "error", code?, detail?}

An answer that is not shown is logged as reasoning. Where it waits for a person, ``hidden`` says how many characters of
the reasoning before were what, so that the agent can go on from what it has said. ``code`` and ``detail`` are those of
an ``AgentFailed``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from context_server.records import Chunk, ChunkKind, Delta

STARTED, FINISHED = "started", "finished"
OK, ERROR, DENIED = "ok", "error", "denied"


@dataclass(slots=True)
class Record:
    """What the log has of one step; ``ending`` is the data of the chunk that says that it is over."""

    number: int
    name: str
    ending: Mapping[str, Any] | None = None
    chunks: tuple[Chunk, ...] = ()


def records_of(chunks: Sequence[Chunk]) -> dict[int, Record]:
    """What the log has of each step of a workflow, by its number."""
    records: dict[int, Record] = {}
    current: Record | None = None
    for chunk in chunks:
        data = chunk.data or {}
        if chunk.kind is not ChunkKind.STEP or "workflow" not in data:
            if current is not None:
                current.chunks = (*current.chunks, chunk)
        elif data["status"] == STARTED:
            current = records[data["number"]] = Record(data["number"], str(data["name"]))
        else:
            records[data["number"]].ending = data
            current = None
    return records


class Said:
    """What the agent of one prompt has said, before the run was suspended and since."""

    def __init__(self, record: Record, *, is_shown: bool) -> None:
        self._number = record.number
        self._is_shown = is_shown
        self._answer: list[str] = []
        self._hidden: list[tuple[ChunkKind, int]] = []
        self.open_calls: dict[str, None] = {}
        """The ids of the calls that have no result."""
        self.chunks = tuple(_as_said(record.chunks))
        """What it said before, as it said it."""
        for chunk in self.chunks:
            self._note(chunk)

    @property
    def answer(self) -> str:
        """The text, without reasoning."""
        return "".join(self._answer)

    def logged(self, delta: Delta) -> Delta:
        """What the log is to have in the place of what the agent says now."""
        self._note(delta)
        if delta.kind is ChunkKind.STEP:
            return Delta(ChunkKind.STEP, None, {**(delta.data or {}), "within": self._number})
        if self._is_shown or not delta.kind.is_textual:
            return delta
        kind, characters = delta.kind, len(delta.text or "")
        if self._hidden and self._hidden[-1][0] is kind:
            characters += self._hidden.pop()[1]
        self._hidden.append((kind, characters))
        return Delta(ChunkKind.REASONING, delta.text)

    def mark(self) -> Delta | None:
        """What tells the answer from the reasoning in what was hidden, for the log; None where nothing was."""
        if not self._hidden:
            return None
        hidden = [[kind.value, characters] for kind, characters in self._hidden]
        return Delta(ChunkKind.STEP, None, {"within": self._number, "status": FINISHED, "hidden": hidden})

    def _note(self, piece: Chunk | Delta) -> None:
        match piece.kind:
            case ChunkKind.TEXT:
                self._answer.append(piece.text or "")
            case ChunkKind.TOOL_CALL:
                self.open_calls[str((piece.data or {}).get("id"))] = None
            case ChunkKind.TOOL_RESULT:
                self.open_calls.pop(str((piece.data or {}).get("id")), None)


def _as_said(chunks: Sequence[Chunk]) -> Iterator[Chunk]:
    """The chunks of a prompt with what was hidden as what it was; each mark is of those since the one before it."""
    begin = 0
    for end, chunk in enumerate(chunks):
        if chunk.kind is ChunkKind.STEP and "hidden" in (chunk.data or {}):
            yield from _revealed(chunks[begin:end], (chunk.data or {})["hidden"])
            begin = end + 1
    yield from chunks[begin:]


def _revealed(chunks: Sequence[Chunk], hidden: Sequence[tuple[str, int]]) -> Iterator[Chunk]:
    parts = [(ChunkKind(kind), characters) for kind, characters in reversed(hidden)]
    for chunk in chunks:
        text = chunk.text or ""
        if chunk.kind is not ChunkKind.REASONING:
            yield chunk
            continue
        while text:
            kind, characters = parts.pop()
            yield replace(chunk, kind=kind, text=text[:characters])
            if characters > len(text):
                parts.append((kind, characters - len(text)))
            text = text[characters:]
