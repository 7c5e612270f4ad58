"""The vocabulary: ids, cleaning and cutting of text, sizes."""

import re
import time
import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from context_server.records import (
    Append,
    Chunk,
    ChunkKind,
    MessageStatus,
    Mode,
    Page,
    Role,
    Run,
    Turn,
    new_id,
    now,
)
from context_server.storable import MAX_CHUNK_CHARACTERS, clean_data, clean_text, split_text

RUN = Run(id="r", context_id="c", message_id="m", owner="o", attempt=1, mode=Mode.ACT)
json_data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters()), inner, max_size=4),
)


def test_an_id_is_a_uuid_of_version_7_with_the_time_in_front():
    before = time.time_ns() // 1_000_000
    value = new_id()
    after = time.time_ns() // 1_000_000

    parsed = uuid.UUID(value)
    assert str(parsed) == value
    assert (parsed.version, parsed.variant) == (7, uuid.RFC_4122)
    assert before <= parsed.int >> 80 <= after
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", value)


def test_ids_are_of_their_own_and_in_the_order_of_time():
    ids = [new_id() for _ in range(5_000)]
    assert len(set(ids)) == len(ids)
    moments = [value[:13] for value in ids]
    assert moments == sorted(moments)


def test_now_is_aware():
    assert now().utcoffset().total_seconds() == 0


@pytest.mark.scenario("content-log", "Characters that cannot be stored")
@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("plain", "plain"),
        ("a\x00b", "a\ufffdb"),
        ("\ud800", "\ufffd"),
        ("\udfff\udc00", "\ufffd\ufffd"),
        ("\U0001f600 e\u0301 \u2028 \x01 \ufeff", "\U0001f600 e\u0301 \u2028 \x01 \ufeff"),
        ("", ""),
    ],
)
def test_text_is_cleaned_of_what_cannot_be_stored_and_of_nothing_else(given, kept):
    assert clean_text(given) == kept


@given(st.text(st.characters()))
def test_clean_text_can_be_encoded_and_is_as_long(text):
    cleaned = clean_text(text)
    assert "\x00" not in cleaned
    assert len(cleaned.encode().decode()) == len(text)
    assert clean_text(cleaned) == cleaned


@given(json_data)
def test_clean_data_is_json_that_can_be_stored(data):
    cleaned = clean_data(data)
    chunk = Chunk(1, ChunkKind.STEP, None, {"data": cleaned})
    assert chunk.size_bytes > 0
    assert clean_data(cleaned) == cleaned


def test_data_may_have_tuples_and_keys_that_are_no_text():
    assert clean_data({1: ("a\x00", [float("inf")]), "\x00": None}) == {"1": ["a\ufffd", [None]], "\ufffd": None}


@pytest.mark.parametrize("length", [0, 1, MAX_CHUNK_CHARACTERS, MAX_CHUNK_CHARACTERS + 1, 3 * MAX_CHUNK_CHARACTERS])
def test_text_is_cut_into_pieces_that_join_to_it(length):
    text = ("ab\U0001f600" * (length // 3 + 1))[:length]
    pieces = split_text(text)
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= MAX_CHUNK_CHARACTERS for piece in pieces)
    assert len(pieces) == -(-length // MAX_CHUNK_CHARACTERS)


@pytest.mark.parametrize(
    ("chunk", "size"),
    [
        (Chunk(1, ChunkKind.TEXT, "abc"), 3),
        (Chunk(1, ChunkKind.TEXT, "ä\U0001f600"), 6),
        (Chunk(1, ChunkKind.TEXT, ""), 0),
        (Chunk(1, ChunkKind.STEP, None, {}), 2),
        (Chunk(1, ChunkKind.STEP, None, {"a": "ä"}), len('{"a": "ä"}'.encode())),
    ],
)
def test_the_size_of_a_chunk_is_that_of_its_content_as_utf8(chunk, size):
    assert chunk.size_bytes == size


def test_the_text_of_a_turn_is_what_was_said():
    chunks = (
        Chunk(1, ChunkKind.REASONING, "hm"),
        Chunk(2, ChunkKind.TEXT, "a"),
        Chunk(3, ChunkKind.TOOL_CALL, None, {}),
        Chunk(4, ChunkKind.TEXT, "b"),
    )
    assert Turn(Role.ASSISTANT, MessageStatus.COMPLETED, "m", chunks).text == "ab"


def test_endings_and_textual_kinds():
    assert [status for status in MessageStatus if status.ended] == ["completed", "failed", "cancelled"]
    assert [kind for kind in ChunkKind if kind.is_textual] == ["text", "reasoning"]


def test_the_head_after_an_append():
    chunks = (Chunk(4, ChunkKind.TEXT, "a"), Chunk(5, ChunkKind.TEXT, "b"))
    assert Append(run=RUN, expected_sequence=3, chunks=chunks, content_bytes=9).sequence == 5


@pytest.mark.parametrize(("sequence", "up_to_date"), [(3, True), (2, False)])
def test_a_page_is_up_to_date_at_the_head(sequence, up_to_date):
    page = Page(
        context_id="c", message_id="m", from_sequence=0, sequence=sequence, chunks=(), status=MessageStatus.STREAMING,
        head=3, final_sequence=None, digest=None, closed=False,
    )  # fmt: skip
    assert page.up_to_date is up_to_date
