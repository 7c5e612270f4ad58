"""What a chunk may hold: text and data that every database, encoder and JSON reader takes, in bounded pieces."""

import math
import re
from collections.abc import Mapping
from typing import Any

MAX_CHUNK_CHARACTERS = 65_536
"""Longest text of one chunk, so that a page of a pull holds several chunks and never has to cut one."""


def split_text(text: str) -> list[str]:
    """``text`` in pieces of at most ``MAX_CHUNK_CHARACTERS``; none for an empty one."""
    if 0 < len(text) <= MAX_CHUNK_CHARACTERS:
        return [text]
    return [text[start : start + MAX_CHUNK_CHARACTERS] for start in range(0, len(text), MAX_CHUNK_CHARACTERS)]


_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def clean_text(text: str) -> str:
    """``text`` with U+0000 and lone surrogates as U+FFFD: not every database or encoder takes them."""
    return _UNSTORABLE.sub("\ufffd", text)


def clean_data(data: Any) -> Any:
    """JSON data with every string in it cleaned as by ``clean_text``; NaN and infinities, which JSON lacks, as null."""
    if isinstance(data, str):
        return clean_text(data)
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if isinstance(data, Mapping):
        return {clean_text(str(key)): clean_data(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [clean_data(value) for value in data]
    return data
