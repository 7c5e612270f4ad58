"""Protections that ``launch`` takes away, one function each: they change the product in the process that calls them."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import Connection, select

from context_server.bus.linked import LinkedBus
from context_server.ledger import Ledger
from context_server.records import Append
from context_server.relay import Relay
from context_server.reply import OpenReply
from context_server.runner import Runner
from context_server.store.dialects import postgresql
from context_server.store.execution import Standing
from context_server.store.tables import messages
from context_server.workers import Assignment, Place, Supervisor

_FENCES = (
    "messages.attempt = batch.attempt AND ",
    "  AND messages.status IN ('pending', 'streaming')\n",
    " AND runs.attempt = batch.attempt AND runs.status = 'running'",
    "  AND runs.lease_expires_at > (extract(epoch FROM clock_timestamp()) * 1000)::bigint\n",
)
"""What the append demands besides the expected sequence."""


def unfenced() -> None:
    """A node appends whether or not it still holds the run's lease. The database's own checks must be dropped too."""
    statement = postgresql._ADVANCE_MESSAGES
    for fence in _FENCES:
        assert fence in statement, fence
        statement = statement.replace(fence, "")
    postgresql._ADVANCE_MESSAGES = statement


def no_reaper() -> None:
    """Nobody ends the runs of a dead node."""

    async def reap(_self: Runner) -> int:
        return 0

    Runner._reap = reap  # type: ignore[method-assign]  # the point of this module


def blind_retry() -> None:
    """A commit whose outcome is unknown is written once more, after whatever the log holds by then."""

    def heads(connection: Connection, message_ids: Sequence[str]) -> dict[str, int]:
        found = select(messages.c.id, messages.c.sequence).where(messages.c.id.in_(message_ids))
        return {row.id: row.sequence for row in connection.execute(found)}

    async def settle(
        self: Ledger, batch: list[tuple[OpenReply, Append]], *, is_unknown: bool, refusals: int
    ) -> list[tuple[OpenReply, Append]]:
        del is_unknown, refusals
        appends = [append for _, append in batch]
        standings = await self._store.standings(appends)
        head_of = await self._store._read(lambda rows: heads(rows, [append.run.message_id for append in appends]))
        left = []
        for (reply, append), (standing, _) in zip(batch, standings, strict=True):
            if standing is Standing.FENCED:
                self._lose(reply)
                continue
            moved = _after(append, head_of[append.run.message_id])
            reply.sequence = moved.sequence
            left.append((reply, moved))
        return left

    Ledger._settle = settle  # type: ignore[method-assign]  # the point of this module


def _after(append: Append, head: int) -> Append:
    """The same text, after another head."""
    chunks = tuple(replace(chunk, sequence=head + place) for place, chunk in enumerate(append.chunks, 1))
    return replace(append, expected_sequence=head, chunks=chunks)


def no_successor() -> None:
    """The place of a worker that died stays empty."""

    async def leave(self: Supervisor, _place: Place, _code: int, _short_lives: int) -> None:
        await self._stopping.wait()

    Supervisor._replace = leave  # type: ignore[method-assign]  # the point of this module


def orphans() -> None:
    """A worker does not notice that its supervisor is gone."""
    Assignment.watch = lambda _self: None  # type: ignore[method-assign]  # the point of this module


def deaf() -> None:
    """Every wake-up of another node is lost, and the bus believes that it hears."""
    hear = LinkedBus._hear

    def hear_oneself(self: LinkedBus, packet: str) -> None:
        if packet.startswith(self._own):
            hear(self, packet)

    LinkedBus._hear = hear_oneself  # type: ignore[method-assign]  # the point of this module


def no_look() -> None:
    """A node never looks by itself whether other nodes have written something, and not when it hears again either."""

    async def sweep_forever(_self: Relay) -> None:
        await asyncio.Event().wait()

    Relay._sweep_forever = sweep_forever  # type: ignore[method-assign]  # the point of this module


DEFECTS: dict[str, Callable[[], Any]] = {
    "unfenced": unfenced,
    "no-reaper": no_reaper,
    "blind-retry": blind_retry,
    "deaf": deaf,
    "no-look": no_look,
    "no-successor": no_successor,
    "orphans": orphans,
}
