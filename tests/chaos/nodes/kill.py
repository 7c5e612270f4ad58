"""Nodes are killed by SIGKILL, one after the other, and started again, while clients converse through all of them.

Every run of a dead node is ended as interrupted by another within ten seconds; a client whose own nodes live notices
nothing, and one whose node dies goes on at another without losing a byte.

The control: nobody ends the runs of dead nodes.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.checker import Violation
from tests.chaos.cluster import Cluster
from tests.chaos.nodes.trial import Clients, Result, habits, judge, writing

CONTROL = "no-reaper"


async def kill(
    directory: Path,
    url: str,
    *,
    seed: int,
    seconds: float,
    nodes: int = 3,
    conversations: int = 30,
    words: tuple[int, int] = (10, 50),
    pause_seconds: tuple[float, float] = (1.0, 4.0),
    rest_seconds: float = 30.0,
    gently: bool = False,
    defects: Sequence[str] = (),
    **settings: object,
) -> Result:
    """Kills one node after the other for so long; between a start and the next kill there is a pause.

    Args:
        directory: an empty folder.
        url: an empty PostgreSQL database.
        seed: of what is killed when, and of what clients ask.
        seconds: how long kills go on.
        nodes: how many there are.
        conversations: how many clients converse.
        words: the shortest and the longest reply.
        pause_seconds: the shortest and the longest pause.
        rest_seconds: how long clients may take to end in the end.
        gently: ask each node to end with SIGTERM: then no run is interrupted that ends within the grace period.
        defects: of ``tests.chaos.defects``.
        settings: of the nodes.
    """
    dice = random.Random(seed)
    result = Result("kill, gently" if gently else "kill", seed)
    kills = 0
    async with (
        Cluster(directory, [url] * nodes, defects=defects, **settings) as cluster,
        await Clients.of(cluster.ports, conversations, dice, habits(words, rate=10)) as clients,
    ):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            await asyncio.sleep(dice.uniform(*pause_seconds))
            node = dice.choice(cluster.nodes)
            try:
                await writing(url, node)
            except TimeoutError:
                break  # Nothing is written any more, as when all contexts are stuck: the verdict says why.
            faults = await (cluster.stop(node) if gently else cluster.kill(node))
            kills += 1
            await asyncio.sleep(dice.uniform(0, pause_seconds[0]))
            await cluster.restart(node, faults)
        result.figures |= {"nodes": nodes, "conversations": conversations, "kills": kills}
        rows = await judge(result, clients, cluster, url, rest_seconds=rest_seconds)
    waits = [
        logged.completed_at - cluster.deaths[run.node_id]
        for run in rows.runs.values()
        if run.node_id in cluster.deaths
        and (logged := rows.messages[run.message_id]).error_code == "interrupted"
        and logged.completed_at is not None
    ]
    result.figures["interrupted after, at most"] = f"{max(waits, default=0.0):.1f} s"
    if gently:
        result.violations += [
            Violation("ending", message_id, "was interrupted by a node that was asked to end")
            for message_id, logged in rows.messages.items()
            if logged.error_code == "interrupted"
        ]
    elif not waits:
        result.void = "no run was cut by a kill"
    return result
