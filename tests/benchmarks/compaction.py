"""Compaction of a log of many chunks while clients pull it: the same bytes before, during and after, and what it costs.

    python -m tests.benchmarks.compaction --chunks 1000000 --database sqlite,postgresql

The log is one reply of a tenth of the chunks and many of a thousand, with every kind of chunk. A fixed list of pulls
(from the start, from the middle, the last ten, bounded ranges; both views; whole pages) is taken of it by a server that
compacts nothing. A second one compacts at once while the same pulls go on, evenly in time, each compared by the SHA-256
of its body; a last round compares all of them when everything is in segments. Live conversations run meanwhile, so that
what compaction adds to their words' delay shows.

"CPU of compaction" is what the server used more of a core than in the same time and under the same load without it;
PostgreSQL is a server of this run's own, on the second core with the load, and what its processes used more stands
beside it. ``--share`` sets what the keeper may take.
"""

import argparse
import asyncio
import hashlib
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import uvloop
from sqlalchemy import text

from context_server.store.maintenance import change_schema
from tests.benchmarks import report
from tests.benchmarks.conversation import Conversation, Tally
from tests.benchmarks.load import Answer, Connection
from tests.benchmarks.server import HOST, TICKS_PER_SECOND, Server, running
from tests.databases import beside
from tests.engines import Postgres
from tests.old_log import choose_pulls, fill

BATCHES_OF_LIVE_SECONDS = 5
HEADER = (
    "database", "chunks", "phase", "seconds", "pulls", "other bytes", "pull p50 / p99 ms", "words p50 / p99 ms",
    "server CPU", "PostgreSQL CPU", "in chores", "rows of chunks + segments", "size MB",
)  # fmt: skip


@dataclass(slots=True)
class Phase:
    """What was seen while the same pulls and conversations went on."""

    name: str
    seconds: float = 0.0
    pulls: int = 0
    different: int = 0
    times: list[float] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    server_cpu: float = 0.0
    engine_cpu: float = 0.0
    chores: float = 0.0
    rows: str = ""
    size: str = ""


# The clients


async def _ask(connection: Connection, path: str) -> tuple[str, float]:
    """The fingerprint of an answer, and the milliseconds that it took."""
    future: asyncio.Future[Answer | None] = asyncio.get_running_loop().create_future()
    began = time.perf_counter()
    connection.send("GET", path, future.set_result)
    answer = await future
    took = (time.perf_counter() - began) * 1000
    if answer is None or answer.status != 200:
        raise RuntimeError(f"{path}: {answer and (answer.status, answer.body[:300])}")
    return hashlib.sha256(answer.body).hexdigest(), took


async def _all_of(server: Server, pulls: list[str]) -> dict[str, str]:
    """Every pull once: path → fingerprint."""
    connection = await Connection.open(HOST, server.port)
    try:
        return {path: (await _ask(connection, path))[0] for path in pulls}
    finally:
        connection.close()


async def _keep_pulling(
    server: Server, expected: dict[str, str], rate: float, phase: Phase, done: asyncio.Event
) -> None:
    """Pulls evenly in time until it is done, comparing each answer."""
    connection = await Connection.open(HOST, server.port)
    paths, loop = list(expected), asyncio.get_running_loop()
    began = loop.time()
    try:
        while not done.is_set():
            path = paths[phase.pulls % len(paths)]
            fingerprint, took = await _ask(connection, path)
            phase.times.append(took)
            phase.different += fingerprint != expected[path]
            phase.pulls += 1
            await asyncio.sleep(max(0.0, began + phase.pulls / rate - loop.time()))
    finally:
        connection.close()


async def _keep_talking(server: Server, count: int, phase: Phase, done: asyncio.Event) -> None:
    """Live conversations, some seconds each, until it is done."""
    ask, words = f"rate=50 seconds={BATCHES_OF_LIVE_SECONDS}", 50 * BATCHES_OF_LIVE_SECONDS
    while not done.is_set():
        async with asyncio.TaskGroup() as group:
            for _ in range(count):
                group.create_task(Conversation(HOST, server.port, ask, words, phase.tally).run())


async def _load(
    server: Server,
    expected: dict[str, str],
    options: argparse.Namespace,
    phase: Phase,
    until: "Until",
    engine: "Engine",
) -> None:
    """One phase: pulls and conversations until ``until`` says so."""
    done, loop = asyncio.Event(), asyncio.get_running_loop()
    before = await loop.run_in_executor(None, server.metrics)
    async with asyncio.TaskGroup() as group:
        group.create_task(_keep_pulling(server, expected, options.rate, phase, done))
        if options.live:
            group.create_task(_keep_talking(server, options.live, phase, done))
        began, cpu, engine_cpu = time.monotonic(), server.cpu_seconds(), engine.cpu_seconds()
        await until(server)
        phase.seconds = time.monotonic() - began
        phase.server_cpu = (server.cpu_seconds() - cpu) / phase.seconds
        phase.engine_cpu = (engine.cpu_seconds() - engine_cpu) / phase.seconds
        after = await loop.run_in_executor(None, server.metrics)
        phase.chores = after.since(before, "context_server_housekeeping_seconds_total") / phase.seconds
        done.set()


@dataclass(frozen=True, slots=True)
class Until:
    """When a phase ends: after some seconds, or once so many chunks have been compacted."""

    seconds: float = 0.0
    chunks: int = 0

    async def __call__(self, server: Server) -> None:
        """Waits for it."""
        if not self.chunks:
            await asyncio.sleep(self.seconds)
            return
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(3600):
            while True:
                metrics = await loop.run_in_executor(None, server.metrics)
                if metrics.value("context_server_chunks_compacted_total") >= self.chunks:
                    return
                await asyncio.sleep(1)


# The databases


class Engine:
    """The database under test: its URL, what its own processes used, and how much it holds."""

    def __init__(self, url: str, postgres: Postgres | None, directory: Path) -> None:
        self.url = url
        self.name = "sqlite" if postgres is None else "postgresql"
        self._postgres = postgres
        self._directory = directory

    def cpu_seconds(self) -> float:
        """Processor time of PostgreSQL's processes so far, those that have ended included; 0 with SQLite."""
        if self._postgres is None:
            return 0.0
        parent = int((self._postgres._data / "postmaster.pid").read_text().split()[0])
        ticks = 0
        for process in Path("/proc").glob("[0-9]*"):
            try:
                fields = (process / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(process.name) == parent:
                ticks += sum(map(int, fields[11:15]))
            elif int(fields[1]) == parent:
                ticks += int(fields[11]) + int(fields[12])
        return ticks / TICKS_PER_SECOND

    def look(self, phase: Phase) -> None:
        """Notes how many rows and bytes there are."""
        with beside(self.url).connect() as connection:
            counts = [connection.scalar(text(f"SELECT count(*) FROM {name}")) for name in ("chunks", "segments")]
            phase.rows = f"{counts[0]:,} + {counts[1]:,}"
            if self._postgres is None:
                pages, free, size = (
                    connection.scalar(text(f"PRAGMA {name}")) or 0
                    for name in ("page_count", "freelist_count", "page_size")
                )
                wal = (self._directory / "bench.db-wal").stat().st_size if phase.seconds else 0
                phase.size = f"{pages * size / 1e6:.0f}, of them {free * size / 1e6:.0f} free; WAL {wal / 1e6:.0f}"
            else:
                sizes = [
                    connection.scalar(text(f"SELECT pg_total_relation_size('{name}')")) or 0
                    for name in ("chunks", "segments")
                ]
                phase.size = f"{sizes[0] / 1e6:.0f} + {sizes[1] / 1e6:.0f}"


@contextmanager
def engine_of(kind: str, directory: Path) -> Iterator[Engine]:
    """An empty database with the newest schema."""
    with ExitStack() as stack:
        if kind == "sqlite":
            engine = Engine(f"sqlite:///{directory / 'bench.db'}", None, directory)
        else:
            postgres = stack.enter_context(Postgres())
            engine = Engine(postgres.create("bench"), postgres, directory)
        asyncio.run(change_schema(engine.url, "head", down=False))
        yield engine


def measure(kind: str, options: argparse.Namespace) -> list[Phase]:
    """The three phases on one database."""
    with report.work_directory() as name, engine_of(kind, Path(name)) as engine:
        directory = Path(name)
        version = report.server_version(engine.url) if kind == "postgresql" else ()
        report.announce(report.command_line("compaction"), directory, *version)
        replies = fill(engine.url, options.chunks)
        pulls = choose_pulls(replies, options.pulls, options.seed)
        never = {"CONTEXT_SERVER_COMPACT_AFTER_HOURS": "0"}
        at_once = {
            "CONTEXT_SERVER_COMPACT_AFTER_HOURS": "1",
            "CONTEXT_SERVER_HOUSEKEEPING_SHARE": str(options.share),
        }
        total = sum(reply.length for reply in replies)
        before, during, after = Phase("before"), Phase("while it is compacted"), Phase("after")
        with running(directory, never, database=engine.url) as server:
            expected = uvloop.run(_all_of(server, pulls))
            uvloop.run(_load(server, expected, options, before, Until(seconds=options.seconds), engine))
            engine.look(before)
        with running(directory, at_once, database=engine.url) as server:
            uvloop.run(_load(server, expected, options, during, Until(chunks=total), engine))
            engine.look(during)
        with running(directory, at_once, database=engine.url) as server:
            again = uvloop.run(_all_of(server, pulls))
            after.different += sum(again[path] != expected[path] for path in pulls)
            after.pulls += len(pulls)
            uvloop.run(_load(server, expected, options, after, Until(seconds=options.seconds), engine))
            engine.look(after)
        return [before, during, after]


def _row(kind: str, options: argparse.Namespace, phase: Phase) -> list[object]:
    times, words = sorted(phase.times), sorted(phase.tally.latencies_ns)
    pulls = f"{report.percentile(times, 50):.1f} / {report.percentile(times, 99):.1f}"
    delays = "-"
    if words:
        delays = f"{report.percentile(words, 50) / 1e6:.0f} / {report.percentile(words, 99) / 1e6:.0f}"
    engine_cpu = f"{phase.engine_cpu:.1%}" if kind == "postgresql" else "-"
    return [
        kind, f"{options.chunks:,}", phase.name, f"{phase.seconds:.0f}", f"{phase.pulls:,}", phase.different, pulls,
        delays, f"{phase.server_cpu:.1%}", engine_cpu, f"{phase.chores:.1%}", phase.rows, phase.size,
    ]  # fmt: skip


def main() -> int:
    """Measure each database, and say whether the bars were reached."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=1_000_000, help="chunks in the log")
    parser.add_argument("--database", default="sqlite,postgresql", help="which, separated by commas")
    parser.add_argument("--pulls", type=int, default=400, help="different pulls")
    parser.add_argument("--rate", type=float, default=20, help="pulls a second")
    parser.add_argument("--live", type=int, default=10, help="live conversations of 50 words a second meanwhile")
    parser.add_argument("--seconds", type=float, default=30, help="length of the phases before and after")
    parser.add_argument("--share", type=float, default=0.05, help="the setting housekeeping_share")
    parser.add_argument("--seed", type=int, default=1, help="which pulls")
    options = parser.parse_args()
    reached = [_measured(kind, options) for kind in options.database.split(",")]
    return 0 if all(reached) else 1


def _measured(kind: str, options: argparse.Namespace) -> bool:
    """Measures one database and prints what was seen; whether the bars were reached."""
    before, during, _ = phases = measure(kind, options)
    print(report.table(HEADER, [_row(kind, options, phase) for phase in phases]))
    cpu = during.server_cpu - before.server_cpu
    different = sum(phase.different for phase in phases)
    faults = [phase.tally.faults() for phase in phases if phase.tally.faulty]
    print(f"\n{different} of {sum(phase.pulls for phase in phases):,} pulls answered other bytes.")
    print(f"CPU of compaction: {cpu:+.1%} of a core in the server", end="")
    print(f", {during.engine_cpu - before.engine_cpu:+.1%} in PostgreSQL." if kind == "postgresql" else ".")
    print(f"Faults of the conversations: {faults or 'none'}.\n", flush=True)
    return not different and not faults and cpu < 0.1


if __name__ == "__main__":
    raise SystemExit(main())
