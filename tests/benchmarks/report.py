"""What a benchmark prints: the machine, the versions, percentiles, and Markdown tables."""

import importlib.metadata
import os
import platform
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.databases import run_beside

PACKAGES = (
    "context-server", "starlette", "sse-starlette", "uvicorn", "uvloop", "httptools", "sqlalchemy", "asyncpg", "redis",
    "pydantic",
)  # fmt: skip


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile of values in ascending order (``percentile(range(1, 101), 99) == 99``)."""
    rank = max(1, -(-len(ordered) * percent // 100))
    return ordered[int(rank) - 1]


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def announce(command: str, directory: Path, *servers: str) -> None:
    """Print the command, the machine and the versions, which belong beside every figure.

    ``servers`` are the versions of those that the run needs, such as ``PostgreSQL 15.14``.
    """
    print(f"`{command}`\n")
    kernel = platform.release().partition("-")[0]
    print(f"Machine: {_processor()}, {os.cpu_count()} cores, {_memory_gib():.0f} GiB, Linux {kernel}; ", end="")
    print(f"{_filesystem(directory)}, fdatasync of 4 KiB {_sync_ms(directory):.2f} ms at the median.\n")
    databases = ", ".join(servers or (f"SQLite {sqlite3.sqlite_version}",))
    print(f"Versions: Python {platform.python_version()}, {databases}, {_packages()}.\n")


def server_version(database_url: str | None) -> tuple[str, ...]:
    """The version of a PostgreSQL server, for ``announce``; nothing without a server."""
    if database_url is None:
        return ()
    [(version,)] = run_beside(database_url, "SHOW server_version")
    return (f"PostgreSQL {version.partition(' ')[0]}",)


def command_line(module: str, package: str = "tests.benchmarks") -> str:
    """How this run was started: ``python -m tests.benchmarks.live --rate 50``."""
    return " ".join(["python", "-m", f"{package}.{module}", *sys.argv[1:]])


def work_directory() -> "tempfile.TemporaryDirectory[str]":
    """A directory for the database, gone after the run; ``TMPDIR`` chooses the disk that is measured."""
    return tempfile.TemporaryDirectory(prefix="context-server-bench-")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _filesystem(directory: Path) -> str:
    """The file system that holds ``directory``; a tmpfs would make every durable figure worthless."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    holding = [(point, kind) for point, kind in mounts if directory.resolve().is_relative_to(point)]
    return max(holding, key=lambda mount: len(mount[0]))[1]


def _sync_ms(directory: Path) -> float:
    """What one durable write costs on this disk, without SQLite."""
    times = []
    with tempfile.TemporaryFile(dir=directory) as file:
        for _ in range(50):
            began = time.perf_counter()
            os.write(file.fileno(), bytes(4096))
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1000


def _packages() -> str:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue  # context-server itself may run from a checkout.
    return ", ".join(found)
