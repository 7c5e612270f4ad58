"""Many followers of one reply, spread over two nodes of one PostgreSQL: how late signals come, and what it costs there.

    python -m tests.benchmarks.followers --followers 10,100,1000 --rate 2 --seconds 20

One conversation is posted at the first node. Every second follower has its stream and its pulls at the first, the
others at the second, and each pulls at every signal. The delay of a signal is the time from the writing of the last
word of the sequence that it names to its arrival: commits, wake-ups, reads of the other node and the followers before
it are in it. Transactions and rows are those of the database (``pg_stat_database``) in the middle of the run.
"""

import argparse
import asyncio
import time
from array import array
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import asyncpg
import uvloop

from tests.benchmarks import report
from tests.benchmarks.load import Answer, Connection, LoadError, SignalStream
from tests.benchmarks.server import HOST, Server, allow_descriptors, running
from tests.databases import new_database

SETTLE_SECONDS = 3.0
"""From the post to the middle of the run, and from there to the end."""
OPENING_AT_ONCE = 50
HEADER = (
    "followers", "words", "signals", "delay p50 ms", "p99 ms", "max ms", "at the second node, p99 ms", "not whole",
    "transactions/s", "rows read/s", "pulls/s memory + database", "CPU of the nodes",
)  # fmt: skip


class Follower:
    """One subscriber of the reply, with a connection for its pulls: one in flight, the latest target wins."""

    def __init__(self, port: int, context_id: str) -> None:
        self._port = port
        self._context_id = context_id
        self._path = ""
        self._held = self._target = 0
        self._in_flight = False
        self._connection: Connection | None = None
        self._stream: SignalStream | None = None
        self.arrivals: list[tuple[int, int]] = []
        """``(sequence, ns)`` of each signal of more content."""
        self.text: list[str] = []
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def open(self) -> None:
        """Subscribes."""
        self._connection = await Connection.open(HOST, self._port)
        path = f"/contexts/{self._context_id}/stream"
        self._stream = await SignalStream.open(HOST, self._port, path, self._on_signal)

    def follow(self, message_id: str) -> None:
        """Begins to pull the reply."""
        self._path = f"/contexts/{self._context_id}/messages/{message_id}/content?from_sequence="
        self._pull()

    def close(self) -> None:
        """Ends both connections."""
        for connection in (self._connection, self._stream):
            if connection is not None:
                connection.close()

    def _on_signal(self, signal: dict[str, Any]) -> None:
        match signal["type"]:
            case "content_delta":
                self.arrivals.append((signal["current_sequence"], time.time_ns()))
                self._target = max(self._target, signal["current_sequence"])
            case "message_completed":
                self._target = max(self._target, signal["final_sequence"])
            case _:
                return
        if not self._in_flight and self._path:
            self._pull()

    def _pull(self) -> None:
        if self._connection is None or self.ended.done():
            return
        self._in_flight = True
        self._connection.send("GET", f"{self._path}{self._held}", self._on_answer)

    def _on_answer(self, answer: Answer | None) -> None:
        self._in_flight = False
        if self.ended.done():
            return
        if answer is None or answer.status != 200:
            self.ended.set_exception(LoadError("the connection ended" if answer is None else repr(answer.body[:300])))
            return
        page = answer.json()
        self.text.append(page["content"])
        self._held = page["sequence"]
        if self._held == page["final_sequence"]:
            self.ended.set_result(None)
        elif self._target > self._held or not page["up_to_date"]:
            self._pull()


class Use:
    """What the database and the nodes did, so far."""

    def __init__(self, nodes: list[Server], database: Mapping[str, int]) -> None:
        self._at = time.monotonic()
        self._cpu = [node.cpu_seconds() for node in nodes]
        self._metrics = [node.metrics() for node in nodes]
        self._database = database

    @classmethod
    async def of(cls, nodes: list[Server], connection: asyncpg.Connection) -> "Use":
        """The counts at this moment."""
        counted = await connection.fetchrow(
            "SELECT xact_commit + xact_rollback AS transactions, tup_returned + tup_fetched AS rows"
            " FROM pg_stat_database WHERE datname = current_database()"
        )
        return await asyncio.to_thread(cls, nodes, dict(counted))

    def since(self, earlier: "Use") -> tuple[str, str, str, str]:
        """Transactions, rows and pulls a second, and shares of a core."""
        seconds = self._at - earlier._at
        pulls = [
            sum(
                now.since(then, "context_server_pulls_total", source=source)
                for now, then in zip(self._metrics, earlier._metrics, strict=True)
            )
            for source in ("memory", "database")
        ]
        return (
            f"{(self._database['transactions'] - earlier._database['transactions']) / seconds:,.1f}",
            f"{(self._database['rows'] - earlier._database['rows']) / seconds:,.0f}",
            f"{pulls[0] / seconds:,.0f} + {pulls[1] / seconds:,.0f}",
            " and ".join(f"{(now - then) / seconds:.0%}" for now, then in zip(self._cpu, earlier._cpu, strict=True)),
        )


async def _measure(nodes: list[Server], url: str, count: int, rate: float, seconds: float) -> list[object]:
    writer = await Connection.open(HOST, nodes[0].port)
    context_id = (await writer.request("POST", "/contexts", {}, 201))["id"]
    followers = [Follower(nodes[number % 2].port, context_id) for number in range(count)]
    for begin in range(0, count, OPENING_AT_ONCE):
        await asyncio.gather(*(follower.open() for follower in followers[begin : begin + OPENING_AT_ONCE]))
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    body = {"payload": {"type": "text", "content": f"rate={rate:g} seconds={seconds:g}"}}
    message_id = (await writer.request("POST", f"/contexts/{context_id}/messages", body, 202))["reply_message_id"]
    for follower in followers:
        follower.follow(message_id)
    await asyncio.sleep(SETTLE_SECONDS)
    before = await Use.of(nodes, connection)
    await asyncio.sleep(seconds - 2 * SETTLE_SECONDS)
    after = await Use.of(nodes, connection)
    async with asyncio.timeout(seconds + 60):
        await asyncio.gather(*(follower.ended for follower in followers))
    path = f"/contexts/{context_id}/messages/{message_id}/content?view=chunks"
    chunks = (await writer.request("GET", path))["chunks"]
    await connection.close()
    for follower in followers:
        follower.close()
    writer.close()
    written = {chunk["sequence"]: int(chunk["text"].split()[-1].partition(":")[2]) for chunk in chunks}
    delays, second = _delays(followers, written), _delays(followers[1::2], written)
    whole = "".join(chunk["text"] for chunk in chunks)
    return [
        count,
        round(rate * seconds),
        f"{len(delays):,}",
        *(_shown_ms(delays, percent) for percent in (50, 99, 100)),
        _shown_ms(second, 99),
        sum("".join(follower.text) != whole for follower in followers),
        *after.since(before),
    ]


def _delays(followers: list[Follower], written: Mapping[int, int]) -> "array[int]":
    """From the writing of a sequence's last word to its signal, in ascending order, in ns."""
    found = [at - written[sequence] for follower in followers for sequence, at in follower.arrivals]
    return array("q", sorted(found))


def _shown_ms(delays: "array[int]", percent: float) -> str:
    return f"{report.percentile(delays, percent) / 1e6:.0f}" if delays else "-"


def main() -> None:
    """Run the sweep with fresh nodes and a fresh database for each count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--followers", default="10,100,1000", help="counts, separated by commas")
    parser.add_argument("--rate", type=float, default=2, help="words a second")
    parser.add_argument("--seconds", type=float, default=20, help="length of the reply")
    options = parser.parse_args()
    counts = [int(count) for count in options.followers.split(",")]
    allow_descriptors(2 * max(counts) + 200)
    rows = []
    for place, count in enumerate(counts):
        with ExitStack() as stack:
            directory = Path(stack.enter_context(report.work_directory()))
            url = stack.enter_context(new_database("postgresql", directory))
            if place == 0:
                report.announce(report.command_line("followers"), directory, *report.server_version(url))
            nodes = [stack.enter_context(running(directory, database=url, core=core)) for core in (0, 1)]
            rows.append(uvloop.run(_measure(nodes, url, count, options.rate, options.seconds)))
    print(report.table(HEADER, rows))


if __name__ == "__main__":
    main()
