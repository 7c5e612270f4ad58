"""What the database holds, read from it directly and not through the server."""

import sqlite3
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncpg


@dataclass(frozen=True, slots=True)
class Logged:
    """One message as the database holds it."""

    sequence: int
    status: str
    final_sequence: int | None
    digest: str | None
    chunks: tuple[tuple[int, str], ...]
    context_id: str = ""
    role: str = "assistant"
    error_code: str | None = None
    completed_at: float | None = None
    """Unix seconds by the database's clock."""

    def text(self, after: int = 0, to: int | None = None) -> str:
        """The text of the sequences after one, up to another."""
        return "".join(text for number, text in self.chunks if number > after and (to is None or number <= to))


@dataclass(frozen=True, slots=True)
class RunRow:
    """One run as the database holds it."""

    context_id: str
    message_id: str
    status: str
    attempt: int
    node_id: str | None = None


@dataclass(frozen=True, slots=True)
class Rows:
    """One consistent picture of a database."""

    messages: Mapping[str, Logged]
    states: Mapping[str, str] = field(default_factory=dict)
    """The state of each context."""
    runs: Mapping[str, RunRow] = field(default_factory=dict)
    read_at: float = 0.0
    """When it was read, in Unix seconds."""


def read_log(database: Path) -> dict[str, Logged]:
    """Every message of an SQLite database that nobody writes."""
    connection = sqlite3.connect(database)
    try:
        assert connection.execute("PRAGMA quick_check").fetchall() == [("ok",)]
        chunks = _by_message(
            connection.execute("SELECT message_id, sequence, text FROM chunks ORDER BY message_id, sequence")
        )
        return {
            message_id: Logged(sequence, status, final, digest, tuple(chunks.get(message_id, ())))
            for message_id, sequence, status, final, digest in connection.execute(
                "SELECT id, sequence, status, final_sequence, digest FROM messages"
            )
        }
    finally:
        connection.close()


def _by_message(rows: Iterable[Any]) -> dict[str, list[tuple[int, str]]]:
    chunks: dict[str, list[tuple[int, str]]] = {}
    for message_id, sequence, text in rows:
        chunks.setdefault(message_id, []).append((sequence, text or ""))
    return chunks


async def connect(url: str) -> asyncpg.Connection:
    """A connection beside the server, to a ``postgresql+asyncpg://`` URL."""
    return await asyncpg.connect(url.replace("+asyncpg", ""), timeout=10, command_timeout=30)


async def read_rows(url: str) -> Rows:
    """Everything that a PostgreSQL database holds, also while it is written."""
    connection = await connect(url)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            chunks = _by_message(
                await connection.fetch("SELECT message_id, sequence, text FROM chunks ORDER BY message_id, sequence")
            )
            messages = await connection.fetch(
                "SELECT id, sequence, status, final_sequence, digest, context_id, role, error->>'code' AS error_code,"
                " completed_at / 1000.0::float8 AS completed_at FROM messages"
            )
            states = await connection.fetch("SELECT id, state FROM contexts")
            runs = await connection.fetch("SELECT id, context_id, message_id, status, attempt, node_id FROM runs")
    finally:
        await connection.close()
    return Rows(
        {
            row["id"]: Logged(
                row["sequence"], row["status"], row["final_sequence"], row["digest"], tuple(chunks.get(row["id"], ())),
                row["context_id"], row["role"], row["error_code"], row["completed_at"],
            )
            for row in messages
        },
        {row["id"]: row["state"] for row in states},
        {
            row["id"]: RunRow(row["context_id"], row["message_id"], row["status"], row["attempt"], row["node_id"])
            for row in runs
        },
        time.time(),
    )  # fmt: skip
