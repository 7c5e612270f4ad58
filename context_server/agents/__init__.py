"""What writes replies: the Agent protocol, the loader, and the two built-in agents."""

from context_server.agents.loading import load_agent
from context_server.agents.protocol import Agent, AgentRun

__all__ = ["Agent", "AgentRun", "load_agent"]
