"""Wake-ups between nodes are lost: all of them, or their server is killed, or it hangs up on whoever listens.

Clients post at the first node, and subscribe and pull at the second, which learns by wake-ups alone, or by looking for
itself, that there is something new. How old words are when they come says how stale the second node is.

The control: a node that hears nothing does not look for itself, nor when it hears again.
"""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from enum import StrEnum
from pathlib import Path

from tests.chaos.checker import Bounds, Violation
from tests.chaos.cluster import Cluster
from tests.chaos.nodes.trial import Clients, Result, habits, judge
from tests.chaos.rows import connect
from tests.engines import Redis

CONTROL = "no-look"
DEAF = ("--defect", "deaf")
HANG_UP_SECONDS = 0.05
RETURN_SECONDS = 5.0
"""How soon after the return of the server words must be fresh again."""


class Loss(StrEnum):
    """How wake-ups are lost."""

    DROPPED = "dropped"
    """Every wake-up of another node is, and the bus believes that it hears."""
    POSTGRESQL = "postgresql"
    """PostgreSQL ends the connections that listen, again and again."""
    REDIS = "redis"
    """Redis is killed and started again."""


async def wakeups(
    directory: Path,
    url: str,
    loss: Loss,
    *,
    redis: Redis | None = None,
    seed: int,
    rounds: int = 1,
    gone_seconds: float = 30.0,
    whole_seconds: float = 20.0,
    conversations: int = 10,
    words: tuple[int, int] = (20, 100),
    bounds: Bounds | None = None,
    fresh_seconds: float = 1.0,
    rest_seconds: float = 30.0,
    defects: Sequence[str] = (),
) -> Result:
    """Loses wake-ups for so long, ``rounds`` times, each time followed by a time in which all is whole.

    ``fresh_seconds`` is how old words may be then, from ``RETURN_SECONDS`` on.
    """
    dice = random.Random(seed)
    bounds = bounds or Bounds()
    result = Result(f"wakeups, {loss}", seed)
    settings = {} if redis is None else {"bus": redis.url}
    given = (*defects, *DEAF) if loss is Loss.DROPPED else defects
    lost: list[float] = [0.0]
    fresh: list[float] = [0.0]
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(Cluster(directory, [url] * 2, defects=given, **settings))
        writer, reader = cluster.ports
        clients = await stack.enter_async_context(
            await Clients.of([reader], conversations, dice, habits(words, rate=10), post=[writer])
        )
        for _ in range(rounds):
            gone_at = time.time()
            async with _lost(loss, url, redis):
                await asyncio.sleep(gone_seconds)
            back_at = time.time()
            lost += clients.ages(gone_at, back_at)
            await asyncio.sleep(whole_seconds)
            if loss is Loss.DROPPED:
                lost += clients.ages(back_at)
            else:
                fresh += clients.ages(back_at + RETURN_SECONDS)
        result.figures |= {
            "rounds": f"{rounds} of {gone_seconds:g} s gone, {whole_seconds:g} s whole",
            "oldest word while gone": f"{max(lost):.2f} s",
            "oldest word when back": "-" if loss is Loss.DROPPED else f"{max(fresh):.2f} s",
        }
        if max(fresh) > fresh_seconds:
            detail = f"a word came after {max(fresh):.1f} s when wake-ups had been back for {RETURN_SECONDS:g} s"
            result.violations.append(Violation("late", "", detail))
        rows = await judge(result, clients, cluster, url, bounds=bounds, rest_seconds=rest_seconds)
        elsewhere = sum(run.node_id == cluster.nodes[0].node_ids[-1] for run in rows.runs.values())
        result.figures["replies written at the first node"] = elsewhere
        if not elsewhere:
            result.void = "no reply was written at the first node"
        elif len(lost) == 1 or (loss is not Loss.DROPPED and len(fresh) == 1):
            result.void = "no word came while wake-ups were lost, or after their return"
    return result


@asynccontextmanager
async def _lost(loss: Loss, url: str, redis: Redis | None) -> AsyncIterator[None]:
    """Wake-ups are lost meanwhile."""
    match loss:
        case Loss.DROPPED:
            yield
        case Loss.POSTGRESQL:
            over = asyncio.Event()
            hanging_up = asyncio.create_task(_hang_up(url, over))
            try:
                yield
            finally:
                over.set()
                assert await hanging_up, "nobody listened"
        case Loss.REDIS:
            assert redis is not None
            redis.kill()
            try:
                yield
            finally:
                await asyncio.to_thread(redis.start)


async def _hang_up(url: str, over: asyncio.Event) -> int:
    """Ends the connections that listen, until it is over; how many it ended."""
    connection = await connect(url)
    ended = 0
    try:
        while not over.is_set():
            ended += await connection.fetchval(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                " WHERE datname = current_database() AND application_name LIKE 'context-server bus%'"
            )
            await asyncio.sleep(HANG_UP_SECONDS)
    finally:
        await connection.close()
    return ended
