"""Several processes on one port: any of them serves, their metrics are one, and one that dies is replaced."""

import asyncio
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.blackbox.crew import (
    alive,
    ask,
    complete,
    connections,
    crew,
    gone,
    kill,
    sample,
    subscribed,
    taken_again,
    told,
    values_of,
)
from tests.blackbox.test_command_line import run, the_line
from tests.chaos import launch, wire
from tests.chaos.agents import script_of
from tests.server import Server

WORKERS = 3
CONNECTIONS = 100


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with crew(tmp_path_factory.mktemp("crew"), WORKERS) as running:
        yield running


@pytest.mark.scenario("operations", "Workers share a port")
async def test_connections_are_dealt_out_evenly(server: Server) -> None:
    await complete(server)
    async with AsyncExitStack() as stack:
        held = [await stack.enter_async_context(wire.connected(server.port)) for _ in range(CONNECTIONS)]
        answers = await asyncio.gather(*(ask(connection, "GET", "/readyz") for connection in held))

    dealt = Counter(answer.json["worker"] for answer in answers)
    assert set(dealt) == {1, 2, 3}
    # Five standard deviations below a third: what chance alone does not do.
    assert min(dealt.values()) >= 10, dealt


@pytest.mark.scenario("operations", "Workers share a port")
async def test_a_conversation_goes_through_any_of_them(server: Server) -> None:
    await complete(server)
    async with asyncio.timeout(60), connections(server, 1, 2, 3) as (poster, listener, reader):
        context_id = (await ask(poster, "POST", "/contexts", {})).json["id"]
        stream = await subscribed(listener, f"/contexts/{context_id}/stream")
        prompt = "words=60 rate=100 seed=4"
        posted = await ask(poster, "POST", f"/contexts/{context_id}/messages", wire.message(prompt))
        reply = posted.json["reply_message_id"]
        signalled = await stream.until("content_delta")
        done = await stream.until("message_completed")
        target = f"/contexts/{context_id}/messages/{reply}/content"
        pulled = [(await ask(connection, "GET", target)).json for connection in (poster, reader)]

    assert signalled.data["message_id"] == done.data["message_id"] == reply
    assert {page["content"] for page in pulled} == {"".join(script_of(prompt))}
    assert {page["final_sequence"] for page in pulled} == {done.data["final_sequence"]}
    assert len(told(server, "serving")) == 1


@pytest.mark.scenario("operations", "Workers refused")
async def test_a_second_server_does_not_get_the_port(server: Server) -> None:
    await complete(server)
    arguments = ("--workers", "2", "--port", str(server.port), "--database", server.database_url)

    assert str(server.port) in the_line(run(server.directory, "serve", *arguments))
    assert (await wire.call(server.port, "GET", "/healthz")).status == 200


@pytest.mark.scenario("operations", "One page of metrics")
async def test_every_worker_shows_the_metrics_of_all(server: Server) -> None:
    await complete(server)
    name = 'problems_total{code="context-not-found"}'
    async with connections(server, 1, 2, 3) as asked, connections(server, 1, 2, 3) as streaming:
        before = [await sample(connection, name) for connection in asked]
        open_before = await sample(asked[0], "open_streams")
        for times, connection in enumerate(asked, start=1):
            for _ in range(times):
                await ask(connection, "GET", "/contexts/unknown")
        context_id = await wire.new_context(server.port)
        for connection in streaming:
            await subscribed(connection, f"/contexts/{context_id}/stream")
        after = [await sample(connection, name) for connection in asked]
        streams = [await sample(connection, "open_streams") for connection in asked]

    assert len(set(before)) == 1
    assert after == [before[0] + 1 + 2 + 3] * WORKERS
    assert streams == [open_before + WORKERS] * WORKERS


@pytest.mark.scenario("operations", "A dead worker is replaced")
async def test_a_killed_worker_is_replaced_and_nobody_else_is_harmed(server: Server) -> None:
    pids = await complete(server)
    context_id = await wire.new_context(server.port)
    async with connections(server, 1, 2, 3) as streaming, connections(server, 2, 3) as (poster, asked):
        streams = [await subscribed(connection, f"/contexts/{context_id}/stream") for connection in streaming]
        await ask(asked, "GET", "/contexts/unknown")
        counted = await sample(asked, 'problems_total{code="context-not-found"}')
        opened = await sample(asked, "open_streams")

        kill(pids[1])
        await gone(pids[1])
        answers = [await wire.call(server.port, "GET", "/healthz") for _ in range(30)]
        successor = await taken_again(server, 1, lives=2)
        receipt = (await ask(poster, "POST", f"/contexts/{context_id}/messages", wire.message("words=20 seed=5"))).json
        async with asyncio.timeout(60):
            ends = [await stream.until("message_completed") for stream in streams[1:]]
        with pytest.raises(wire.BROKEN):
            await streams[0].until("message_completed")
        async with connections(server, 1) as (again,):
            recounted = await sample(again, 'problems_total{code="context-not-found"}')

        async def forgotten() -> bool:
            return await sample(asked, "open_streams") == opened - 1

        await wire.until(forgotten)

    (died,) = told(server, "worker_died")
    assert (died["worker"], died["how"]) == (1, "was ended by SIGKILL")
    assert successor != pids[1]
    assert alive(pids[2])
    assert alive(pids[3])
    assert {answer.status for answer in answers} == {200}
    assert {end.data["message_id"] for end in ends} == {receipt["reply_message_id"]}
    assert recounted == counted


async def test_without_a_successor_a_place_stays_empty_and_without_a_watch_workers_outlive_their_supervisor(
    tmp_path: Path,
) -> None:
    """The controls: what the tests of replacing and of ending together look for is not there by itself."""
    command = launch.command("--defect", "no-successor", "--defect", "orphans")
    with crew(tmp_path, 2, *command) as server:
        pids = await complete(server)
        values = values_of(pids[1])
        try:
            kill(pids[1])
            await gone(pids[1])
            with pytest.raises(TimeoutError):
                await taken_again(server, 1, lives=2, seconds=3)
            server.kill()
            with pytest.raises(TimeoutError):
                await gone(pids[2], seconds=3)
        finally:
            kill(pids[2])
            shutil.rmtree(values)
