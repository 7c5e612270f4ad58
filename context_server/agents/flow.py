"""What a workflow takes its steps by: one after the other, each of them once, whatever happens between two.

A step that is over is in the log with how it ended. A function that is called again, since its run was suspended, gets
the same of it: the result, or the same exception. For the same reason only one step is open at any time, and one that
was cut off, as by a timeout around it, is the last: nobody could say how it ended.
"""

import asyncio
import inspect
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from context_server.agents.driving import AgentExited, deltas_of
from context_server.agents.flow_log import DENIED, ERROR, FINISHED, OK, STARTED, Record, Said, records_of
from context_server.agents.protocol import Agent, AgentFailed, AgentRun, Yielded
from context_server.records import (
    ApprovalRequest,
    ApprovalStatus,
    Chunk,
    ChunkKind,
    Delta,
    MessageStatus,
    Role,
    Suspend,
    Turn,
    Usage,
    unfinished_result,
)
from context_server.storable import clean_data


class CallFailed(Exception):
    """What the step ``name`` called has failed. A workflow may catch it and go on.

    What it was is the ``__cause__``, for the log only: when the workflow is called again, nobody knows it any more.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"The call of {name} failed.")
        self.name = name


class Denied(Exception):
    """A person has denied the call of a tool; ``note`` is what was said to it. A workflow may catch it and go on."""

    def __init__(self, tool: str, note: str | None) -> None:
        super().__init__(f"The call of {tool} was denied.")
        self.tool = tool
        self.note = note


class _Suspended(BaseException):
    """Ends the function where it waits for a person; not an Exception, so that no workflow takes it for a failure."""


class Flow:
    """What a workflow function takes its steps by."""

    def __init__(self, agent: Agent, history: Sequence[Turn], run: AgentRun, name: str) -> None:
        self.run = run
        self.total: int | None = None
        """How many steps there are, where the function knows and says so: clients show progress by it."""
        self._agent = agent
        self._history = list(history)
        self._name = name
        self._number = 0
        self._records = records_of(() if run.reply is None else run.reply.chunks)
        self._taker: asyncio.Task[Any] | None = None  # Who takes the step that is open.
        self._misuse: Exception | None = None  # It ends the reply, even where the function catches it.
        self._said: asyncio.Queue[Yielded | None] = asyncio.Queue()
        # One at a time: the function waits until what it has said is taken. Its end needs no room.
        self._room = asyncio.Semaphore(1)
        self._usage = Usage()

    async def yielded_by(self, work: Awaitable[None]) -> AsyncGenerator[Yielded]:
        """What the function says, while it works."""
        task = asyncio.ensure_future(self._complete(work))
        task.add_done_callback(lambda _: self._said.put_nowait(None))
        try:
            while (value := await self._said.get()) is not None:
                yield value
                if isinstance(value, Suspend):
                    return
                self._room.release()
            task.result()
        finally:
            under_way = {task, self._taker or task}
            for each in under_way:
                each.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)

    async def _tell(self, value: Yielded) -> None:
        await self._room.acquire()
        self._said.put_nowait(value)

    async def _complete(self, work: Awaitable[None]) -> None:
        failure: BaseException | None = None
        try:
            await work
        except _Suspended:
            return
        except Denied as error:
            raise AgentFailed("workflow-failed", str(error)) from None
        except CallFailed as error:
            failure = error.__cause__ or error  # Operators are told of what it was.
        except (SystemExit, KeyboardInterrupt) as error:
            raise AgentExited from error
        failure = failure or self._misuse
        if failure is not None:
            raise failure
        if self._taker not in (None, asyncio.current_task()) and not self._taker.done():
            msg = "a workflow ended before a step of it: await each"
            raise RuntimeError(msg)

    # The steps

    async def prompt(self, text: str, *, name: str = "prompt", is_shown: bool = True) -> str:
        """Has the agent answer ``text``, with the conversation so far; its answer.

        The answer is part of the reply; with ``is_shown`` false it is reasoning.

        Raises:
            AgentFailed: the agent raised it.
            CallFailed: the agent raised anything else.
        """
        record = self._begin(name)
        if record.ending is not None:
            return str(_again(record, record.ending))
        await self._say_started(record)
        said = Said(record, is_shown=is_shown)
        try:
            await self._answer(record, text, said)
        except AgentFailed as error:
            await self._close(said)
            await self._finish(record, ERROR, code=error.code, detail=error.detail)
            raise
        except Exception as error:
            await self._close(said)
            await self._finish(record, ERROR)
            raise CallFailed(name) from error
        answer = str(clean_data(said.answer))
        await self._finish(record, OK, result=answer)
        return answer

    async def _answer(self, record: Record, text: str, said: Said) -> None:
        turn = Turn(Role.USER, MessageStatus.COMPLETED, self.run.run_id, (Chunk(1, ChunkKind.TEXT, text),))
        run = replace(self.run, reply=None, approvals={})
        if record.chunks and self.run.reply is not None:  # Its reply is what it said in this step.
            run = replace(self.run, reply=replace(self.run.reply, chunks=said.chunks))
        before = self._usage
        async with aclosing(deltas_of(self._agent, [*self._history, turn], run)) as values:
            async for value in values:
                if isinstance(value, Suspend):
                    await self._suspend(value, said.mark())
                elif isinstance(value, Usage):
                    self._usage = _sum(before, value)  # At once: it counts also where the prompt fails.
                    await self._tell(self._usage)
                else:
                    await self._tell(said.logged(value))

    async def _close(self, said: Said) -> None:
        """Gives a result to the calls that a failed agent has left open, so that the workflow may go on."""
        for call_id in said.open_calls:
            await self._tell(Delta(ChunkKind.TOOL_RESULT, None, unfinished_result(call_id, "interrupted")))

    async def call(
        self,
        tool: Callable[..., Any],
        *,
        name: str | None = None,
        needs_approval: bool = False,
        is_editable: bool = False,
        **arguments: Any,
    ) -> Any:
        """Calls a function of yours with JSON arguments; its result as JSON has it.

        An async function runs on the event loop, a plain one in a thread, which is not stopped when the run is. With
        ``needs_approval`` a person decides first, and may change the arguments where it ``is_editable``.

        Raises:
            Denied: the person said no.
            CallFailed: the function raised an exception, or returned what is no JSON.
        """
        name = name if name is not None else str(getattr(tool, "__name__", type(tool).__name__))
        record = self._begin(name)
        if record.ending is not None:
            return _again(record, record.ending)
        await self._say_started(record)
        if needs_approval:
            arguments = await self._approved(record, arguments, is_editable=is_editable)
        else:
            call = {"id": _call_id(record), "name": name, "arguments": arguments}
            await self._tell(Delta(ChunkKind.TOOL_CALL, None, call))
        begun = asyncio.get_running_loop().time()
        try:
            result = json.loads(json.dumps(clean_data(await _called(tool, arguments))))
        except Exception as error:
            await self._say_result(record, ERROR, None, begun)
            await self._finish(record, ERROR)
            raise CallFailed(name) from error
        await self._say_result(record, OK, result, begun)
        await self._finish(record, OK, result=result)
        return result

    async def _approved(self, record: Record, arguments: Mapping[str, Any], *, is_editable: bool) -> dict[str, Any]:
        approval = self.run.approvals.get(_call_id(record))
        if approval is None:
            request = ApprovalRequest(
                call_id=_call_id(record), tool=record.name, arguments=arguments, editable=is_editable
            )
            await self._suspend(Suspend((request,)))
        elif approval.status is ApprovalStatus.APPROVED:
            return dict(approval.final_arguments)
        note = None if approval is None else approval.note
        await self._say_result(record, DENIED, note, asyncio.get_running_loop().time())
        await self._finish(record, DENIED, note=note)
        raise Denied(record.name, note)

    async def say(self, text: str) -> None:
        """Adds text to the reply."""
        record = self._begin("say")
        if record.ending is None:
            await self._say_started(record)
            await self._tell(Delta(ChunkKind.TEXT, text))
            await self._finish(record, OK, result=None)

    # The log

    def _begin(self, name: str) -> Record:
        """What the log has of the next step, which is open from now on where it is not over."""
        if self._misuse is None and self._taker is not None:
            msg = f"step {self._number} of {self._name} is not over, and a workflow takes one step at a time"
            self._misuse = RuntimeError(msg)
        if self._misuse is not None:
            raise self._misuse
        self._number += 1
        record = self._records.get(self._number) or Record(self._number, name)
        if record.name != name:
            detail = f"Step {self._number} of {self._name} was another one when it began."
            self._misuse = AgentFailed("workflow-changed", detail)
            raise self._misuse
        if record.ending is None:
            self._taker = asyncio.current_task()
        return record

    async def _say_started(self, record: Record) -> None:
        if record.number not in self._records:
            total = {} if self.total is None else {"total": self.total}
            data = {"number": record.number, **total, "status": STARTED, "name": record.name, "workflow": self._name}
            await self._tell(Delta(ChunkKind.STEP, None, data))

    async def _say_result(self, record: Record, status: str, result: Any, begun: float) -> None:
        seconds = round(asyncio.get_running_loop().time() - begun, 3)
        data = {"id": _call_id(record), "status": status, "result": result, "seconds": seconds}
        await self._tell(Delta(ChunkKind.TOOL_RESULT, None, data))

    async def _finish(self, record: Record, outcome: str, **more: Any) -> None:
        data = {"number": record.number, "status": FINISHED, "name": record.name, "workflow": self._name}
        await self._tell(Delta(ChunkKind.STEP, None, {**data, "outcome": outcome, **more}))
        self._taker = None

    async def _suspend(self, suspend: Suspend, mark: Delta | None = None) -> None:
        """Says that the run waits for a person, and ends the function."""
        if mark is not None:
            await self._tell(mark)
        await self._tell(suspend)
        raise _Suspended


def _again(record: Record, ending: Mapping[str, Any]) -> Any:
    """What a step that is over gave.

    Raises:
        AgentFailed, CallFailed, Denied: as it ended.
    """
    match ending.get("outcome"):
        case "error" if "code" in ending:
            raise AgentFailed(str(ending["code"]), str(ending["detail"]))
        case "error":
            raise CallFailed(record.name)
        case "denied":
            raise Denied(record.name, ending["note"])
    return ending["result"]


def _call_id(record: Record) -> str:
    return f"step-{record.number}"


async def _called(tool: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """What the function gives; a plain one may block, so it runs in a thread."""
    try:
        if inspect.iscoroutinefunction(tool):
            return await tool(**arguments)
        result = await asyncio.to_thread(_in_thread, tool, arguments)
        return await result if inspect.isawaitable(result) else result
    except (SystemExit, KeyboardInterrupt) as error:
        raise AgentExited from error


def _in_thread(tool: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    try:
        return tool(**arguments)
    except StopIteration as error:  # No future can hold it: who waits for the thread would do so for ever.
        msg = "the function raised StopIteration"
        raise RuntimeError(msg) from error


def _sum(before: Usage, usage: Usage) -> Usage:
    return Usage(
        input_tokens=before.input_tokens + usage.input_tokens,
        output_tokens=before.output_tokens + usage.output_tokens,
        requests=before.requests + usage.requests,
        tool_calls=before.tool_calls + usage.tool_calls,
        estimated=before.estimated or usage.estimated,
    )
