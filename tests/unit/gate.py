"""An agent that waits, for tests of what happens while a run is on."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.unit.rooms import Rooms, open_rooms, until


class Gate:
    """An agent that says a word for each run and then waits until it is let go; it knows what became of it."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.stopped: list[str] = []
        self.open = asyncio.Event()

    async def __call__(self, history, run):
        self.begun.append(run.run_id)
        try:
            yield "word "
            await self.open.wait()
            yield "end"
        except (asyncio.CancelledError, GeneratorExit):
            self.stopped.append(run.run_id)
            raise

    async def has_begun(self, count: int = 1) -> None:
        async def reached() -> bool:
            return len(self.begun) >= count

        await until(reached)


@asynccontextmanager
async def gate_rooms(folder: Path, **options: Any) -> AsyncIterator[tuple[Rooms, Gate]]:
    """The rooms with a ``Gate`` as their agent."""
    gate = Gate()
    async with open_rooms(folder, gate, **options) as rooms:
        yield rooms, gate
