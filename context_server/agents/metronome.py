"""The measuring agent: words that carry their number and the moment of writing, on schedule.

A subscriber that reads ``17:1763719200000000000 `` knows which word it is and, on the same machine, how old it is.
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from context_server.agents.protocol import AgentRun
from context_server.records import ChunkKind, Delta, Turn

MAX_WORDS_PER_SECOND = 100_000
MAX_SECONDS = 86_400
MAX_WORDS = 10_000_000
MAX_MESSAGE_CHARACTERS = 2_000  # Further on nothing is read, so that a pasted book delays no other reply.
LATE_WORDS_PER_YIELD = 64  # Words written in a row, when late, before the event loop gets a turn.

_SETTING = re.compile(r"(\w+)=(\S*)")
_DECIMAL = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,9})?")
_WHOLE = re.compile(r"[0-9]{1,9}")
_ALLOWED = (
    f"The metronome takes rate=0..{MAX_WORDS_PER_SECOND} (words a second) with seconds=0..{MAX_SECONDS} or "
    f"words=0..{MAX_WORDS}; rate=0, which is as fast as possible, needs words."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """What to write: ``words`` words, one every ``interval_seconds`` (0: as fast as possible)."""

    words: int
    interval_seconds: float


def read_beat(text: str) -> Beat:
    """The beat that a message asks for: ``rate=50 seconds=6`` → 300 words, one every 0.02 s; also its defaults.

    ``words=N`` counts in place of ``seconds``. Words without ``=`` are ignored.

    Raises:
        ValueError: a setting is unknown, no number, or out of its bounds.
    """
    settings = {"rate": "50", "seconds": "6", "words": ""}
    for name, value in _SETTING.findall(text[:MAX_MESSAGE_CHARACTERS]):
        if name not in settings or not value:
            raise ValueError(name)
        settings[name] = value
    rate = _number(settings["rate"], _DECIMAL, MAX_WORDS_PER_SECOND)
    seconds = _number(settings["seconds"], _DECIMAL, MAX_SECONDS)
    if settings["words"]:
        words = int(_number(settings["words"], _WHOLE, MAX_WORDS))
    elif rate:
        words = round(rate * seconds)
    else:
        raise ValueError("words")
    return Beat(words=words, interval_seconds=1 / rate if rate else 0.0)


def _number(value: str, form: re.Pattern[str], largest: int) -> float:
    """The number that ``value`` writes in the given form; ValueError when it is another thing or above ``largest``."""
    if form.fullmatch(value) is None or float(value) > largest:
        raise ValueError(value)
    return float(value)


async def metronome(history: Sequence[Turn], run: AgentRun) -> AsyncIterator[Delta]:
    """Write ``0:<ns> ``, ``1:<ns> ``, …, each its own delta; ns is ``time.time_ns()`` at the moment of writing.

    Word n is due n intervals after the first, by the event loop's monotonic clock. A late word is written at once and
    none is skipped, so that a stall shows as a burst and not as a lower rate.
    """
    try:
        beat = read_beat(history[-1].text)
    except ValueError:
        yield Delta(ChunkKind.TEXT, _ALLOWED)
        return
    clock = asyncio.get_running_loop().time
    interval_seconds = beat.interval_seconds
    begun = clock()
    for number in range(beat.words):
        ahead_seconds = begun + number * interval_seconds - clock()
        if ahead_seconds > 0:
            # Once, not until it is due: uvloop rounds to whole milliseconds, and a loop here would spin for the rest.
            await asyncio.sleep(ahead_seconds)
        elif number % LATE_WORDS_PER_YIELD == 0:
            await asyncio.sleep(0)
        yield Delta(ChunkKind.TEXT, f"{number}:{time.time_ns()} ")
