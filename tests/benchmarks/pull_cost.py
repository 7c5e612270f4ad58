"""Cost of a pull: the last chunks of a long message against the same pull on a short one, read from the database.

    python -m tests.benchmarks.pull_cost --long 100000 --short 100 --last 10

The messages are written by the metronome and then given one chunk for each word; a second long one is compacted too.
The server is started anew, so that nothing of them is in memory, and its metrics prove that every pull read the
database. They are asked in turns on one connection. ``EXPLAIN QUERY PLAN`` shows how the chunks are found.
"""

import argparse
import hashlib
import sqlite3
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import uvloop
from sqlalchemy import Select
from sqlalchemy.dialects import sqlite

from context_server.store import Store, statements
from tests.benchmarks import report
from tests.benchmarks.load import Connection
from tests.benchmarks.server import HOST, Server, running

HEADER = (
    "message of",
    "pull of the last",
    "bytes",
    "p50 µs",
    "p99 µs",
    "from the database",
    "p50 against the short one",
)
INSERT_CHUNK = "INSERT INTO chunks (message_id, sequence, kind, text) VALUES (?, ?, ?, ?)"
PAD = 24
"""Characters of a chunk; about a word of the metronome."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A message that holds exactly ``length`` chunks."""

    path: str
    message_id: str
    length: int
    in_segments: bool = False

    @property
    def name(self) -> str:
        """What it is, for people."""
        return f"{self.length:,} chunks{', compacted' if self.in_segments else ''}"


async def _reply(server: Server, length: int) -> Prepared:
    """An ended reply with one word, which ``_lengthen`` makes ``length`` chunks long."""
    connection = await Connection.open(HOST, server.port)
    try:
        context_id = (await connection.request("POST", "/contexts", {}, 201))["id"]
        body = {"payload": {"type": "text", "content": "rate=0 words=1"}}
        accepted = await connection.request("POST", f"/contexts/{context_id}/messages", body, 202)
        path = f"/contexts/{context_id}/messages/{accepted['reply_message_id']}/content"
        page: dict[str, Any] = {"final_sequence": None, "sequence": 0}
        while page["final_sequence"] is None:
            page = await connection.request("GET", f"{path}?from_sequence={page['sequence']}&wait=10")
        return Prepared(path, accepted["reply_message_id"], length)
    finally:
        connection.close()


def _lengthen(database: Path, prepared: Prepared) -> None:
    """Replace the reply's text by ``length`` chunks of one word each, in the stopped server's file."""
    words = [f"{number}:".ljust(PAD - 1, "0") + " " for number in range(prepared.length)]
    text = "".join(words).encode()
    rows = [(prepared.message_id, number, "text", word) for number, word in enumerate(words, 1)]
    connection = sqlite3.connect(database)
    try:
        with connection:
            connection.execute("DELETE FROM chunks WHERE message_id = ?", (prepared.message_id,))
            connection.executemany(INSERT_CHUNK, rows)
            connection.execute(
                "UPDATE messages SET sequence = ?, final_sequence = ?, content_bytes = ?, digest = ? WHERE id = ?",
                (prepared.length, prepared.length, len(text), hashlib.sha256(text).hexdigest(), prepared.message_id),
            )
    finally:
        connection.close()


async def _compact(database: Path, prepared: Prepared) -> None:
    """Merges the chunks of one message, which is made to have ended before all others."""
    connection = sqlite3.connect(database)
    with connection:
        connection.execute("UPDATE messages SET completed_at = 1 WHERE id = ?", (prepared.message_id,))
    connection.close()
    async with Store.open(f"sqlite:///{database}") as store:
        after = None
        while True:
            done = await store.house.compact(time.time_ns() // 1_000_000 - 1000, after)
            if (after := done.resume_after) is None:
                return


def _plan(database: Path, prepared: Prepared) -> list[str]:
    """How SQLite finds the chunks of a pull."""
    statement, parameters = statements.select_chunks(prepared.message_id, prepared.length - 10, prepared.length, 100)
    sql = cast("Select[Any]", statement).compile(dialect=sqlite.dialect(paramstyle="named"))
    values = sql.construct_params(cast("dict[str, Any]", parameters))
    connection = sqlite3.connect(database)
    try:
        return [str(row[3]) for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", values)]
    finally:
        connection.close()


async def _measure(server: Server, prepared: list[Prepared], last: int, rounds: int) -> list[tuple[list[float], int]]:
    """For each message the times of its pulls in µs, ascending, and the bytes of an answer."""
    connection = await Connection.open(HOST, server.port)
    times: list[list[float]] = [[] for _ in prepared]
    sizes = [0 for _ in prepared]
    try:
        for turn in range(rounds + rounds // 10):
            for place, message in enumerate(prepared):
                began = time.perf_counter()
                page = await connection.request("GET", f"{message.path}?from_sequence={message.length - last}")
                elapsed = (time.perf_counter() - began) * 1e6
                if page["sequence"] != message.length or len(page["content"]) != last * PAD:
                    raise RuntimeError(f"the pull did not answer the last {last} chunks")
                sizes[place] = len(page["content"])
                if turn >= rounds // 10:  # The first tenth warms both sides up.
                    times[place].append(elapsed)
    finally:
        connection.close()
    return [(sorted(values), size) for values, size in zip(times, sizes, strict=True)]


def main() -> None:
    """Prepare, restart, pull, explain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", type=int, default=100_000, help="chunks of the long message")
    parser.add_argument("--short", type=int, default=100, help="chunks of the short message")
    parser.add_argument("--last", type=int, default=10, help="chunks that each pull reads")
    parser.add_argument("--rounds", type=int, default=2000, help="pulls of each")
    options = parser.parse_args()
    with report.work_directory() as name:
        directory = Path(name)
        report.announce(report.command_line("pull_cost"), directory)
        with running(directory) as server:
            lengths = (options.short, options.long, options.long)
            prepared = [uvloop.run(_reply(server, length)) for length in lengths]
        for message in prepared:
            _lengthen(directory / "bench.db", message)
        prepared[2] = replace(prepared[2], in_segments=True)
        uvloop.run(_compact(directory / "bench.db", prepared[2]))
        with running(directory) as server:
            before = server.metrics()
            results = uvloop.run(_measure(server, prepared, options.last, options.rounds))
            read = server.metrics().since(before, "context_server_pulls_total", source="database")
        plan = _plan(directory / "bench.db", prepared[1])
    asked = len(prepared) * (options.rounds + options.rounds // 10)
    reference = statistics.median(results[0][0])
    rows = [
        [
            message.name, f"{options.last} chunks", size, f"{report.percentile(times, 50):.0f}",
            f"{report.percentile(times, 99):.0f}", f"{read:,.0f} of {asked:,} pulls",
            f"{statistics.median(times) / reference:.2f} times",
        ]
        for message, (times, size) in zip(prepared, results, strict=True)
    ]  # fmt: skip
    print(report.table(HEADER, rows))
    print("\nQuery plan of the read:\n")
    print("\n".join(f"    {line}" for line in plan))


if __name__ == "__main__":
    main()
