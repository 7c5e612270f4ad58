"""Starts servers by forking a process that has imported everything already.

A fresh interpreter takes a second of processor time to import a server, and the tests start hundreds of them, on
machines that may have two slow cores; a fork takes a hundredth of that, and what it runs is the same.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {"context_server": "context_server.__main__", "tests.chaos.launch": "tests.chaos.launch"}
"""What ``python -m`` runs, and the module whose ``main`` that calls."""
IMPORTED = (*PROGRAMS.values(), "context_server.agents.demo", "tests.blackbox.scripted")
MEASURED = "COVERAGE_PROCESS_CONFIG"


def unmeasured(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which coverage does not count."""
    return {name: value for name, value in environment.items() if not name.startswith("COVERAGE")}


class Child:
    """A process that a nursery forked; as much of ``subprocess.Popen`` as tests use."""

    def __init__(self, pid: int, nursery: "Nursery") -> None:
        self.pid = pid
        self._nursery = nursery
        self._lock = threading.Lock()
        self._code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None as long as it runs."""
        with self._lock:
            if self._code is None:
                self._code = self._nursery.code_of(self.pid)
            return self._code

    def wait(self, timeout: float) -> int:
        """Its exit code, when it has ended.

        Raises:
            subprocess.TimeoutExpired.
        """
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a forked program", timeout)
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        """Sends a signal; it is no failure when it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)  # Who has ended keeps the number until its exit code has been asked for.

    def terminate(self) -> None:
        """Asks it to end."""
        self.send_signal(signal.SIGTERM)


class Nursery:
    """The process that forks; it ends with the one that made it. May be used from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # A child is measured from its own beginning; what is imported here, the tests themselves import too.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.nursery"], cwd=ROOT, env=unmeasured(os.environ),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        atexit.register(self._close)

    def _close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def bear(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        cwd: Path,
        environment: Mapping[str, str],
        log: Path,
        errors: Path | None = None,
    ) -> Child:
        """A child that runs what ``python -m module *arguments`` does, and writes to ``log``, or to two files.

        It is measured if the environment says so. Then SIGUSR1 ends it at once, with what was counted.
        """
        order = {
            "module": module,
            "arguments": [*arguments],
            "cwd": str(cwd),
            "environment": {**environment},
            "outputs": [str(log), str(errors or log)],
        }
        return Child(self._ask(order), self)

    def code_of(self, pid: int) -> int | None:
        """The exit code of a child that has ended, once; None when it has not."""
        return self._ask({"ended": pid})

    def _ask(self, order: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
            return json.loads(self._process.stdout.readline())


@functools.cache
def nursery() -> Nursery:
    """The one of this process."""
    return Nursery()


def _become(order: Mapping[str, Any]) -> NoReturn:
    """In the child: the program that was ordered, as if it had been started by itself."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.path.insert(0, order["cwd"])
    sys.argv = [order["module"], *order["arguments"]]
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for target, path in enumerate(order["outputs"], 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), target)
    if MEASURED in os.environ:
        importlib.import_module("coverage").process_startup(force=True)
        signal.signal(signal.SIGUSR1, lambda *_: os._exit(0))  # With its patch "_exit", coverage saves first.
    code = 1
    try:
        importlib.import_module(PROGRAMS[order["module"]]).main(order["arguments"])
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    """Forks a child for each line of orders and says its process id, or says how one has ended."""
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # What was imported is garbage in no child.
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # It is typed for the tests, and they close this.
    for line in sys.stdin:
        order = json.loads(line)
        if "ended" in order:
            ended, status = os.waitpid(order["ended"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if ended else None), flush=True)
            continue
        pid = os.fork()
        if not pid:
            _become(order)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
