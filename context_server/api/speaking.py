"""Speaks a dialect: what happens to one reply, as the server-sent events of a table.

Each chunk's events have its sequence as ``id``: the last of them, so that a client that was cut between two gets both
again. The ending has ``<final_sequence>:end``.
"""

import json
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, TypeVar

from context_server.api import schemas, signals
from context_server.api.dialects import Dialect
from context_server.api.dialects.table import INSTEAD, Begin, End, Ended, Moment, Payload, Reply, Row, Told, moment_of
from context_server.records import Chunk, ChunkKind, MessageStatus, Page

K = TypeVar("K", Begin, Moment, End)
T = TypeVar("T")

_to_json = json.JSONEncoder(separators=(",", ":")).encode
_NO_DATA: Payload = {}

PageOf = Callable[[int, int], Awaitable[Page]]
"""Reads a page of the reply: the chunks after a sequence, up to another one."""


class ToolNames:
    """Names of the tools that a reply calls, by the id of the call: a result does not repeat the name.

    A stream that begins in the middle may meet the result of a call that came before. Then, and only then, what lies
    before its ``start`` is read, once, as far as it has to be.
    """

    def __init__(self, start: int, page_of: PageOf) -> None:
        self._names: dict[str, str] = {}
        self._start = start
        self._read = 0
        self._page_of = page_of

    def note(self, chunk: Chunk) -> None:
        """Remembers a call."""
        if chunk.kind is ChunkKind.TOOL_CALL and chunk.data is not None and "id" in chunk.data:
            self._names[str(chunk.data["id"])] = str(chunk.data.get("name"))

    async def find(self, call_id: str) -> str | None:
        """The name of a call's tool, which is not asked for again; None when the log has no such call."""
        while call_id not in self._names and self._read < self._start:
            page = await self._page_of(self._read, self._start)
            for chunk in page.chunks:
                self.note(chunk)
            self._read = page.sequence if page.chunks else self._start
        return self._names.pop(call_id, None)


class Speaker:
    """Writes the events of one stream. ``types`` leaves out all others, but never the event that ends the stream."""

    def __init__(
        self, dialect: Dialect, reply: Reply, tools: ToolNames, *, types: frozenset[str] | None = None, named: bool
    ) -> None:
        self._frame = dialect.frame
        self._names_tools = dialect.names_tools
        self._reply = reply
        self._tools = tools
        self._named = named or dialect.always_named
        self._begins = _rows_of(Begin, dialect.begins, types)
        self._chunks = _rows_of(Moment, dialect.chunks, types)
        self._ends = _rows_of(End, dialect.ends, types, keep_last=True)

    def begin(self) -> bytes:
        """The event that a stream begins with; its ``id`` is the sequence that the stream starts after."""
        reply = self._reply
        rows = self._begins[Begin.REGENERATING if reply.is_regenerated else Begin.STARTED]
        return self._write(rows, reply, str(reply.sequence)).encode("ascii")

    async def chunks(self, chunks: Iterable[Chunk]) -> bytes:
        """The events of some chunks, one after the other; empty where none of them is told."""
        parts = []
        for chunk in chunks:
            rows = self._chunks[moment_of(chunk)]
            if self._names_tools:
                self._tools.note(chunk)
            if rows:
                parts.append(self._write(rows, await self._told(chunk), str(chunk.sequence)))
        return "".join(parts).encode("ascii")

    async def _told(self, chunk: Chunk) -> Told:
        if chunk.text is not None:
            return Told(sequence=chunk.sequence, text=chunk.text, data=_NO_DATA)
        told = Told(sequence=chunk.sequence, data=schemas.shown_data(chunk, self._reply.path) or _NO_DATA)
        if chunk.kind is ChunkKind.TOOL_RESULT and self._names_tools:
            told.tool = await self._tools.find(str(told.data.get("id")))
        return told

    def end(self, ended: Ended) -> bytes:
        """The last events of a stream."""
        end = End.REGENERATED if ended.reply.is_regenerated else End.FINISHED
        if ended.message.status is MessageStatus.FAILED:
            end = End.FAILED
        return self._write(self._ends[end], ended, f"{ended.message.final_sequence}:end").encode("ascii")

    def beside(self, fields: Payload, *, retry_ms: int | None = None) -> bytes:
        """A heartbeat or goodbye: about the stream, so without an ``id``."""
        name = str(fields["type"])
        payload = {key: value for key, value in fields.items() if key != "type"}
        data = _to_json(self._frame(name, self._reply, payload))
        return signals.frame_event(data, name=name if self._named else None, retry_ms=retry_ms).encode("ascii")

    def _write(self, rows: tuple[Row[T], ...], what: T, event_id: str) -> str:
        if not rows:
            return ""
        if len(rows) == 1:  # Nearly always.
            return self._event(rows[0], what, event_id)
        *others, last = rows
        return "".join([*(self._event(row, what, None) for row in others), self._event(last, what, event_id)])

    def _event(self, row: Row[T], what: T, event_id: str | None) -> str:
        data = _to_json(self._frame(row.name, self._reply, row.payload(what)))
        return signals.frame_event(data, name=row.name if self._named else None, event_id=event_id)


def _rows_of(
    moments: type[K], table: Mapping[K, tuple[Row[Any], ...]], types: frozenset[str] | None, *, keep_last: bool = False
) -> dict[K, tuple[Row[Any], ...]]:
    """The rows of every moment, those of another where the table has none, and of them those that are asked for."""
    found: dict[K, tuple[Row[Any], ...]] = {}
    for moment in moments:
        instead: Any = INSTEAD.get(moment)
        rows = table.get(moment) or table.get(instead, ())
        found[moment] = tuple(
            row
            for number, row in enumerate(rows)
            if types is None or row.name in types or (keep_last and number == len(rows) - 1)
        )
    return found
