"""Makes the agent that the settings ask for: which model, which servers of tools."""

import os
import shlex
import shutil
from typing import Any

from pydantic_ai import Agent as LibraryAgent
from pydantic_ai.agent import AbstractAgent
from pydantic_ai.exceptions import UserError
from pydantic_ai.models import Model, infer_model
from pydantic_ai.toolsets import AbstractToolset

from context_server.agents.choice import Choice
from context_server.agents.engine.agent import EngineAgent
from context_server.agents.engine.failures import Retrying
from context_server.errors import AgentNotLoadable

COMPATIBLE = "openai-compatible"
"""How the provider at ``model_url`` is called in the log."""
_AT_A_URL = ("openai-chat:", "openai:", "openai-responses:")
_NO_KEY = "unused"
"""Local servers want none, and the SDK wants one."""


def engine_for(found: AbstractAgent[Any, Any] | EngineAgent | None, choice: Choice) -> EngineAgent:
    """The agent that was found, or one without tools, with what the settings add.

    Raises:
        AgentNotLoadable: the model or a server of tools cannot be had, or the agent has no model.
    """
    models = {name: model_for(name, _url_of(name, choice)) for name in {choice.model, *choice.models} if name}
    engine = found if isinstance(found, EngineAgent) else EngineAgent(found or LibraryAgent())
    return engine.furnished(
        model=models.get(choice.model),
        models=models,
        toolsets=[toolset_for(server) for server in choice.mcp],
        retrying=Retrying(retries=choice.model_retries),
    )


def _url_of(name: str, choice: Choice) -> str:
    """Where to look for a model: at the URL of the settings, but for further ones of other providers."""
    return choice.model_url if name == choice.model or name.startswith(_AT_A_URL) else ""


def model_for(name: str, url: str) -> Model:
    """The model of that name, ``provider:name``; with ``url`` that of an OpenAI-compatible server there.

    Keys come from the environment, by the names that the provider gives them.

    Raises:
        AgentNotLoadable: there is no such provider, its package is missing, or its key is.
    """
    try:
        return _model_at(name, url) if url else infer_model(name)
    except (UserError, ImportError, ValueError) as error:
        reason = " ".join(str(error).split())  # It is shown as one line.
        raise AgentNotLoadable(f"model {name!r}: {reason}") from error


def _model_at(name: str, url: str) -> Model:
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai_compatible import OpenAICompatibleProvider

    if not url.startswith(("http://", "https://")):
        raise AgentNotLoadable("the URL of a model begins with http:// or https://")
    kind, separator, model = name.partition(":")
    key = os.environ.get("OPENAI_API_KEY") or _NO_KEY
    provider = OpenAICompatibleProvider(COMPATIBLE, base_url=url, api_key=key)
    if separator and model:
        match kind:
            case "openai-chat":
                return OpenAIChatModel(model, provider=provider)
            case "openai" | "openai-responses":
                return OpenAIResponsesModel(model, provider=provider)
    raise AgentNotLoadable(f"model {name!r}: with a URL it is written as openai-chat:NAME (or openai:NAME)")


def toolset_for(server: str) -> AbstractToolset[Any]:
    """The tools of an MCP server: at a URL, or of a command that is started and spoken to by its standard streams.

    Raises:
        AgentNotLoadable: the library's extra is missing, or there is no such command.
    """
    try:
        from fastmcp.client.transports import StdioTransport  # type: ignore[import-not-found]  # not among the tests' packages
        from pydantic_ai.mcp import MCPToolset
    except ImportError as error:
        raise AgentNotLoadable("tools of MCP servers need an extra: pip install 'pydantic-ai-slim[mcp]'") from error
    if server.startswith(("http://", "https://")):
        return MCPToolset(server)
    try:
        command, *arguments = shlex.split(server)
    except ValueError:
        raise AgentNotLoadable("the command of an MCP server is empty, or has an open quotation mark") from None
    found = shutil.which(command)
    if found is None:  # It is not repeated: people write keys before commands.
        raise AgentNotLoadable("the command of an MCP server is not found; it begins with the program's name")
    return MCPToolset(StdioTransport(found, arguments))
