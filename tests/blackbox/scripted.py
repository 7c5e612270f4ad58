"""An agent that does what the message says: a JSON list of steps, such as ``[["text", "a"], ["wait", "gate"]]``.

Gates and marks are files in the server's working directory: ``wait`` goes on when the test has made the file, ``mark``
makes one for the test to see.
"""

import asyncio
import json
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from context_server.agents import AgentFailed, AgentRun
from context_server.agents.protocol import Yielded
from context_server.records import ApprovalRequest, ApprovalStatus, ChunkKind, Delta, Role, Suspend, Turn, Usage

UNCLEAN_TEXT = "nul \x00, surrogate \ud800, pair \U0001f600 "
"""What an agent may yield though no database or encoder takes it."""
RUBBISH: dict[str, Any] = {"number": 7, "none": None, "bytes": b"text", "list": ["text"]}


async def scripted(history: Sequence[Turn], run: AgentRun) -> AsyncIterator[Yielded]:
    """Do the steps of the last message that is such a list, in order; after an ``approve``, those behind it."""
    asked = [turn for turn in history if turn.role is Role.USER and not turn.steers]
    steps = json.loads(asked[-1].text)
    if run.reply is not None:
        asked_for = sum("approval" in (chunk.data or {}) for chunk in run.reply.chunks)
        for result in _decided(run):
            yield result
        while asked_for:
            verb, *arguments = steps.pop(0)
            asked_for -= len(arguments) if verb == "approve" else 0
    for verb, *arguments in steps:
        if verb in ("look", "history"):
            yield await _look(run) if verb == "look" else json.dumps([turn.text for turn in history])
            continue
        async with aclosing(_STEPS[verb](*arguments)) as deltas:
            async for delta in deltas:
                yield delta


def _decided(run: AgentRun) -> list[Delta]:
    """What the approved tool does: it says with which arguments it was called, in a file too; a denied one does not."""
    results = []
    closed = {chunk.data["id"] for chunk in run.reply.chunks if chunk.kind is ChunkKind.TOOL_RESULT}
    for call_id, approval in run.approvals.items():
        if call_id in closed:
            continue
        status, result = "denied", approval.note
        if approval.status is ApprovalStatus.APPROVED:
            status, result = "ok", dict(approval.final_arguments)
            with Path(f"called-{run.context_id}").open("a") as file:
                file.write(f"{approval.id}\n")
        data = {"id": call_id, "status": status, "result": result, "seconds": 0.0}
        results.append(Delta(ChunkKind.TOOL_RESULT, None, data))
    return results


async def _look(run: AgentRun) -> Delta:
    """How the context stands at this step: a step, with what was said meanwhile."""
    look = await run.look()
    said = [turn.text for turn in look.steering]
    ids = [turn.message_id for turn in look.steering]
    return Delta(ChunkKind.STEP, None, {"number": 1, "mode": look.mode, "messages": ids, "said": said})


async def _approve(*calls: dict[str, Any]) -> AsyncGenerator[Suspend, None]:
    """Asks for approval of calls, each ``{id, tool, arguments, editable?}``."""
    yield Suspend(
        tuple(
            ApprovalRequest(
                call_id=call["id"],
                tool=call["tool"],
                arguments=call["arguments"],
                editable=call.get("editable", False),
            )
            for call in calls
        )
    )


async def _usage(numbers: dict[str, Any]) -> AsyncGenerator[Usage, None]:
    yield Usage(**numbers)


async def _give_up(code: str, detail: str) -> AsyncGenerator[str, None]:
    raise AgentFailed(code, detail)
    yield


async def _text(*words: str) -> AsyncGenerator[str, None]:
    for word in words:
        yield word


async def _textual(kind: str, text: str) -> AsyncGenerator[Delta, None]:
    yield Delta(ChunkKind(kind), text)


async def _data(kind: str, data: dict[str, Any]) -> AsyncGenerator[Delta, None]:
    yield Delta(ChunkKind(kind), None, data)


async def _unclean() -> AsyncGenerator[Delta | str, None]:
    yield UNCLEAN_TEXT
    yield Delta(ChunkKind.TOOL_CALL, None, {"id": "1", "name": UNCLEAN_TEXT, "arguments": {UNCLEAN_TEXT: 1}})
    yield Delta(ChunkKind.TOOL_RESULT, None, {"id": "1", "result": [UNCLEAN_TEXT]})


async def _rubbish(name: str) -> AsyncGenerator[Any, None]:
    yield RUBBISH[name]


async def _wait(gate: str) -> AsyncGenerator[str, None]:
    while not Path(gate).exists():  # noqa: ASYNC110, ASYNC240  # The test is another process.
        await asyncio.sleep(0.005)
    return
    yield


async def _mark(name: str) -> AsyncGenerator[str, None]:
    Path(name).write_text("done")  # noqa: ASYNC240
    return
    yield


async def _hold(gate: str, mark: str) -> AsyncGenerator[str, None]:
    """Waits at a gate; marks that it was told to stop."""
    try:
        async for text in _wait(gate):
            yield text
    except asyncio.CancelledError:
        Path(mark).write_text("told to stop")  # noqa: ASYNC240
        raise


async def _stubborn(gate: str, text: str, mark: str) -> AsyncGenerator[str, None]:
    """Waits at a gate, whatever it is told, and then yields; marks what became of that."""
    while not Path(gate).exists():  # noqa: ASYNC240
        try:
            await asyncio.sleep(0.005)
        except asyncio.CancelledError:
            continue
    try:
        yield text
    finally:
        Path(mark).write_text("refused")  # noqa: ASYNC240


async def _fail(text: str) -> AsyncGenerator[str, None]:
    raise RuntimeError(text)
    yield


async def _exit() -> AsyncGenerator[str, None]:
    sys.exit("of the exception")
    yield


async def _fail_when_stopped(gate: str, text: str) -> AsyncGenerator[str, None]:
    try:
        async for nothing in _wait(gate):
            yield nothing
    finally:
        raise RuntimeError(text)


async def _words(count: int, seconds: float) -> AsyncGenerator[str, None]:
    """``0 1 2 … `` over some seconds, each word a delta."""
    for number in range(count):
        yield f"{number} "
        await asyncio.sleep(seconds / count)


async def _endless(size: int, mark: str) -> AsyncGenerator[str, None]:
    try:
        while True:
            yield "x" * size
    finally:
        Path(mark).write_text("closed")  # noqa: ASYNC240


async def _flood(count: int, size: int, progress: str) -> AsyncGenerator[str, None]:
    """``count`` numbered lines of ``size`` characters at once; a file says how many the server has taken."""
    for number in range(count):
        yield f"{number:0{size - 1}d}\n"
        Path(progress).write_text(str(number + 1))  # noqa: ASYNC240


_STEPS: dict[str, Callable[..., AsyncGenerator[Any, None]]] = {
    "approve": _approve,
    "give_up": _give_up,
    "usage": _usage,
    "text": _text,
    "textual": _textual,
    "data": _data,
    "unclean": _unclean,
    "rubbish": _rubbish,
    "wait": _wait,
    "mark": _mark,
    "hold": _hold,
    "stubborn": _stubborn,
    "fail": _fail,
    "exit": _exit,
    "fail_when_stopped": _fail_when_stopped,
    "words": _words,
    "endless": _endless,
    "flood": _flood,
}
