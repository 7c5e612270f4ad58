"""The dialects of the inline view: tables of the same log, and what becomes of any log in each of them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from context_server.api import schemas
from context_server.api.dialects import DEFAULT, DIALECTS, Dialect
from context_server.api.dialects.table import Begin, End, Ended, Moment, Reply, moment_of
from context_server.api.speaking import Speaker, ToolNames
from context_server.records import Chunk, ChunkKind, Failure, Message, MessageStatus, Page, Role

BEGUN = datetime(2026, 11, 21, 10, 0, 0, tzinfo=UTC)
REPLY = Reply(
    context_id="c",
    message_id="m",
    run_id="r",
    path="/api/contexts/c/messages/m",
    owner_key="key",
    question="What is it?",
)
TEXT_FIELDS = {"default": ("text_delta", "text"), "nexus": ("text_chunk", "chunk")} | {
    "assistant": ("assistant_delta", "delta"),
    "agent": ("LLM_CHUNK", "content"),
}


def message(status: MessageStatus = MessageStatus.COMPLETED, sequence: int = 3) -> Message:
    return Message(
        id="m",
        context_id="c",
        parent_id="u",
        role=Role.ASSISTANT,
        status=status,
        sequence=sequence,
        final_sequence=sequence,
        display=None,
        client_metadata={},
        run_id="r",
        error=Failure(code="agent-error", detail="It broke.") if status is MessageStatus.FAILED else None,
        usage={"input_tokens": 3, "output_tokens": 5},
        digest="0" * 64,
        created_at=BEGUN,
        completed_at=BEGUN + timedelta(seconds=2.5),
    )


@dataclass(frozen=True)
class Told:
    """One event as a client reads it."""

    id: str | None
    name: str | None
    data: dict[str, Any]


def events(written: bytes) -> list[Told]:
    found = []
    for block in written.decode("ascii").split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append(Told(fields.get("id"), fields.get("event"), json.loads(fields["data"])))
    return found


class Log:
    """The log of one reply, and which pages of it were read besides."""

    def __init__(self, chunks: Sequence[Chunk], page_chunks: int = 2) -> None:
        self.chunks = chunks
        self.pages: list[tuple[int, int]] = []
        self._page_chunks = page_chunks

    async def page(self, after: int, until: int) -> Page:
        self.pages.append((after, until))
        found = tuple(self.chunks[after:until][: self._page_chunks])
        return page_of(found, after, len(self.chunks))

    def speaker(self, dialect: Dialect, start: int = 0, **options: Any) -> Speaker:
        reply = replace(REPLY, sequence=start)
        return Speaker(dialect, reply, ToolNames(start, self.page), **{"named": False, **options})


def page_of(chunks: tuple[Chunk, ...], after: int, head: int) -> Page:
    return Page(
        context_id="c",
        message_id="m",
        from_sequence=after,
        sequence=after + len(chunks),
        chunks=chunks,
        status=MessageStatus.STREAMING,
        head=head,
        final_sequence=None,
        digest=None,
        closed=False,
    )


def log_of(*pieces: tuple[str, Any]) -> Log:
    return Log(
        [
            Chunk(
                number,
                ChunkKind(kind),
                held if isinstance(held, str) else None,
                None if isinstance(held, str) else held,
            )
            for number, (kind, held) in enumerate(pieces, start=1)
        ]
    )


CALL = {"id": "call-1", "name": "look_up", "arguments": {"q": "ü"}}
RESULT = {"id": "call-1", "status": "ok", "result": {"found": "naïve"}, "seconds": 0.25}
APPROVAL = {
    "id": "call-2",
    "name": "send",
    "arguments": {},
    "approval": {"id": "a", "editable": True, "expires_at": "x"},
}
WHOLE = log_of(
    ("step", {"number": 1, "total": 2, "status": "started"}),
    ("reasoning", "Let me see."),
    ("tool_call", CALL),
    ("tool_result", RESULT),
    ("step", {"number": 1, "status": "finished"}),
    ("text", "It is "),
    ("error", {"message": "The search is slow."}),
    ("tool_call", APPROVAL),
    ("text", "blue."),
)
SPOKEN: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "default": [
        ("step", {"sequence": 1, "data": {"number": 1, "total": 2, "status": "started"}}),
        ("reasoning_delta", {"sequence": 2, "text": "Let me see."}),
        ("tool_call_started", {"sequence": 3, "data": CALL}),
        ("tool_call_finished", {"sequence": 4, "data": RESULT}),
        ("step", {"sequence": 5, "data": {"number": 1, "status": "finished"}}),
        ("text_delta", {"sequence": 6, "text": "It is "}),
        ("error", {"sequence": 7, "data": {"message": "The search is slow."}}),
        ("approval_requested", {"sequence": 8, "data": APPROVAL}),
        ("text_delta", {"sequence": 9, "text": "blue."}),
    ],
    "nexus": [
        ("tool_call_started", {"tool_name": "look_up", "args": {"q": "ü"}}),
        ("tool_call_finished", {"tool_name": "look_up", "status": "ok", "result": '{"found": "naïve"}'}),
        ("text_chunk", {"chunk": "It is ", "is_final": False}),
        ("error", {"message": "The search is slow."}),
        ("tool_call_started", {"tool_name": "send", "args": {}}),
        ("approval_requested", {"tool_name": "send", "args": {}, "approval": APPROVAL["approval"]}),
        ("text_chunk", {"chunk": "blue.", "is_final": False}),
    ],
    "assistant": [
        ("assistant_delta", {"delta": "It is "}),
        ("approval_requested", APPROVAL),
        ("assistant_delta", {"delta": "blue."}),
    ],
    "agent": [
        ("STEP_START", {"step": 1, "max_steps": 2}),
        ("THINKING", {"content": "Let me see."}),
        ("TOOL_CALL_START", {"tool_name": "look_up", "parameters": {"q": "ü"}}),
        ("TOOL_CALL_FINISH", {"tool_name": "look_up", "result": {"found": "naïve"}, "status": "ok"}),
        ("STEP_FINISH", {"step": 1}),
        ("LLM_CHUNK", {"content": "It is ", "delta": "It is "}),
        ("TOOL_CALL_START", {"tool_name": "send", "parameters": {}}),
        ("APPROVAL_REQUESTED", {"tool_name": "send", "parameters": {}, "approval": APPROVAL["approval"]}),
        ("LLM_CHUNK", {"content": "blue.", "delta": "blue."}),
    ],
}


def framed(dialect: str, name: str, payload: dict[str, Any]) -> dict[str, Any]:
    """The data of an event, as the clients of a dialect expect it."""
    if dialect == "nexus":
        return {"event": name, "run_id": "r", "payload": payload}
    return {"type": name, **payload} if dialect == "default" else payload


@pytest.mark.parametrize("name", DIALECTS)
async def test_a_dialect_tells_each_chunk_in_its_own_words(name: str) -> None:
    told = events(await WHOLE.speaker(DIALECTS[name]).chunks(WHOLE.chunks))

    assert [event.data for event in told] == [framed(name, *spoken) for spoken in SPOKEN[name]]
    assert [event.name for event in told] == [None if name == "default" else spoken for spoken, _ in SPOKEN[name]]
    ids = [int(event.id) for event in told if event.id is not None]
    assert ids == sorted(set(ids))
    assert ids[-1] == 9


async def test_our_own_events_have_a_name_when_it_is_asked_for() -> None:
    told = events(await WHOLE.speaker(DEFAULT, named=True).chunks(WHOLE.chunks))

    assert [event.name for event in told] == [event.data["type"] for event in told]


BEGINS: dict[str, tuple[str, dict[str, Any]]] = {
    "nexus": ("run_started", {"owner_key": "key", "user_input": "What is it?"}),
    "assistant": ("assistant_typing", {"chat_id": "c", "message_id": "m"}),
    "agent": ("AGENT_START", {"input": "What is it?", "config": {}, "context_id": "c", "message_id": "m"}),
}


@pytest.mark.parametrize("name", BEGINS)
def test_a_dialect_begins_in_its_own_words(name: str) -> None:
    (told,) = events(WHOLE.speaker(DIALECTS[name]).begin())

    assert told == Told("0", BEGINS[name][0], framed(name, *BEGINS[name]))


def test_our_own_view_begins_with_where_it_starts_and_what_a_post_made() -> None:
    posted = {"reply_message_id": "m"}
    speaker = Speaker(DEFAULT, replace(REPLY, sequence=7, posted=posted), ToolNames(7, WHOLE.page), named=False)

    (told,) = events(speaker.begin())

    assert (told.id, told.data["type"], told.data["sequence"], told.data["posted"]) == ("7", "run_started", 7, posted)
    assert "posted" not in events(WHOLE.speaker(DEFAULT).begin())[0].data


USAGE = {"input_tokens": 3, "output_tokens": 5}
ENDS: dict[tuple[str, MessageStatus], list[tuple[str, dict[str, Any]]]] = {
    ("nexus", MessageStatus.COMPLETED): [
        ("text_chunk", {"chunk": "", "is_final": True}),
        ("run_finished", {"status": "completed"}),
    ],
    ("nexus", MessageStatus.FAILED): [
        ("text_chunk", {"chunk": "", "is_final": True}),
        ("error", {"message": "It broke."}),
        ("run_finished", {"status": "error"}),
    ],
    ("assistant", MessageStatus.CANCELLED): [
        ("usage_info", {"chat_id": "c", "message_id": "m", "usage": USAGE}),
        (
            "assistant_complete",
            {"chat_id": "c", "message_id": "m", "content": "All.", "status": "cancelled", "digest": "0" * 64},
        ),
    ],
    ("assistant", MessageStatus.FAILED): [
        ("usage_info", {"chat_id": "c", "message_id": "m", "usage": USAGE}),
        ("assistant_error", {"chat_id": "c", "message_id": "m", "error": "It broke.", "code": "agent-error"}),
    ],
    ("agent", MessageStatus.COMPLETED): [
        ("AGENT_FINISH", {"result": "All.", "duration": 2.5, "status": "completed", "usage": USAGE})
    ],
    ("agent", MessageStatus.FAILED): [
        ("ERROR", {"error_type": "agent-error", "message": "It broke.", "error": "It broke."})
    ],
}


@pytest.mark.parametrize(("name", "status"), ENDS)
def test_a_dialect_ends_in_its_own_words(name: str, status: MessageStatus) -> None:
    ended = Ended(reply=REPLY, message=message(status), content="All.")

    told = events(WHOLE.speaker(DIALECTS[name]).end(ended))

    assert [(event.name, event.data) for event in told] == [
        (spoken, framed(name, spoken, payload)) for spoken, payload in ENDS[name, status]
    ]
    assert [event.id for event in told] == [*[None] * (len(told) - 1), "3:end"]


def test_our_own_view_says_why_a_reply_failed_and_then_that_it_ended() -> None:
    error, finished = events(WHOLE.speaker(DEFAULT).end(Ended(reply=REPLY, message=message(MessageStatus.FAILED))))

    assert error == Told(None, None, {"type": "error", "code": "agent-error", "detail": "It broke."})
    expected = {"type": "run_finished", "status": "failed", "final_sequence": 3, "usage": USAGE, "digest": "0" * 64}
    assert finished.id == "3:end"
    assert finished.data | expected == finished.data


def test_a_regenerated_reply_is_told_as_such_where_the_dialect_knows_it() -> None:
    again = replace(REPLY, is_regenerated=True)
    spoken = {}
    for name, dialect in DIALECTS.items():
        speaker = Speaker(dialect, again, ToolNames(0, WHOLE.page), named=True)
        told = [*events(speaker.begin()), *events(speaker.end(Ended(reply=again, message=message())))]
        spoken[name] = [event.name for event in told]

    assert spoken == {
        "default": ["run_started", "run_finished"],
        "nexus": ["run_started", "text_chunk", "run_finished"],
        "assistant": ["assistant_regenerating", "usage_info", "assistant_regenerated"],
        "agent": ["AGENT_START", "AGENT_FINISH"],
    }


async def test_only_the_asked_types_are_told_and_always_the_last_event() -> None:
    speaker = WHOLE.speaker(DIALECTS["agent"], types=frozenset({"LLM_CHUNK"}))

    told = [
        *events(speaker.begin()),
        *events(await speaker.chunks(WHOLE.chunks)),
        *events(speaker.end(Ended(reply=REPLY, message=message(sequence=9)))),
    ]

    assert [(event.name, event.id) for event in told] == [
        ("LLM_CHUNK", "6"),
        ("LLM_CHUNK", "9"),
        ("AGENT_FINISH", "9:end"),
    ]


async def test_of_two_events_of_a_chunk_the_last_one_that_is_told_has_its_sequence() -> None:
    speaker = WHOLE.speaker(DIALECTS["agent"], types=frozenset({"TOOL_CALL_START"}))

    told = events(await speaker.chunks(WHOLE.chunks[7:8]))

    assert [(event.name, event.id) for event in told] == [("TOOL_CALL_START", "8")]


async def test_a_stream_that_begins_between_a_call_and_its_result_finds_the_name_once() -> None:
    log = log_of(
        ("tool_call", CALL | {"id": "1", "name": "one"}),
        ("tool_call", CALL | {"id": "2", "name": "two"}),
        ("text", "so"),
        ("text", "it"),
        ("tool_result", RESULT | {"id": "2"}),
        ("tool_result", RESULT | {"id": "1"}),
        ("tool_result", RESULT | {"id": "never called"}),
        ("tool_result", RESULT | {"id": "nor this"}),
    )

    told = events(await log.speaker(DIALECTS["agent"], start=4).chunks(log.chunks[4:]))

    assert [event.data["tool_name"] for event in told] == ["two", "one", None, None]
    assert log.pages == [(0, 4), (2, 4)]


async def test_nothing_is_read_for_names_that_are_known_or_not_wanted() -> None:
    log = log_of(("text", "so"), ("tool_call", CALL), ("tool_result", RESULT))

    await log.speaker(DIALECTS["agent"], start=1).chunks(log.chunks[1:])
    await log.speaker(DEFAULT, start=2).chunks(log.chunks[2:])

    assert log.pages == []


async def test_a_long_result_is_cut_and_says_where_it_is_whole() -> None:
    log = log_of(("tool_call", CALL), ("tool_result", RESULT | {"result": "x" * 100_000}))

    ours = events(await log.speaker(DEFAULT).chunks(log.chunks))[1].data["data"]
    nexus = events(await log.speaker(DIALECTS["nexus"]).chunks(log.chunks))[1].data["payload"]

    assert (ours["truncated"], ours["url"]) == (True, "/api/contexts/c/messages/m/chunks/2")
    assert nexus == {"tool_name": "look_up", "status": "ok", "result": ours["result"]}


def test_heartbeat_and_goodbye_are_framed_as_the_dialect_does() -> None:
    beat = {"type": "heartbeat", "heads": []}
    told = {name: events(WHOLE.speaker(dialect).beside(beat))[0] for name, dialect in DIALECTS.items()}

    assert told == {
        "default": Told(None, None, beat),
        "nexus": Told(None, "heartbeat", {"event": "heartbeat", "run_id": "r", "payload": {"heads": []}}),
        "assistant": Told(None, "heartbeat", {"heads": []}),
        "agent": Told(None, "heartbeat", {"heads": []}),
    }
    assert b"retry: 700\n" in WHOLE.speaker(DEFAULT).beside({"type": "goodbye"}, retry_ms=700)


@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_every_dialect_can_begin_end_and_say_text(dialect: Dialect) -> None:
    assert {Begin.STARTED} <= dialect.begins.keys()
    assert {Moment.TEXT} <= dialect.chunks.keys()
    assert {End.FINISHED, End.FAILED} <= dialect.ends.keys()
    assert {"heartbeat", "goodbye"}.isdisjoint(dialect.types)


def test_each_kind_of_chunk_is_a_moment() -> None:
    assert {moment_of(Chunk(1, kind, None, {})) for kind in ChunkKind} == set(Moment) - {
        Moment.APPROVAL,
        Moment.STEP_FINISHED,
    }


# Any log

SCALARS = st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5)
DATA = st.dictionaries(
    st.sampled_from(["id", "name", "arguments", "status", "result", "approval", "number", "type", "sequence"]),
    SCALARS | st.dictionaries(st.text(max_size=3), SCALARS, max_size=2),
    max_size=5,
)
TEXTUAL = st.tuples(st.sampled_from(["text", "text", "reasoning"]), st.text(min_size=1, max_size=8))
OTHER = st.tuples(st.sampled_from([str(kind) for kind in ChunkKind if not kind.is_textual]), DATA)


def id_of(piece: tuple[str, Any]) -> object:
    """What may be there once: a call, and the result of a call."""
    kind, held = piece
    return (kind, str(held.get("id"))) if kind in ("tool_call", "tool_result") else object()


LOGS = st.lists(TEXTUAL | OTHER, max_size=12, unique_by=id_of).map(lambda pieces: log_of(*pieces))


def parts(log: Log, cuts: list[int]) -> Iterator[tuple[Chunk, ...]]:
    """The chunks as pages bring them, cut anywhere."""
    bounds = [0, *sorted(min(cut, len(log.chunks)) for cut in cuts), len(log.chunks)]
    return (tuple(log.chunks[start:end]) for start, end in pairwise(bounds))


@pytest.mark.scenario("dialects", "One text in every dialect")
@given(log=LOGS, cuts=st.lists(st.integers(0, 12), max_size=3))
async def test_every_dialect_tells_the_text_of_the_pull(log: Log, cuts: list[int]) -> None:
    pulled = json.loads(schemas.content_body(page_of(tuple(log.chunks), 0, len(log.chunks)), "content", "e"))["content"]
    for name, dialect in DIALECTS.items():
        speaker = log.speaker(dialect, named=True)
        written = [speaker.begin(), *[await speaker.chunks(part) for part in parts(log, cuts)]]
        written.append(speaker.end(Ended(reply=REPLY, message=message(sequence=len(log.chunks)))))
        kind, field = TEXT_FIELDS[name]
        told = [event.data.get("payload", event.data) for event in events(b"".join(written)) if event.name == kind]
        assert "".join(data[field] for data in told) == pulled


@given(log=LOGS, at=st.integers(0, 12))
async def test_a_stream_that_goes_on_tells_what_an_unbroken_one_does(log: Log, at: int) -> None:
    at = min(at, len(log.chunks))
    for dialect in DIALECTS.values():
        whole = events(await log.speaker(dialect).chunks(log.chunks))
        before = events(await log.speaker(dialect).chunks(log.chunks[:at]))
        after = events(await log.speaker(dialect, start=at).chunks(log.chunks[at:]))
        assert before + after == whole
