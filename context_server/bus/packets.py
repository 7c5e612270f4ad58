"""Wake-ups as they cross: packets of at most 7,999 bytes of ASCII, versioned, read strictly.

A packet is a version, the sender, and items, separated by single spaces:

    1d41d8cd98f00b204 G P<nonce> Q C<id> D<id> M<context id><tag>,<version>,<message id>,<sequence>

| item | is |
|---|---|
| ``G`` | the sender could not send for a while: whoever hears it has missed something |
| ``P`` | a ping, which only its sender cares for; the nonce, 8 hex digits, is that of its connection |
| ``Q``, ``C``, ``D``, ``M`` | ``RunQueued``, ``CancelRequested``, ``RunDeleted``, ``Moved`` |

An id is a UUID as everywhere, a tag is 8 hex digits, a number is decimal; a number or a message id may be empty, for
None. So nothing that people wrote has room in a packet, neither by mistake nor on purpose. Ids in base64 would make
packets a third shorter, at twice the time to write and to read them.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import assert_never

from context_server.bus.wakeups import CancelRequested, Moved, RunDeleted, RunQueued, WakeUp
from context_server.records import MAX_INTEGER

VERSION = "1"
MAX_PACKET_BYTES = 7999
"""What NOTIFY takes (PostgreSQL's documentation of NOTIFY: "shorter than 8000 bytes"); also bounds what is read."""


@dataclass(frozen=True, slots=True)
class Gap:
    """The sender has lost wake-ups that it had to send."""


@dataclass(frozen=True, slots=True)
class Ping:
    """The sender wants to hear itself. The nonce tells its connection: what an earlier one said proves nothing."""

    nonce: str


Item = WakeUp | Gap | Ping


class Malformed(Exception):
    """What arrived is no packet of this version."""


_ID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_NUMBER = r"(?:0|[1-9][0-9]{0,15})"
_HEAD = re.compile(rf"{VERSION}[0-9a-f]{{16}}")
_PING = re.compile(r"P[0-9a-f]{8}")
_RUN = re.compile(rf"[CD]{_ID}")
_MOVED = re.compile(rf"M({_ID})([0-9a-f]{{8}}),({_NUMBER})?,({_ID})?,({_NUMBER})?")


def head_of(node: str) -> str:
    """How each packet of a node begins; ``node`` is 16 hex digits."""
    return VERSION + node


def encode_item(item: Item) -> str:
    """An item as it stands in a packet, at most 116 characters.

    Raises:
        ValueError: it would not be understood: an id is no UUID, a tag is none, or a number is out of bounds.
    """
    match item:
        case Moved():
            return _encode_moved(item)
        case RunQueued():
            return "Q"
        case CancelRequested(run_id):
            return _encode_run("C", run_id)
        case RunDeleted(run_id):
            return _encode_run("D", run_id)
        case Gap():
            return "G"
        case Ping(nonce):
            return f"P{nonce}"
        case _:
            assert_never(item)


def _encode_moved(moved: Moved) -> str:
    version, sequence = moved.version, moved.sequence
    if (version or 0) > MAX_INTEGER or (sequence or 0) > MAX_INTEGER:
        raise ValueError("out of bounds")
    encoded = (
        f"M{moved.context_id}{moved.owner_tag},{'' if version is None else version},{moved.message_id or ''},"
        f"{'' if sequence is None else sequence}"
    )
    if not _MOVED.fullmatch(encoded):
        raise ValueError("not an id, a tag or a number")
    return encoded


def _encode_run(letter: str, run_id: str) -> str:
    encoded = letter + run_id
    if not _RUN.fullmatch(encoded):
        raise ValueError("not an id")
    return encoded


def pack(node: str, items: Iterable[str]) -> list[str]:
    """Encoded items in as few packets as hold them, in their order; no packet where there is no item."""
    packets: list[str] = []
    head = head_of(node)
    part, size = [head], len(head)
    for item in items:
        if size + 1 + len(item) > MAX_PACKET_BYTES:
            packets.append(" ".join(part))
            part, size = [head], len(head)
        part.append(item)
        size += 1 + len(item)
    if len(part) > 1:
        packets.append(" ".join(part))
    return packets


def unpack(packet: str) -> list[Item]:
    """The items of a packet, in their order.

    Raises:
        Malformed: anything at all is wrong with it; nothing of it counts then.
    """
    if len(packet) > MAX_PACKET_BYTES:
        raise Malformed
    head, *items = packet.split(" ")
    if not _HEAD.fullmatch(head):
        raise Malformed
    return [_decode_item(item) for item in items]


def _decode_item(item: str) -> Item:
    if moved := _MOVED.fullmatch(item):
        context_id, tag, version, message_id, sequence = moved.groups()
        return Moved(context_id, tag, _integer(version), message_id, _integer(sequence))
    if _RUN.fullmatch(item):
        return CancelRequested(item[1:]) if item[0] == "C" else RunDeleted(item[1:])
    if item == "Q":
        return RunQueued()
    if item == "G":
        return Gap()
    if _PING.fullmatch(item):
        return Ping(item[1:])
    raise Malformed


def _integer(digits: str | None) -> int | None:
    if digits is None:
        return None
    number = int(digits)
    if number > MAX_INTEGER:
        raise Malformed
    return number
