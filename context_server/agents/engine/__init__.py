"""The engine: replies by agents of Pydantic AI. Nothing imports this room until such an agent is chosen."""

from context_server.agents.engine.agent import EngineAgent
from context_server.agents.engine.choosing import engine_for

__all__ = ["EngineAgent", "engine_for"]
