"""Takes deltas out of an agent, whatever kind of iterator it is and whatever it yields or raises."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, nullcontext
from typing import Any

from context_server.agents.protocol import Agent, AgentRun
from context_server.records import ChunkKind, Delta, Turn


class AgentExited(Exception):
    """The agent raised what ends a process, such as by ``sys.exit``; out of a task it would end this one."""


async def deltas_of(agent: Agent, history: Sequence[Turn], run: AgentRun) -> AsyncGenerator[Delta]:
    """What the agent yields, each as a delta; an agent that is a generator is closed in the end.

    Raises:
        AgentExited: it raised SystemExit or KeyboardInterrupt.
        TypeError, ValueError: it yielded something else than ``str`` or a ``Delta`` of a known kind.
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


def _as_delta(value: Delta | str) -> Delta:
    if isinstance(value, str):
        return Delta(ChunkKind.TEXT, value)
    if isinstance(value, Delta):
        return Delta(ChunkKind(value.kind), value.text, value.data)
    msg = f"an agent yields str or Delta, not {type(value).__name__}"
    raise TypeError(msg)
