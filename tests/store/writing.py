"""How the tests bring a store into a state: post, claim, write, end."""

import hashlib
from dataclasses import dataclass, field

from context_server.records import (
    Append,
    Chunk,
    ChunkKind,
    Ending,
    Failure,
    Message,
    Outcome,
    Phase,
    Receipt,
    Run,
    Transition,
    Usage,
)
from context_server.store import Store
from context_server.store.exchanges import Post

OWNER = "alice"
STRANGER = "mallory"
FAILURE = Failure(code="agent-error", detail="It failed.")


def call(number: int = 1) -> Chunk:
    """A tool call, to be given its sequence by a ``Writer``."""
    return Chunk(0, ChunkKind.TOOL_CALL, None, {"id": f"call-{number}", "name": "look", "arguments": {}})


def result(number: int = 1) -> Chunk:
    """The result of ``call(number)``."""
    return Chunk(0, ChunkKind.TOOL_RESULT, None, {"id": f"call-{number}", "status": "ok", "result": None})


def reasoning(text: str) -> Chunk:
    """A thought, which is no part of the text."""
    return Chunk(0, ChunkKind.REASONING, text)


def sha256(text: str) -> str:
    """The digest of a text as messages carry it."""
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Writer:
    """A run's view of its reply, as the ledger keeps it: where it is, and what it has written."""

    store: Store
    run: Run
    sequence: int = 0
    size: int = 0
    text: str = ""
    open_tools: int = 0
    chunks: list[Chunk] = field(default_factory=list)

    def take(
        self,
        *pieces: str | Chunk,
        outcome: Outcome | None = None,
        failure: Failure | None = None,
        usage: Usage | None = None,
    ) -> Append:
        """The append that adds the pieces and, with an ``outcome``, ends the run."""
        sequence = self.sequence
        phases = []
        for piece in pieces:
            kind, text, data = (
                (ChunkKind.TEXT, piece, None) if isinstance(piece, str) else (piece.kind, piece.text, piece.data)
            )
            self.sequence += 1
            chunk = Chunk(self.sequence, kind, text, data)
            self.chunks.append(chunk)
            self.size += chunk.size_bytes
            self.text += text or "" if kind is ChunkKind.TEXT else ""
            self.open_tools += {ChunkKind.TOOL_CALL: 1, ChunkKind.TOOL_RESULT: -1}.get(kind, 0)
            phases.append(Phase(kind, self.open_tools))
        ending = None
        if outcome is not None:
            ending = Ending(outcome=outcome, digest=sha256(self.text), failure=failure)
        return Append(
            run=self.run,
            expected_sequence=sequence,
            chunks=tuple(self.chunks[len(self.chunks) - len(pieces) :]),
            content_bytes=self.size,
            phases=tuple(phases),
            ending=ending,
            usage=usage,
        )

    async def write(
        self, *pieces: str | Chunk, outcome: Outcome | None = None, failure: Failure | None = None
    ) -> Transition | None:
        """Appends the pieces in a batch of their own."""
        (transition,) = await self.store.append([self.take(*pieces, outcome=outcome, failure=failure)])
        return transition

    async def message(self) -> Message:
        """The reply as the store has it."""
        return await self.store.message(self.run.owner, self.run.context_id, self.run.message_id)


async def post(store: Store, text: str = "Hello", *, context_id: str | None = None, owner: str = OWNER) -> Receipt:
    """Posts a message, in a new context unless one is named; its run is queued."""
    if context_id is None:
        context_id = (await store.create_context(owner)).id
    receipt, _ = await store.post_message(owner, context_id, Post(text=text))
    return receipt


async def claim(store: Store) -> Writer:
    """Claims the oldest queued run."""
    ((run, _),) = await store.claim_runs(1)
    return Writer(store, run)


async def start(store: Store, text: str = "Hello", *, context_id: str | None = None, owner: str = OWNER) -> Writer:
    """Posts a message and claims its run; there must be no other queued one."""
    await post(store, text, context_id=context_id, owner=owner)
    return await claim(store)


async def exchange(
    store: Store,
    text: str = "Hello",
    *answer: str | Chunk,
    context_id: str | None = None,
    owner: str = OWNER,
    outcome: Outcome = Outcome.SUCCEEDED,
) -> Writer:
    """A message and its whole reply."""
    writer = await start(store, text, context_id=context_id, owner=owner)
    await writer.write(*answer, outcome=outcome, failure=FAILURE if outcome is Outcome.FAILED else None)
    return writer
