"""A node is stopped in the middle of writing (SIGSTOP) until its leases are over and others have ended its runs.

When it goes on (SIGCONT), it believes that it still holds them; nothing that it then appends may be written.

The control: the append asks for no lease and no attempt, and the database makes no checks of its own.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg

from tests.chaos.checker import Bounds, Violation
from tests.chaos.cluster import Cluster, Node
from tests.chaos.nodes.trial import Clients, Result, habits, judge, without_checks, writing
from tests.chaos.rows import connect

CONTROL = "unfenced"
TAKE_SECONDS = 30.0
"""How long to wait until the runs of a node have been taken from it; then it is continued all the same."""
NOTICE_SECONDS = 5.0
"""How long a node that goes on may take to say that it lost its runs."""

Ends = dict[str, tuple[int, str | None, int]]
"""``(sequence, digest, characters in chunks)`` of each reply, by the id of its run."""


@dataclass(slots=True)
class _Stops:
    """What came of the stops so far."""

    waits: list[float] = field(default_factory=list)
    """Seconds until the runs of a node were taken from it, for each stop."""
    taken: int = 0
    said: int = 0
    violations: list[Violation] = field(default_factory=list)

    @property
    def late(self) -> int:
        """How many runs something was appended to after their end."""
        return sum(violation.kind == "changed" for violation in self.violations)


async def suspend(
    directory: Path,
    url: str,
    *,
    seed: int,
    rounds: int,
    nodes: int = 3,
    conversations: int = 9,
    words: tuple[int, int] = (20, 80),
    lease_seconds: float = 6.0,
    rest_seconds: float = 30.0,
    defects: Sequence[str] = (),
) -> Result:
    """Stops a node past its lease and continues it, ``rounds`` times; ends early when something came late."""
    dice = random.Random(seed)
    result = Result("suspend", seed)
    stops = _Stops()
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(
            Cluster(directory, [url] * nodes, defects=defects, lease_seconds=lease_seconds)
        )
        if CONTROL in defects:
            await stack.enter_async_context(without_checks(url))
        clients = await stack.enter_async_context(
            await Clients.of(cluster.ports, conversations, dice, habits(words, rate=20))
        )
        rows = await connect(url)
        stack.push_async_callback(rows.close)
        while len(stops.waits) < rounds and not stops.late:
            node = dice.choice(cluster.nodes)
            await writing(url, node)
            await asyncio.sleep(dice.uniform(0, 0.2))
            faults = cluster.fault("suspend", node, may_hold_locks=True)
            await _stop_once(rows, node, stops)
            cluster.over(faults)
        result.violations += stops.violations
        await judge(result, clients, cluster, url, rest_seconds=rest_seconds)
    result.figures = {
        "nodes": nodes,
        "lease": f"{lease_seconds:g} s",
        "stops": len(stops.waits),
        "runs taken": stops.taken,
        "taken after, at most": f"{max(stops.waits):.1f} s",
        "late appends": stops.late,
        "losses in the log": stops.said,
    } | result.figures
    if not stops.taken:
        result.void = "no node was stopped while it held a run"
    return result


async def _stop_once(rows: asyncpg.Connection, node: Node, stops: _Stops) -> None:
    """Stops a node until its runs are taken from it, continues it, and looks for what it appends."""
    node.suspend()
    began = time.monotonic()
    before = await _taken_from(rows, node)
    stops.waits.append(time.monotonic() - began)
    node.resume()
    if stops.waits[-1] > Bounds().orphan:
        detail = f"the runs of a stopped node were taken from it after {stops.waits[-1]:.1f} s"
        stops.violations.append(Violation("orphan", node.node_ids[-1], detail))
    stops.taken += len(before)
    stops.said += await _noticed(rows, node, before)
    after = await _ends(rows, list(before))
    stops.violations += [
        Violation("changed", run_id, f"after its end: {before[run_id]} became {after[run_id]}")
        for run_id in before
        if before[run_id] != after[run_id]
    ]


async def _taken_from(rows: asyncpg.Connection, node: Node) -> Ends:
    """Waits until others have ended every run of a node that was stopped, or too long; how those replies ended."""
    held = "SELECT id FROM runs WHERE node_id = $1 AND status = 'running'"
    node_id = node.node_ids[-1]
    before = left = {row["id"] for row in await rows.fetch(held, node_id)}
    deadline = time.monotonic() + TAKE_SECONDS
    while left and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
        left = {row["id"] for row in await rows.fetch(held, node_id)}
    return await _ends(rows, list(before - left))


async def _ends(rows: asyncpg.Connection, run_ids: list[str]) -> Ends:
    found = await rows.fetch(
        "SELECT runs.id, messages.sequence, messages.digest,"
        " (SELECT coalesce(sum(length(text)), 0) FROM chunks WHERE message_id = messages.id) AS characters"
        " FROM runs JOIN messages ON messages.id = runs.message_id WHERE runs.id = ANY($1)",
        run_ids,
    )
    return {row["id"]: (row["sequence"], row["digest"], row["characters"]) for row in found}


async def _noticed(rows: asyncpg.Connection, node: Node, before: Ends) -> int:
    """Waits until the node has said of each run that it was lost, or something was appended; how many it said."""
    deadline = time.monotonic() + NOTICE_SECONDS
    said: list[str] = []
    while len(said) < len(before) and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
        lines = [line for line in node.log.read_text().splitlines() if '"run_fenced"' in line]
        said = [run_id for run_id in before if any(run_id in line for line in lines)]
        if await _ends(rows, list(before)) != before:
            break
    return len(said)
