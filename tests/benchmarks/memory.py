"""Memory: the server's resident memory while long replies stream, one of their readers stalled.

    python -m tests.benchmarks.memory --conversations 150 --words 100000 --rate 0

``--rate 0`` writes as fast as the server commits. Nearly all readers follow with pulls; one asks for the text and stops
reading its stream and its answer, and reads the whole reply when all others are done. The server is warm once half of
the words are committed; the slope is a least-squares line through the samples after that.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop

from tests.benchmarks import report
from tests.benchmarks.conversation import Conversation, StalledReader, Tally
from tests.benchmarks.server import HOST, LOG_TAIL, Server, allow_descriptors, running

POINTS = 10
SAMPLE_SECONDS = 0.5
HEADER = (
    "conversations", "words each", "text committed", "took", "words/s", "resident at start", "at half-time",
    "at the end", "slope after half-time", "lost / repeated / out of order", "stalled reader caught up", "server CPU",
    "load CPU",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at the server: when, how many words the readers held, how much memory was resident."""

    seconds: float
    words: int
    resident_bytes: int


async def _sample(server: Server, tally: Tally, samples: list[Sample]) -> None:
    began = time.monotonic()
    while True:
        samples.append(Sample(time.monotonic() - began, tally.words, server.resident_bytes()))
        await asyncio.sleep(SAMPLE_SECONDS)


def _slope(samples: Sequence[Sample]) -> float:
    """MiB per minute of the least-squares line."""
    mean_x = sum(sample.seconds for sample in samples) / len(samples)
    mean_y = sum(sample.resident_bytes for sample in samples) / len(samples)
    spread = sum((sample.seconds - mean_x) ** 2 for sample in samples)
    if not spread:
        return 0.0
    joint = sum((sample.seconds - mean_x) * (sample.resident_bytes - mean_y) for sample in samples)
    return joint / spread * 60 / 2**20


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the run left behind."""

    samples: list[Sample]
    tally: Tally
    stalled: Tally
    seconds: float
    committed_bytes: float
    server_cpu: float
    load_cpu: float


async def _measure(server: Server, count: int, words: int, rate: float, limit_seconds: float) -> Outcome:
    ask = f"rate={rate:g} words={words}"
    tally, stalled_tally, samples = Tally(), Tally(), list[Sample]()
    stalled = StalledReader(HOST, server.port, ask, words, stalled_tally)
    sampling = asyncio.create_task(_sample(server, tally, samples))
    began, load_began, server_began = time.monotonic(), time.process_time(), server.cpu_seconds()
    try:
        async with asyncio.timeout(limit_seconds):
            async with asyncio.TaskGroup() as group:
                group.create_task(stalled.stall())
                for _ in range(count - 1):
                    group.create_task(Conversation(HOST, server.port, ask, words, tally, timed=False).run())
            seconds = time.monotonic() - began
            server_cpu = (server.cpu_seconds() - server_began) / seconds
            load_cpu = (time.process_time() - load_began) / seconds
            sampling.cancel()
            await stalled.catch_up()
    finally:
        sampling.cancel()
        stalled.close()
    committed = server.metrics().value("context_server_bytes_committed_total")
    return Outcome(samples, tally, stalled_tally, seconds, committed, server_cpu, load_cpu)


def _mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _print(count: int, words: int, outcome: Outcome) -> None:
    samples = outcome.samples
    half = next(place for place, sample in enumerate(samples) if sample.words >= samples[-1].words / 2)
    warm = samples[half:]
    row = [
        count,
        f"{words:,}",
        _mib(outcome.committed_bytes),
        f"{outcome.seconds:.0f} s",
        f"{outcome.tally.words / outcome.seconds:,.0f}",
        _mib(samples[0].resident_bytes),
        _mib(warm[0].resident_bytes),
        _mib(warm[-1].resident_bytes),
        f"{_slope(warm):+.1f} MiB/min",
        outcome.tally.faults(),
        f"{outcome.stalled.words:,} words, {outcome.stalled.faults()}",
        f"{outcome.server_cpu:.0%}",
        f"{outcome.load_cpu:.0%}",
    ]
    print(report.table(HEADER, [row]))
    chosen = [samples[round(point * (len(samples) - 1) / (POINTS - 1))] for point in range(POINTS)]
    print("\n" + report.table(
        ["seconds", *(f"{sample.seconds:.0f}" for sample in chosen)],
        [
            ["words held by readers", *(f"{sample.words:,}" for sample in chosen)],
            ["resident MiB", *(f"{sample.resident_bytes / 2**20:.1f}" for sample in chosen)],
        ],
    ))  # fmt: skip


def main() -> None:
    """Stream against a fresh server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=150, help="replies at once, the stalled one included")
    parser.add_argument("--words", type=int, default=100_000, help="words of each reply")
    parser.add_argument("--rate", type=float, default=0, help="words a second of each; 0: as fast as possible")
    parser.add_argument("--limit-seconds", type=float, default=3600, help="give up after this time")
    options = parser.parse_args()
    allow_descriptors(4 * options.conversations + 100)
    with report.work_directory() as name:
        report.announce(report.command_line("memory"), Path(name))
        with running(Path(name)) as server:
            outcome = uvloop.run(
                _measure(server, options.conversations, options.words, options.rate, options.limit_seconds)
            )
            if outcome.tally.faulty or outcome.stalled.faulty:
                print(server.log_text()[-LOG_TAIL:], file=sys.stderr)
    _print(options.conversations, options.words, outcome)


if __name__ == "__main__":
    main()
