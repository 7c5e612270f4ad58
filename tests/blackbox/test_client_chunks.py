"""The Python client follows every chunk of a reply, and not its text alone."""

import asyncio
from collections.abc import AsyncIterator, Iterator

import httpx2
import pytest

from context_server.client import Chunk, ContextClient, DigestMismatch, ReplyFailed, UnexpectedAnswer
from tests.blackbox.calls import SCRIPTED, Calls, release, script
from tests.blackbox.network import Forward, MeddlingTransport, UnsteadyNetwork, connected, is_pull, rewritten
from tests.server import Server

SEND = {"id": "call-1", "tool": "send_mail", "arguments": {"to": "ann"}}
CALL = {"id": "look-1", "name": "look", "arguments": {}}
RESULT = {"id": "look-1", "status": "ok", "result": "x" * 30_000, "seconds": 0.5}
STEPS = (
    ["data", "step", {"number": 1, "total": 2}],
    ["textual", "reasoning", "Let me see. "],
    ["data", "tool_call", CALL],
    ["data", "tool_result", RESULT],
    ["text", "It is "],
)
KINDS = ["step", "reasoning", "tool_call", "tool_result", "text"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("chunks"), agent=SCRIPTED) as running:
        yield running


async def read_kinds(chunks: AsyncIterator[Chunk], kinds: list[str]) -> None:
    async for chunk in chunks:
        kinds.append(chunk.kind)  # noqa: PERF401  # What came before an error is kept.


@pytest.mark.scenario("python-client", "Every chunk of a reply")
async def test_chunks_of_every_kind_come_in_order_and_whole(server: Server) -> None:
    async with connected(server) as client:
        context = await client.create_context()
        posted = await client.post(context.id, script(*STEPS, ["wait", "chunks"], ["text", "cold."]))
        chunks = []
        async for chunk in client.follow_chunks(context.id, posted.reply_message_id):
            chunks.append(chunk)
            if len(chunks) == len(STEPS):
                release(server, "chunks")
        cut = chunks[3]
        whole = await client.chunk(context.id, posted.reply_message_id, cut.sequence)
        rest = client.follow_chunks(context.id, posted.reply_message_id, from_sequence=4)
        again = [chunk async for chunk in rest]
    assert [chunk.kind for chunk in chunks] == [*KINDS, "text"]
    assert [chunk.sequence for chunk in chunks] == [1, 2, 3, 4, 5, 6]
    assert (chunks[1].text, chunks[2].data) == ("Let me see. ", CALL)
    assert cut.data is not None
    assert cut.data["truncated"] is True
    assert whole.data == RESULT
    assert again == chunks[4:]


@pytest.mark.scenario("python-client", "Every chunk of a reply")
async def test_chunks_of_a_failed_reply_come_before_its_error(server: Server) -> None:
    async with connected(server) as client:
        context = await client.create_context()
        posted = await client.post(context.id, script(*STEPS, ["give_up", "out-of-luck", "It gave up."]))
        kinds: list[str] = []
        with pytest.raises(ReplyFailed) as failed:
            await read_kinds(client.follow_chunks(context.id, posted.reply_message_id), kinds)
        quietly = client.follow_chunks(context.id, posted.reply_message_id, raise_on_failure=False)
        assert [chunk.kind async for chunk in quietly] == kinds == KINDS
    assert failed.value.code == "out-of-luck"


@pytest.mark.scenario("python-client", "A reply that waits for a person")
async def test_a_follow_waits_with_the_reply_for_a_person(server: Server) -> None:
    pulls: list[str] = []
    waiting = asyncio.Event()

    async def note_pulls(request: httpx2.Request, forward: Forward) -> httpx2.Response:
        if is_pull(request):
            pulls.append(str(request.url))
        return await forward(request)

    async def read() -> list[str]:
        kinds = []
        async for chunk in client.follow_chunks(context.id, posted.reply_message_id):
            kinds.append(chunk.kind)
            if chunk.data and "approval" in chunk.data:
                waiting.set()
        return kinds

    async with connected(server, note_pulls) as client:
        context = await client.create_context()
        posted = await client.post(context.id, script(["text", "a"], ["approve", SEND], ["text", "b"]))
        reading = asyncio.create_task(read())
        await waiting.wait()
        Calls(server).settled(context.id, "awaiting_approval")
        before = len(pulls)
        for title in ("one", "two", "three"):  # Signals that bring nothing must not make it pull.
            await client.execute("/mode", "plan" if title == "two" else "act", context_id=context.id)
        assert len(pulls) <= before + 1
        assert not reading.done()
        (approval,) = await client.approvals(context.id)
        await client.approve(context.id, approval.id)
        assert await reading == ["text", "tool_call", "tool_result", "text"]


@pytest.mark.scenario("python-client", "Every chunk of a reply")
async def test_a_bad_network_costs_no_chunk(server: Server) -> None:
    steps = []
    for number in range(30):
        steps += [["textual", "reasoning", f"{number} "], ["data", "step", {"number": number}], ["words", 3, 0.04]]
    async with (
        connected(server) as direct,
        UnsteadyNetwork(server.port, seed=5) as network,
        httpx2.AsyncClient(trust_env=False) as http,
        ContextClient(network.url, http=http, request_seconds=0.3, silence_seconds=0.3, poll_seconds=0.3) as client,
    ):
        context = await direct.create_context()
        posted = await direct.post(context.id, script(*steps))
        chunks = [chunk async for chunk in client.follow_chunks(context.id, posted.reply_message_id)]
        message = await direct.get_message(context.id, posted.reply_message_id)
    assert [chunk.sequence for chunk in chunks] == list(range(1, (message.final_sequence or 0) + 1))
    assert "".join(chunk.text or "" for chunk in chunks if chunk.kind == "text") == message.content
    assert [chunk.data["number"] for chunk in chunks if chunk.data] == list(range(30))


@pytest.mark.scenario("python-client", "Chunks that are not what was written")
@pytest.mark.parametrize(
    ("change", "error"), [("text", DigestMismatch), ("missing", UnexpectedAnswer), ("sequence", UnexpectedAnswer)]
)
async def test_chunks_that_are_not_what_was_written_are_an_error(
    server: Server, change: str, error: type[Exception]
) -> None:
    async def tamper(request: httpx2.Request, forward: Forward) -> httpx2.Response:
        response = await forward(request)
        if not is_pull(request):
            return response
        await response.aread()
        chunks = response.json()["chunks"]
        match change:
            case "text":
                chunks = [each | ({"text": "other"} if "text" in each else {}) for each in chunks]
            case "missing":
                chunks = chunks[:-1]
            case _:
                chunks = [each | {"sequence": each["sequence"] + 1} for each in chunks]
        return rewritten(response, chunks=chunks)

    async with (
        httpx2.AsyncClient(transport=MeddlingTransport(tamper), trust_env=False) as http,
        connected(server) as direct,
        ContextClient(server.url, http=http, give_up_seconds=0.1) as client,
    ):
        context = await direct.create_context()
        posted = await direct.post(context.id, script(*STEPS))
        assert [chunk async for chunk in direct.follow_chunks(context.id, posted.reply_message_id)]
        with pytest.raises(error):
            [chunk async for chunk in client.follow_chunks(context.id, posted.reply_message_id)]
