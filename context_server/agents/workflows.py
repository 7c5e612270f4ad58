"""Workflows: a named sequence of prompts and tools with conditions, as a plain Python function beside an agent.

    workflows = Workflows(agent)

    @workflows.workflow
    async def release(flow: Flow, version: str) -> None:
        notes = await flow.prompt(f"Write the notes of {version}.")
        if "breaking" in notes:
            await flow.call(publish, version=version, needs_approval=True)

    context-server serve --agent my_module:workflows

A message ``{"type": "workflow", "name": "release", "input": {"version": "1.2"}}`` starts it; any other goes to the
agent. Each ``await flow.…`` is a step, numbered in order, and recorded in the log with how it ended. When a run that
was suspended goes on, the function is called again, and steps that are in the log give what they gave, without being
taken again; so it has to take the same steps for the same input and results (as in Temporal, DBOS and others). A
clock, a random number or a file is read in a step, by ``flow.call``.
"""

import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from functools import wraps
from typing import Any, TypeVar

from pydantic import ConfigDict, ValidationError, validate_call

from context_server.agents.driving import deltas_of
from context_server.agents.flow import Flow
from context_server.agents.loading import as_agent
from context_server.agents.protocol import Agent, AgentFailed, AgentRun, Yielded
from context_server.records import Role, Turn

WorkflowFunction = Callable[..., Coroutine[Any, Any, None]]
F = TypeVar("F", bound=WorkflowFunction)


class Workflows:
    """An agent, and the workflows that messages may start in its place."""

    def __init__(self, agent: Any) -> None:
        self.agent: Agent = as_agent(agent)
        self.workflows: dict[str, WorkflowFunction] = {}

    def workflow(self, function: F) -> F:
        """Makes a workflow of ``async def function(flow, …)``; its name is the function's."""
        if not inspect.iscoroutinefunction(function):
            msg = f"workflow {function.__name__!r} should be async def function(flow, …)"
            raise TypeError(msg)
        self.workflows[function.__name__] = function
        return function

    async def __call__(self, history: Sequence[Turn], run: AgentRun) -> AsyncGenerator[Yielded]:
        """Runs the workflow that the message starts, or has the agent answer.

        Raises:
            AgentFailed: ``workflow-unknown``, ``workflow-input``, ``workflow-changed``, ``workflow-failed``; or as the
                agent's.
        """
        started = _asked(history, run).workflow
        yielded: AsyncGenerator[Yielded]
        if started is None:
            yielded = deltas_of(self.agent, history, run)
        else:
            flow = Flow(self.agent, history, run, started.name)
            yielded = flow.yielded_by(self._begin(flow, started.name, started.input))
        async with aclosing(yielded) as values:
            async for value in values:
                yield value

    def _begin(self, flow: Flow, name: str, given: Mapping[str, Any]) -> Awaitable[None]:
        function = self.workflows.get(name)
        if function is None:
            known = ", ".join(sorted(self.workflows)) or "none"
            raise AgentFailed("workflow-unknown", f"There is no workflow of that name; there are: {known}.")
        takes = f"{name} takes {', '.join(map(str, _parameters(function).values())) or 'no input'}"
        try:
            inspect.signature(function).bind(flow, **given)
            return _validated(function)(flow, **given)
        except TypeError:
            raise AgentFailed("workflow-input", f"{takes}.") from None
        except ValidationError as error:
            raise AgentFailed("workflow-input", f"{takes}; {_reason(function, error)}.") from None


def _asked(history: Sequence[Turn], run: AgentRun) -> Turn:
    """The message to be answered: the last; but of a run that was suspended, what it has taken since follows it."""
    if run.reply is None:
        return history[-1]
    return next((turn for turn in reversed(history) if turn.role is Role.USER and not turn.steers), history[-1])


def _validated(function: WorkflowFunction) -> WorkflowFunction:
    """The function, which checks what it is called with at once and not when it is awaited."""

    @wraps(function)
    def begin(*args: Any, **kwargs: Any) -> Coroutine[Any, Any, None]:
        return function(*args, **kwargs)

    return validate_call(config=ConfigDict(arbitrary_types_allowed=True))(begin)


def _parameters(function: WorkflowFunction) -> Mapping[str, inspect.Parameter]:
    """What a workflow takes, by name: ``version: str``."""
    parameters = inspect.signature(function, eval_str=True).parameters
    return {name: parameters[name] for name in list(parameters)[1:]}


def _reason(function: WorkflowFunction, error: ValidationError) -> str:
    """``version: string_type``: of which parameter, and why. The rest of the place, and the words, may be the input."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    name = first["loc"][0] if first["loc"] else None
    return f"{name}: {first['type']}" if name in _parameters(function) else str(first["type"])
