"""Takes deltas out of an agent, whatever kind of iterator it is and whatever it yields or raises."""

import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, nullcontext
from typing import Any

from context_server.agents.protocol import Agent, AgentRun, Yielded
from context_server.records import MAX_INTEGER, ApprovalRequest, ChunkKind, Delta, Suspend, Turn, Usage
from context_server.storable import clean_data


class AgentExited(Exception):
    """The agent raised what ends a process, such as by ``sys.exit``; out of a task it would end this one."""


async def deltas_of(agent: Agent, history: Sequence[Turn], run: AgentRun) -> AsyncGenerator[Delta | Usage | Suspend]:
    """What the agent yields, text as deltas; an agent that is a generator is closed in the end.

    Raises:
        AgentExited: it raised SystemExit or KeyboardInterrupt.
        TypeError, ValueError: it yielded none of what an agent may, a ``Delta`` of an unknown kind, or a ``Suspend``
            that nobody could decide on.
        Whatever else the agent raises.
    """
    try:
        yielded = agent(history, run)
        closing: Any = aclosing(yielded) if hasattr(yielded, "aclose") else nullcontext()
        async with closing:
            async for value in yielded:
                yield _as_delta(value)
    except (SystemExit, KeyboardInterrupt) as error:
        raise AgentExited from error


def _as_delta(value: Yielded) -> Delta | Usage | Suspend:
    if isinstance(value, str):
        return Delta(ChunkKind.TEXT, value)
    if isinstance(value, Delta):
        return Delta(ChunkKind(value.kind), value.text, value.data)
    if isinstance(value, Suspend):
        return _checked_suspend(value)
    if isinstance(value, Usage):
        return _checked_usage(value)
    msg = f"an agent yields str, Delta, Usage or Suspend, not {type(value).__name__}"
    raise TypeError(msg)


def _checked_usage(usage: Usage) -> Usage:
    numbers = (usage.input_tokens, usage.output_tokens, usage.requests, usage.tool_calls)
    if not all(type(number) is int and 0 <= number <= MAX_INTEGER for number in numbers):
        msg = f"a Usage holds whole numbers from 0 to {MAX_INTEGER}"
        raise TypeError(msg)
    if not isinstance(usage.estimated, bool):
        msg = "a Usage is estimated or not: True or False"
        raise TypeError(msg)
    return usage


def _checked_suspend(suspend: Suspend) -> Suspend:
    """The suspension, if it asks for something that can be shown, stored and told apart by the ids of its calls."""
    requests: Any = suspend.requests  # Whatever an agent put there.
    if not isinstance(requests, tuple | list) or not requests:
        msg = "a Suspend asks for approval of one call or more"
        raise TypeError(msg)
    if not all(map(_is_request, requests)):
        msg = "a Suspend holds ApprovalRequests: call_id and tool are text, arguments an object, editable True or False"
        raise TypeError(msg)
    for request in requests:
        json.dumps(clean_data(request.arguments))
    if len({request.call_id for request in requests}) < len(requests):
        msg = "each call of a Suspend has an id of its own"
        raise ValueError(msg)
    return suspend


def _is_request(request: Any) -> bool:
    kinds = {"call_id": str, "tool": str, "editable": bool, "arguments": Mapping}
    return isinstance(request, ApprovalRequest) and all(
        isinstance(getattr(request, name), kind) for name, kind in kinds.items()
    )
