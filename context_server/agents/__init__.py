"""What writes replies: the Agent protocol, the loader, and the built-in agents."""

from context_server.agents.choice import Choice
from context_server.agents.flow import CallFailed, Denied, Flow
from context_server.agents.loading import load_agent
from context_server.agents.protocol import Agent, AgentFailed, AgentRun, Look
from context_server.agents.workflows import Workflows

__all__ = [
    "Agent",
    "AgentFailed",
    "AgentRun",
    "CallFailed",
    "Choice",
    "Denied",
    "Flow",
    "Look",
    "Workflows",
    "load_agent",
]
