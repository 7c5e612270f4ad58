"""What stands on the wire: small, strict, and without room for words."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from context_server.bus.packets import (
    MAX_PACKET_BYTES,
    Gap,
    Malformed,
    Ping,
    encode_item,
    head_of,
    pack,
    unpack,
)
from context_server.bus.wakeups import CancelRequested, Moved, RunDeleted, RunQueued, owner_tag
from context_server.records import MAX_INTEGER

NODE = "0123456789abcdef"
ID = "01890a5d-ac96-774b-bcce-b302099a8057"

ids = st.uuids().map(str)
numbers = st.none() | st.integers(0, MAX_INTEGER)
tags = st.text().map(owner_tag)
items = st.one_of(
    st.builds(Moved, ids, tags, numbers, st.none() | ids, numbers),
    st.builds(CancelRequested, ids),
    st.builds(RunDeleted, ids),
    st.sampled_from([RunQueued(), Gap(), Ping("00c0ffee")]),
)


@given(st.lists(items, max_size=120))
def test_what_is_packed_is_unpacked_in_its_order(said):
    packets = pack(NODE, map(encode_item, said))
    assert [item for packet in packets for item in unpack(packet)] == said
    assert all(len(packet.encode()) <= MAX_PACKET_BYTES for packet in packets)


def test_a_packet_holds_many_wake_ups():
    largest = encode_item(Moved(ID, "ffffffff", MAX_INTEGER, ID, MAX_INTEGER))
    (first, *others) = pack(NODE, [largest] * 100)
    assert len(unpack(first)) >= 65
    assert len(others) == 1


def test_the_format_is_the_documented_one():
    said = [Gap(), Ping("c001d00d"), RunQueued(), CancelRequested(ID), RunDeleted(ID), Moved(ID, "00c0ffee", 7, ID, 12),
            Moved(ID, "00c0ffee", None, None, None)]  # fmt: skip
    (packet,) = pack(NODE, map(encode_item, said))
    assert packet == (f"1{NODE} G Pc001d00d Q C{ID} D{ID} M{ID}00c0ffee,7,{ID},12 M{ID}00c0ffee,,,")
    assert packet.startswith(head_of(NODE))


@pytest.mark.scenario("wake-ups", "Rubbish on the channel")
@given(st.text() | st.lists(st.sampled_from([f"1{NODE}", "Q", f"C{ID}", "", "M", "1"])).map(" ".join))
@example(f"1{NODE} Q Q\n")
@example(f"1{NODE}  Q")
@example(f"2{NODE} Q")
@example(f"1{NODE} Q" + " Q" * 4000)
def test_anything_else_is_malformed_and_nothing_else_is_raised(text):
    try:
        found = unpack(text)
    except Malformed:
        return
    assert " ".join([text[:17], *map(encode_item, found)]) == text


@pytest.mark.parametrize(
    "item",
    [
        "q", "QQ", "P", "Pc001d00", "PC001D00D",
        "C", f"C{ID}x", f"C{ID[:-1]}", f"C{ID.upper()}", f"C{ID[:-1]}g", f"X{ID}",
        f"M{ID}00c0ffee", f"M{ID}00C0FFEE,,,", f"M{ID}00c0ffee,01,,", f"M{ID}00c0ffee,-1,,",
        f"M{ID}00c0ffee,{MAX_INTEGER + 1},,", f"M{ID}00c0ffee,\u0661,,", f"M{ID}00c0ffee,1,{ID[:-1]},1",
        f"M{ID}00c0ffee,1,,1,", f"M{ID}00c0ffee,1e3,,", "Q\n", "Q\x00",
    ],
)  # fmt: skip
def test_an_item_that_is_not_exactly_right_spoils_its_packet(item):
    assert unpack(f"1{NODE} Q") == [RunQueued()]
    with pytest.raises(Malformed):
        unpack(f"1{NODE} Q {item}")


@pytest.mark.parametrize(
    "wake_up",
    [
        CancelRequested("a run"), RunDeleted(""), RunDeleted(f"{ID}00"), Moved("words", "00c0ffee", 1, None, None),
        Moved(ID, "Ada", 1, None, None), Moved(ID, "00c0ffee00", 1, None, None), Moved(ID, "00c0ffee", -1, None, None),
        Moved(ID, "00c0ffee", MAX_INTEGER + 1, None, None), Moved(ID, "00c0ffee", 1, "words", None),
        Moved(ID, "00c0ffee", 1, f"{ID},1", None), Moved(ID.upper(), "00c0ffee", 1, None, None),
    ],
)  # fmt: skip
def test_what_is_no_id_no_tag_and_no_number_cannot_be_said(wake_up):
    with pytest.raises(ValueError):  # noqa: PT011  # Each for a reason of its own.
        encode_item(wake_up)


def test_a_tag_stands_for_an_owner_and_does_not_tell_who_it_is():
    assert owner_tag("local") == owner_tag("local") != owner_tag("Local")
    assert len(owner_tag("a name of any length" * 100)) == 8
