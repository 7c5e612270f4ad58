"""Cost of an append: early and late in a message, and in a file with few and with many contexts.

    python -m tests.benchmarks.append_cost --long 100000 --contexts 100000 --rounds 2000

Commits of one chunk each through ``Store.append``, in this process, on core 0, under uvloop, durable. All situations
are measured in turns, in a shuffled order, so that a slow moment of the disk meets each of them. The processor's time
is shown beside the time on the clock, since a sync would hide a growth of some microseconds.
"""

import argparse
import asyncio
import contextlib
import hashlib
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop
from sqlalchemy import create_engine

from context_server.records import Append, Chunk, ChunkKind, MessageStatus, Mode, Phase, Role, Run, State, new_id
from context_server.store import Store, tables
from context_server.store.exchanges import Post
from tests.benchmarks import report
from tests.benchmarks.server import pin

OWNER = "local"
WORD = "12345:1700000000000000000 "
BATCH = 500
EARLY = 9
"""Chunks that a short message holds before it is measured: the first append that counts is the 10th chunk."""
ACTIVE = 10
"""Contexts whose runs write: nine short messages and a long one."""
HEADER = (
    "contexts in the file", "append of chunk", "appends", "p50 µs", "p99 µs", "processor µs",
    "p50 against the first row",
)  # fmt: skip


@dataclass(slots=True)
class Writer:
    """One run that writes."""

    store: Store
    run: Run
    sequence: int = 0

    async def append(self, count: int) -> None:
        """Commit ``count`` chunks in one transaction."""
        chunks = tuple(Chunk(self.sequence + number, ChunkKind.TEXT, WORD) for number in range(1, count + 1))
        await self.store.append(
            [
                Append(
                    run=self.run,
                    expected_sequence=self.sequence,
                    chunks=chunks,
                    content_bytes=len(WORD) * (self.sequence + count),
                    phases=() if self.sequence else (Phase(ChunkKind.TEXT),),
                )
            ]
        )
        self.sequence += count


@dataclass(slots=True)
class Situation:
    """Where appends are measured, and what they took."""

    contexts: int
    writers: list[Writer]
    first_chunk: int
    times: list[float] = field(default_factory=list)
    processor_seconds: float = 0.0

    async def measure(self, turn: int) -> None:
        """One append of one chunk."""
        writer = self.writers[turn % len(self.writers)]
        processor, began = time.process_time(), time.perf_counter()
        await writer.append(1)
        self.times.append((time.perf_counter() - began) * 1e6)
        self.processor_seconds += time.process_time() - processor

    def row(self, reference: float) -> list[object]:
        """The table's row."""
        ordered = sorted(self.times)
        middle = report.percentile(ordered, 50)
        last = max(writer.sequence for writer in self.writers)
        return [
            f"{self.contexts:,}", f"{self.first_chunk:,} to {last:,}", f"{len(ordered):,}", f"{middle:.0f}",
            f"{report.percentile(ordered, 99):.0f}", f"{self.processor_seconds / len(ordered) * 1e6:.0f}",
            f"{middle / reference:.2f} times",
        ]  # fmt: skip


async def _begin(store: Store) -> Writer:
    context = await store.create_context(OWNER)
    await store.post_message(OWNER, context.id, Post(text="write"))
    ((run, _),) = await store.claim_runs(1)
    return Writer(store, run)


def _fill(database: Path, count: int) -> None:
    """Add ``count`` idle contexts, each with a message of a user, its reply, and a chunk of both."""
    contexts: list[dict[str, Any]] = []
    messages: list[dict[str, Any]] = []
    chunks: list[dict[str, Any]] = []
    digest = hashlib.sha256(WORD.encode()).hexdigest()
    for number in range(count):
        context_id, question, reply, moment = new_id(), new_id(), new_id(), 1_700_000_000_000 + number
        contexts.append({
            "id": context_id, "owner": OWNER, "mode": Mode.ACT, "state": State.IDLE, "version": 4, "message_count": 2,
            "head_message_id": reply, "metadata": {}, "created_at": moment, "updated_at": moment,
        })  # fmt: skip
        for position, (message_id, role) in enumerate(((question, Role.USER), (reply, Role.ASSISTANT)), 1):
            messages.append({
                "id": message_id, "context_id": context_id, "position": position, "role": role, "attempt": 1,
                "status": MessageStatus.COMPLETED, "sequence": 1, "final_sequence": 1, "content_bytes": len(WORD),
                "ended_version": 4, "client_metadata": {}, "digest": digest, "created_at": moment,
                "completed_at": moment,
            })  # fmt: skip
            chunks.append({"message_id": message_id, "sequence": 1, "kind": ChunkKind.TEXT, "text": WORD})
    engine = create_engine(f"sqlite:///{database}")
    with engine.begin() as connection:
        connection.execute(tables.contexts.insert(), contexts)
        connection.execute(tables.messages.insert(), messages)
        connection.execute(tables.chunks.insert(), chunks)
    engine.dispose()


async def _situations(store: Store, contexts: int, long: int) -> list[Situation]:
    short_writers = [await _begin(store) for _ in range(ACTIVE - 1)]
    for writer in short_writers:
        await writer.append(EARLY)
    long_writer = await _begin(store)
    while long_writer.sequence < long - 1:
        await long_writer.append(min(BATCH, long - 1 - long_writer.sequence))
    return [Situation(contexts, short_writers, EARLY + 1), Situation(contexts, [long_writer], long)]


async def _measure(directory: Path, long: int, contexts: int, rounds: int) -> list[Situation]:
    async with contextlib.AsyncExitStack() as stack:
        situations = []
        for count in (ACTIVE, contexts):
            database = directory / f"{count}.db"
            url = f"sqlite:///{database}"
            async with Store.open(url):
                pass  # It makes the schema.
            if count > ACTIVE:
                await asyncio.to_thread(_fill, database, count - ACTIVE)
            store = await stack.enter_async_context(Store.open(url))
            situations += await _situations(store, count, long)
        order = random.Random(1)
        for turn in range(rounds):
            # Not always in the same order: an append after one to the other file finds colder caches.
            for situation in order.sample(situations, len(situations)):
                await situation.measure(turn)
        return situations


def main() -> None:
    """Prepare both files, append in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", type=int, default=100_000, help="chunk of the long message that is measured first")
    parser.add_argument("--contexts", type=int, default=100_000, help="contexts in the larger file")
    parser.add_argument("--rounds", type=int, default=2000, help="appends in each situation")
    options = parser.parse_args()
    pin(0)
    with report.work_directory() as name:
        report.announce(report.command_line("append_cost"), Path(name))
        situations = uvloop.run(_measure(Path(name), options.long, options.contexts, options.rounds))
    reference = report.percentile(sorted(situations[0].times), 50)
    print(report.table(HEADER, [situation.row(reference) for situation in situations]))


if __name__ == "__main__":
    main()
