"""What holds after a crash of the server, and how the simplest clients follow a reply all the same."""

import asyncio
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import wire
from tests.chaos.agents import script_of
from tests.databases import KINDS
from tests.server import Server

DATABASES = KINDS


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """One reply at a time, so that a second one is queued; a cancelled agent may take its time."""
    with Server(tmp_path, agent="tests.chaos.agents:scripted", max_active_runs=1, cancel_grace_seconds=60) as running:
        yield running


@pytest.fixture(scope="module")
def steady(database_kind: str | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that nobody kills."""
    with Server(tmp_path_factory.mktemp("steady"), agent="tests.chaos.agents:scripted") as running:
        yield running
        assert "error" not in running.log.read_text()


async def message_of(server: Server, receipt: dict[str, Any]) -> dict[str, Any]:
    """A reply as the server shows it."""
    target = f"/contexts/{receipt['context_id']}/messages/{receipt['reply_message_id']}"
    found: dict[str, Any] = (await wire.call(server.port, "GET", target)).json
    return found


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.scenario("resume", "Kill in mid-reply")
async def test_a_reply_that_a_crash_cut_is_failed_and_kept(server: Server) -> None:
    context_id = await wire.new_context(server.port)
    prompt = "words=1000 rate=200 seed=4"
    async with wire.stream(server.port, f"/contexts/{context_id}/stream") as signals:
        receipt = await wire.post(server.port, context_id, prompt)
        signalled = 0
        while signalled < 10:
            signalled = (await signals.until("content_delta")).data["current_sequence"]
        seen = await wire.pull(server.port, context_id, receipt["reply_message_id"])

    server.kill()
    server.start()

    await wire.reached(server.port, context_id, "failed")
    reply = await message_of(server, receipt)
    assert (reply["status"], reply["error"]["code"]) == ("failed", "interrupted")
    assert reply["final_sequence"] >= max(signalled, seen["sequence"])
    assert reply["content"].startswith(seen["content"])
    assert "".join(script_of(prompt)).startswith(reply["content"])
    assert reply["digest"] == digest_of(reply["content"])
    again = await wire.pull(server.port, context_id, receipt["reply_message_id"])
    assert again["content"] == reply["content"]
    next_reply = await wire.follow(server.port, await wire.post(server.port, context_id, "words=2 seed=5"))
    assert (next_reply["content"], next_reply["status"]) == ("5.0 5.1 ", "completed")


@pytest.mark.scenario("resume", "Kill while queued")
async def test_a_queued_run_survives_a_crash(server: Server) -> None:
    first, second = await wire.new_context(server.port), await wire.new_context(server.port)
    running = await wire.post(server.port, first, "words=1 hold")
    await wire.follow(server.port, running, until=1)
    queued = await wire.post(server.port, second, "words=3 seed=6")
    assert await wire.state_of(server.port, second) == "queued"

    server.kill()
    server.start()

    reply = await wire.follow(server.port, queued)
    assert (reply["content"], reply["status"]) == ("6.0 6.1 6.2 ", "completed")
    assert (await message_of(server, queued))["run_id"] == queued["run_id"]
    await wire.reached(server.port, first, "failed")  # Where runs have leases, once the dead one's is over.
    assert (await message_of(server, running))["error"]["code"] == "interrupted"


@pytest.mark.scenario("resume", "Kill while cancelling")
async def test_a_cancellation_survives_a_crash(server: Server) -> None:
    context_id = await wire.new_context(server.port)
    receipt = await wire.post(server.port, context_id, "words=3 seed=7 stubborn")
    seen = await wire.follow(server.port, receipt, until=1)
    await wire.call(server.port, "POST", f"/contexts/{context_id}/cancel")
    assert await wire.state_of(server.port, context_id) == "cancelling"

    server.kill()
    server.start()

    await wire.reached(server.port, context_id, "idle")
    reply = await message_of(server, receipt)
    assert (reply["status"], reply["error"]) == ("cancelled", None)
    assert reply["content"].startswith(seen["content"])
    assert reply["digest"] == digest_of(reply["content"])


async def epochs_of(server: Server, context_id: str, message_id: str) -> set[str]:
    """Every epoch that a client meets: in a context, a pull and a signal."""
    async with wire.stream(server.port, f"/contexts/{context_id}/stream") as signals:
        signalled = (await signals.next()).data["epoch"]
    context = (await wire.call(server.port, "GET", f"/contexts/{context_id}")).json["epoch"]
    return {signalled, context, (await wire.pull(server.port, context_id, message_id))["epoch"]}


@pytest.mark.scenario("resume", "Epoch over a restart")
async def test_the_epoch_belongs_to_the_database(server: Server, steady: Server) -> None:
    receipts = []
    for place in (server, steady):
        receipts.append(await wire.post(place.port, await wire.new_context(place.port), "words=1"))
        await wire.follow(place.port, receipts[-1])
    here, there = ((receipt["context_id"], receipt["reply_message_id"]) for receipt in receipts)
    before = await epochs_of(server, *here)

    assert server.stop() == 0
    server.start()

    assert len(before) == 1
    assert await epochs_of(server, *here) == before
    assert not await epochs_of(steady, *there) & before


@pytest.mark.scenario("resume", "Client without signals")
async def test_a_client_may_only_pull(steady: Server) -> None:
    context_id = await wire.new_context(steady.port)
    receipt = await wire.post(steady.port, context_id, "words=60 rate=200 seed=8")

    reply = await wire.follow(steady.port, receipt)

    assert reply["content"] == "".join(script_of("words=60 seed=8"))
    assert reply["digest"] == digest_of(reply["content"])


class Frontend:
    """The documented pattern: signals only move a target, and one pull at a time goes after the latest."""

    def __init__(self, port: int, context_id: str) -> None:
        self.state = "unknown"
        self.text = ""
        self.pulls_in_flight: list[int] = []
        self._port = port
        self._context_id = context_id
        self._reply: str | None = None
        self._sequence = 0
        self._final: int | None = None
        self._wanted = asyncio.Event()
        self._in_flight = 0

    async def listen(self, opened: asyncio.Event) -> None:
        """An ``EventSource``: it looks at each signal and never takes text from one."""
        async with wire.stream(self._port, f"/contexts/{self._context_id}/stream") as signals:
            async for event in signals:
                if event.type == "state_changed":
                    self.state = event.data["new_state"]
                opened.set()
                self._wanted.set()

    async def signalled(self) -> None:
        """Returns at the next signal."""
        self._wanted.clear()
        await self._wanted.wait()

    async def send(self, content: str, answered_after: asyncio.Event | None = None) -> str:
        """The reply; the answer of the POST may be held back until something has happened."""
        receipt = await wire.post(self._port, self._context_id, content)
        if answered_after is not None:
            await answered_after.wait()
        self._reply, self._sequence, self.text, final = receipt["reply_message_id"], 0, "", None
        self._wanted.set()  # Once on entering the state: the signals may all have come before.
        while final is None or self._sequence < final:
            await self._wanted.wait()
            self._wanted.clear()
            final = await self._pull()
        return self.text

    async def _pull(self) -> int | None:
        assert self._reply is not None
        self._in_flight += 1
        self.pulls_in_flight.append(self._in_flight)
        page = await wire.pull(self._port, self._context_id, self._reply, self._sequence)
        self._in_flight -= 1
        self.text += page["content"]
        self._sequence = page["sequence"]
        final: int | None = page["final_sequence"]
        return final


@pytest.mark.scenario("resume", "Frontend with one pull in flight")
async def test_a_simple_frontend_assembles_every_reply(steady: Server) -> None:
    context_id = await wire.new_context(steady.port)
    page, opened, ended = Frontend(steady.port, context_id), asyncio.Event(), asyncio.Event()

    async def watch() -> None:
        async with wire.stream(steady.port, f"/contexts/{context_id}/stream") as signals:
            opened.set()
            await signals.until("message_completed")
            ended.set()

    async with asyncio.TaskGroup() as tasks, asyncio.timeout(60):
        listening = tasks.create_task(page.listen(opened))
        tasks.create_task(watch())
        await opened.wait()
        texts = [await page.send("words=1 seed=1", answered_after=ended)]
        for prompt in ("words=60 rate=300 seed=2", "words=500 seed=3"):
            await wire.reached(steady.port, context_id, "idle")
            texts.append(await page.send(prompt))
        while page.state != "idle":
            await page.signalled()
        listening.cancel()

    assert texts == ["".join(script_of(prompt)) for prompt in ("words=1 seed=1", "words=60 seed=2", "words=500 seed=3")]
    assert set(page.pulls_in_flight) == {1}


@pytest.mark.scenario("runs", "Client disconnects in mid-reply")
async def test_a_client_that_leaves_ends_nothing(steady: Server) -> None:
    context_id = await wire.new_context(steady.port)
    body = wire.message("words=60 rate=200 seed=9")
    request = wire.request_bytes("POST", f"/contexts/{context_id}/messages", body, {"Accept": "text/event-stream"})
    async with wire.connected(steady.port) as (reader, writer):
        writer.write(request)
        status, _ = await wire.read_head(reader)
        await reader.readuntil(b"9.2 ")

    assert status == 200
    await wire.reached(steady.port, context_id, "idle")
    messages = (await wire.call(steady.port, "GET", f"/contexts/{context_id}/messages?include=content")).json["items"]
    assert messages[-1]["content"] == "".join(script_of("words=60 seed=9"))
    assert messages[-1]["status"] == "completed"
