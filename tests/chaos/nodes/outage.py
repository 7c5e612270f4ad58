"""PostgreSQL crashes (``pg_ctl -m immediate``) and is started again, over and over, while replies are being written.

Every other crash comes when the nodes' last commits are done and the answers to them are lost on the way: their
outcome is unknown, and the nodes have to find out. Most runs live through it, as the database is back before their
leases are over.

The control: a commit of unknown outcome is written once more.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from tests.chaos.cluster import Cluster
from tests.chaos.nodes.trial import Clients, Result, at_rest, habits, judge, ready_again, writing
from tests.chaos.proxy import Proxy
from tests.engines import Postgres

CONTROL = "blind-retry"
LOSING_SECONDS = 1.0
"""How long answers to commits are lost before the crash: long enough for each node to commit something."""


async def outage(
    directory: Path,
    url: str,
    postgres: Postgres,
    *,
    seed: int,
    seconds: float,
    nodes: int = 2,
    conversations: int = 20,
    words: tuple[int, int] = (40, 120),
    pause_seconds: tuple[float, float] = (1.0, 4.0),
    gone_seconds: tuple[float, float] = (0.0, 1.0),
    rest_seconds: float = 30.0,
    defects: Sequence[str] = (),
) -> Result:
    """Crashes the database again and again for so long; ends early when a text was written twice."""
    dice = random.Random(seed)
    result = Result("outage", seed)
    crashes = 0
    recoveries: list[float] = []
    async with AsyncExitStack() as stack:
        proxy = stack.enter_context(Proxy(postgres.port))
        through = url.replace(f":{postgres.port}/", f":{proxy.port}/")
        cluster = await stack.enter_async_context(Cluster(directory, [through] * nodes, defects=defects))
        clients = await stack.enter_async_context(
            await Clients.of(cluster.ports, conversations, dice, habits(words, rate=20))
        )
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            await asyncio.sleep(dice.uniform(*pause_seconds))
            await asyncio.gather(*(writing(url, node) for node in cluster.nodes))
            faults = cluster.fault("outage", *cluster.nodes)
            if crashes % 2 == 0:
                proxy.lose_answers_to(b"COMMIT;")
                await asyncio.sleep(LOSING_SECONDS)
            await asyncio.to_thread(postgres.crash)
            proxy.lose_nothing()
            crashes += 1
            await asyncio.sleep(dice.uniform(*gone_seconds))
            await asyncio.to_thread(postgres.start)
            recoveries.append(await ready_again(result, cluster.nodes))
            cluster.over(faults)
        await judge(result, clients, cluster, url, rest_seconds=rest_seconds)
        await at_rest(url, rest_seconds)
        found = cluster.log_lines("commit_found")
        result.figures = {
            "nodes": nodes, "conversations": conversations, "crashes": crashes,
            "commits delayed / found done": f"{cluster.log_lines('commit_delayed')} / {found}",
            "ready again after, at most": f"{max(recoveries, default=0.0):.1f} s",
        } | result.figures  # fmt: skip
    if not found and not defects:
        result.void = "no commit of unknown outcome had been done"
    return result
