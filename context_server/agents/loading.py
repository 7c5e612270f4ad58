"""Finds the agent that ``--agent`` names."""

import importlib
import inspect
import sys
from pathlib import Path
from typing import cast

from context_server.agents.protocol import Agent
from context_server.errors import AgentNotLoadable

BUILT_IN = {
    "demo": "context_server.agents.demo:demo",
    "metronome": "context_server.agents.metronome:metronome",
}


def load_agent(name: str) -> Agent:
    """The agent called ``demo`` or ``metronome``, or the callable at ``module:name``.

    The working directory is importable, so that ``--agent my_agent:reply`` finds ``./my_agent.py``.

    Raises:
        AgentNotLoadable: nothing is there, it does not import, it cannot be called, or it does not yield.
    """
    target = BUILT_IN.get(name, name)
    module_name, separator, attribute = target.partition(":")
    if not separator or not module_name or not attribute:
        raise AgentNotLoadable(f"agent {name!r} is neither built in ({', '.join(BUILT_IN)}) nor written as module:name")
    if name not in BUILT_IN and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # It is shown as one line.
        raise AgentNotLoadable(f"agent {name!r} cannot be imported: {reason}") from error
    try:
        found = getattr(module, attribute)
    except AttributeError:
        raise AgentNotLoadable(f"agent {name!r}: module {module_name!r} has no {attribute!r}") from None
    if not callable(found):
        raise AgentNotLoadable(f"agent {name!r} is not callable; it should be async def agent(history, run)")
    if _cannot_be_iterated(found) or _cannot_be_iterated(type(found).__call__):
        raise AgentNotLoadable(f"agent {name!r} is no async generator; it should be async def and yield its text")
    return cast("Agent", found)


def _cannot_be_iterated(function: object) -> bool:
    """Whether calling it surely gives no async iterator: ``async def`` without ``yield``, or ``yield`` without async.

    A plain function may return an async iterator, so it passes.
    """
    return inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function)
