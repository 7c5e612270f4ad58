"""A reply that is being written: what its run has yielded and the log does not hold yet."""

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from context_server.machine import advance, phase_event
from context_server.records import (
    Append,
    Chunk,
    ChunkKind,
    Delta,
    Ending,
    Failure,
    Outcome,
    Run,
    State,
)
from context_server.storable import clean_data, clean_text, split_text

_BURST = 32
"""Deltas that an agent may yield before it is made to let the event loop go round."""


class OpenReply:
    """A reply that is being written: what its run has yielded and the log does not hold yet."""

    __slots__ = (
        "_burst",
        "content_bytes",
        "digest",
        "ended",
        "ending",
        "fenced",
        "in_flight_bytes",
        "on_fenced",
        "open_tools",
        "pending",
        "pending_bytes",
        "phase",
        "phases",
        "room",
        "run",
        "sequence",
    )

    def __init__(self, run: Run, sequence: int, on_fenced: Callable[[], None]) -> None:
        self.run = run
        self.sequence = sequence
        self.on_fenced = on_fenced
        self.pending: list[tuple[ChunkKind, list[str] | Mapping[str, Any]]] = []
        self.pending_bytes = 0
        self.in_flight_bytes = 0
        self.content_bytes = 0
        self.digest = hashlib.sha256()
        self.phase = State.THINKING
        self.phases: list[tuple[ChunkKind, int]] = []
        self.open_tools = 0
        self.room = asyncio.Event()
        self.ending: tuple[Outcome, Failure | None] | None = None
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.fenced = False
        self._burst = 0

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
            self.pending.append((delta.kind, delta.data or {}))
            self.open_tools += {ChunkKind.TOOL_CALL: 1, ChunkKind.TOOL_RESULT: -1}.get(delta.kind, 0)
        self.pending_bytes += size
        self.content_bytes += size
        if event := phase_event(self.phase, delta.kind, self.open_tools):
            self.phase = advance(self.phase, event)
            self.phases.append((delta.kind, self.open_tools))

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
        )
        self.sequence = append.sequence
        self.in_flight_bytes = self.pending_bytes
        self.pending, self.phases, self.pending_bytes = [], [], 0
        return append


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
