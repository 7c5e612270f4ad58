"""Finds the agent that ``--agent`` names, or makes the one that ``--model`` asks for."""

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any, cast

from context_server.agents.choice import Choice
from context_server.agents.protocol import Agent
from context_server.errors import AgentNotLoadable

BUILT_IN = {
    "demo": "context_server.agents.demo:demo",
    "metronome": "context_server.agents.metronome:metronome",
}
DEFAULT = "demo"
LIBRARY = "pydantic_ai"


def load_agent(name: str, choice: Choice | None = None) -> Agent:
    """The agent called ``demo`` or ``metronome``, or the callable or the agent of Pydantic AI at ``module:name``.

    With a model and the default name it is an agent without tools. The working directory is importable, so that
    ``--agent my_agent:reply`` finds ``./my_agent.py``.

    Raises:
        AgentNotLoadable: nothing is there, it does not import, it cannot be called, or it does not yield; a package, a
            model or a key is missing; or it is no agent of Pydantic AI and a model is chosen for it.
    """
    choice = choice or Choice()
    if choice.model_url and not choice.model:
        raise AgentNotLoadable("a URL of a model needs a model, written as openai-chat:NAME")
    if choice.model and name == DEFAULT:
        return _engine(None, choice)
    found = _find(name)
    if _is_of_the_library(found):
        return _with_model(name, _engine(found, choice))
    if hasattr(found, "workflows") and _is_of_the_library(found.agent):
        found.agent = _with_model(name, _engine(found.agent, choice))
    elif choice.is_of_the_engine:
        raise AgentNotLoadable(f"agent {name!r} takes no model and no MCP servers; only agents of Pydantic AI do")
    if not callable(found):
        raise AgentNotLoadable(f"agent {name!r} is not callable; it should be async def agent(history, run)")
    if _cannot_be_iterated(found) or _cannot_be_iterated(type(found).__call__):
        raise AgentNotLoadable(f"agent {name!r} is no async generator; it should be async def and yield its text")
    return cast("Agent", found)


def _with_model(name: str, engine: Any) -> Agent:
    """An agent of Pydantic AI that can answer.

    Raises:
        AgentNotLoadable: it has no model, and none was chosen.
    """
    if not engine.has_model:
        raise AgentNotLoadable(f"agent {name!r} has no model; give one by --model, or to the agent")
    return cast("Agent", engine)


def as_agent(found: Any) -> Agent:
    """An agent of this server as it is, and one of Pydantic AI in its wrapping."""
    return _engine(found, Choice()) if _is_of_the_library(found) else cast("Agent", found)


def _find(name: str) -> Any:
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
        return getattr(module, attribute)
    except AttributeError:
        raise AgentNotLoadable(f"agent {name!r}: module {module_name!r} has no {attribute!r}") from None


def _is_of_the_library(found: object) -> bool:
    """Whether it is an agent of Pydantic AI, which is imported only where somebody has done so already."""
    library = sys.modules.get(LIBRARY)
    if library is None:
        return False
    from context_server.agents.engine import EngineAgent

    return isinstance(found, (library.agent.AbstractAgent, EngineAgent))


def _engine(found: Any, choice: Choice) -> Agent:
    try:
        from context_server.agents.engine import engine_for
    except ImportError as error:
        raise AgentNotLoadable(f"models need an extra: pip install 'context-server[agents]' ({error})") from error
    return engine_for(found, choice)


def _cannot_be_iterated(function: object) -> bool:
    """Whether calling it surely gives no async iterator: ``async def`` without ``yield``, or ``yield`` without async.

    A plain function may return an async iterator, so it passes.
    """
    return inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function)
