"""The server under test: a process of its own on the first core, watched through ``/proc`` and ``/metrics``."""

import contextlib
import http.client
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
START_SECONDS = 30
STOP_SECONDS = 30
LOG_TAIL = 4000
"""Characters of the server's log that are shown when a run saw faults."""
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_SAMPLE = re.compile(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? ([^ ]+)$")


def pin(core: int) -> None:
    """Keep this process, and what it starts from now on, on one core; does nothing where there is only one."""
    if (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(0, {core})


def allow_descriptors(needed: int) -> None:
    """Raise the limit on open files for this process and for the server that it starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(needed, hard), hard))


def machine_cpu_seconds() -> float:
    """Processor time that everything on this machine used so far, on all cores."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _idle, _iowait, interrupts, soft_interrupts = fields[:7]
    return (user + nice + system + interrupts + soft_interrupts) / TICKS_PER_SECOND


class Metrics:
    """One reading of ``/metrics``."""

    def __init__(self, text: str) -> None:
        self._samples: dict[tuple[str, str], float] = {}
        self._declared = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")}
        for line in text.splitlines():
            if match := _SAMPLE.match(line):
                self._samples[match[1], match[2] or ""] = float(match[3])

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples called ``name`` that carry all ``labels``; 0 for a counter that has not counted yet.

        Raises:
            KeyError: the server has no metric of that name.
        """
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        if name not in self._declared and not any(sample == name for sample, _ in self._samples):
            raise KeyError(name)
        return sum(
            value
            for (sample, sample_labels), value in self._samples.items()
            if sample == name and all(label in sample_labels for label in wanted)
        )

    def since(self, earlier: "Metrics", name: str, **labels: str) -> float:
        """How far a counter went since ``earlier``."""
        return self.value(name, **labels) - earlier.value(name, **labels)


class Server:
    """A running ``context-server serve``."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process = process
        self.pid = process.pid
        self.port = port
        self.log = log

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of a GET on a connection of its own."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=10)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def metrics(self) -> Metrics:
        """What ``/metrics`` says now."""
        return Metrics(self.get("/metrics")[1])

    def cpu_seconds(self) -> float:
        """Processor time of all its threads so far, user and system."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND

    def resident_bytes(self) -> int:
        """Resident memory now."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024

    def descriptors(self) -> int:
        """Open file descriptors now."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))  # noqa: PTH208  (a count of names; no Path objects wanted)

    def unsent_bytes(self, peer_port: int) -> int:
        """Bytes in the kernel's send queue of the connection from ``peer_port``; 0 when there is no such connection."""
        wanted = (f":{self.port:04X}", f":{peer_port:04X}")
        for line in Path(f"/proc/{self.pid}/net/tcp").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[1].endswith(wanted[0]) and fields[2].endswith(wanted[1]):
                return int(fields[4].partition(":")[0], 16)
        return 0

    def log_text(self) -> str:
        """Everything that it has printed."""
        return self.log.read_text(errors="replace")

    def stop(self) -> float:
        """SIGTERM, and the seconds until it was gone; killed and TimeoutExpired raised when it does not go."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
        return time.monotonic() - began


def _wait_until_ready(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        with contextlib.suppress(OSError, http.client.HTTPException):
            if server.get("/readyz")[0] == 200:
                return
        time.sleep(0.02)
    raise RuntimeError(f"the server did not start:\n{server.log_text()[-2000:]}")


@contextlib.contextmanager
def running(
    directory: Path,
    environment: Mapping[str, str] | None = None,
    *,
    database: str | None = None,
    core: int = 0,
    agent: str = "metronome",
) -> Iterator[Server]:
    """A server on one core with the metronome, or another agent, and else default settings; this process on core 1.

    ``CONTEXT_SERVER_…`` variables of the caller's environment hold, so that a setting can be tried without an edit.
    Without a ``database`` it stores in the directory, and a second server there finds what the first one stored.
    """
    port = free_port()
    log = directory / f"server-{port}.log"
    command = [sys.executable, "-m", "context_server", "serve", "--agent", agent, "--log-format", "json"]
    command += ["--host", HOST, "--port", str(port), "--database", database or str(directory / "bench.db")]
    pin(core)  # The child inherits it with all threads that it will ever start.
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=output, env=os.environ | dict(environment or {})
        )
    pin(1)
    server = Server(process, port, log)
    try:
        _wait_until_ready(server)
        yield server
    except Exception:
        print(server.log_text()[-LOG_TAIL:], file=sys.stderr)
        raise
    finally:
        if process.poll() is None:
            server.stop()
