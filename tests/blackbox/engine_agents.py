"""An agent of Pydantic AI; its model is a setting, and its tools leave files in the working directory."""

import asyncio
from pathlib import Path
from typing import Any

from pydantic_ai import Agent, RunContext
from pydantic_ai.exceptions import ApprovalRequired

agent: Agent[Any, Any] = Agent(instructions="Use the tools.")


@agent.tool_plain(metadata={"read_only": True})
def look(city: str) -> dict[str, Any]:
    """The weather in a city."""
    return {"city": city, "celsius": 4}


@agent.tool_plain(requires_approval=True, metadata={"editable_arguments": True})
def send(to: str) -> str:
    """Sends a message."""
    with Path("sent").open("a") as file:
        file.write(f"{to}\n")
    return f"sent to {to}"


@agent.tool_plain
async def wait() -> str:
    """Waits for ever."""
    Path("waiting").touch()  # noqa: ASYNC240
    await asyncio.Event().wait()
    return ""


@agent.tool
def pay(ctx: RunContext[Any], euros: int) -> str:
    """Pays; much money only when a person has approved."""
    if euros > 100 and not ctx.tool_call_approved:
        raise ApprovalRequired
    return f"paid {euros}"
