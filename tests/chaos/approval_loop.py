"""SIGKILL at random points of runs with tools, an approval and 2,000 words; the approvals come from another client.

    python -m tests.chaos.approval_loop --kills 50 --seed 1

prints its result as a Markdown table and ends with 1 when a promise was broken: every approved tool ran at most once
and after its approval was recorded, none ran without, what a client holds is the log, and no history with a call
without a result was sent to the model. ``--defect`` takes a protection away; with it the trial must fail.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import platform
import random
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from context_server.client import ClientError, ContextClient, ReplyEnded
from tests.chaos.approving_agent import JOURNAL, WORDS
from tests.server import Server

AGENT = "tests.chaos.approving_agent:agent"
DEFECTS = ("unasked", "twice", "dangling")
BROKEN = ("unasked", "twice", "early", "denied", "dangling", "text", "digest", "gap", "open", "stuck")
CONTEXTS = 4
DENIED = 0.15
RETRY_SECONDS = 60.0
LATEST_KILL_SECONDS = 5.0
LAST_SECONDS = 8.0
"""A reply takes about three: kills fall on its tools, its approval, its words, and between replies."""


@dataclass(slots=True)
class Result:
    """What the trial saw."""

    kills: int = 0
    replies: Counter[str] = field(default_factory=Counter)
    decisions: Counter[str] = field(default_factory=Counter)
    phases: Counter[str] = field(default_factory=Counter)
    sent: int = 0
    broken: Counter[str] = field(default_factory=Counter)
    details: list[str] = field(default_factory=list)

    def report_broken(self, kind: str, detail: str) -> None:
        """Notes a broken promise."""
        self.broken[kind] += 1
        self.details.append(f"{kind}: {detail}")

    @property
    def passed(self) -> bool:
        """Whether every promise was kept, in a trial that tried them."""
        return not self.broken and self.replies["completed"] > 0 and self.sent > 0


class _Talker:
    """One client that posts, follows, and holds what it was given; it does not know of approvals."""

    def __init__(self, url: str, result: Result) -> None:
        self._url = url
        self._result = result
        self.context_id = ""
        self.stopping = False
        self.held: dict[str, str] = {}

    async def run(self) -> None:
        async with ContextClient(self._url, retry_seconds=RETRY_SECONDS) as client:
            self.context_id = (await client.create_context()).id
            while not self.stopping:
                with contextlib.suppress(ClientError):  # Killed before the answer; it is tried again.
                    await self._one(client)

    async def _one(self, client: ContextClient) -> None:
        context = await client.get_context(self.context_id)
        run = context.active_run
        message_id = str(run["message_id"]) if run else (await client.post(self.context_id, "Send it")).reply_message_id
        self.held.setdefault(message_id, "")
        status = "completed"
        text = ""
        try:
            async with contextlib.aclosing(client.follow(self.context_id, message_id)) as following:
                async for piece in following:
                    text += piece
        except ReplyEnded:
            status = "ended early"
        self.held[message_id] = text
        self._result.replies[status] += 1


async def _approve(server: Server, talkers: list[_Talker], dice: random.Random, result: Result) -> None:
    """Another client: looks for what waits, and decides on it, twice at times."""
    async with httpx2.AsyncClient(base_url=server.url, timeout=5) as http:
        while True:
            for context_id in [talker.context_id for talker in talkers if talker.context_id]:
                with contextlib.suppress(httpx2.HTTPError, ValueError, KeyError):
                    found = (await http.get(f"/contexts/{context_id}/approvals")).json()["items"]
                    for approval in found:
                        await asyncio.sleep(dice.uniform(0, 0.3))
                        word = "deny" if dice.random() < DENIED else "approve"
                        path = f"/contexts/{context_id}/approvals/{approval['id']}"
                        answers = await asyncio.gather(
                            *(http.post(path, json={"decision": word}) for _ in range(dice.choice((1, 2))))
                        )
                        result.decisions.update(f"{word} {answer.status_code}" for answer in answers)
            await asyncio.sleep(0.05)


async def approval_loop(
    directory: Path, *, kills: int, seed: int, contexts: int = CONTEXTS, defect: str = ""
) -> Result:
    """Kills a server ``kills`` times while ``contexts`` talk; ``defect`` is one of ``DEFECTS``, or none."""
    dice = random.Random(seed)
    result = Result()
    server = Server(directory, agent=AGENT, log_format="json")
    if defect:
        server._environment["CONTEXT_SERVER_TRIAL_DEFECT"] = defect
    with contextlib.ExitStack() as stack:
        stack.push(server)
        await asyncio.to_thread(server.start)
        talkers = [_Talker(server.url, result) for _ in range(contexts)]
        async with asyncio.TaskGroup() as tasks:
            talking = [tasks.create_task(talker.run()) for talker in talkers]
            approving = tasks.create_task(_approve(server, talkers, random.Random(seed + 1), result))
            for number in range(kills):
                await asyncio.sleep(dice.uniform(0.3, LATEST_KILL_SECONDS))
                await asyncio.to_thread(server.kill)
                result.kills += 1
                result.phases.update(await asyncio.to_thread(_states, server.database))
                await asyncio.to_thread(server.start)
                if sys.stderr.isatty():
                    print(f"\rkill {number + 1} of {kills}", end="", file=sys.stderr)
            await asyncio.sleep(LAST_SECONDS)  # After the last kill everything goes on.
            for talker in talkers:
                talker.stopping = True
            _, late = await asyncio.wait(talking, timeout=RETRY_SECONDS)
            for task in late:
                result.report_broken("stuck", "a reply has not ended")
                task.cancel()
            approving.cancel()
        await asyncio.to_thread(server.stop)
    _check(directory, server.database, talkers, result)
    return result


def _states(database: Path) -> list[str]:
    """The state of each context as the crash left it."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return [state for (state,) in connection.execute("SELECT state FROM contexts")]


def _check(directory: Path, database: Path, talkers: list[_Talker], result: Result) -> None:
    journal = [json.loads(line) for line in (directory / JOURNAL).read_text().splitlines()]
    with contextlib.closing(sqlite3.connect(database)) as connection:
        connection.row_factory = sqlite3.Row
        approvals = {(row["run_id"], row["call_id"]): row for row in connection.execute("SELECT * FROM approvals")}
        _check_tools(journal, approvals, result)
        for talker in talkers:
            for message_id, text in talker.held.items():
                _check_reply(connection, message_id, text, result)


def _check_tools(journal: list[dict[str, Any]], approvals: dict[Any, sqlite3.Row], result: Result) -> None:
    calls: Counter[tuple[str, str]] = Counter()
    for line in journal:
        if line["what"] == "dangling":
            result.report_broken("dangling", line["call_id"])
            continue
        key = (line["run_id"], line["call_id"])
        calls[key] += 1
        result.sent += 1
        approval = approvals.get(key)
        if approval is None:
            result.report_broken("unasked", line["call_id"])
        elif approval["status"] != "approved":
            result.report_broken("denied", f"{line['call_id']} is {approval['status']}")
        elif approval["decided_at"] > line["at_ms"]:
            result.report_broken("early", line["call_id"])
        if calls[key] == 2:
            result.report_broken("twice", line["call_id"])


def _check_reply(connection: sqlite3.Connection, message_id: str, text: str, result: Result) -> None:
    message = connection.execute("SELECT * FROM messages WHERE id = ?", (message_id,)).fetchone()
    chunks = connection.execute("SELECT * FROM chunks WHERE message_id = ? ORDER BY sequence", (message_id,)).fetchall()
    logged = "".join(chunk["text"] for chunk in chunks if chunk["kind"] == "text")
    if message["final_sequence"] is not None and text != logged:
        result.report_broken("text", message_id)
    if message["digest"] is not None and hashlib.sha256(logged.encode()).hexdigest() != message["digest"]:
        result.report_broken("digest", message_id)
    if [chunk["sequence"] for chunk in chunks] != list(range(1, len(chunks) + 1)):
        result.report_broken("gap", message_id)
    if message["status"] == "completed" and logged.split()[-1:] != [str(WORDS - 1)]:
        result.report_broken("text", f"{message_id} is completed and not whole")
    data = [(chunk["kind"], json.loads(chunk["data"])["id"]) for chunk in chunks if chunk["kind"].startswith("tool_")]
    called = Counter(call_id for kind, call_id in data if kind == "tool_call")
    answered = Counter(call_id for kind, call_id in data if kind == "tool_result")
    if message["final_sequence"] is not None and called != answered:
        result.report_broken("open", message_id)


def report(result: Result, seed: int, seconds: float) -> str:
    """The result as a Markdown table, with what it was measured on."""
    cells = {
        "kills": result.kills,
        "replies": ", ".join(f"{count} {name}" for name, count in sorted(result.replies.items())),
        "states at the kills": ", ".join(f"{count} {name}" for name, count in result.phases.most_common()),
        "decisions": ", ".join(f"{count} {name}" for name, count in sorted(result.decisions.items())),
        "tool runs": result.sent,
        **{kind: result.broken[kind] for kind in BROKEN},
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in cells.items())
    versions = f"seed {seed}, {seconds:.0f} s, Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}"
    return f"| what | seen |\n|---|---|\n{table}\n\n{versions}: **{'passed' if result.passed else 'FAILED'}**"


def main() -> None:
    """Run the trial and print what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--contexts", type=int, default=CONTEXTS)
    parser.add_argument("--defect", choices=DEFECTS, default="", help="a negative control")
    options = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        result = asyncio.run(
            approval_loop(
                Path(name), kills=options.kills, seed=options.seed, contexts=options.contexts, defect=options.defect
            )
        )
    print(report(result, options.seed, time.monotonic() - started))
    for detail in result.details[:20]:
        print(f"* {detail}")
    sys.exit(0 if result.passed else 1)


if __name__ == "__main__":
    main()
