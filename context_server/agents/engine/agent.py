"""An agent of Pydantic AI as one of this server: from the log to a conversation, and from its events to deltas."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import pydantic_ai
import structlog
from pydantic_ai.agent import AbstractAgent
from pydantic_ai.models import Model
from pydantic_ai.toolsets import AbstractToolset

from context_server.agents.engine.failures import UNKNOWN, ModelFailed, Retrying
from context_server.agents.engine.history import rebuild
from context_server.agents.engine.writing import Means, Writing
from context_server.agents.protocol import AgentRun, Yielded
from context_server.records import Turn

log = structlog.get_logger("context_server.agents")


def _the_run(run: AgentRun) -> AgentRun:
    return run


class EngineAgent:
    """Writes replies by an agent of Pydantic AI.

    ``deps`` makes what the agent's tools find in ``ctx.deps``; by default that is the ``AgentRun``. ``model`` takes the
    place of the agent's own, and ``models`` are those that a context may ask for, by name.
    """

    def __init__(
        self,
        agent: AbstractAgent[Any, Any],
        *,
        deps: Callable[[AgentRun], Any] = _the_run,
        model: Model | None = None,
        models: Mapping[str, Model] | None = None,
        toolsets: Sequence[AbstractToolset[Any]] = (),
        retrying: Retrying | None = None,
    ) -> None:
        pydantic_ai.BANNER_ENABLED = False  # It greets whoever develops; here nobody reads it.
        self.agent = agent
        self._deps = deps
        self._model = model
        self._models = models or {}
        self._toolsets = tuple(toolsets)
        self._retrying = retrying or Retrying()

    @property
    def has_model(self) -> bool:
        """Whether it can answer without being given a model."""
        return self._model is not None or getattr(self.agent, "model", None) is not None

    def furnished(
        self,
        *,
        model: Model | None,
        models: Mapping[str, Model],
        toolsets: Sequence[AbstractToolset[Any]],
        retrying: Retrying,
    ) -> "EngineAgent":
        """The same agent with what the server's settings add to it."""
        return EngineAgent(
            self.agent,
            deps=self._deps,
            model=model or self._model,
            models={**self._models, **models},
            toolsets=(*self._toolsets, *toolsets),
            retrying=retrying,
        )

    async def __call__(self, history: Sequence[Turn], run: AgentRun) -> AsyncGenerator[Yielded]:
        """Writes one reply.

        Raises:
            ModelFailed: the model did, and was not to be asked again; or the context asks for one that is not here.
        """
        chosen = self._chosen(run.model)
        writing = Writing(Means(agent=self.agent, model=chosen, toolsets=self._toolsets), run, self._deps(run))
        system = self._system(chosen)
        retried = 0
        while True:
            conversation = await rebuild(history, run, system)
            try:
                async with aclosing(writing.attempt(conversation)) as pieces:
                    async for piece in pieces:
                        yield piece
            except ModelFailed as failure:
                pause = None if writing.begun else self._retrying.pause_seconds(failure, retried)
                if pause is None:
                    raise
                log.info("model_asked_again", run_id=run.run_id, code=failure.code, pause_seconds=round(pause, 3))
            else:
                return
            retried += 1
            await asyncio.sleep(pause)

    def _chosen(self, name: str | None) -> Model | None:
        """The model for a context; None for the agent's own."""
        if name is None:
            return self._model
        if name not in self._models:
            raise ModelFailed(UNKNOWN, "This server does not have the model that the context asks for.")
        return self._models[name]

    def _system(self, chosen: Model | None) -> str | None:
        """The name of the model's provider, where it is known before the first request."""
        model = chosen or getattr(self.agent, "model", None)
        return model.system if isinstance(model, Model) else None
