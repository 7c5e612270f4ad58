"""The store as a dictionary would keep it: what every method should do, without a database.

Written from the documented table of states, and not with the program's own.
"""

from dataclasses import dataclass, field

from context_server.records import Chunk, ChunkKind, MessageStatus, Outcome, Role, State
from tests.store.writing import Writer, sha256

WORKING = ("thinking", "streaming", "calling_tool")


@dataclass(eq=False)
class ModelMessage:
    """A message as it should be read."""

    id: str
    role: Role
    status: MessageStatus
    chunks: list[Chunk] = field(default_factory=list)
    error: str | None = None

    @property
    def text(self) -> str:
        return "".join(chunk.text or "" for chunk in self.chunks if chunk.kind is ChunkKind.TEXT)

    @property
    def final_sequence(self) -> int | None:
        return len(self.chunks) if self.status.ended else None

    @property
    def digest(self) -> str | None:
        return sha256(self.text) if self.status.ended else None


@dataclass(eq=False)
class ModelContext:
    """A context as it should be read, and the writers of its runs: the live one and those that are over."""

    id: str
    title: str | None = None
    state: State = State.IDLE
    version: int = 1
    messages: list[ModelMessage] = field(default_factory=list)
    run_id: str | None = None
    writer: Writer | None = None
    stale: list[Writer] = field(default_factory=list)

    @property
    def takes_messages(self) -> bool:
        return self.state in ("idle", "failed")

    @property
    def reply(self) -> ModelMessage:
        return self.messages[-1]

    def move(self, state: str) -> None:
        """Another state is another version."""
        if state != self.state:
            self.state = State(state)
            self.version += 1

    def posted(self, user: ModelMessage, reply_id: str, run_id: str) -> None:
        self.messages += [user, ModelMessage(reply_id, Role.ASSISTANT, MessageStatus.PENDING)]
        self.run_id = run_id
        self.move("queued")

    def claimed(self, writer: Writer) -> None:
        self.writer = writer
        self.move("thinking")

    def appended(self, chunks: tuple[Chunk, ...], open_tools: int) -> None:
        """``open_tools`` are those open before these chunks."""
        for chunk in chunks:
            self.reply.chunks.append(chunk)
            self.reply.status = MessageStatus.STREAMING
            if chunk.kind is ChunkKind.TOOL_CALL:
                open_tools += 1
            if chunk.kind is ChunkKind.TOOL_RESULT:
                open_tools -= 1
            if self.state in WORKING:
                self.move(self._after(chunk.kind, open_tools))

    def _after(self, kind: ChunkKind, open_tools: int) -> str:
        if kind is ChunkKind.TOOL_CALL:
            return "calling_tool"
        if kind is ChunkKind.TOOL_RESULT:
            return "thinking" if self.state == "calling_tool" and open_tools <= 0 else self.state
        return "streaming" if self.state == "thinking" and kind != "step" else self.state

    def ended(self, outcome: Outcome, error: str) -> None:
        """The run has said its last word: a context that was being cancelled is cancelled, whatever that is."""
        if self.state == "cancelling":
            self._close(MessageStatus.CANCELLED, "idle")
        elif outcome is Outcome.SUCCEEDED:
            self._close(MessageStatus.COMPLETED, "idle")
        else:
            self._close(MessageStatus.FAILED, "failed", error)

    def cancelled(self) -> None:
        if self.state == "queued":
            self._close(MessageStatus.CANCELLED, "idle")
        elif self.state in WORKING:
            self.move("cancelling")

    def expired(self) -> None:
        """Whoever wrote is gone: each call without a result is given one that says so."""
        status = "cancelled" if self.state == "cancelling" else "interrupted"
        for call_id in self._open_calls():
            data = {"id": call_id, "status": status, "result": None, "seconds": None}
            self.reply.chunks.append(Chunk(len(self.reply.chunks) + 1, ChunkKind.TOOL_RESULT, None, data))
            self.reply.status = MessageStatus.STREAMING
        self.ended(Outcome.FAILED, "interrupted")

    def _open_calls(self) -> list[str]:
        found: list[str] = []
        for chunk in self.reply.chunks:
            if chunk.data is None:
                continue
            if chunk.kind is ChunkKind.TOOL_CALL and chunk.data["id"] not in found:
                found.append(chunk.data["id"])
            if chunk.kind is ChunkKind.TOOL_RESULT and chunk.data["id"] in found:
                found.remove(chunk.data["id"])
        return found

    def _close(self, status: MessageStatus, state: str, error: str | None = None) -> None:
        self.reply.status = status
        self.reply.error = error
        if self.writer is not None:
            self.stale.append(self.writer)
        self.run_id = self.writer = None
        self.move(state)
