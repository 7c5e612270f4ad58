"""The supervisor with small programs in place of servers: who is replaced, after which rest, and when it gives up."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from context_server import workers
from context_server.errors import WorkerNotStarted
from context_server.workers import EXIT_STORAGE_BROKEN, Supervisor, how_it_ended, values_directory
from tests.unit.rooms import DEADLINE_SECONDS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def descriptors() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def end() -> None:
    """What the process manager does."""
    os.kill(os.getpid(), signal.SIGTERM)


async def until(reached: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not reached():  # noqa: ASYNC110  # What is waited for has no event.
            await asyncio.sleep(0.002)


def is_stopped(process: int) -> bool:
    """Whether SIGSTOP has stopped it."""
    return ") T " in Path(f"/proc/{process}/stat").read_text(encoding="ascii")


class Crew:
    """A supervisor of as many workers as the plan names, and the port that they share."""

    def __init__(
        self, plan: str, stack: ExitStack, on_ready: Callable[[], None] = end, program: str = sys.executable,
        patience_seconds: float = 20.0,
    ) -> None:  # fmt: skip
        self.port = 0
        self._stack = stack
        self.listeners = [self.listen() for _ in plan.split(",")]
        self.values = stack.enter_context(values_directory())
        self.supervisor = Supervisor(
            (program, "-m", "tests.unit.worker_program", plan),
            self.listeners,
            settings={},
            values=self.values,
            listen_again=self.listen,
            patience_seconds=patience_seconds,
            on_ready=on_ready,
        )

    def listen(self) -> socket.socket:
        listener = self._stack.enter_context(socket.create_server(("127.0.0.1", self.port), reuse_port=True))
        self.port = listener.getsockname()[1]
        return listener

    def holder(self, number: int) -> "subprocess.Popen[bytes]":
        process = self.supervisor._places[number - 1].process
        assert process is not None
        return process

    async def run(self) -> int:
        async with asyncio.timeout(3 * DEADLINE_SECONDS):
            return await self.supervisor.run()

    async def who_answers(self) -> int:
        """The process id of the worker that a new connection gets to."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        answer = await reader.readline()
        writer.close()
        return int(answer)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers find this package, wherever the tests were started."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def told(logs: list[Any], event: str) -> list[Any]:
    return [entry for entry in logs if entry["event"] == event]


async def test_all_serve_and_end_together(descriptors: ExitStack) -> None:
    with capture_logs() as logs:
        crew = Crew("1=serve,2=serve,3=serve", descriptors)
        assert await crew.run() == 0

    assert sorted(entry["worker"] for entry in told(logs, "worker_ready")) == [1, 2, 3]
    assert not told(logs, "worker_died")
    assert not told(logs, "worker_killed")


@pytest.mark.scenario("operations", "Workers refused")
@pytest.mark.parametrize(
    ("plan", "line"),
    [
        ("1=serve,2=refuse", "There is no database."),
        ("1=crash,2=serve", "worker 1 ended with exit code 3 before it was ready"),
        ("1=refuse,2=refuse", "There is no database."),
    ],
)
async def test_a_worker_that_cannot_begin_ends_all_with_its_reason(
    descriptors: ExitStack, plan: str, line: str
) -> None:
    crew = Crew(plan, descriptors)

    with pytest.raises(WorkerNotStarted) as failure:
        await crew.run()

    assert str(failure.value) == line


async def test_a_program_that_is_not_there_is_said(descriptors: ExitStack) -> None:
    with pytest.raises(WorkerNotStarted, match="no process could be started"):
        await Crew("1=serve", descriptors, program="/no/such/program").run()


@pytest.mark.scenario("operations", "Rest between short lives")
async def test_who_dies_again_rests_and_connections_get_to_the_others_meanwhile(
    descriptors: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "FIRST_PAUSE_SECONDS", 3.0)
    ready = asyncio.Event()
    with capture_logs() as logs:
        crew = Crew("1=serve,2=serve", descriptors, ready.set)
        running = asyncio.ensure_future(crew.run())
        await until(ready.is_set)
        crew.holder(1).kill()
        await until(lambda: len(told(logs, "worker_ready")) == 3)
        crew.holder(1).kill()
        await until(lambda: len(told(logs, "worker_died")) == 2)
        answering = {await crew.who_answers() for _ in range(20)}
        other = crew.holder(2).pid
        await until(lambda: len(told(logs, "worker_ready")) == 4)
        third = crew.holder(1).pid
        seen: set[int] = set()
        while len(seen) < 2:
            seen.add(await crew.who_answers())
        end()
        assert await running == 0

    died = [(entry["worker"], entry["how"], entry["next_in_seconds"]) for entry in told(logs, "worker_died")]
    assert died == [(1, "was ended by SIGKILL", 0.0), (1, "was ended by SIGKILL", 3.0)]
    assert answering == {other}
    assert seen == {other, third}


@pytest.mark.scenario("operations", "A dead worker is replaced")
async def test_a_worker_that_dies_is_replaced_at_once_and_keeps_those_who_wait(descriptors: ExitStack) -> None:
    ready = asyncio.Event()
    crew = Crew("1=serve,2=serve", descriptors, ready.set)
    with capture_logs() as logs:
        running = asyncio.ensure_future(crew.run())
        await until(ready.is_set)
        first = crew.holder(1)
        pid = first.pid
        first.send_signal(signal.SIGSTOP)  # What connects from now on waits at its socket.
        await until(lambda: is_stopped(pid))
        waiting = [asyncio.ensure_future(crew.who_answers()) for _ in range(30)]
        await until(lambda: sum(each.done() for each in waiting) >= 5)
        first.kill()
        answered = set(await asyncio.gather(*waiting))
        end()
        assert await running == 0

    (died,) = told(logs, "worker_died")
    assert died["next_in_seconds"] == 0.0
    assert pid not in answered
    assert len(answered) == 2


@pytest.mark.scenario("operations", "Rest between short lives")
async def test_short_lives_make_the_rests_longer_and_a_broken_storage_ends_all(
    descriptors: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "FIRST_PAUSE_SECONDS", 0.1)
    monkeypatch.setattr(workers, "LONGEST_PAUSE_SECONDS", 0.15)
    monkeypatch.setattr(workers, "BROKEN_LIVES", 4)
    with capture_logs() as logs:
        crew = Crew("1=serve,2=break", descriptors, lambda: None)
        code = await crew.run()

    assert code == EXIT_STORAGE_BROKEN
    assert [entry["next_in_seconds"] for entry in told(logs, "worker_died")] == [0.0, 0.1, 0.15]


@pytest.mark.scenario("operations", "Workers end together")
async def test_a_worker_that_does_not_stop_is_killed(descriptors: ExitStack) -> None:
    with capture_logs() as logs:
        assert await Crew("1=deaf,2=serve", descriptors, patience_seconds=0.5).run() == 0

    assert [entry["worker"] for entry in told(logs, "worker_killed")] == [1]


async def test_a_signal_before_all_are_ready_ends_them(descriptors: ExitStack) -> None:
    crew = Crew("1=serve,2=serve", descriptors)
    running = asyncio.ensure_future(crew.run())
    await until(lambda: crew.supervisor._places[0].process is not None)
    end()

    assert await running == 0


def test_how_a_process_ended_is_said_in_words() -> None:
    assert how_it_ended(3) == "ended with exit code 3"
    assert how_it_ended(-9) == "was ended by SIGKILL"
    assert how_it_ended(-63) == "was ended by signal 63"


def test_the_values_lie_on_a_disk_where_there_is_no_memory_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_MEMORY", Path("/no/such/folder"))

    with values_directory() as values:
        assert values.is_dir()

    assert not values.exists()
