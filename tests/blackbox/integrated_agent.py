"""The agent of the integration list: tools of every sort, and a workflow; its model is a setting."""

import asyncio
from pathlib import Path
from typing import Any

from pydantic_ai import Agent

from context_server.agents import Flow, Workflows

agent: Agent[Any, Any] = Agent(instructions="Use the tools.")


@agent.tool_plain(metadata={"read_only": True})
async def look(city: str) -> dict[str, Any]:
    """The weather in a city."""
    return {"city": city, "celsius": 4}


@agent.tool_plain(requires_approval=True)
async def send(to: str) -> str:
    """Sends a message."""
    with Path("sent").open("a") as file:  # noqa: ASYNC230 - one line
        file.write(f"{to}\n")
    return f"sent to {to}"


@agent.tool_plain
async def nap() -> str:
    """Takes its time."""
    await asyncio.sleep(60)
    return "rested"


workflows = Workflows(agent)


@workflows.workflow
async def trip(flow: Flow, city: str) -> None:
    """Looks, and packs when it is cold."""
    weather = await flow.call(look, city=city)
    await flow.prompt(f"Pack for {city}." if weather["celsius"] < 10 else f"Go to {city}.")
