"""Shutdown: how long SIGTERM takes with open streams, one of them stalled, and who gets a farewell.

    python -m tests.benchmarks.shutdown --streams 200 --busy 20

``--busy`` replies are being written. The stalled reader follows all of them on one multiplexed stream with a tiny
receive buffer and has stopped reading; the signal is sent once its connection has been full for a second.
"""

import argparse
import asyncio
import json
import signal
import time
from pathlib import Path
from typing import Any

import uvloop

from tests.benchmarks import report
from tests.benchmarks.conversation import TINY_BUFFER_BYTES
from tests.benchmarks.load import Connection, SignalStream
from tests.benchmarks.server import HOST, STOP_SECONDS, Server, allow_descriptors, running

FULL_SECONDS = 1.0
STALL_SECONDS = 120
HEADER = (
    "open streams", "busy replies", "unsent bytes of the stalled stream", "seconds to exit", "exit status",
    "live streams with goodbye and retry", "ended cleanly", "retry ms", "error lines in the log",
)  # fmt: skip


def _ignore(signal: dict[str, Any]) -> None:
    """The stream itself notes the farewell."""


async def _wait_until_stalled(server: Server, port: int) -> int:
    """Bytes that the kernel holds for the stalled reader, once that number has stood still for ``FULL_SECONDS``."""
    deadline = time.monotonic() + STALL_SECONDS
    last, since = 0, time.monotonic()
    while time.monotonic() < deadline:
        await asyncio.sleep(0.05)
        unsent = server.unsent_bytes(port)
        if unsent != last:
            last, since = unsent, time.monotonic()
        elif unsent and time.monotonic() - since >= FULL_SECONDS:
            return unsent
    raise RuntimeError(f"the stalled reader's connection did not fill within {STALL_SECONDS} s (now {last} bytes)")


async def _prepare(server: Server, count: int, busy: int) -> tuple[SignalStream, list[SignalStream]]:
    """The stalled stream and the live ones, with ``busy`` replies under way."""
    connection = await Connection.open(HOST, server.port)
    contexts = [(await connection.request("POST", "/contexts", {}, 201))["id"] for _ in range(count - 1)]
    query = "&".join(f"context={context_id}" for context_id in contexts[:busy])
    stalled = await SignalStream.open(HOST, server.port, f"/stream?{query}", _ignore, TINY_BUFFER_BYTES)
    live = [
        await SignalStream.open(HOST, server.port, f"/contexts/{context_id}/stream", _ignore) for context_id in contexts
    ]
    stalled.stall()
    body = {"payload": {"type": "text", "content": "rate=100 seconds=600"}}
    for context_id in contexts[:busy]:
        await connection.request("POST", f"/contexts/{context_id}/messages", body, 202)
    connection.close()
    return stalled, live


def _error_lines(log: str) -> int:
    """Lines of level error or above, and lines of a traceback that is no JSON."""
    errors = 0
    for line in filter(str.strip, log.splitlines()):
        try:
            level = json.loads(line).get("level", "")
        except (json.JSONDecodeError, AttributeError):
            level = "error" if "ERROR" in line or "Traceback" in line or "Exception" in line else ""
        errors += str(level).lower() in ("error", "critical")
    return errors


async def _measure(server: Server, count: int, busy: int) -> list[object]:
    stalled, live = await _prepare(server, count, busy)
    unsent = await _wait_until_stalled(server, stalled.local_port)
    loop = asyncio.get_running_loop()
    began = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    status = await loop.run_in_executor(None, server.process.wait, STOP_SECONDS)
    seconds = time.monotonic() - began
    async with asyncio.timeout(10):
        await asyncio.gather(*(stream.ended for stream in live))
    stalled.close()
    retries = [stream.farewell for stream in live if stream.farewell is not None]
    spread = f"{min(retries)} to {max(retries)}" if retries else "none"
    return [
        count, busy, f"{unsent:,}", f"{seconds:.1f}", status, f"{len(retries)} of {len(live)}",
        f"{sum(stream.clean for stream in live)} of {len(live)}", spread, _error_lines(server.log_text()),
    ]  # fmt: skip


def main() -> None:
    """Stop a fresh server under streams."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=200, help="open streams, the stalled one included")
    parser.add_argument("--busy", type=int, default=20, help="replies that are being written")
    options = parser.parse_args()
    allow_descriptors(2 * options.streams + 200)
    with report.work_directory() as name:
        report.announce(report.command_line("shutdown"), Path(name))
        with running(Path(name)) as server:
            row = uvloop.run(_measure(server, options.streams, options.busy))
    print(report.table(HEADER, [row]))


if __name__ == "__main__":
    main()
