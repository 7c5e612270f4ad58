"""What the Python client can ask a server besides a reply: approvals, branches, what waits, files, commands."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx2
import pytest

from context_server.client import (
    ApprovalDecidedError,
    CommandCarriedOut,
    ContextClient,
    NotAllowedError,
    NotEditableError,
    NotFoundError,
    ProblemError,
    QueueFullError,
    ReplyCancelled,
    WorkflowCall,
)
from tests.blackbox.calls import SCRIPTED, Calls, release, script
from tests.blackbox.network import Forward, connected
from tests.server import Server

SEND = {"id": "call-1", "tool": "send_mail", "arguments": {"to": "ann"}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = {"max_waiting_messages": 2, "models": "openai-chat:small"}
    with Server(tmp_path_factory.mktemp("client"), agent=SCRIPTED, **settings) as running:
        yield running


@pytest.fixture
async def client(server: Server) -> AsyncIterator[ContextClient]:
    async with connected(server) as connection:
        yield connection


async def say(client: ContextClient, context_id: str, text: str, **options: object) -> str:
    """Posts, and waits for the reply's end: its text."""
    return "".join([piece async for piece in client.reply(context_id, script(["text", text]), **options)])


async def asked(client: ContextClient, server: Server, *, editable: bool = False) -> tuple[str, str]:
    """A context in which a call waits: its id, and the approval's."""
    context = await client.create_context()
    await client.post(context.id, script(["approve", {**SEND, "editable": editable}], ["text", "done"]))
    Calls(server).settled(context.id, "awaiting_approval")
    (approval,) = await client.approvals(context.id)
    return context.id, approval.id


@pytest.mark.scenario("python-client", "A decision by the Python client")
async def test_a_call_is_approved_with_other_arguments(client: ContextClient, server: Server) -> None:
    context_id, approval_id = await asked(client, server, editable=True)
    (pending,) = await client.approvals(context_id)
    assert (pending.tool, pending.arguments, pending.editable) == ("send_mail", {"to": "ann"}, True)
    decided = await client.approve(context_id, approval_id, arguments={"to": "bob"}, note="he is back")
    assert (decided.status, decided.edited_arguments, decided.note) == ("approved", {"to": "bob"}, "he is back")
    assert await client.approvals(context_id) == []
    assert [each.status for each in await client.approvals(context_id, include_decided=True)] == ["approved"]


@pytest.mark.scenario("python-client", "A decision by the Python client")
async def test_another_decision_is_told_what_stands(client: ContextClient, server: Server) -> None:
    context_id, approval_id = await asked(client, server)
    with pytest.raises(NotEditableError):
        await client.approve(context_id, approval_id, arguments={"to": "eve"})
    await client.deny(context_id, approval_id, note="not now")
    assert (await client.deny(context_id, approval_id)).status == "denied"
    with pytest.raises(ApprovalDecidedError) as refused:
        await client.approve(context_id, approval_id)
    assert refused.value.approval is not None
    assert (refused.value.approval.status, refused.value.approval.note) == ("denied", "not now")
    with pytest.raises(NotFoundError, match="approval-not-found"):
        await client.approve(context_id, "none")


async def test_a_decision_whose_answer_is_lost_is_one_decision(server: Server) -> None:
    lost = []

    async def lose_the_first(request: httpx2.Request, forward: Forward) -> httpx2.Response:
        response = await forward(request)
        if "/approvals/" in request.url.path and not lost:
            lost.append(await response.aread())
            raise httpx2.ReadError("lost", request=request)
        return response

    async with connected(server, lose_the_first) as client:
        context_id, approval_id = await asked(client, server)
        assert (await client.approve(context_id, approval_id)).status == "approved"
    assert len(lost) == 1


@pytest.mark.scenario("python-client", "Branches by the Python client")
async def test_messages_are_edited_regenerated_moved_between_and_forked(client: ContextClient) -> None:
    context = await client.create_context()
    await say(client, context.id, "one")
    await say(client, context.id, "ONE", parent_id=None)
    line = await client.list_messages(context.id)
    first_id, edited_id = line[0].siblings
    assert (line[0].id, line[0].parent_id, line[1].content) == (edited_id, None, "ONE")
    again = await client.regenerate(context.id, line[1].id)
    assert "".join([piece async for piece in client.follow(context.id, again.reply_message_id)]) == "ONE"
    tree = await client.list_messages(context.id, tree=True)
    assert len(tree) == 5
    first_reply = next(message.id for message in tree if message.parent_id == first_id)
    moved = await client.move_head(context.id, first_reply)
    assert moved.head_message_id == first_reply
    assert [message.content for message in await client.list_messages(context.id)][1] == "one"
    fork = await client.fork(context.id, first_reply, title="another")
    assert (fork.title, len(await client.list_messages(fork.id))) == ("another", 2)
    assert (await client.move_head(context.id, None)).head_message_id is None
    assert await client.list_messages(context.id) == []


@pytest.mark.scenario("python-client", "What waits, by the Python client")
async def test_messages_wait_and_are_taken_back(client: ContextClient, server: Server) -> None:
    context = await client.create_context()
    running = await client.post(context.id, script(["text", "a"], ["wait", "client-queue"], ["text", "b"]))
    with pytest.raises(NotAllowedError):
        await client.post(context.id, "x")
    first = await client.post(context.id, script(["text", "first"]), if_busy="queue")
    second = await client.post(context.id, script(["text", "second"]), if_busy="queue")
    assert first.disposition == "queue"
    with pytest.raises(QueueFullError):
        await client.post(context.id, "x", if_busy="queue")
    waiting = await client.queue(context.id)
    assert [each.message_id for each in waiting] == [first.message_id, second.message_id]
    assert waiting[0].payload["content"] == script(["text", "first"])
    await client.take_back(context.id, first.message_id)
    with pytest.raises(NotFoundError):
        await client.take_back(context.id, first.message_id)
    followed = client.follow(context.id, second.reply_message_id)  # It is not there yet, and is waited for.
    release(server, "client-queue")
    assert "".join([piece async for piece in followed]) == "second"
    assert (await client.get_message(context.id, running.reply_message_id)).content == "ab"


@pytest.mark.scenario("python-client", "What waits, by the Python client")
async def test_a_message_interrupts(client: ContextClient) -> None:
    context = await client.create_context()
    running = await client.post(context.id, script(["text", "a"], ["wait", "never"]))
    assert await say(client, context.id, "now", if_busy="interrupt") == "now"
    with pytest.raises(ReplyCancelled):
        [piece async for piece in client.follow(context.id, running.reply_message_id)]


@pytest.mark.scenario("python-client", "Files by the Python client")
async def test_files_go_there_and_back(client: ContextClient, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(b"rain")
    file = await client.upload(path)
    assert (file.name, file.media_type, file.size_bytes) == ("notes.txt", "text/plain", 4)
    assert await client.download(file.id) == b"rain"
    named = await client.upload(b"\x89PNG", name="a.png", media_type="image/png")
    context = await client.create_context()
    posted = await client.post(context.id, script(["text", "seen"]), files=[file.id, named.id])
    message = await client.get_message(context.id, posted.message_id)
    assert message.payload is not None
    assert [each["name"] for each in message.payload["files"]] == ["notes.txt", "a.png"]
    await client.delete_file(file.id)
    with pytest.raises(NotFoundError, match="file-not-found"):
        await client.download(file.id)
    with pytest.raises(ProblemError) as refused:
        await client.upload(b"x", name="x.unheard-of")
    assert refused.value.code == "unsupported-media-type"
    with pytest.raises(FileNotFoundError):
        await client.upload(tmp_path / "none")


async def test_a_file_alone_and_a_workflow_are_messages(client: ContextClient) -> None:
    file = await client.upload(b"rain", name="notes.txt")
    for options in ({"files": [file.id]}, {"workflow": WorkflowCall("report", {"city": "Oslo"})}):
        context = await client.create_context()
        posted = await client.post(context.id, **options)
        payload = (await client.get_message(context.id, posted.message_id)).payload
        assert payload is not None
        assert [each["id"] for each in payload["files"]] == options.get("files", [])
        assert payload["input"] == (None if "files" in options else {"city": "Oslo"})
    with pytest.raises(ValueError, match="neither text nor files"):
        await client.post(context.id, "x", workflow=WorkflowCall("report"))


@pytest.mark.scenario("python-client", "Commands by the Python client")
async def test_commands_modes_models_and_usage(client: ContextClient) -> None:
    context = await client.create_context()
    assert (await client.execute("/ping")).message == "pong"
    answer = await client.execute("/mode", "plan", context_id=context.id)
    assert (answer.status, answer.data) == ("success", {"mode": "plan"})
    assert (await client.execute("/nothing")).status == "error"
    assert (await client.set_mode(context.id, "act")).mode == "act"
    assert (await client.set_model(context.id, "openai-chat:small")).model == "openai-chat:small"
    assert (await client.set_model(context.id, None)).model is None
    steps = script(["usage", {"input_tokens": 3, "output_tokens": 4, "requests": 1, "tool_calls": 0}], ["text", "x"])
    assert [piece async for piece in client.reply(context.id, steps)] == ["x"]
    used = await client.usage(context.id)
    assert (used.replies, used.input_tokens, used.estimated) == (1, 3, False)
    assert (await client.usage()).replies >= 1
    with pytest.raises(CommandCarriedOut) as carried_out:
        await client.post(context.id, "/mode plan")
    assert carried_out.value.answer.data == {"mode": "plan"}
