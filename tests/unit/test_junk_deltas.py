"""What an agent yields is checked before it can touch another reply."""

import pytest

from context_server.agents import AgentFailed
from context_server.records import ApprovalRequest, ChunkKind, Delta, Suspend, Usage
from tests.unit.rooms import open_rooms

JUNK = [
    Delta(ChunkKind.STEP, data=[1, 2]),
    Delta(ChunkKind.STEP, data="abc"),
    Delta(ChunkKind.STEP, text="no object"),
    Delta(ChunkKind.TEXT, data={"no": "text"}),
    Delta(ChunkKind.TEXT, text=7),
    Delta("unheard of", text="word"),
    {"no": "delta"},
    b"bytes",
    Usage(input_tokens=float("nan")),
    Usage(requests=-1),
    Usage(estimated=None),
    Suspend(()),
    Suspend(("call",)),
    Suspend((ApprovalRequest(call_id=5, tool="t", arguments={}),)),
    Suspend((ApprovalRequest(call_id="c", tool="t", arguments={}, editable="yes"),)),
    Suspend((ApprovalRequest(call_id="c", tool="t", arguments=[1]),)),
]


@pytest.mark.parametrize("junk", JUNK, ids=repr)
async def test_a_junk_delta_fails_its_own_reply_and_no_other(tmp_path, junk):
    async def agent(history, _run):
        yield "word"
        if history[-1].text == "junk":
            yield junk

    async with open_rooms(tmp_path, agent) as rooms:
        bad, good = await rooms.post("junk"), await rooms.post("please")
        failed = await rooms.ended(bad)
        assert (failed.error.code, failed.content) == ("agent-error", "word")
        assert (await rooms.ended(good)).content == "word"


@pytest.mark.parametrize("leaving", [SystemExit, KeyboardInterrupt])
async def test_an_agent_that_would_end_the_process_fails_alone(tmp_path, leaving):
    async def agent(_history, _run):
        yield "word"
        raise leaving

    async with open_rooms(tmp_path, agent) as rooms:
        assert (await rooms.ended(await rooms.post())).error.code == "agent-error"


@pytest.mark.parametrize(
    ("code", "kept"), [("out-of-luck", "out-of-luck"), ("Not One!", "agent-error"), (7, "agent-error")]
)
async def test_a_failure_that_an_agent_names_is_stored_whatever_it_holds(tmp_path, code, kept):
    async def agent(_history, _run):
        yield "word"
        raise AgentFailed(code, ValueError("x" * 5000))

    async with open_rooms(tmp_path, agent) as rooms:
        error = (await rooms.ended(await rooms.post())).error
    assert error.code == kept
    assert len(error.detail) == 2000
