"""The long form of each trial of many nodes, as one command.

    python -m tests.chaos.nodes kill --minutes 10 [--gently]
    python -m tests.chaos.nodes suspend --rounds 100
    python -m tests.chaos.nodes outage --minutes 5
    python -m tests.chaos.nodes wakeups --bus postgresql
    python -m tests.chaos.nodes partition --rounds 3

Each starts a PostgreSQL of its own, prints its result in Markdown with the seed, the versions and the machine, and ends
with 1 when a promise was broken. With ``--control`` the protection is off: then it ends with 1 when nothing was found.
"""

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from tests.benchmarks import report
from tests.chaos.nodes import kill, outage, partition, suspend, wakeups
from tests.chaos.nodes.trial import Result
from tests.engines import Postgres, Redis

Trial = Callable[[Path, str, Postgres, argparse.Namespace, tuple[str, ...]], Awaitable[Result]]


async def _kill(
    directory: Path, url: str, _postgres: Postgres, options: argparse.Namespace, defects: tuple[str, ...]
) -> Result:
    return await kill.kill(
        directory, url, seed=options.seed, seconds=60 * options.minutes, gently=options.gently, defects=defects
    )


async def _suspend(
    directory: Path, url: str, _postgres: Postgres, options: argparse.Namespace, defects: tuple[str, ...]
) -> Result:
    return await suspend.suspend(directory, url, seed=options.seed, rounds=options.rounds, defects=defects)


async def _outage(
    directory: Path, url: str, postgres: Postgres, options: argparse.Namespace, defects: tuple[str, ...]
) -> Result:
    return await outage.outage(
        directory, url, postgres, seed=options.seed, seconds=60 * options.minutes, defects=defects
    )


async def _partition(
    directory: Path, url: str, postgres: Postgres, options: argparse.Namespace, defects: tuple[str, ...]
) -> Result:
    return await partition.partition(
        directory, url, postgres, seed=options.seed, rounds=options.rounds, defects=defects
    )


async def _wakeups(
    directory: Path, url: str, _postgres: Postgres, options: argparse.Namespace, defects: tuple[str, ...]
) -> Result:
    loss = wakeups.Loss(options.bus)
    if loss is not wakeups.Loss.REDIS:
        return await wakeups.wakeups(directory, url, loss, seed=options.seed, rounds=options.rounds, defects=defects)
    with Redis() as redis:
        return await wakeups.wakeups(
            directory, url, loss, redis=redis, seed=options.seed, rounds=options.rounds, defects=defects
        )


TRIALS: dict[str, tuple[Trial, str]] = {
    "kill": (_kill, kill.CONTROL),
    "suspend": (_suspend, suspend.CONTROL),
    "outage": (_outage, outage.CONTROL),
    "wakeups": (_wakeups, wakeups.CONTROL),
    "partition": (_partition, partition.CONTROL),
}


def main() -> None:
    """Run one trial and print what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trial", choices=TRIALS)
    parser.add_argument("--minutes", type=float, default=5.0, help="of kill and outage")
    parser.add_argument("--rounds", type=int, default=1, help="of suspend, wakeups and partition")
    parser.add_argument("--bus", choices=list(wakeups.Loss), default=wakeups.Loss.POSTGRESQL, help="of wakeups")
    parser.add_argument("--gently", action="store_true", help="of kill: by SIGTERM, which interrupts no short reply")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--control", action="store_true", help="the negative control: without the protection")
    parser.add_argument("--keep", type=Path, help="an empty folder for the nodes' logs; else they are gone afterwards")
    options = parser.parse_args()
    trial, control = TRIALS[options.trial]
    defects = ("--defect", control) if options.control else ()
    with report.work_directory() as name, Postgres() as postgres:
        directory = options.keep or Path(name)
        url = postgres.create("chaos")
        report.announce(report.command_line("nodes", "tests.chaos"), Path(name), *report.server_version(url))
        result = asyncio.run(trial(directory, url, postgres, options, defects))
    print(result.report())
    sys.exit(0 if (bool(result.violations) if options.control else result.passed) else 1)


if __name__ == "__main__":
    main()
