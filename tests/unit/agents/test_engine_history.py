"""The history that a model is given: rebuilt from the log alone, and sound whatever the log holds."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic_ai.messages import (
    BinaryContent,
    ModelMessage,
    ModelRequest,
    ModelResponse,
    TextPart,
    ThinkingPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)

from context_server.agents import AgentRun
from context_server.agents.engine.history import LEFT_OUT, rebuild
from context_server.records import (
    Chunk,
    ChunkKind,
    Delta,
    FileRef,
    MessageStatus,
    Role,
    Turn,
    WorkflowCall,
)
from tests.unit.agents.conversing import (
    RUN,
    Script,
    agent_of,
    call,
    calling,
    chunks_of,
    decide,
    faults_of,
    finished,
    reasoning,
    replied,
    result,
    said,
    started,
    text,
    write,
)

LAST = said("and now?", "message-9")


async def messages_of(*history: Turn, run: AgentRun = RUN, provider: str | None = None) -> list[ModelMessage]:
    messages = (await rebuild(history, run, provider)).messages
    assert faults_of(messages) == []
    return messages


def plain(messages: list[ModelMessage]) -> list[Any]:
    """Each message as a list of what its parts hold."""
    return [
        [part.args_as_dict() if isinstance(part, ToolCallPart) else part.content for part in each.parts]
        for each in messages
    ]


@pytest.mark.scenario("agents", "A later turn")
async def test_a_conversation_is_rebuilt_from_the_log_with_calls_and_results():
    reply = replied(
        started(1),
        text("Let me look."),
        finished(1),
        call("a", city="Oslo"),
        call("b", city="Rome"),
        result("b", {"celsius": 20}),
        result("a", {"celsius": 4}),
        started(2),
        text("Cold."),
        finished(2),
    )
    messages = await messages_of(said("weather?"), reply, LAST)
    assert plain(messages) == [
        ["weather?"],
        ["Let me look.", {"city": "Oslo"}, {"city": "Rome"}],
        [{"celsius": 4}, {"celsius": 20}],
        ["Cold."],
        ["and now?"],
    ]
    assert [type(each) for each in messages] == [ModelRequest, ModelResponse] * 2 + [ModelRequest]


async def test_without_step_markers_results_part_the_responses():
    reply = replied(text("First."), call("a"), result("a", "1"), call("b"), result("b", "2"), text("Done."))
    assert plain(await messages_of(said("go"), reply, LAST)) == [
        ["go"],
        ["First.", {}],
        ["1"],
        [{}],
        ["2"],
        ["Done."],
        ["and now?"],
    ]


@pytest.mark.scenario("agents", "A call without a result")
@pytest.mark.parametrize("status", [MessageStatus.FAILED, MessageStatus.CANCELLED])
async def test_a_call_that_was_cut_gets_a_result_that_says_what_is_known(status):
    reply = replied(text("I will"), call("a", "send"), status=status)
    messages = await messages_of(said("go"), reply, LAST)
    (back, asked) = messages[2].parts
    assert isinstance(back, ToolReturnPart)
    assert back.outcome == "interrupted"
    assert back.content == "The call was interrupted; whether it took effect is not known."
    assert asked.content == "and now?"


@pytest.mark.parametrize(
    ("status", "outcome", "content"),
    [
        ("ok", "success", ""),
        ("error", "failed", "The tool failed."),
        ("denied", "denied", "The call was denied; the tool was not run."),
        ("expired", "interrupted", "Nobody decided on the call in time; the tool was not run."),
        ("cancelled", "interrupted", "The call was cancelled; whether it took effect is not known."),
        ("interrupted", "interrupted", "The call was interrupted; whether it took effect is not known."),
        (7, "interrupted", "The call was interrupted; whether it took effect is not known."),
    ],
)
async def test_a_result_without_content_says_what_became_of_the_call(status, outcome, content):
    messages = await messages_of(said("go"), replied(call("a"), result("a", None, status)), LAST)
    back = messages[2].parts[0]
    assert isinstance(back, ToolReturnPart)
    assert (back.outcome, back.content) == (outcome, content)


async def test_replies_without_a_word_leave_nothing_and_ids_are_used_once():
    history = (
        said("one", "m1"),
        replied(status=MessageStatus.FAILED, message_id="r1"),
        said("two", "m2"),
        replied(call("call-1"), result("call-1", "a"), message_id="r2"),
        said("three", "m3"),
        replied(call("call-1"), result("call-1", "b"), message_id="r3"),
        LAST,
    )
    messages = await messages_of(*history)
    assert plain(messages)[0] == ["one", "two"]
    ids = [part.tool_call_id for each in messages for part in each.parts if isinstance(part, ToolCallPart)]
    assert ids == ["call-1", "call-1-2"]


async def test_a_history_that_was_cut_begins_with_a_note():
    messages = await messages_of(replied(text("as I said")), LAST)
    assert plain(messages) == [[LEFT_OUT], ["as I said"], ["and now?"]]


@pytest.mark.scenario("agents", "A message that steered")
async def test_a_message_that_steered_stands_where_the_reply_took_it():
    reply = replied(started(1), finished(1), call("a"), result("a"), started(2, "s1"), text("In French, then."))
    history = (said("go"), reply, said("in French", "s1", steers=True), said("late", "s2", steers=True), LAST)
    assert plain(await messages_of(*history)) == [
        ["go"],
        [{}],
        ["seen", "in French"],
        ["In French, then."],
        ["late", "and now?"],
    ]


async def test_a_message_that_the_reply_is_yet_to_take_is_left_to_its_next_look():
    script = Script([[calling("send", '{"to": "me"}')]])
    agent = agent_of(script)
    agent.tool_plain(send, requires_approval=True)
    run = decide(await write(agent))
    conversation = await rebuild((said("hello"), said("wait", "s1", steers=True)), run, None)
    assert plain(conversation.messages) == [["hello"], [{"to": "me"}]]
    assert set(conversation.open_calls) == {"call_0"}


def send(to: str) -> str:
    return f"sent to {to}"


# Reasoning


async def test_reasoning_goes_back_only_where_it_is_signed_and_to_its_own_provider():
    kept = {
        "name": "anthropic",
        "parts": [
            {"kind": "thinking", "characters": 3, "signature": "S1"},
            {"kind": "text", "characters": 2},
            {"kind": "thinking", "characters": 4, "id": "field"},
            {"kind": "call", "call": "a", "details": {"thought_signature": "T"}},
        ],
    }
    reply = replied(started(1), reasoning("hm,"), text("ok"), reasoning("well"), finished(1, provider=kept), call("a"))
    signed = (await messages_of(said("go"), reply, LAST, provider="anthropic"))[1].parts
    assert [type(part) for part in signed] == [ThinkingPart, TextPart, ToolCallPart]
    assert (signed[0].content, signed[0].signature, signed[0].provider_name) == ("hm,", "S1", "anthropic")
    assert signed[2].provider_details == {"thought_signature": "T"}
    elsewhere = (await messages_of(said("go"), reply, LAST, provider="openai"))[1].parts
    assert [type(part) for part in elsewhere] == [TextPart, ToolCallPart]


@pytest.mark.parametrize("logged", ["o", "okay"])
async def test_a_layout_that_does_not_fit_the_log_is_not_used(logged):
    kept = {"name": "anthropic", "parts": [{"kind": "text", "characters": 2, "details": {"thought_signature": "T"}}]}
    reply = replied(started(1), text(logged), finished(1, provider=kept))
    (part,) = (await messages_of(said("go"), reply, LAST, provider="anthropic"))[1].parts
    assert (part.content, part.provider_details) == (logged, None)


# Files and workflows


@pytest.mark.scenario("agents", "A file in a message")
async def test_files_are_given_by_their_content_and_deleted_ones_by_a_note():
    kinds = {"a": "text/plain", "b": "image/png", "c": "application/zip", "d": "image/png"}
    files = tuple(
        FileRef(id=each, name=f"{each}.x", media_type=kind, size_bytes=1, sha256="0" * 64)
        for each, kind in kinds.items()
    )

    async def read(file_id: str) -> bytes:
        if file_id == "d":
            raise FileNotFoundError(file_id)
        return {"a": b"caf\xc3\xa9", "b": b"\x89PNG"}[file_id]

    messages = await messages_of(said("look", files=files), run=replace(RUN, read_file=read))
    (part,) = messages[0].parts
    assert isinstance(part, UserPromptPart)
    asked, written, image, archive, gone = part.content
    assert (asked, written) == ("look", "[the file a.x]\ncafé")
    assert isinstance(image, BinaryContent)
    assert (image.data, image.media_type) == (b"\x89PNG", "image/png")
    assert archive == "[the file c.x is of the type application/zip, which no model reads]"
    assert gone == "[the file d.x was deleted]"


async def test_messages_without_text_are_not_empty():
    workflow = WorkflowCall(name="report", input={"week": 3})
    messages = await messages_of(said("", "m1"), said("", "m2", workflow=workflow))
    assert plain(messages) == [["[a message without text]", '[the workflow report was started with {"week": 3}]']]


# Whatever the log holds

IDS = st.sampled_from(["a", "b", "call-1", "", None, 3])
NAMES = st.sampled_from(["look", "send", "with spaces in it", "", None, "x" * 90])
STATUSES = st.sampled_from(["ok", "error", "denied", "expired", "cancelled", "interrupted", None, "odd"])
JSON = st.sampled_from([None, "text", 1, {"a": [1, 2]}, [], {}])
TEXTS = st.sampled_from(["", "word ", "\n"])
DELTAS = st.one_of(
    st.builds(lambda content: text(content), TEXTS),
    st.builds(lambda content: reasoning(content), TEXTS),
    st.builds(
        lambda call_id, name, arguments: Delta(
            ChunkKind.TOOL_CALL, data={"id": call_id, "name": name, "arguments": arguments}
        ),
        IDS,
        NAMES,
        JSON,
    ),
    st.builds(
        lambda call_id, content, status: Delta(
            ChunkKind.TOOL_RESULT, data={"id": call_id, "status": status, "result": content}
        ),
        IDS,
        JSON,
        STATUSES,
    ),
    st.builds(lambda data: Delta(ChunkKind.ERROR, data={"detail": data}), JSON),
    st.builds(
        lambda number, status, messages, provider: Delta(
            ChunkKind.STEP, data={"number": number, "status": status, "messages": messages, "provider": provider}
        ),
        st.one_of(st.integers(0, 5), st.none()),
        st.sampled_from(["started", "finished", None]),
        st.sampled_from([[], ["s1"], ["nobody"], None, [4]]),
        st.sampled_from(
            [None, 4, {"name": "p", "parts": [{"kind": "text", "characters": 5, "details": {"x": 1}}]}, {"name": "p"}]
        ),
    ),
)
REPLIES = st.lists(DELTAS, max_size=12)


def history_of(replies: list[list[Delta]]) -> list[Turn]:
    history: list[Turn] = []
    for number, deltas in enumerate(replies):
        history.append(said(f"question {number}", f"m{number}"))
        history.append(replied(*deltas, message_id=f"r{number}"))
        if number == 0:
            history.append(said("steer", "s1", steers=True))
    return [*history, LAST]


@settings(max_examples=150, deadline=None)
@given(replies=st.lists(REPLIES, max_size=4), cut=st.integers(0, 8), provider=st.sampled_from([None, "p", "q"]))
async def test_any_log_gives_a_history_in_which_each_call_has_one_result(replies, cut, provider):
    history = history_of(replies)
    messages = (await rebuild(history[min(cut, len(history) - 1) :], RUN, provider)).messages
    assert faults_of(messages) == []
    assert isinstance(messages[-1], ModelRequest)


@settings(max_examples=40, deadline=None)
@given(replies=st.lists(REPLIES, max_size=3))
async def test_the_library_takes_the_history_of_any_log(replies):
    script = Script([["fine"]])
    assert (await write(agent_of(script), *history_of(replies))).text == "fine"
    assert faults_of(script.asked[0]) == []


@settings(max_examples=60, deadline=None)
@given(data=st.data())
async def test_a_reply_that_is_cut_anywhere_gives_a_sound_history(data):
    script = Script(
        [
            [{0: calling("look")[1], 1: calling("look", call_id="call_0")[1]}],
            ["So ", "far. ", calling("look")],
            ["Done."],
        ]
    )
    agent = agent_of(script)
    agent.tool_plain(look)
    whole = await write(agent)
    held = data.draw(st.integers(0, len(whole.deltas)))
    cut = Turn(Role.ASSISTANT, MessageStatus.FAILED, "reply-0", chunks_of(whole.deltas[:held]))
    assert faults_of((await rebuild((said("go"), cut, LAST), RUN, None)).messages) == []


def look() -> str:
    return "seen"


async def test_the_history_of_a_reply_is_what_the_library_had():
    script = Script([["One. ", calling("look")], ["Two. ", calling("look")], ["Three."], ["Again."]])
    agent = agent_of(script)
    agent.tool_plain(look)
    first = await write(agent, said("go"))
    await write(agent, said("go"), replied(*first.deltas), LAST)
    assert plain(script.asked[3])[:-1] == [*plain(script.asked[2]), ["Three."]]


async def test_an_open_call_that_nobody_decided_on_counts_as_interrupted():
    reply = Turn(Role.ASSISTANT, MessageStatus.STREAMING, RUN.message_id, (Chunk(1, ChunkKind.TOOL_CALL, None, {}),))
    conversation = await rebuild((said("go"),), replace(RUN, reply=reply), None)
    assert conversation.open_calls == {}
    assert faults_of(conversation.messages) == []
