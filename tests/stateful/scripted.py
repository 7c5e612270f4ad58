"""An agent that does what the test says, one step at a time, and remembers what it yielded."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence
from enum import Enum

from context_server.agents import AgentRun
from context_server.records import Delta, Turn


class Stop(Enum):
    """How a script ends."""

    RETURN = "return"
    RAISE = "raise"


Step = str | Delta | Stop


class ScriptedAgent:
    """Yields the steps of its replies' scripts as they come in; ``written`` is the text yielded for each reply."""

    def __init__(self, scripts: Mapping[str, Sequence[Step]] | None = None) -> None:
        self.written: dict[str, str] = {}
        self._steps: defaultdict[str, asyncio.Queue[Step]] = defaultdict(asyncio.Queue)
        for message_id, steps in (scripts or {}).items():
            for step in steps:
                self.tell(message_id, step)

    def tell(self, message_id: str, step: Step) -> None:
        """Adds a step to a reply's script; it is taken when the run is on."""
        self._steps[message_id].put_nowait(step)

    async def __call__(self, history: Sequence[Turn], run: AgentRun) -> AsyncIterator[Delta | str]:
        self.written[run.message_id] = ""
        while True:
            step = await self._steps[run.message_id].get()
            if step is Stop.RETURN:
                return
            if step is Stop.RAISE:
                raise RuntimeError("The script says so.")
            if isinstance(step, str):
                self.written[run.message_id] += step
            yield step
