"""What the trials of many nodes share: clients that run meanwhile, the verdict in the end, and how it is printed."""

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Self

from tests.benchmarks.report import percentile, table
from tests.chaos import wire
from tests.chaos.checker import KINDS, NODE_KINDS, RESTING_STATES, Bounds, Violation, check_nodes
from tests.chaos.cluster import Cluster, Node
from tests.chaos.follower import Follower, Habits
from tests.chaos.history import Followed, Outcome
from tests.chaos.rows import Rows, connect, read_rows

READY_SECONDS = 5.0
"""How soon a node must be ready again once what it needs is back."""
REST_SECONDS = 30.0
"""How long clients may take to see their last replies end, once nothing is broken any more."""


@dataclass(slots=True)
class Result:
    """What a trial found."""

    name: str
    seed: int
    figures: dict[str, object] = field(default_factory=dict)
    violations: list[Violation] = field(default_factory=list)
    void: str | None = None
    """Why the trial proves nothing, if so."""

    @property
    def counts(self) -> dict[str, int]:
        """How often each promise was broken."""
        found = Counter(violation.kind for violation in self.violations)
        return {kind: found[kind] for kind in (*KINDS, *NODE_KINDS)}

    @property
    def passed(self) -> bool:
        """Whether every promise was kept, and the trial proves it."""
        return not self.violations and self.void is None

    def report(self) -> str:
        """The result in Markdown."""
        verdict = "passed" if self.passed else "FAILED" if self.violations else f"void: {self.void}"
        parts = [
            table(list(self.figures), [list(self.figures.values())]),
            table(list(self.counts), [list(self.counts.values())]),
            f"{self.name}, seed {self.seed}: **{verdict}**",
            "\n".join(f"* {each.kind}: {each.message_id}: {each.detail}" for each in self.violations[:20]),
        ]
        return "\n\n".join(part for part in parts if part)


def habits(words: tuple[int, int], rate: int, patience_seconds: float = 5.0) -> Habits:
    """Clients that ask for replies of so many stamped words, ``rate`` a second, and do not wait for long."""

    def prompt(dice: random.Random, number: int) -> str:
        return f"stamped words={dice.randint(*words)} rate={rate} seed={number}"

    return Habits(prompt=prompt, patience_seconds=patience_seconds)


class Clients:
    """Followers that converse until they are told to stop; use it with ``async with``."""

    def __init__(self, followers: Sequence[Follower]) -> None:
        self.followers = followers
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def of(
        cls, ports: Sequence[int], count: int, dice: random.Random, habits: Habits, **doors: Sequence[int]
    ) -> Self:
        """So many clients, each with a context of its own; ``doors`` are the ports for one kind of request."""
        contexts = [await wire.new_context(dice.choice(ports)) for _ in range(count)]
        return cls(
            [Follower(ports, context_id, random.Random(dice.random()), habits, **doors) for context_id in contexts]
        )

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(follower.run()) for follower in self.followers]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def finish(self, seconds: float = REST_SECONDS) -> None:
        """Lets each end with its present reply; one that does not in time is stopped, and the checker will say why."""
        for follower in self.followers:
            follower.stop()
        await asyncio.wait(self._tasks, timeout=seconds)
        for task in self._tasks:
            if task.done() and not task.cancelled():
                task.result()  # A defect of the harness.

    @property
    def replies(self) -> list[Followed]:
        """Every reply that was followed."""
        return [reply for follower in self.followers for reply in follower.history.replies]

    def ages(self, since: float = 0.0, until: float = float("inf")) -> list[float]:
        """How old words were when they came, in ascending order; of those that came in a span of time."""
        return sorted(age for reply in self.replies for at, age in reply.ages if since <= at <= until)


async def judge(
    result: Result,
    clients: Clients,
    cluster: Cluster,
    url: str,
    *,
    bounds: Bounds | None = None,
    rest_seconds: float = REST_SECONDS,
) -> Rows:
    """Lets the clients finish, and has everything that they saw checked; the rows of the end."""
    await clients.finish(rest_seconds)
    rows = await read_rows(url)
    histories = [follower.history for follower in clients.followers]
    result.violations += check_nodes(histories, rows, cluster.faults, cluster.deaths, bounds)
    replies, ages = clients.replies, clients.ages() or [0.0]
    operations = [operation for history in histories for operation in history.operations]
    result.figures |= {
        "replies": f"{len(replies):,}",
        "interrupted": sum(logged.error_code == "interrupted" for logged in rows.messages.values()),
        "signals": f"{sum(len(reply.signalled) for reply in replies):,}",
        "pulls": f"{sum(len(reply.pulls) for reply in replies):,}",
        "failed / unknown requests": " / ".join(
            str(sum(operation.outcome is outcome for operation in operations))
            for outcome in (Outcome.FAILED, Outcome.UNKNOWN)
        ),
        "age of words, p50 / p99 / max": " / ".join(f"{percentile(ages, share):.2f}" for share in (50, 99, 100)) + " s",
    }
    if not replies:
        result.void = "no client got a reply"
    return rows


async def at_rest(url: str, seconds: float) -> None:
    """Returns once no context is in a running state, or when the time is over."""
    connection = await connect(url)
    try:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if not await connection.fetchval("SELECT count(*) FROM contexts WHERE state <> ALL($1)", RESTING_STATES):
                return
            await asyncio.sleep(0.1)
    finally:
        await connection.close()


async def writing(url: str, node: Node) -> None:
    """Returns once the node holds a run that writes."""
    connection = await connect(url)
    query = (
        "SELECT count(*) FROM runs JOIN messages ON messages.id = runs.message_id"
        " WHERE runs.node_id = $1 AND runs.status = 'running' AND messages.sequence > 0"
    )
    try:
        async with asyncio.timeout(REST_SECONDS):
            while not await connection.fetchval(query, node.node_ids[-1]):  # noqa: ASYNC110  # Rows tell nobody.
                await asyncio.sleep(0.02)
    finally:
        await connection.close()


async def readiness(node: Node) -> int:
    """The status of ``/readyz``; 0 without an answer."""
    try:
        return (await wire.call(node.port, "GET", "/readyz")).status
    except wire.BROKEN:
        return 0


async def becomes(node: Node, status: int, seconds: float) -> float | None:
    """The seconds until ``/readyz`` answers with a status; None when it does not in time."""
    began = time.monotonic()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while await readiness(node) != status:  # noqa: ASYNC110  # What is waited for is another process.
                await asyncio.sleep(0.05)
            return time.monotonic() - began
    return None


async def ready_again(result: Result, nodes: Sequence[Node]) -> float:
    """The seconds until each node is ready; one that is not in time is a violation."""
    found = await asyncio.gather(*(becomes(node, HTTPStatus.OK, READY_SECONDS) for node in nodes))
    for node, seconds in zip(nodes, found, strict=True):
        if seconds is None:
            detail = f"port {node.port} is not ready {READY_SECONDS:g} s after what it needs was back"
            result.violations.append(Violation("stuck", "", detail))
    return max(READY_SECONDS if seconds is None else seconds for seconds in found)


@contextlib.asynccontextmanager
async def without_checks(url: str) -> AsyncIterator[None]:
    """Drops the checks that the database itself makes of messages: for the control of what the append demands."""
    connection = await connect(url)
    try:
        names = await connection.fetch(
            "SELECT conname FROM pg_constraint WHERE conrelid = 'messages'::regclass AND contype = 'c'"
        )
        for name in names:
            await connection.execute(f'ALTER TABLE messages DROP CONSTRAINT "{name["conname"]}"')
        yield
    finally:
        await connection.close()
