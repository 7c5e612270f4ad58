"""A PostgreSQL and a Redis of a test's own, which it may crash: each on a free port, in a folder that goes with it.

Where their programs are not installed the test is skipped, and in CI it fails.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

from tests.ports import free_port

HOST = "127.0.0.1"
START_SECONDS = 90.0
_POSTGRES_USER = "postgres"
_MEMORY_BYTES = 2**29
"""Room that a PostgreSQL of a short trial never fills."""
_SETTINGS = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",
    "max_connections": "200",
    "log_min_messages": "fatal",
}


def missing(what: str) -> None:
    """Skips the test, with the reason; in CI, where nothing may be missing, fails it."""
    if os.environ.get("CI"):
        pytest.fail(f"{what} is not installed")
    pytest.skip(f"{what} is not installed")


def postgres_programs() -> Path | None:
    """The folder with ``initdb`` and ``pg_ctl`` of the newest PostgreSQL; Debian keeps them off the path."""
    found = shutil.which("pg_ctl")
    if found is not None:
        return Path(found).resolve().parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"), key=lambda path: float(path.parts[-3]))
    return versions[-1].parent if versions else None


class Postgres:
    """A PostgreSQL server with its default durability; use it with ``with``.

    It refuses to run as root, and then runs as the user ``postgres``. ``quick`` keeps its files in memory where that
    has room: a crash of the server loses the same there as on a disk, and a busy disk does not hold the test up.
    """

    def __init__(self, *, quick: bool = False) -> None:
        programs = postgres_programs()
        if programs is None:
            missing("PostgreSQL")
        assert programs is not None
        self._programs = programs
        self.port = free_port()
        self._folder = Path(tempfile.mkdtemp(prefix="context-server-postgres-", dir=_memory() if quick else None))
        self._data = self._folder / "data"
        self.log = self._folder / "postgres.log"

    def __enter__(self) -> Self:
        try:
            if os.geteuid() == 0:
                shutil.chown(self._folder, _POSTGRES_USER)
            # Without the syncs of initdb itself: what it writes is wanted for minutes; the server syncs as always.
            self._run("initdb", "--no-sync", "--auth=trust", f"--username={_POSTGRES_USER}", "--encoding=UTF8")
            self.start()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self.crash()
        self._remove()

    def _remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def _run(self, program: str, *arguments: str) -> None:
        """Runs one of PostgreSQL's programs on the data folder; what it says is in what is raised."""
        user = _POSTGRES_USER if os.geteuid() == 0 else None
        subprocess.run(
            [self._programs / program, "-D", self._data, *arguments],
            user=user, group=user, extra_groups=[] if user else None, cwd=self._folder,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True,
        )  # fmt: skip

    def start(self) -> None:
        """Starts it, and returns when it takes connections, having repaired what a crash left."""
        options = " ".join(f"-c {name}='{value}'" for name, value in (_SETTINGS | {"port": str(self.port)}).items())
        self._run("pg_ctl", "start", "--wait", f"--timeout={START_SECONDS:.0f}", f"--log={self.log}", "-o", options)

    def crash(self) -> None:
        """Ends it at once, without a checkpoint: what is not in its log is lost (``pg_ctl -m immediate``)."""
        self._run("pg_ctl", "stop", "--wait", "--mode=immediate")

    def create(self, name: str) -> str:
        """Makes an empty database; its URL, ``postgresql+asyncpg://…``."""
        subprocess.run(
            [self._programs / "createdb", "-h", HOST, "-p", str(self.port), "-U", _POSTGRES_USER, name],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        return self.url(name)

    def url(self, name: str, port: int | None = None) -> str:
        """The URL of a database, by way of another port where one is given."""
        return f"postgresql+asyncpg://{_POSTGRES_USER}@{HOST}:{port or self.port}/{name}"


class Redis:
    """A Redis server that keeps nothing on disk; use it with ``with``."""

    def __init__(self) -> None:
        program = shutil.which("redis-server")
        if program is None:
            missing("Redis")
        self._program = str(program)
        self.port = free_port()
        self.url = f"redis://{HOST}:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            self.kill()

    def start(self) -> None:
        """Starts it, and returns when it takes connections."""
        assert self._process is None
        self._process = subprocess.Popen(
            [self._program, "--port", str(self.port), "--bind", HOST, "--save", "", "--appendonly", "no"],
            cwd=tempfile.gettempdir(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while not _takes_connections(self.port):
            assert self._process.poll() is None, "redis-server ended"
            assert time.monotonic() < deadline, "redis-server did not start"
            time.sleep(0.02)

    def kill(self) -> None:
        """Ends it with SIGKILL: its connections break, and nothing listens any more."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._process = None


def _takes_connections(port: int) -> bool:
    try:
        with socket.create_connection((HOST, port), timeout=1.0):
            return True
    except OSError:
        return False


def _memory() -> Path | None:
    """A folder in memory with room for a PostgreSQL, if there is one."""
    folder = Path("/dev/shm")  # noqa: S108  # Each folder in it has a random name, and is its user's alone.
    if folder.is_dir() and os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > _MEMORY_BYTES:
        return folder
    return None


@contextlib.contextmanager
def private_database(name: str = "chaos") -> Iterator[tuple[Postgres, str]]:
    """A PostgreSQL with one empty database, and the URL of that."""
    with Postgres() as postgres:
        yield postgres, postgres.create(name)
