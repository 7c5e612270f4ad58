"""What is shown of a tool's data where it is one chunk of many."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from context_server.api.schemas import LONG_DATA_BYTES, chunk_body, shown_data, whole_chunk_body
from context_server.records import Chunk, ChunkKind

PATH = "/contexts/c/messages/m"


def result(data: dict[str, Any], kind: ChunkKind = ChunkKind.TOOL_RESULT) -> Chunk:
    return Chunk(7, kind, None, data)


def test_data_is_cut_from_one_byte_too_many_on() -> None:
    frame = len(json.dumps({"result": ""}))
    exact = {"result": "x" * (LONG_DATA_BYTES - frame)}
    assert shown_data(result(exact), PATH) is exact
    longer = {"result": exact["result"] + "x"}
    assert shown_data(result(longer), PATH) == {
        "result": "x" * 2000,
        "truncated": True,
        "size_bytes": LONG_DATA_BYTES + 1,
        "url": f"{PATH}/chunks/7",
    }


def test_data_of_other_kinds_is_shown_as_it_is() -> None:
    data = {"detail": "x" * 100_000}
    for kind in (ChunkKind.STEP, ChunkKind.ERROR):
        assert shown_data(result(data, kind), PATH) is data
    text = Chunk(1, ChunkKind.TEXT, "x" * 60_000)
    assert chunk_body(text, PATH)["text"] == text.text


@given(st.dictionaries(st.text(), st.recursive(st.none() | st.text() | st.floats(allow_nan=False), st.lists)))
def test_what_is_shown_is_bounded_and_what_is_whole_is_whole(data: dict[str, Any]) -> None:
    chunk = result({**data, "x": "y" * 20_000})
    shown = shown_data(chunk, PATH)
    assert shown is not None
    assert shown["truncated"] is True
    assert len(json.dumps(shown)) < 8 * 2 * 6 * 2000 + 1000  # Names and values, each character at worst six long.
    assert json.loads(whole_chunk_body(chunk))["data"] == chunk.data


def test_data_with_very_many_or_very_long_fields_is_bounded() -> None:
    for data in ({str(number): 1 for number in range(10_000)}, {"k" * 20_000: 1}, {"id": "i" * 20_000}):
        shown = shown_data(result(data), PATH)
        assert shown is not None
        assert len(json.dumps(shown)) < 40_000
        assert shown["size_bytes"] > LONG_DATA_BYTES
