"""The Python client and a real server, when all goes well and when somebody changes their mind."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import httpx2
import pytest

from context_server.client import (
    ContextClient,
    NotAllowedError,
    NotFoundError,
    ReplyCancelled,
    ReplyFailed,
    Signal,
)
from tests.blackbox.calls import release, script
from tests.blackbox.network import (
    Forward,
    connected,
    is_pull,
    numbers,
    read,
)
from tests.server import Server


@pytest.mark.scenario("resume", "Python client follows a reply")
async def test_a_reply_comes_in_parts_and_whole(scripted: Server) -> None:
    steps = script(["text", "a"], ["wait", "read-1"], ["text", "b"], ["wait", "read-2"], ["text", "c"])
    parts = []
    async with connected(scripted) as client:
        context = await client.create_context(title="Words", metadata={"for": "a test"})
        async for text in client.reply(context.id, steps):
            parts.append(text)
            release(scripted, f"read-{len(parts)}")
        said, replied = await client.list_messages(context.id)
    assert (context.title, context.metadata, context.state) == ("Words", {"for": "a test"}, "idle")
    assert parts == ["a", "b", "c"]
    assert (said.role, said.content) == ("user", steps)
    assert (replied.role, replied.status, replied.content) == ("assistant", "completed", "abc")


@pytest.mark.scenario("resume", "Python client follows a reply")
async def test_a_failed_reply_and_a_refused_command_raise_typed_errors(tmp_path: Path) -> None:
    parts: list[str] = []
    with Server(tmp_path, agent="demo") as server:
        async with connected(server) as client:
            context = await client.create_context()
            with pytest.raises(ReplyFailed) as failed:
                await read(client.reply(context.id, "please fail"), parts)
            quietly = client.follow(context.id, failed.value.message_id, raise_on_failure=False)
            again = [text async for text in quietly]
            await client.post(context.id, "give me a long answer")
            with pytest.raises(NotAllowedError) as refused:
                await client.post(context.id, "too early")
            with pytest.raises(NotFoundError) as missing:
                await client.get_message(context.id, "none")
    assert failed.value.code == "agent-error"
    assert "".join(parts) == "".join(again) != ""
    assert (refused.value.code, refused.value.allowed_commands) == ("command-not-allowed", ("cancel",))
    assert refused.value.state in ("queued", "thinking", "calling_tool", "streaming")
    assert missing.value.code == "message-not-found"


async def test_cancel_ends_the_reply_with_what_was_written(metronome: Server) -> None:
    parts: list[str] = []
    async with connected(metronome) as client:
        context = await client.create_context()
        with pytest.raises(ReplyCancelled) as cancelled:
            await read(client.reply(context.id, "rate=100 seconds=60"), parts, {5: lambda: client.cancel(context.id)})
        message = await client.get_message(context.id, cancelled.value.message_id)
    assert message.content == "".join(parts)
    assert message.sequence == cancelled.value.sequence


@pytest.mark.scenario("resume", "Client without signals")
async def test_without_signals_it_polls_and_is_as_exact(scripted: Server) -> None:
    steps = script(["text", "0 "], ["wait", "polled"], ["words", 19, 0.4])
    pulls = []

    async def no_streams(request: httpx2.Request, forward: Forward) -> httpx2.Response:
        if request.url.path.endswith("/stream"):
            return httpx2.Response(503, json={"code": "too-many-streams", "status": 503, "detail": "No room."})
        if is_pull(request):
            pulls.append(request.url.params.get("wait"))
            if pulls[-1] is not None:
                release(scripted, "polled")
        return await forward(request)

    async with connected(scripted, no_streams) as client:
        context = await client.create_context()
        posted = await client.post(context.id, steps)
        pages = [page async for page in client.pages(context.id, posted.reply_message_id)]
    text = "".join(page.content for page in pages)
    assert numbers(text) == [0, *range(19)]
    assert pages[-1].digest == hashlib.sha256(text.encode()).hexdigest()
    assert pages[-1].sequence == pages[-1].final_sequence
    assert pulls[0] is None
    assert "20" in pulls
    assert len(pulls) <= 25


async def test_anything_is_resumed_by_sequence(scripted: Server) -> None:
    async with connected(scripted) as client:
        context = await client.create_context()
        posted = await client.post(context.id, script(["words", 20, 0.1], ["wait", "left"], ["words", 20, 0.1]))
        first = client.pages(context.id, posted.reply_message_id)
        page = await anext(first)
        await first.aclose()
        release(scripted, "left")
        rest = [
            text
            async for text in client.follow(
                context.id, posted.reply_message_id, from_sequence=page.sequence, epoch=page.epoch
            )
        ]
    assert page.status == "streaming"
    assert numbers(page.content + "".join(rest)) == [*range(20), *range(20)]


async def test_a_deleted_context_ends_what_follows_it(metronome: Server) -> None:
    async with connected(metronome) as client:
        context = await client.create_context()
        texts = client.reply(context.id, "rate=50 seconds=60")
        with pytest.raises(NotFoundError):
            await read(texts, [], {3: lambda: client.delete_context(context.id)})


@pytest.mark.parametrize("leave", ["break", "aclose", "cancel"])
async def test_a_reader_that_leaves_leaves_nothing_behind(metronome: Server, leave: str) -> None:
    before = asyncio.all_tasks()
    open_responses = 0

    class Watched(httpx2.AsyncByteStream):
        def __init__(self, stream: httpx2.AsyncByteStream) -> None:
            self.stream = stream

        async def __aiter__(self) -> AsyncIterator[bytes]:
            async for data in self.stream:
                yield data

        async def aclose(self) -> None:
            nonlocal open_responses
            open_responses -= 1
            await self.stream.aclose()

    async def watch(request: httpx2.Request, forward: Forward) -> httpx2.Response:
        nonlocal open_responses
        response = await forward(request)
        open_responses += 1
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = Watched(response.stream)
        return response

    async def read() -> None:
        texts = client.reply(context.id, "rate=50 seconds=60")
        async for _ in texts:
            if leave == "cancel":
                begun.set()
                await asyncio.Event().wait()
            if leave == "aclose":
                await texts.aclose()
            break

    async with connected(metronome, watch) as client:
        context = await client.create_context()
        begun = asyncio.Event()
        reading = asyncio.create_task(read())
        if leave == "cancel":
            await begun.wait()
            reading.cancel()
        await asyncio.wait({reading})
        assert reading.cancelled() == (leave == "cancel")
        assert (await client.get_context(context.id)).state in ("thinking", "streaming")
    left = asyncio.all_tasks() - before
    if left:  # The event loop's own closing of an iteration that was left by break.
        await asyncio.wait(left, timeout=60)
    assert asyncio.all_tasks() <= before
    assert open_responses == 0


async def test_lists_are_read_to_their_end(metronome: Server) -> None:
    async def small_pages(request: httpx2.Request, forward: Forward) -> httpx2.Response:
        if request.url.params.get("limit"):
            request.url = request.url.copy_set_param("limit", "2")
        return await forward(request)

    async with connected(metronome, small_pages) as client:
        context = await client.create_context()
        for _ in range(3):
            assert numbers("".join([text async for text in client.reply(context.id, "rate=0 words=2")])) == [0, 1]
        messages = await client.list_messages(context.id)
    assert [message.role for message in messages] == ["user", "assistant"] * 3
    assert all(message.content for message in messages)


async def test_what_a_listener_raises_reaches_the_reader(metronome: Server) -> None:
    def raise_it(signal: Signal) -> None:
        raise LookupError(signal.type)

    async with connected(metronome) as client:
        context = await client.create_context()
        with pytest.raises(LookupError, match="state_changed"):
            async for _ in client.reply(context.id, "rate=50 seconds=60", on_signal=raise_it):
                pass


def test_an_address_without_scheme_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="http://127"):
        ContextClient("localhost:8000")
