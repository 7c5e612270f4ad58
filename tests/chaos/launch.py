"""The server with one of its protections off, or in worse surroundings: for negative controls.

    python -m tests.chaos.launch [--publish-before-commit] [--commit-delay-ms N] [--header-seconds S] [--say-node-id]
        [--defect NAME] -- serve …

The defects of many nodes are in ``defects``.
A trial that passes with a protection off proves nothing about the protection.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Connection

from context_server import __main__ as command_line
from context_server import serving
from context_server.__main__ import main as serve
from context_server.store import Store
from context_server.store.database import SqliteDatabase as Database
from tests.chaos.defects import DEFECTS

NODE_ID_LINE = "node_id: "


def _append_hastily() -> None:
    """Says that it wrote before it committed: visible first, durable later, which the crash loop must find."""

    async def hasty(self: Database, work: Callable[[Connection], Any]) -> Any:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()

        def telling_work(connection: Connection) -> Any:
            result = work(connection)
            loop.call_soon_threadsafe(done.set_result, result)
            return result

        committed = asyncio.ensure_future(self.write(telling_work))
        await asyncio.wait({done, committed}, return_when=asyncio.FIRST_COMPLETED)
        return done.result() if done.done() else committed.result()

    Database.append = hasty  # type: ignore[method-assign]  # the point of this program


def _delay_commits(seconds: float) -> None:
    """A slow disk: each write takes longer before it begins to be durable, in the writer's thread."""
    write = Database.write

    async def slow(self: Database, work: Callable[[Connection], Any]) -> Any:
        def slow_work(connection: Connection) -> Any:
            result = work(connection)
            time.sleep(seconds)
            return result

        return await write(self, slow_work)

    Database.write = slow  # type: ignore[method-assign]  # the point of this program


def _say_node_id() -> None:
    """Prints by which ``node_id`` this process claims runs, on a line of its own."""
    make = Store.__init__

    def telling(self: Store, *given: Any, **named: Any) -> None:
        make(self, *given, **named)
        if self._lease is not None:
            print(f"{NODE_ID_LINE}{self._lease.node_id}", flush=True)

    Store.__init__ = telling  # type: ignore[method-assign]  # the point of this program


def command(*options: str) -> tuple[str, ...]:
    """The command line that serves with these options."""
    return (sys.executable, "-m", "tests.chaos.launch", *options, "--", "serve")


def main(arguments: Sequence[str] | None = None) -> None:
    """Break what is asked for, then serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--publish-before-commit", action="store_true")
    parser.add_argument("--commit-delay-ms", type=float, default=0.0)
    parser.add_argument("--header-seconds", type=float)
    parser.add_argument("--say-node-id", action="store_true")
    parser.add_argument("--defect", choices=DEFECTS, action="append", default=[])
    parser.add_argument("rest", nargs="+")
    options = parser.parse_args(arguments)
    if options.commit_delay_ms:
        _delay_commits(options.commit_delay_ms / 1000)
    if options.publish_before_commit:
        _append_hastily()
    if options.header_seconds is not None:
        serving.HEADER_SECONDS = options.header_seconds
    if options.say_node_id:
        _say_node_id()
    for defect in options.defect:
        DEFECTS[defect]()
    given = sys.argv[1:] if arguments is None else arguments
    switches = given[: len(given) - len(options.rest)]
    command_line.WORKER_PROGRAM = (sys.executable, "-m", "tests.chaos.launch", *switches, "worker")
    serve(options.rest)


if __name__ == "__main__":
    main()
