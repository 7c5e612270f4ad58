"""A real server for black-box tests: its own process, port, database and log."""

import contextlib
import http.client
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.databases import new_database
from tests.nursery import MEASURED, Child, nursery, unmeasured
from tests.ports import free_port

START_SECONDS = 90.0
STOP_SECONDS = 60.0
DATABASE_VARIABLE = "CONTEXT_SERVER_TEST_DATABASE"


class Server:
    """``python -m context_server serve`` in ``directory``; ``settings`` by the names of ``Settings``.

    It keeps its port and database over ``kill`` or ``stop`` and ``start``. ``log`` is the file with what it printed.
    ``command`` may be replaced before it is started, by that of another of ``nursery.PROGRAMS``. With
    ``CONTEXT_SERVER_TEST_DATABASE=postgresql`` its database is one of a PostgreSQL server, unless the settings name
    another.
    """

    command: tuple[str, ...] = (sys.executable, "-m", "context_server", "serve")

    def __init__(self, directory: Path, **settings: Any) -> None:
        self.directory = directory
        self.port = settings.setdefault("port", free_port())
        self.url = f"http://127.0.0.1:{self.port}"
        self.database = directory / "context-server.db"
        self.log = directory / "server.log"
        self._holds = contextlib.ExitStack()
        if "database" not in settings and os.environ.get(DATABASE_VARIABLE) == "postgresql":
            settings["database"] = self._holds.enter_context(new_database("postgresql", directory))
        settings.setdefault("database", self.database)
        given = str(settings["database"])
        self.database_url = given if "://" in given else f"sqlite:///{given}"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("CONTEXT_SERVER_")}
        given = {f"CONTEXT_SERVER_{name.upper()}": str(value) for name, value in settings.items()}
        root = str(Path(__file__).resolve().parents[1])
        self._environment = inherited | given | {"PYTHONPATH": root}
        self._prefix = str(settings.get("path_prefix", ""))
        self._process: Child | None = None

    @property
    def pid(self) -> int:
        return self._running().pid

    @property
    def is_running(self) -> bool:
        return self._process is not None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._holds:
            if self._process is None:
                return
            if self._is_measured:
                self._process.send_signal(signal.SIGUSR1)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(STOP_SECONDS)
            self.kill()

    @property
    def _is_measured(self) -> bool:
        """Whether coverage counts in it, as it does unless it has a command of its own."""
        return MEASURED in self._environment and self.command == Server.command

    def start(self) -> None:
        """Starts it, and returns when it is ready."""
        assert self._process is None
        self._process = self._spawn()
        deadline = time.monotonic() + START_SECONDS
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"the server did not start:\n{self.log.read_text()}")
            time.sleep(0.02)

    def _spawn(self) -> Child:
        _, _, module, *arguments = self.command
        environment = self._environment if self._is_measured else unmeasured(self._environment)
        return nursery().bear(module, arguments, cwd=self.directory, environment=environment, log=self.log)

    def stop(self) -> int:
        """Asks it to end with SIGTERM; its exit code."""
        self._running().terminate()
        return self.wait()

    def wait(self) -> int:
        """Waits for it to end by itself; its exit code."""
        code = self._running().wait(STOP_SECONDS)
        self._process = None
        return code

    def kill(self) -> None:
        """Ends it with SIGKILL."""
        process = self._running()
        process.send_signal(signal.SIGKILL)
        process.wait(STOP_SECONDS)
        self._process = None

    def _running(self) -> Child:
        assert self._process is not None
        return self._process

    def _is_ready(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10.0)
        try:
            connection.request("GET", f"{self._prefix}/readyz")
            return connection.getresponse().status == http.HTTPStatus.OK
        except OSError:
            return False
        finally:
            connection.close()
