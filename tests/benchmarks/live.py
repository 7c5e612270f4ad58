"""Live conversations: how long a word takes from the agent to a client that pulls it, durably, at a given load.

    python -m tests.benchmarks.live --conversations 10,150,300 --rate 50 --seconds 20
    python -m tests.benchmarks.live --database sqlite,postgresql
    python -m tests.benchmarks.live --database postgresql --reader-elsewhere
    python -m tests.benchmarks.live --agent metronome,engine --conversations 40,150

Each conversation has one context, one subscriber and one connection for pulls; they start spread over a second. All
words count, those of the start included, in which each conversation costs three requests and a claim on top; "steady"
are the words written from two seconds after the last start on. Processor shares are of one core, in the middle of the
run; "other CPU" is what neither server nor load used, on all cores: a row with much of it comes from a busy machine,
and with PostgreSQL it is mostly that. The agent ``engine`` is the metronome as a function model of Pydantic AI. With
``--reader-elsewhere`` clients post at one node, on the first core, and subscribe and pull at another, on the second;
"server" is then the second.
"""

import argparse
import asyncio
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import uvloop

from tests.benchmarks import report
from tests.benchmarks.conversation import Conversation, Tally
from tests.benchmarks.server import HOST, LOG_TAIL, Metrics, Server, allow_descriptors, machine_cpu_seconds, running
from tests.databases import KINDS, new_database

STAGGER_SECONDS = 1.0
AGENTS = {"metronome": "metronome", "engine": "tests.benchmarks.engine_metronome:agent"}
HEADER = (
    "database", "agent", "conversations", "words", "p50 ms", "p90 ms", "p99 ms", "max ms", "steady p50 / p99 ms",
    "lost / repeated / out of order", "server CPU", "load CPU", "other CPU", "commits/s", "ms per commit",
    "chunks per commit", "pulls/s memory + database", "signals/s", "merged/s",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Window:
    """What the steady middle of a run used."""

    seconds: float
    server_cpu: float
    load_cpu: float
    other_cpu: float
    before: Metrics
    after: Metrics

    def rate(self, name: str, **labels: str) -> float:
        """A counter's growth per second."""
        return self.after.since(self.before, name, **labels) / self.seconds


async def _observe(server: Server, seconds: float) -> Window:
    loop = asyncio.get_running_loop()
    before = await loop.run_in_executor(None, server.metrics)
    began, load_began, server_began = time.monotonic(), time.process_time(), server.cpu_seconds()
    machine_began = machine_cpu_seconds()
    await asyncio.sleep(seconds)
    elapsed = time.monotonic() - began
    server_cpu = (server.cpu_seconds() - server_began) / elapsed
    load_cpu = (time.process_time() - load_began) / elapsed
    other_cpu = max(0.0, (machine_cpu_seconds() - machine_began) / elapsed - server_cpu - load_cpu)
    after = await loop.run_in_executor(None, server.metrics)
    return Window(elapsed, server_cpu, load_cpu, other_cpu, before, after)


async def _measure(server: Server, writer: Server, count: int, rate: float, seconds: float) -> tuple[Tally, Window]:
    steady_seconds = min(STAGGER_SECONDS + 2, seconds / 2)
    tally = Tally(steady_from_ns=time.time_ns() + round(steady_seconds * 1e9))
    words = round(rate * seconds)
    async with asyncio.timeout(seconds * 4 + 60), asyncio.TaskGroup() as group:
        observed = group.create_task(_observe_later(server, seconds))
        for _ in range(count):
            ask = f"rate={rate:g} seconds={seconds:g}"
            elsewhere = None if writer is server else writer.port
            conversation = Conversation(HOST, server.port, ask, words, tally, writer_port=elsewhere)
            group.create_task(conversation.run())
            await asyncio.sleep(STAGGER_SECONDS / count)
    return tally, observed.result()


async def _observe_later(server: Server, seconds: float) -> Window:
    await asyncio.sleep(STAGGER_SECONDS + 1)
    return await _observe(server, max(0.5, seconds - STAGGER_SECONDS - 2))


def _row(count: int, tally: Tally, window: Window) -> list[object]:
    ordered, steady = sorted(tally.latencies_ns), sorted(tally.steady_latencies_ns)
    commits = max(window.rate("context_server_commit_seconds_count"), 0.001)
    memory = window.rate("context_server_pulls_total", source="memory")
    database = window.rate("context_server_pulls_total", source="database")
    return [
        count,
        f"{tally.words:,}",
        *(f"{report.percentile(ordered, percent) / 1e6:.1f}" for percent in (50, 90, 99, 100)),
        f"{report.percentile(steady, 50) / 1e6:.1f} / {report.percentile(steady, 99) / 1e6:.1f}",
        tally.faults(),
        f"{window.server_cpu:.0%}",
        f"{window.load_cpu:.0%}",
        f"{window.other_cpu:.0%}",
        f"{commits:.0f}",
        f"{window.rate('context_server_commit_seconds_sum') / commits * 1000:.1f}",
        f"{window.rate('context_server_chunks_committed_total') / commits:.1f}",
        f"{memory:,.0f} + {database:,.0f}",
        f"{window.rate('context_server_signals_sent_total'):,.0f}",
        f"{window.rate('context_server_signals_merged_total'):,.0f}",
    ]


def _run(database: str, agent: str, count: int, options: argparse.Namespace, *, is_first: bool) -> list[object]:
    """One row, with a server and a database of its own."""
    with report.work_directory() as name, ExitStack() as stack:
        directory = Path(name)
        url = stack.enter_context(new_database(database, directory)) if database == "postgresql" else None
        if is_first:
            report.announce(report.command_line("live"), directory, *report.server_version(url))
        writer = server = stack.enter_context(running(directory, database=url, agent=AGENTS[agent]))
        if options.reader_elsewhere:
            server = stack.enter_context(running(directory, database=url, agent=AGENTS[agent], core=1))
        tally, window = uvloop.run(_measure(server, writer, count, options.rate, options.seconds))
        if tally.faulty:
            print(server.log_text()[-LOG_TAIL:], file=sys.stderr)
        return [database, agent, *_row(count, tally, window)]


def main() -> None:
    """Run the sweep with a fresh server and database for each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", default="10,150,300", help="counts, separated by commas")
    parser.add_argument("--rate", type=float, default=50, help="words a second of each")
    parser.add_argument("--seconds", type=float, default=20, help="length of each reply")
    parser.add_argument("--database", default="sqlite", help=f"where the log is kept: {', '.join(KINDS)}, or both")
    parser.add_argument("--agent", default="metronome", help=f"what writes: {', '.join(AGENTS)}, or both")
    parser.add_argument("--reader-elsewhere", action="store_true", help="read at another node than the one that writes")
    options = parser.parse_args()
    databases = options.database.split(",")
    if unknown := set(databases) - set(KINDS):
        parser.error(f"unknown database {', '.join(sorted(unknown))}; known are {', '.join(KINDS)}")
    agents = options.agent.split(",")
    if unknown := set(agents) - set(AGENTS):
        parser.error(f"unknown agent {', '.join(sorted(unknown))}; known are {', '.join(AGENTS)}")
    if options.reader_elsewhere and "sqlite" in databases:
        parser.error("--reader-elsewhere needs --database postgresql")
    counts = [int(count) for count in options.conversations.split(",")]
    allow_descriptors(4 * max(counts) + 100)
    # PostgreSQL's version first.
    wanted = [(database, agent, count) for count in counts for agent in agents for database in sorted(databases)]
    rows = [_run(*each, options, is_first=place == 0) for place, each in enumerate(wanted)]
    print(report.table(HEADER, rows))


if __name__ == "__main__":
    main()
