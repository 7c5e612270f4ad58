"""Shows one reply as it is written: its text, what the agent thinks, its steps and tools, and how it ends."""

import asyncio
import contextlib
import time
from typing import Any

from context_server.chat.asking import Asker, Leaving
from context_server.chat.display import Display
from context_server.chat.wording import call_line, ending, error_line, result_line, short, step_line
from context_server.client import Chunk, ClientError, ContextClient, Signal, TransportError

STATES = {
    "queued": "waiting for its turn",
    "thinking": "thinking…",
    "streaming": "writing…",
    "calling_tool": "calling a tool…",
    "awaiting_approval": "waiting for an approval",
    "cancelling": "cancelling…",
}


class ShownReply:
    """One reply on the display, from its first chunk to its end."""

    def __init__(
        self,
        client: ContextClient,
        context_id: str,
        message_id: str,
        display: Display,
        asker: Asker,
        *,
        shows_reasoning: bool,
    ) -> None:
        self._client = client
        self._context_id = context_id
        self._message_id = message_id
        self._display = display
        self._asker = asker
        self._shows_reasoning = shows_reasoning
        self._folded = 0
        self._state = ""
        self._step = ""
        self._running: dict[str, tuple[str, str, float]] = {}
        self._asked_for: set[str] = set()

    async def show(self) -> str | None:
        """Shows all of it; what is to be said about the end.

        Raises:
            Leaving: the person has had enough, or is needed and not there.
            TransportError: the server is lost.
        """
        outcome = None
        error: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                asking = group.create_task(self._asker.run())
                outcome = await self._follow()
                asking.cancel()
        except* Leaving as left:
            error = left.exceptions[0]
        except* TransportError as lost:
            error = lost.exceptions[0]
        except* ClientError as failed:
            outcome = f"({failed.exceptions[0]})"
        if error is not None:
            raise error
        return outcome

    async def _follow(self) -> str | None:
        pages = self._client.pages(
            self._context_id,
            self._message_id,
            view="chunks",
            on_signal=self._signalled,
            on_connection=self._connection_changed,
        )
        async with contextlib.aclosing(pages):
            async for page in pages:
                if self._asked_for:
                    self._asker.look()  # What is asked may be decided.
                async with self._asker.screen:
                    for chunk in page.chunks:
                        self._show_chunk(chunk)
                    self._show_status()
                if self._asked_for:
                    self._asker.look()
        self._unfold()
        if page.status == "completed":
            return None
        return ending(await self._client.get_message(self._context_id, self._message_id))

    def _show_chunk(self, chunk: Chunk) -> None:
        data = chunk.data or {}
        if chunk.kind != "reasoning":
            self._unfold()
        match chunk.kind:
            case "text":
                self._display.write(chunk.text or "")
            case "reasoning" if self._shows_reasoning:
                self._display.reason(chunk.text or "")
            case "reasoning":
                self._folded += len(chunk.text or "")
            case "tool_call":
                self._called(data)
            case "tool_result":
                self._returned(data)
            case "step" if (line := step_line(data)) is not None:
                self._step = line
                if data.get("number") != 1 or "total" in data:  # That there is a first step says nothing.
                    self._display.note(line)
            case "error":
                self._display.note(error_line(data))

    def _called(self, data: Any) -> None:
        call_id, name = str(data.get("id")), str(data.get("name", "tool"))
        line = call_line(name, data.get("arguments"))
        self._running[call_id] = (name, line, time.monotonic())
        if "approval" in data:
            self._asked_for.add(call_id)
            self._asker.expect(call_id)
        self._display.note(f"→ {line}")

    def _returned(self, data: Any) -> None:
        call_id = str(data.get("id"))
        name, _, _ = self._running.pop(call_id, ("tool", "", 0.0))
        self._asked_for.discard(call_id)
        self._display.note(result_line(short(name), data))

    def _unfold(self) -> None:
        if self._folded:
            self._display.note(f"(reasoning of {self._folded} characters; /reasoning on shows it)")
            self._folded = 0

    def _show_status(self) -> None:
        running = [(line, since) for key, (_, line, since) in self._running.items() if key not in self._asked_for]
        words, since = (running[0][0], running[0][1]) if running else (self._state, None)
        self._display.status(" · ".join(each for each in (self._step, words) if each), since=since)

    def _signalled(self, told: Signal) -> None:
        if told.type == "state_changed" and told.new_state is not None:
            self._state = STATES.get(told.new_state, "")
            self._show_status()
        if told.type in ("state_changed", "context_changed", "context_deleted") and self._asked_for:
            self._asker.look()

    def _connection_changed(self, connected: bool) -> None:
        if not connected:
            self._display.status("connection lost, resuming…", trouble=True)
            return
        self._show_status()
        if self._asked_for:
            self._asker.look()
