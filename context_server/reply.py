"""A reply that is being written: what its run has yielded and the log does not hold yet."""

import asyncio
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from context_server.machine import advance, phase_event
from context_server.records import (
    Append,
    Approval,
    Chunk,
    ChunkKind,
    Delta,
    Ending,
    Failure,
    Outcome,
    Phase,
    Run,
    State,
    Usage,
    unfinished_result,
)
from context_server.storable import clean_data, clean_text, split_text

_BURST = 32
"""Deltas that an agent may yield before it is made to let the event loop go round."""


_ODD_IN_A_NAME = re.compile(r"[^\w.:/-]+")
_MAX_SHOWN_NAME = 64
"""A model may make up a tool's name; what of it goes into signals is the name of something, and no text."""


class OpenReply:
    """A reply that is being written: what its run has yielded and the log does not hold yet."""

    __slots__ = (
        "_burst",
        "_open_calls",
        "_usage_before",
        "approvals",
        "content_bytes",
        "digest",
        "ended",
        "ending",
        "fenced",
        "in_flight_bytes",
        "is_usage_new",
        "on_fenced",
        "open_tools",
        "pending",
        "pending_bytes",
        "phase",
        "phases",
        "room",
        "run",
        "sequence",
        "suspended",
        "usage",
    )

    def __init__(self, run: Run, on_fenced: Callable[[], None]) -> None:
        self.run = run
        self.sequence = run.sequence
        self.on_fenced = on_fenced
        self.pending: list[tuple[ChunkKind, list[str] | Mapping[str, Any]]] = []
        self.pending_bytes = 0
        self.in_flight_bytes = 0
        self.content_bytes = run.content_bytes
        self.digest = hashlib.sha256()
        self.phase = State.THINKING
        self.phases: list[Phase] = []
        self.open_tools = 0
        self._open_calls: dict[str, str] = {}
        self.approvals: tuple[Approval, ...] = ()
        self.suspended: asyncio.Future[bool] | None = None
        self._usage_before = Usage()
        self.usage = Usage()
        self.is_usage_new = False
        self.room = asyncio.Event()
        self.ending: tuple[Outcome, Failure | None] | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.fenced = False
        self._burst = 0

    def restore(self, chunks: Iterable[Chunk], usage: Usage | None) -> None:
        """Takes in what the reply held before its run was suspended: for its digest, and for the calls still open."""
        for chunk in chunks:
            if chunk.kind is ChunkKind.TEXT and chunk.text is not None:
                self.digest.update(chunk.text.encode())
            elif chunk.data is not None:
                self._count_tool(chunk.kind, chunk.data)
        self._usage_before = self.usage = usage or Usage()
        if self.open_tools > 0:  # What was approved runs now, or is said not to: until then the tool is being called.
            self._note_phase(ChunkKind.TOOL_CALL, next(iter(self._open_calls.values()), None))

    def _count_tool(self, kind: ChunkKind, data: Mapping[str, Any]) -> None:
        call_id = str(data.get("id"))
        if kind is ChunkKind.TOOL_CALL:
            self.open_tools += 1
            self._open_calls[call_id] = str(data.get("name"))
        elif kind is ChunkKind.TOOL_RESULT:
            self.open_tools -= 1
            self._open_calls.pop(call_id, None)

    def _note_phase(self, kind: ChunkKind, tool: str | None) -> None:
        if event := phase_event(self.phase, kind, self.open_tools):
            self.phase = advance(self.phase, event)
            self.phases.append(Phase(kind, self.open_tools, tool))

    def open_calls(self) -> list[str]:
        """The ids of the tool calls that have no result yet, oldest first."""
        return list(self._open_calls)

    def close_calls(self, status: str) -> None:
        """Adds a result to each open tool call that says that there is none: the reply is about to end."""
        for call_id in self.open_calls():
            delta, size = clean_delta(Delta(ChunkKind.TOOL_RESULT, data=unfinished_result(call_id, status)))
            self.add(delta, size)

    def note_usage(self, usage: Usage) -> None:
        """What this attempt has used so far; what was used before a suspension is added."""
        before = self._usage_before
        self.usage = Usage(
            input_tokens=before.input_tokens + usage.input_tokens,
            output_tokens=before.output_tokens + usage.output_tokens,
            requests=before.requests + usage.requests,
            tool_calls=before.tool_calls + usage.tool_calls,
            estimated=before.estimated or usage.estimated,
        )
        self.is_usage_new = True

    def add(self, delta: Delta, size: int) -> None:
        """Puts a clean delta behind what is pending, merging adjacent text of one kind."""
        if delta.kind.is_textual:
            text = delta.text or ""
            if self.pending and self.pending[-1][0] is delta.kind:
                self.pending[-1][1].append(text)  # type: ignore[union-attr]  # a textual kind holds a list
            else:
                self.pending.append((delta.kind, [text]))
            if delta.kind is ChunkKind.TEXT:
                self.digest.update(text.encode())
        else:
            data = delta.data or {}
            self.pending.append((delta.kind, data))
            self._count_tool(delta.kind, data)
        self.pending_bytes += size
        self.content_bytes += size
        self._note_phase(delta.kind, _tool_of(delta))

    def bursts(self) -> bool:
        """Whether the agent has yielded so much at a stretch that the event loop should go round."""
        self._burst = (self._burst + 1) % _BURST
        return self._burst == 0

    def take(self) -> Append:
        """Everything pending as an append; it is in flight from here until it is durable."""
        chunks: list[Chunk] = []
        for kind, content in self.pending:
            if isinstance(content, list):
                for piece in split_text("".join(content)):
                    chunks.append(Chunk(self.sequence + len(chunks) + 1, kind, piece))
            else:
                chunks.append(Chunk(self.sequence + len(chunks) + 1, kind, None, content))
        ending = None
        if self.ending is not None:
            outcome, failure = self.ending
            ending = Ending(outcome=outcome, digest=self.digest.hexdigest(), failure=failure)
        append = Append(
            run=self.run,
            expected_sequence=self.sequence,
            chunks=tuple(chunks),
            content_bytes=self.content_bytes,
            phases=tuple(self.phases),
            ending=ending,
            usage=self.usage if self.is_usage_new else None,
            approvals=self.approvals,
        )
        self.sequence = append.sequence
        self.in_flight_bytes = self.pending_bytes
        self.pending, self.phases, self.pending_bytes = [], [], 0
        self.is_usage_new, self.approvals = False, ()
        return append


def _tool_of(delta: Delta) -> str | None:
    """The name of the tool that a delta calls, short enough for a signal."""
    if delta.kind is not ChunkKind.TOOL_CALL or delta.data is None:
        return None
    return _ODD_IN_A_NAME.sub("_", str(delta.data.get("name", "")))[:_MAX_SHOWN_NAME] or None


def clean_delta(delta: Delta) -> tuple[Delta, int]:
    """The delta with what cannot be stored replaced, and its size in bytes.

    Raises:
        TypeError: it has anything but text where its kind carries text, or but an object where it carries data.
    """
    if delta.kind.is_textual:
        text: object = delta.text  # Whatever an agent put there.
        if not isinstance(text, str) or delta.data is not None:
            msg = f"a {delta.kind} delta carries text, and no data"
            raise TypeError(msg)
        if not text.isascii() or "\x00" in text:
            text = clean_text(text)
        return Delta(delta.kind, text), len(text) if text.isascii() else len(text.encode())
    data: object = delta.data
    if not isinstance(data, Mapping) or delta.text is not None:
        msg = f"a {delta.kind} delta carries data, an object, and no text"
        raise TypeError(msg)
    clean = Delta(delta.kind, None, clean_data(data))
    return clean, Chunk(0, clean.kind, None, clean.data).size_bytes
