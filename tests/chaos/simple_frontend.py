"""How often a simple frontend is exact with the default pace, in a real browser, on this machine as it is.

    python -m tests.chaos.simple_frontend --rounds 20 --busy 0

holds ``--rounds`` conversations of three replies each, while ``--busy`` loops compete for the processors, and prints
the result as a Markdown row. ``--settings`` are those of the server (``signal_settle_ms=100``). It ends with 1 when a
reply was not exact; ``--settings signal_patience_ms=0`` is the negative control. Such a client depends on the time that
an answer takes, so a busy machine may make it fail, which says what the pace is worth there.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles

from tests.blackbox.browser import Shown, converse, installed, served
from tests.blackbox.calls import Calls
from tests.server import Server

TEXTS = ["rate=50 seconds=1", "rate=500 seconds=1", "rate=15 seconds=1"]


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """Processes that do nothing, as fast as they can."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def talk(browser: str, rounds: int, settings: dict[str, str]) -> list[Shown]:
    """All replies of all conversations, each with a server and a browser of its own."""
    shown = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, served() as page:
            directory = Path(name)
            with Server(directory, agent="metronome", cors_origins=page.origin, **settings) as server:
                shown += converse(Calls(server), page, browser, directory, TEXTS)
    return shown


def main() -> int:
    """Runs the trial; 0 when every reply was exact."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--busy", type=int, default=0, help="loops that compete for the processors")
    parser.add_argument("--settings", nargs="*", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    browser = installed()
    if browser is None:
        parser.error("no browser is installed")
    with busy(options.busy):
        shown = talk(browser, options.rounds, dict(each.split("=", 1) for each in options.settings))
    exact = sum(reply.is_exact for reply in shown)
    pauses = quantiles([reply.longest_pause_ms for reply in shown], n=100)
    print(f"{platform.system()}, {os.cpu_count()} processors, Python {platform.python_version()}, {browser}")
    print(
        "| busy loops | settings | replies | exact | text differs | signals that overtook a pull | pause, p50 | p99 |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    print(
        f"| {options.busy} | {' '.join(options.settings) or 'default'} | {len(shown)} | {exact} "
        f"| {sum(reply.text != reply.written for reply in shown)} | {sum(reply.overtaken for reply in shown)} "
        f"| {pauses[49]:.0f} ms | {pauses[98]:.0f} ms |"
    )
    return exact != len(shown)


if __name__ == "__main__":
    sys.exit(main())
