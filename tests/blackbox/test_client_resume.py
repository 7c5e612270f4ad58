"""The Python client, when networks and servers break, and when what comes back is not what was written."""

import asyncio
import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import httpx2
import pytest

from context_server.client import (
    ContextClient,
    DigestMismatch,
    HistoryChanged,
    IncompleteReply,
    NotFoundError,
    ReplyFailed,
    ServerUnreachable,
    Signal,
    UnavailableError,
    UnexpectedAnswer,
)
from tests.blackbox.calls import release, script
from tests.blackbox.network import (
    Forward,
    MeddlingTransport,
    UnsteadyNetwork,
    connected,
    is_post,
    is_pull,
    numbers,
    read,
    rewritten,
)
from tests.ports import free_port
from tests.server import Server


@pytest.mark.scenario("resume", "Python client through broken connections")
async def test_a_bad_network_costs_no_character(metronome: Server) -> None:
    at_once, most_at_once = 0, 0

    async def count_pulls(request: httpx2.Request, forward: Forward) -> httpx2.Response:
        nonlocal at_once, most_at_once
        if not is_pull(request):
            return await forward(request)
        at_once += 1
        most_at_once = max(most_at_once, at_once)
        try:
            response = await forward(request)
            await response.aread()
            return response
        finally:
            at_once -= 1

    async with (
        connected(metronome) as direct,
        UnsteadyNetwork(metronome.port, seed=7) as network,
        httpx2.AsyncClient(transport=MeddlingTransport(count_pulls), trust_env=False) as http,
        ContextClient(network.url, http=http, request_seconds=0.3, silence_seconds=0.3, poll_seconds=0.3) as client,
    ):
        context = await direct.create_context()
        text = "".join([text async for text in client.reply(context.id, "rate=100 seconds=2")])
        messages = await direct.list_messages(context.id)
    assert sum(network.fates.values()) >= 3
    assert numbers(text) == list(range(200))
    assert [message.content for message in messages] == ["rate=100 seconds=2", text]
    assert most_at_once == 1


async def test_a_post_whose_answer_is_lost_is_posted_once(metronome: Server) -> None:
    lost: list[bytes] = []

    async def lose_the_first_answer(request: httpx2.Request, forward: Forward) -> httpx2.Response:
        response = await forward(request)
        if is_post(request) and not lost:
            lost.append(await response.aread())
            raise httpx2.ReadError("lost", request=request)
        return response

    async with connected(metronome, lose_the_first_answer) as client:
        context = await client.create_context()
        posted = await client.post(context.id, "rate=0 words=1", client_metadata={"n": 1})
        messages = await client.list_messages(context.id, include_content=False)
    assert json.loads(lost[0])["message_id"] == posted.message_id
    assert [message.id for message in messages] == [posted.message_id, posted.reply_message_id]
    assert messages[0].client_metadata == {"n": 1}


@pytest.mark.parametrize(
    ("status", "headers", "attempts"), [(503, {"Retry-After": "0"}, 3), (507, {"Retry-After": "0"}, 3), (507, {}, 1)]
)
async def test_an_unable_server_is_asked_again_when_it_says_so(
    metronome: Server, status: int, headers: dict[str, str], attempts: int
) -> None:
    keys = []

    async def refuse_twice(request: httpx2.Request, forward: Forward) -> httpx2.Response:
        if not is_post(request):
            return await forward(request)
        keys.append(request.headers["Idempotency-Key"])
        return await forward(request) if len(keys) == 3 else httpx2.Response(status, headers=headers)

    async with connected(metronome, refuse_twice) as client:
        context = await client.create_context()
        with contextlib.ExitStack() as stack:
            if attempts == 1:
                stack.enter_context(pytest.raises(UnavailableError, match="http-507"))
            await client.post(context.id, "rate=0 words=1")
    assert len(keys) == attempts
    assert len(set(keys)) == 1


@pytest.mark.scenario("resume", "Python client proves completeness")
async def test_the_end_is_what_is_held_and_not_what_is_signalled(scripted: Server) -> None:
    told_of_end = asyncio.Event()

    def note(signal: Signal) -> None:
        if signal.type == "message_completed":
            told_of_end.set()

    async def answer_after_the_end(request: httpx2.Request, forward: Forward) -> httpx2.Response:
        response = await forward(request)
        if is_pull(request):
            await response.aread()
            if response.json()["sequence"]:
                release(scripted, "answered")
                await told_of_end.wait()
        return response

    steps = script(["text", "before the end, "], ["wait", "answered"], ["text", "and the rest"])
    async with connected(scripted, answer_after_the_end) as client:
        context = await client.create_context()
        parts = [text async for text in client.reply(context.id, steps, on_signal=note)]
    assert parts == ["before the end, ", "and the rest"]


@pytest.mark.scenario("resume", "Python client proves completeness")
@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"content": "something else "}, DigestMismatch),
        ({"final_sequence": 10_000}, IncompleteReply),
        ({"sequence": "many"}, UnexpectedAnswer),
    ],
)
async def test_what_is_not_what_was_written_is_an_error(
    metronome: Server, changes: dict[str, Any], error: type[Exception]
) -> None:
    async def tamper_with_the_end(request: httpx2.Request, forward: Forward) -> httpx2.Response:
        response = await forward(request)
        if is_pull(request):
            await response.aread()
            if response.json()["final_sequence"] is not None:
                return rewritten(response, **changes)
        return response

    async with connected(metronome) as direct, connected(metronome, tamper_with_the_end) as client:
        context = await direct.create_context()
        posted = await direct.post(context.id, "rate=0 words=3")
        assert len([text async for text in direct.follow(context.id, posted.reply_message_id)]) >= 1
        with pytest.raises(error):
            async for _ in client.follow(context.id, posted.reply_message_id):
                pass


@pytest.mark.scenario("resume", "Python client and another history")
async def test_another_epoch_in_the_middle_of_a_reply(metronome: Server) -> None:
    async def change_epoch(request: httpx2.Request, forward: Forward) -> httpx2.Response:
        response = await forward(request)
        if is_pull(request):
            await response.aread()
            return rewritten(response, epoch="another") if response.json()["from_sequence"] else response
        return response

    async with connected(metronome, change_epoch) as client:
        context = await client.create_context()
        with pytest.raises(HistoryChanged, match="epoch"):
            async for _ in client.reply(context.id, "rate=50 seconds=60"):
                pass


@pytest.mark.scenario("resume", "Python client and another history")
async def test_a_backup_that_lacks_what_is_held(server: Server, tmp_path: Path) -> None:
    backup = tmp_path / "backup.db"

    def restore() -> None:
        server.kill()
        for left in tmp_path.glob("context-server.db-*"):
            left.unlink()
        backup.replace(server.database)
        server.start()

    parts: list[str] = []
    async with connected(server) as client:
        context = await client.create_context()
        texts = client.reply(context.id, "rate=50 seconds=60")
        with pytest.raises(HistoryChanged, match="from sequence 0") as changed:
            await read(texts, parts, {3: lambda: back_up(server.database, backup), 10: restore})
        again = client.follow(context.id, changed.value.message_id, raise_on_failure=False)
        restored = "".join([text async for text in again])
    assert "".join(parts).startswith(restored)
    assert 0 < len(restored) < len("".join(parts))


def back_up(database: Path, target: Path) -> None:
    with contextlib.closing(sqlite3.connect(database)) as source, contextlib.closing(sqlite3.connect(target)) as copy:
        source.backup(copy)


async def test_a_killed_server_comes_back_and_the_client_by_itself(server: Server) -> None:
    parts: list[str] = []
    connections: list[bool] = []

    def restart() -> None:
        server.kill()
        server.start()

    async with connected(server) as client:
        context = await client.create_context()
        texts = client.reply(context.id, "rate=100 seconds=60", on_connection=connections.append)
        with pytest.raises(ReplyFailed) as failed:
            await read(texts, parts, {10: restart})
        after = await client.get_context(context.id)
        kept = await client.get_message(context.id, failed.value.message_id)
    text = "".join(parts)
    assert failed.value.code == "interrupted"
    assert text == kept.content
    assert numbers(text) == list(range(len(numbers(text))))
    assert (after.state, connections[:2]) == ("failed", [True, False])


async def test_a_server_that_stays_away_is_given_up(server: Server) -> None:
    async with connected(server, give_up_seconds=0.3, retry_seconds=0.3) as client:
        context = await client.create_context()
        texts = client.reply(context.id, "rate=100 seconds=60")
        assert await anext(texts)
        server.kill()
        with pytest.raises(ServerUnreachable):
            async for _ in texts:
                pass
        with pytest.raises(ServerUnreachable):
            await client.get_context(context.id)
    async with ContextClient(f"http://127.0.0.1:{free_port()}", retry_seconds=0) as nowhere:
        with pytest.raises(ServerUnreachable):
            await nowhere.create_context()


async def test_signals_go_on_after_a_restart_until_the_context_is_deleted(server: Server) -> None:
    seen: list[str | None] = []
    connections: list[bool] = []
    async with connected(server) as client:
        context = await client.create_context()
        await client.post(context.id, "rate=50 seconds=60")
        async for signal in client.signals(context.id, on_connection=connections.append):
            if signal.type == "content_delta" and "content_delta" not in seen:
                server.kill()
                server.start()
            if signal.type == "message_completed":
                await client.delete_context(context.id)
            seen.append(signal.type)
        with pytest.raises(NotFoundError):
            await anext(client.signals(context.id))
    assert seen[0] == "state_changed"
    assert "message_completed" in seen
    assert seen[-1] == "context_deleted"
    assert connections == [True, False, True]
