"""What wake-ups cost, and how long they take from node to node.

    python -m tests.benchmarks.bus --conversations 1,10,300 --rate 50 --seconds 10

Two processes on a private PostgreSQL and then on a private Redis: one says that each conversation has moved, ``rate``
times a second each, the other follows all of them. Nothing else is done, so the processor's time is that of the bus, of
its driver, and of waking up. ``sent`` is what is left after merging. The delay is that of what arrives, from the moment
it was published.
"""

import argparse
import asyncio
import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import uvloop

from context_server.bus import BusState, Moved, WakeUp, open_bus, owner_tag
from context_server.metrics import Metrics
from context_server.records import new_id
from tests.benchmarks import report
from tests.engines import Postgres, Redis

HEADER = (
    "bus", "conversations", "published a second", "sent a second", "processor of the sender", "µs for one published",
    "µs for one sent", "processor of the hearer", "µs for one heard", "delay p50 ms", "p99 ms", "most ms",
)  # fmt: skip
TAG = owner_tag("local")
TICK_SECONDS = 0.001
SETTLE_SECONDS = 0.5


def _processor(began: float) -> float:
    return time.process_time() - began


async def _hear(database: str, redis: str) -> None:
    """The other process: follows everything until its input ends, then prints what it found."""
    delays: list[float] = []

    def listen(wake_up: WakeUp, _remote: bool) -> None:
        if isinstance(wake_up, Moved) and wake_up.sequence is not None:
            delays.append(time.monotonic_ns() / 1e6 - wake_up.sequence / 1e3)

    bus = open_bus(database, redis, namespace="bench", metrics=Metrics())
    bus.subscribe(listen)
    bus.follow_all()
    async with bus:
        assert bus.state is BusState.CONNECTED
        print("ready", flush=True)
        began = time.process_time()
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        print(json.dumps({"processor": _processor(began), "delays": sorted(delays)}))


async def _say(database: str, redis: str, conversations: int, rate: float, seconds: float) -> list[object]:
    """One row of the table."""
    program = (sys.executable, "-m", "tests.benchmarks.bus", "--hear", database, redis)
    pipe = asyncio.subprocess.PIPE
    hearer = await asyncio.create_subprocess_exec(*program, stdin=pipe, stdout=pipe, limit=2**28)
    assert hearer.stdout is not None
    assert await hearer.stdout.readline() == b"ready\n"
    metrics = Metrics()
    contexts = [(new_id(), new_id()) for _ in range(conversations)]
    async with open_bus(database, redis, namespace="bench", metrics=metrics) as bus:
        assert bus.state is BusState.CONNECTED
        published, began, processor = 0, time.monotonic(), time.process_time()
        while (now := time.monotonic()) < began + seconds:
            while published < (now - began) * rate * conversations:
                context, message = contexts[published % conversations]
                # The moment in place of a sequence; it grows as sequences do.
                bus.publish(Moved(context, TAG, None, message, time.monotonic_ns() // 1000))
                published += 1
            due = began + published / (rate * conversations)
            await asyncio.sleep(max(TICK_SECONDS, due - time.monotonic()))
        took, spent = time.monotonic() - began, _processor(processor)
        await asyncio.sleep(SETTLE_SECONDS)
    found: dict[str, Any] = json.loads((await hearer.communicate(b""))[0])
    sent = metrics.registry.get_sample_value("context_server_wake_ups_sent_total", {"bus": bus.kind}) or 0
    delays = found["delays"]
    return [
        bus.kind, conversations, f"{published / took:,.0f}", f"{sent / took:,.0f}", f"{spent / took:.1%}",
        f"{spent / published * 1e6:.1f}", f"{spent / sent * 1e6:.1f}", f"{found['processor'] / took:.1%}",
        f"{found['processor'] / len(delays) * 1e6:.1f}", f"{report.percentile(delays, 50):.1f}",
        f"{report.percentile(delays, 99):.1f}", f"{delays[-1]:.1f}",
    ]  # fmt: skip


def main() -> None:
    """Start both servers, measure on each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", default="1,10,300", help="how many move at once, separated by commas")
    parser.add_argument("--rate", type=float, default=50.0, help="moves a second of each")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each measurement")
    parser.add_argument("--hear", nargs=2, metavar=("DATABASE", "BUS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.hear:
        uvloop.run(_hear(*options.hear))
        return
    with ExitStack() as stack:
        report.announce(report.command_line("bus"), Path(stack.enter_context(report.work_directory())))
        database = stack.enter_context(Postgres()).create("bench")
        redis = stack.enter_context(Redis()).url
        rows = [
            uvloop.run(_say(database, url, int(count), options.rate, options.seconds))
            for url in ("", redis)
            for count in options.conversations.split(",")
        ]
    print(report.table(HEADER, rows))


if __name__ == "__main__":
    main()
