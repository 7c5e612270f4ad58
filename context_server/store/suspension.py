"""What runs wait for: people's decisions, their turn, and what is said to them meanwhile. ``Store.suspension``."""

import time
from collections.abc import Set
from dataclasses import dataclass
from functools import partial

from sqlalchemy import Connection

from context_server.errors import Fenced
from context_server.records import Approval, Message, Mode, Run, Transition, Turn
from context_server.store import approvals, posting, reading, run_statements, waiting, waiting_statements
from context_server.store.approvals import Decided, Decision
from context_server.store.conversations import lock_row
from context_server.store.database import Database


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """How the context of a run stands: its mode, and what was posted for the run and is its own now.

    ``version`` is the context's new one, where something was taken.
    """

    mode: Mode
    steering: tuple[Turn, ...] = ()
    version: int | None = None


class Suspension:
    """The transactions of approvals and of the queue.

    Raises, from every method: as ``Store``.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    async def approvals(self, owner: str, context_id: str, *, only_pending: bool) -> list[Approval]:
        """What runs of a context have asked for, oldest first.

        Raises:
            ContextNotFound.
        """

        def work(connection: Connection) -> list[Approval]:
            reading.require_context(connection, owner, context_id)
            return approvals.approvals(connection, context_id, only_pending=only_pending)

        return await self._database.read(work)

    async def decide(
        self, owner: str, context_id: str, approval_id: str, decision: Decision, *, if_match: int | None
    ) -> Decided:
        """An approval as it stands after a decision; once nothing of the run is pending, it is queued again.

        Raises:
            ContextNotFound, VersionMismatch, ApprovalNotFound, ApprovalDecided, ArgumentsNotEditable.
        """
        return await self._database.write(
            lambda connection: posting.decide(
                connection,
                owner=owner,
                now_ms=_clock_ms(),
                context_id=context_id,
                approval_id=approval_id,
                decision=decision,
                if_match=if_match,
            )
        )

    async def overdue(self, limit: int) -> list[tuple[str, str]]:
        """``(owner, context_id)`` of contexts in which nobody has decided in time."""
        return await self._database.read(partial(approvals.expired, limit=limit))

    async def expire(self, owner: str, context_id: str) -> Transition | None:
        """Ends a run on whose request nobody has decided in time; None where somebody has.

        Raises:
            ContextNotFound.
        """
        return await self._database.write(
            lambda connection: posting.expire_approvals(
                connection, owner=owner, context_id=context_id, now_ms=_clock_ms()
            )
        )

    async def waiting(self, owner: str, context_id: str) -> list[tuple[Message, str]]:
        """Messages that wait for their turn in a context, each with the id of its reply, in the order of the turns.

        Raises:
            ContextNotFound.
        """
        return await self._database.read(partial(reading.waiting, owner=owner, context_id=context_id))

    async def remove_waiting(
        self, owner: str, context_id: str, message_id: str, *, if_match: int | None
    ) -> tuple[int, str]:
        """Takes back a message that waits; the context's new version, and the id of its reply.

        Raises:
            ContextNotFound, VersionMismatch, WaitingNotFound.
        """
        return await self._database.write(
            lambda connection: posting.remove_waiting(
                connection,
                owner=owner,
                now_ms=_clock_ms(),
                context_id=context_id,
                message_id=message_id,
                if_match=if_match,
            )
        )

    async def look(self, run: Run, known: Set[str] = frozenset()) -> Taken:
        """How the context of a run stands now; it writes only where something was posted for the run.

        Given is what was posted for it but for what is ``known``, also where an earlier look has taken it and its
        outcome was unknown.

        Raises:
            Fenced: the run is not this attempt's any more.
        """
        mode, is_news = await self._database.read(partial(_look, run_id=run.id, known=known))
        if not is_news:
            return Taken(mode=mode)

        def work(connection: Connection) -> Taken:
            context = lock_row(connection, run.owner, run.context_id, None)
            if connection.execute(*run_statements.lock_held_run(run.id, run.attempt)).first() is None:
                raise Fenced(run.id)
            taken = waiting.take_steering(connection, context, run.id, _clock_ms())
            rows = connection.execute(*waiting_statements.select_all_steering(run.id)).all()
            turns = tuple(reading.to_turn(connection, row) for row in rows if row.id not in known)
            return Taken(mode=Mode(context.mode), steering=turns, version=context.version + 1 if taken else None)

        return await self._database.write(work)


def _look(connection: Connection, *, run_id: str, known: Set[str]) -> tuple[Mode, bool]:
    mode = connection.execute(*waiting_statements.select_mode(run_id)).scalar_one_or_none()
    if mode is None:
        raise Fenced(run_id)
    rows = connection.execute(*waiting_statements.select_all_steering(run_id)).all()
    return Mode(mode), any(row.id not in known for row in rows)


def _clock_ms() -> int:
    return time.time_ns() // 1_000_000
