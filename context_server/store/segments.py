"""Segments: many chunks of an ended message in one row, so that a log of years is not a row for each word.

A segment keeps what its chunks were, each with its sequence, its kind and its bytes: whoever reads them cannot tell
whether they lie in rows of their own or in segments. The segments of a message are a prefix of it: they hold the
sequences 1 to ``messages.compacted_sequence``, the table ``chunks`` holds the others.

The format, 1: the row names the first and the last sequence, which makes N chunks. ``body`` is a zlib stream (RFC 1950,
whose checksum finds a damaged one) of

* the kinds, N letters: ``t`` text, ``r`` reasoning, ``c`` tool_call, ``o`` tool_result, ``s`` step, ``e`` error; a
  small letter where the chunk has text, a capital one where it has data;
* the lengths, N unsigned 32-bit integers, most significant byte first, in bytes;
* the contents, one after the other, in UTF-8: the text as it is, or the data as JSON.

So a text ``Hi`` and a tool call with ``{}`` are the stream of ``tC 00000002 00000002 Hi{}``, without the spaces, with
each number as its four bytes.
"""

import json
import struct
import zlib
from collections.abc import Iterator, Sequence

from context_server.records import Chunk, ChunkKind

FORMAT = 1
MAX_SEGMENT_CHUNKS = 500
MAX_SEGMENT_BYTES = 65_536
"""What one segment holds: a pull of its last ten chunks has to open all of it. One chunk may be larger by itself."""

_LETTERS = {
    ChunkKind.TEXT: "t",
    ChunkKind.REASONING: "r",
    ChunkKind.TOOL_CALL: "c",
    ChunkKind.TOOL_RESULT: "o",
    ChunkKind.STEP: "s",
    ChunkKind.ERROR: "e",
}
_TEXTS = {ord(letter): kind for kind, letter in _LETTERS.items()}
_DATA = {ord(letter.upper()): kind for kind, letter in _LETTERS.items()}
# 6 makes a segment of English words a tenth smaller than 1, and takes three times as long; a log is written once.
_LEVEL = 6


class SegmentDamaged(Exception):
    """The body of a segment is not what its row says; the database's file was changed or the disk lies."""


def encode_segment(chunks: Sequence[Chunk]) -> bytes:
    """The body of a segment of these chunks, whose sequences are contiguous."""
    contents = [_content_of(chunk) for chunk in chunks]
    kinds = "".join([_letter_of(chunk) for chunk in chunks]).encode()
    lengths = struct.pack(f">{len(contents)}I", *map(len, contents))
    return zlib.compress(b"".join((kinds, lengths, *contents)), _LEVEL)


def _letter_of(chunk: Chunk) -> str:
    letter = _LETTERS[chunk.kind]
    return letter if chunk.text is not None else letter.upper()


def _content_of(chunk: Chunk) -> bytes:
    if chunk.text is not None:
        return chunk.text.encode()
    return json.dumps(chunk.data, ensure_ascii=False, separators=(",", ":")).encode()


def decode_segment(body: bytes, first: int, last: int, after: int, until: int) -> Iterator[Chunk]:
    """The chunks ``after < sequence <= until`` among those that the segment ``first`` to ``last`` holds, in order.

    Raises:
        SegmentDamaged: the body does not hold them.
    """
    count = last - first + 1
    try:
        raw = zlib.decompress(body)
        lengths = struct.unpack_from(f">{count}I", raw, count)
    except (zlib.error, struct.error) as error:
        raise SegmentDamaged from error
    begin = max(0, after + 1 - first)
    end = max(begin, min(count, until + 1 - first))
    at = 5 * count + sum(lengths[:begin])
    if 5 * count + sum(lengths) != len(raw):
        raise SegmentDamaged
    for place, length in enumerate(lengths[begin:end], begin):
        content = raw[at : at + length].decode()
        at += length
        kind = _TEXTS.get(raw[place])
        if kind is not None:
            yield Chunk(first + place, kind, content)
        else:
            yield Chunk(first + place, _DATA[raw[place]], None, json.loads(content))
