"""SIGKILL in the middle of streaming, many times in a row, with clients that resume by themselves.

    python -m tests.chaos.crash_loop --kills 50 --seed 1

prints its result as a Markdown table and ends with 1 when a promise was broken. Each kill comes at a random moment
while every context streams. Right after it the database is copied as the crash left it, and looked at; then the server
is started again, and whatever was running must have ended within ``RECOVERY_SECONDS``. In the end the checker compares
all that the clients saw with the log.

``--publish-before-commit`` is the negative control: with it the run must fail.
"""

import argparse
import asyncio
import platform
import random
import shutil
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos import launch, wire
from tests.chaos.checker import KINDS, Violation, check
from tests.chaos.follower import Follower
from tests.chaos.rows import Logged, read_log
from tests.server import Server

RECOVERY_SECONDS = 5.0
CONTEXTS = 4
WORDS_BEFORE_KILL = 2
LATEST_KILL_SECONDS = 0.4
PROGRESS_SECONDS = 30.0


@dataclass(slots=True)
class Result:
    """What a crash loop found."""

    kills: int = 0
    in_mid_stream: int = 0
    stuck: int = 0
    replies: int = 0
    pulls: int = 0
    signals: int = 0
    start_seconds: list[float] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """How often each promise was broken."""
        found = Counter(violation.kind for violation in self.violations)
        return {kind: found[kind] for kind in KINDS} | {"stuck": self.stuck}

    @property
    def passed(self) -> bool:
        """Whether every promise was kept, by kills that count."""
        return not any(self.counts.values()) and self.in_mid_stream >= 0.8 * self.kills


async def crash_loop(
    directory: Path, *, kills: int, seed: int, contexts: int = CONTEXTS, defects: Sequence[str] = ()
) -> Result:
    """Kills a server ``kills`` times; ``defects`` are options of ``tests.chaos.launch``."""
    dice = random.Random(seed)
    result = Result()
    server = Server(directory, agent="tests.chaos.agents:scripted", log_format="json")
    if defects:
        server.command = launch.command(*defects)
    with ExitStack() as stack:
        stack.push(server)  # It is started by hand, so as not to block this loop, and killed when this is left.
        await asyncio.to_thread(server.start)
        followers = [
            Follower([server.port], await wire.new_context(server.port), random.Random(dice.random()))
            for _ in range(contexts)
        ]
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(follower.run()) for follower in followers]
            while result.kills < kills and not result.violations:
                await _kill_once(server, followers, dice, result)
            if not result.violations:
                await _all(follower.streams(WORDS_BEFORE_KILL) for follower in followers)
            for follower, task in zip(followers, running, strict=True):
                follower.stop()
                if result.violations:
                    task.cancel()  # The text that it holds is not the log's: it could not go on.
        if not result.violations:
            if await asyncio.to_thread(server.stop):
                result.violations.append(Violation("ending", "", "the server did not end well"))
            result.violations += check([follower.history for follower in followers], read_log(server.database))
    replies = [reply for follower in followers for reply in follower.history.replies]
    result.replies = len(replies)
    result.pulls = sum(len(reply.pulls) for reply in replies)
    result.signals = sum(len(reply.signalled) for reply in replies)
    return result


async def _all(waits: Iterable[Awaitable[None]]) -> None:
    async with asyncio.timeout(PROGRESS_SECONDS):
        await asyncio.gather(*waits)


async def _kill_once(server: Server, followers: Sequence[Follower], dice: random.Random, result: Result) -> None:
    """Kills while every context streams a message that was posted since the last start, and starts again."""
    await _all(follower.streams(WORDS_BEFORE_KILL) for follower in followers)
    await asyncio.sleep(dice.uniform(0, LATEST_KILL_SECONDS))
    await asyncio.to_thread(server.kill)
    result.kills += 1
    left, running = await asyncio.to_thread(_post_mortem, server.database, server.directory / "post-mortem")
    result.in_mid_stream += any(left[message_id].sequence for _, message_id in running)
    result.violations += check([follower.history for follower in followers], left, complete=False)
    if result.violations:
        return
    started = time.monotonic()
    await asyncio.to_thread(server.start)
    result.start_seconds.append(time.monotonic() - started)
    for context_id, message_id in running:
        while (await wire.pull(server.port, context_id, message_id))["final_sequence"] is None:
            if time.monotonic() - started > RECOVERY_SECONDS:
                result.stuck += 1
                break
            await asyncio.sleep(0.05)


def _post_mortem(database: Path, directory: Path) -> tuple[dict[str, Logged], list[tuple[str, str]]]:
    """The log as the crash left it, and ``(context_id, reply)`` of the runs that were on; works on a copy."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for part in (database, database.with_name(f"{database.name}-wal")):
        if part.exists():
            shutil.copy(part, directory)
    copy = directory / database.name
    log = read_log(copy)
    connection = sqlite3.connect(copy)
    try:
        return log, connection.execute("SELECT context_id, message_id FROM runs WHERE status = 'running'").fetchall()
    finally:
        connection.close()


def report(result: Result, seed: int) -> str:
    """The result as a Markdown table, with what it was measured on."""
    starts = sorted(result.start_seconds) or [0.0]
    cells = {
        "kills": result.kills,
        "in mid-stream": result.in_mid_stream,
        "replies": result.replies,
        "signals": f"{result.signals:,}",
        "pulls": f"{result.pulls:,}",
        **result.counts,
        "start, median and worst": f"{starts[len(starts) // 2]:.2f} s, {starts[-1]:.2f} s",
    }
    rows = (cells.keys(), ["---"] * len(cells), map(str, cells.values()))
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    versions = f"seed {seed}, Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, {platform.system()}"
    return f"{table}\n\n{versions}: **{'passed' if result.passed else 'FAILED'}**"


def main() -> None:
    """Run the loop and print what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--contexts", type=int, default=CONTEXTS)
    parser.add_argument("--commit-delay-ms", type=int, default=0, help="a slow disk")
    parser.add_argument("--publish-before-commit", action="store_true", help="the negative control")
    options = parser.parse_args()
    defects = ["--commit-delay-ms", str(options.commit_delay_ms)] if options.commit_delay_ms else []
    if options.publish_before_commit:
        defects.append("--publish-before-commit")
    with tempfile.TemporaryDirectory() as name:
        result = asyncio.run(
            crash_loop(Path(name), kills=options.kills, seed=options.seed, contexts=options.contexts, defects=defects)
        )
    print(report(result, options.seed))
    for violation in result.violations[:20]:
        print(f"* {violation.kind}: {violation.message_id}: {violation.detail}")
    sys.exit(0 if result.passed else 1)


if __name__ == "__main__":
    main()
