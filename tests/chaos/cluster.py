"""Several servers of one database, each a process of its own that is killed, stopped, continued and started again."""

import asyncio
import os
import re
import signal
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from tests.chaos import launch
from tests.chaos.history import Fault
from tests.server import Server

AGENT = "tests.chaos.agents:scripted"
_NODE_ID = re.compile(rf"^{launch.NODE_ID_LINE}(\S+)$", re.MULTILINE)


class Node(Server):
    """One of several servers of one database, in a folder of its own; it says which ``node_id`` it claims runs by."""

    def __init__(self, directory: Path, *, defects: Sequence[str] = (), **settings: Any) -> None:
        directory.mkdir(parents=True)
        super().__init__(directory, **settings)
        self.command = launch.command("--say-node-id", *defects)

    @property
    def node_ids(self) -> list[str]:
        """One for each time that it was started."""
        return _NODE_ID.findall(self.log.read_text())

    def suspend(self) -> None:
        """Stops it in the middle of whatever it does (SIGSTOP); its connections stay open."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Lets it go on (SIGCONT), without knowing how long it stood still."""
        os.kill(self.pid, signal.SIGCONT)


class Cluster:
    """Nodes, and what was done to them; use it with ``async with``.

    Args:
        directory: an empty folder.
        urls: the database as each node reaches it; one node for each.
        defects: options of ``tests.chaos.launch`` for every node.
        settings: of every node.
    """

    def __init__(self, directory: Path, urls: Sequence[str], *, defects: Sequence[str] = (), **settings: Any) -> None:
        given = {"agent": AGENT, "log_format": "json", **settings}
        self.nodes = [
            Node(directory / f"node-{number}", defects=defects, database=url, **given)
            for number, url in enumerate(urls, 1)
        ]
        self.faults: list[Fault] = []
        self.deaths: dict[str, float] = {}
        """When each node that was killed was, by its ``node_id``."""

    async def __aenter__(self) -> Self:
        try:
            await _together(node.start for node in self.nodes)
        except BaseException:
            await self._kill_all()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._kill_all()

    async def _kill_all(self) -> None:
        await _together(node.kill for node in self.nodes if node.is_running)

    @property
    def ports(self) -> list[int]:
        """Where the nodes listen."""
        return [node.port for node in self.nodes]

    def fault(self, kind: str, *nodes: Node, may_hold_locks: bool = False) -> list[Fault]:
        """Notes that something is about to be done to nodes; whoever does it closes it with ``over``.

        A node that ``may_hold_locks`` meanwhile may keep a post from being repeated at another, until it loses them.
        """
        began = [Fault(kind, node.port, time.time()) for node in nodes]
        if may_hold_locks:
            others = [node for node in self.nodes if node not in nodes]
            began += [Fault(kind, node.port, time.time(), only="post") for node in others]
        self.faults += began
        return began

    def over(self, faults: Iterable[Fault]) -> None:
        """Notes that the nodes can be relied on again."""
        for fault in faults:
            fault.ended = time.time()

    async def kill(self, node: Node) -> list[Fault]:
        """Ends a node with SIGKILL; the fault lasts until ``restart``."""
        faults = self.fault("kill", node)
        node_id = node.node_ids[-1]
        await asyncio.to_thread(node.kill)
        self.deaths[node_id] = time.time()
        return faults

    async def stop(self, node: Node) -> list[Fault]:
        """Asks a node to end with SIGTERM, and waits until it has; the fault lasts until ``restart``."""
        faults = self.fault("stop", node)
        await asyncio.to_thread(node.stop)
        return faults

    async def restart(self, node: Node, faults: Iterable[Fault]) -> None:
        """Starts a node that was killed or stopped."""
        await asyncio.to_thread(node.start)
        self.over(faults)

    def log_lines(self, event: str) -> int:
        """How many lines of all nodes' logs are of this event."""
        return sum(node.log.read_text().count(f'"event": "{event}"') for node in self.nodes)


async def _together(works: Iterable[Any]) -> None:
    await asyncio.gather(*(asyncio.to_thread(work) for work in works))
