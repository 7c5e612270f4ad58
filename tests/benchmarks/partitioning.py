"""Chunks in one table against chunks in 16 partitions by hash of the message: append, pull, compaction, deletion.

    python -m tests.benchmarks.partitioning --chunks 4000000 --rounds 300

On a PostgreSQL server of this run's own, with the statements that the server uses, by one connection. Both tables are
filled with the same replies, analysed and vacuumed; then they are measured in turns, so that a slow moment meets both.
An append adds one chunk to each of 50 open messages, as a group commit does. "Compaction" reads a thousand chunks and
deletes them; "deletion" deletes the rows of a reply by its id alone, as a cascade does. The vacuum is that of what the
rounds left behind.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, NullPool, TextClause, create_engine, make_url, text

from context_server.records import new_id
from tests.benchmarks import report
from tests.engines import private_database

PARTITIONS = 16
REPLY = 500
"""Chunks of each reply."""
OPEN = 50
"""Messages that grow with each commit."""
COMPACTED = 1000
COLUMNS = """
    message_id varchar(36) NOT NULL, sequence bigint NOT NULL, kind varchar(12) NOT NULL, text text, data json,
    PRIMARY KEY (message_id, sequence)
"""
FILL = """
INSERT INTO {table} SELECT message_id, sequence, 'text', md5(sequence::text || message_id), NULL
FROM unnest(CAST(:ids AS text[])) AS message_id, generate_series(1, :length) AS sequence
"""
APPEND = """
INSERT INTO {table} (message_id, sequence, kind, text, data)
SELECT message_id, sequence, kind, text, data::json
FROM unnest(CAST(:ids AS text[]), CAST(:sequences AS bigint[]), CAST(:kinds AS text[]), CAST(:texts AS text[]),
            CAST(:data AS text[])) AS batch (message_id, sequence, kind, text, data)
"""
PULL = """
SELECT sequence, kind, text, data FROM {table}
WHERE message_id = :id AND sequence > :after AND sequence <= :until ORDER BY sequence LIMIT 500
"""
COMPACT = "DELETE FROM {table} WHERE message_id = :id AND sequence > :after AND sequence <= :until"
DELETE = "DELETE FROM {table} WHERE message_id = :id"
HEADER = ("what", "rounds", "plain p50 µs", "p99 µs", "16 partitions p50 µs", "p99 µs", "p50 against the plain one")


@dataclass(slots=True)
class Layout:
    """One way to keep chunks, and what it took."""

    table: str
    times: dict[str, list[float]] = field(default_factory=dict)
    vacuum_seconds: float = 0.0
    size_bytes: int = 0

    def timed(self, what: str, work: Callable[..., None], connection: Connection, *given: Any) -> None:
        """Runs ``work`` on this table and notes its microseconds."""
        began = time.perf_counter()
        work(connection, self, *given)
        self.times.setdefault(what, []).append((time.perf_counter() - began) * 1e6)

    def sql(self, statement: str) -> TextClause:
        """The statement for this table."""
        return text(statement.format(table=self.table))


def create(connection: Connection) -> None:
    """Both layouts, empty."""
    connection.execute(text(f"CREATE TABLE plain ({COLUMNS})"))
    connection.execute(text(f"CREATE TABLE parted ({COLUMNS}) PARTITION BY HASH (message_id)"))
    for number in range(PARTITIONS):
        bounds = f"WITH (MODULUS {PARTITIONS}, REMAINDER {number})"
        connection.execute(text(f"CREATE TABLE parted_{number} PARTITION OF parted FOR VALUES {bounds}"))


def fill(connection: Connection, layouts: list[Layout], chunks: int) -> list[str]:
    """The same replies in both; their ids."""
    ids = [new_id() for _ in range(chunks // REPLY)]
    for start in range(0, len(ids), 200):
        for layout in layouts:
            connection.execute(layout.sql(FILL), {"ids": ids[start : start + 200], "length": REPLY})
        connection.commit()
    return ids


@contextmanager
def transaction(connection: Connection) -> Iterator[None]:
    """One durable transaction."""
    with connection.begin():
        yield


def _append(connection: Connection, layout: Layout, ids: list[str], sequence: int) -> None:
    values = {
        "ids": ids, "sequences": [sequence] * len(ids), "kinds": ["text"] * len(ids),
        "texts": [f"{sequence}:1700000000000000000 "] * len(ids), "data": [None] * len(ids),
    }  # fmt: skip
    with transaction(connection):
        connection.execute(layout.sql(APPEND), values)


def _pull(connection: Connection, layout: Layout, message_id: str) -> None:
    with transaction(connection):
        limits = {"id": message_id, "after": REPLY - 10, "until": REPLY}
        if len(connection.execute(layout.sql(PULL), limits).all()) != 10:
            raise RuntimeError("the pull did not answer ten chunks")


def _compact(connection: Connection, layout: Layout, pair: list[str]) -> None:
    with transaction(connection):
        for message_id in pair:
            limits = {"id": message_id, "after": 0, "until": REPLY}
            connection.execute(layout.sql(PULL), limits).all()
            connection.execute(layout.sql(COMPACT), limits)


def _delete(connection: Connection, layout: Layout, message_id: str) -> None:
    with transaction(connection):
        connection.execute(layout.sql(DELETE), {"id": message_id})


def measure(connection: Connection, layouts: list[Layout], ids: list[str], rounds: int, seed: int) -> None:
    """Everything in turns, on replies that no round has touched before."""
    chosen = random.Random(seed)
    fresh = chosen.sample(ids, rounds * (COMPACTED // REPLY + 1))
    rest = sorted(set(ids) - set(fresh))
    growing = [new_id() for _ in range(OPEN)]
    for turn in range(rounds):
        pulled = chosen.choice(rest)
        pair = [fresh.pop() for _ in range(COMPACTED // REPLY)]
        gone = fresh.pop()
        for layout in chosen.sample(layouts, len(layouts)):
            layout.timed("append of 50 chunks", _append, connection, growing, turn + 1)
            layout.timed("pull of the last 10", _pull, connection, pulled)
            layout.timed("compaction of 1,000", _compact, connection, pair)
            layout.timed("deletion of 500", _delete, connection, gone)


def main() -> None:
    """Fill, measure in turns, vacuum, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, default=4_000_000, help="rows in each table")
    parser.add_argument("--rounds", type=int, default=300, help="of each kind, on each table")
    parser.add_argument("--seed", type=int, default=1, help="which replies")
    options = parser.parse_args()
    with report.work_directory() as name, private_database("partitioning") as (_, url):
        report.announce(report.command_line("partitioning"), Path(name), *report.server_version(url))
        layouts = [Layout("plain"), Layout("parted")]
        engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"), poolclass=NullPool)
        with engine.connect() as connection:
            create(connection)
            connection.commit()
            began = time.perf_counter()
            ids = fill(connection, layouts, options.chunks)
            print(f"Filled in {time.perf_counter() - began:.0f} s.\n")
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE"))
            connection.execute(text("CHECKPOINT"))
        with engine.connect() as connection:
            measure(connection, layouts, ids, options.rounds, options.seed)
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for layout in layouts:
                began = time.perf_counter()
                connection.execute(layout.sql("VACUUM {table}"))
                layout.vacuum_seconds = time.perf_counter() - began
                sizes = (
                    "SELECT sum(pg_total_relation_size(oid)) FROM pg_class WHERE relkind = 'r' AND relname LIKE :like"
                )
                layout.size_bytes = int(connection.scalar(text(sizes), {"like": f"{layout.table}%"}) or 0)
    rows = []
    plain, parted = layouts
    for what in plain.times:
        one, other = sorted(plain.times[what]), sorted(parted.times[what])
        ratio = statistics.median(other) / statistics.median(one)
        cells = [f"{report.percentile(each, percent):,.0f}" for each in (one, other) for percent in (50, 99)]
        rows.append([what, f"{len(one):,}", *cells, f"{ratio:.2f} times"])
    print(report.table(HEADER, rows))
    print(
        f"\nVacuum: {plain.vacuum_seconds:.1f} s plain, {parted.vacuum_seconds:.1f} s partitioned. "
        f"Size: {plain.size_bytes / 1e6:,.0f} MB and {parted.size_bytes / 1e6:,.0f} MB."
    )


if __name__ == "__main__":
    main()
