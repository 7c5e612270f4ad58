"""The network between one node and PostgreSQL is cut, without a word to either, and mended later.

The node says by ``/readyz`` that it is of no use; its runs are taken from it, each once; neither what it had sent
before the cut nor what it sends after it writes anything.

The control: the append asks for no lease and no attempt, and the database makes no checks of its own.
"""

import asyncio
import random
from collections.abc import Sequence
from contextlib import AsyncExitStack
from http import HTTPStatus
from pathlib import Path

from tests.benchmarks.server import Metrics
from tests.chaos import wire
from tests.chaos.checker import Violation
from tests.chaos.cluster import Cluster, Node
from tests.chaos.nodes.trial import (
    Clients,
    Result,
    at_rest,
    becomes,
    habits,
    judge,
    ready_again,
    without_checks,
    writing,
)
from tests.chaos.proxy import Proxy
from tests.engines import Postgres

CONTROL = "unfenced"
UNREADY_SECONDS = 15.0
"""How soon a node that cannot reach the database must say so."""
BEFORE_SECONDS = 1.0


async def partition(
    directory: Path,
    url: str,
    postgres: Postgres,
    *,
    seed: int,
    rounds: int = 1,
    cut_seconds: float = 30.0,
    nodes: int = 2,
    conversations: int = 12,
    words: tuple[int, int] = (30, 90),
    lease_seconds: float = 6.0,
    rest_seconds: float = 30.0,
    defects: Sequence[str] = (),
) -> Result:
    """Cuts the first node's way to the database for so long, ``rounds`` times.

    Clients post and pull at every node, and keep their streams at the others: a stream of the node that is cut has
    nothing to say meanwhile, and nobody can know that of it but by ``/readyz``.
    """
    dice = random.Random(seed)
    result = Result("partition", seed)
    unready: list[float] = []
    recoveries: list[float] = []
    async with AsyncExitStack() as stack:
        proxy = stack.enter_context(Proxy(postgres.port))
        urls = [url.replace(f":{postgres.port}/", f":{proxy.port}/"), *[url] * (nodes - 1)]
        cluster = await stack.enter_async_context(
            Cluster(directory, urls, defects=defects, lease_seconds=lease_seconds)
        )
        if CONTROL in defects:
            await stack.enter_async_context(without_checks(url))
        cut, others = cluster.nodes[0], cluster.nodes[1:]
        clients = await stack.enter_async_context(
            await Clients.of(
                cluster.ports, conversations, dice, habits(words, rate=20),
                stream=[node.port for node in others],
            )
        )  # fmt: skip
        for _ in range(rounds):
            await writing(url, cut)
            await asyncio.sleep(dice.uniform(0, BEFORE_SECONDS))
            faults = cluster.fault("partition", cut, may_hold_locks=True)
            proxy.cut()
            mended = asyncio.create_task(asyncio.sleep(cut_seconds))
            seconds = await becomes(cut, HTTPStatus.SERVICE_UNAVAILABLE, min(cut_seconds, UNREADY_SECONDS))
            if seconds is None:
                result.violations.append(Violation("stuck", "", "a node without its database says that it is ready"))
            unready.append(UNREADY_SECONDS if seconds is None else seconds)
            await mended
            proxy.mend()
            recoveries.append(await ready_again(result, [cut]))
            cluster.over(faults)
        result.figures |= {
            "cuts": f"{rounds} of {cut_seconds:g} s",
            "503 after, at most": f"{max(unready):.1f} s",
            "ready again after, at most": f"{max(recoveries):.1f} s",
        }
        rows = await judge(result, clients, cluster, url, rest_seconds=rest_seconds)
        await at_rest(url, rest_seconds)
        ended = [logged for logged in rows.messages.values() if logged.error_code == "interrupted"]
        counted = sum([await _interrupted(node) for node in cluster.nodes])
        if counted != len(ended):
            detail = f"{counted} runs were ended as interrupted, {len(ended)} replies were"
            result.violations.append(Violation("retaken", "", detail))
        if not ended:
            result.void = "the node that was cut held no runs"
    return result


async def _interrupted(node: Node) -> int:
    """How many runs a node has ended as interrupted."""
    try:
        text = (await wire.call(node.port, "GET", "/metrics")).body.decode()
    except wire.BROKEN:
        return 0
    return int(Metrics(text).value("context_server_runs_ended_total", code="interrupted"))
