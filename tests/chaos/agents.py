"""Agents whose text is known beforehand, and which misbehave on request."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Sequence

from context_server.agents import AgentRun
from context_server.records import Turn

_SETTING = re.compile(r"(\w+)=([0-9]+)")


def script_of(prompt: str) -> list[str]:
    """The words that ``scripted`` writes for a prompt: ``words=2 seed=7`` → ``7.0 ``, ``7.1 ``."""
    settings = {name: int(value) for name, value in _SETTING.findall(prompt)}
    return [f"{settings.get('seed', 0)}.{number} " for number in range(settings.get("words", 3))]


async def scripted(history: Sequence[Turn], run: AgentRun) -> AsyncIterator[str]:
    """Writes the prompt's words, ``rate`` a second (as fast as it can without one); then does what the prompt says.

    ``stamped`` adds to each word the moment of writing in Unix milliseconds: ``7.0@1763719200000 ``.
    ``stubborn`` ignores its cancellation, ``hold`` waits until it is cancelled, ``raise`` raises what the user said,
    ``echo`` writes it, and anything else ends the reply.
    """
    prompt = history[-1].text
    settings = {name: int(value) for name, value in _SETTING.findall(prompt)}
    clock = asyncio.get_running_loop().time
    begun = clock()
    for number, word in enumerate(script_of(prompt)):
        if rate := settings.get("rate"):
            await asyncio.sleep(max(0.0, begun + number / rate - clock()))
        yield f"{word[:-1]}@{time.time_ns() // 1_000_000} " if "stamped" in prompt else word
    if "echo" in prompt:
        yield prompt
    if "raise" in prompt:
        raise RuntimeError(prompt)
    if "stubborn" in prompt:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.Event().wait()
    if "hold" in prompt:
        await asyncio.Event().wait()
