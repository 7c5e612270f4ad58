"""Asks a person about the calls of a reply that wait for a decision.

The log says that a call waits, and the server whether it still does; a signal or a chunk only makes the asker look
again. So a question goes away by itself when another client decides, when time is up, or when the reply is cancelled.
"""

import asyncio
import json
import shlex
from typing import Any

from context_server.chat.display import Display
from context_server.chat.keyboard import Keyboard
from context_server.chat.wording import exact, harmless, short
from context_server.client import (
    ApprovalDecidedError,
    ApprovalInfo,
    ClientError,
    ContextClient,
    NotFoundError,
    ProblemError,
    TransportError,
    UnavailableError,
)

EXIT_UNDECIDED = 3
"""A call waits for a person, and there is nobody to ask."""

_STANDS = {
    "approved": "Approved elsewhere.",
    "denied": "Denied elsewhere.",
    "expired": "Nobody decided in time.",
    "cancelled": "Cancelled, with the reply.",
}


class Leaving(Exception):
    """The chat ends, and leaves the reply as it is."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


class Asker:
    """The questions of one reply.

    ``screen`` is held while a person is asked: what belongs to the reply is shown after.
    """

    def __init__(
        self, client: ContextClient, url: str, context_id: str, message_id: str, display: Display, keyboard: Keyboard
    ) -> None:
        self.screen = asyncio.Lock()
        self._client = client
        self._url = url.rstrip("/")
        self._context_id = context_id
        self._message_id = message_id
        self._display = display
        self._keyboard = keyboard
        self._due = asyncio.Event()
        self._places: dict[str, int] = {}

    def expect(self, call_id: str) -> None:
        """The log has come to a call that waits; they are asked about in this order."""
        self._places.setdefault(call_id, len(self._places))

    def look(self) -> None:
        """Something waits for a decision, or may have been decided."""
        self._due.set()

    async def run(self) -> None:
        """Asks whenever there is something to ask.

        Raises:
            Leaving: there is nobody to ask, or the person leaves.
        """
        while True:
            await self._due.wait()
            self._due.clear()
            async with self.screen:
                try:
                    while pending := await self._pending():
                        await self._decide(pending)
                except (TransportError, UnavailableError) as error:
                    self._display.notice(f"Not asked yet: {error}")
                    self.look()  # The client has waited long enough before it said so.
                except ClientError as error:
                    self._display.notice(f"Not asked: {error}")

    async def _pending(self) -> list[ApprovalInfo]:
        found = await self._client.approvals(self._context_id)
        pending = [approval for approval in found if approval.message_id == self._message_id]
        return sorted(pending, key=lambda approval: self._places.get(approval.tool_call_id, len(self._places)))

    async def _decide(self, pending: list[ApprovalInfo]) -> None:
        if not self._keyboard.interactive:
            self._display.notice(self._how_to_decide(pending))
            raise Leaving(EXIT_UNDECIDED)
        with self._display.paused():
            self._display.question(_question(pending[0], len(pending)))
            said = await self._ask(pending[0])
            self._display.notice(said)

    async def _ask(self, approval: ApprovalInfo) -> str:
        """Asks until it is decided; how."""
        prompt = "[a]pprove  [d]eny" + ("  [e]dit" if approval.editable else "") + " > "
        while True:
            answering = asyncio.create_task(self._keyboard.answer(prompt))
            watching = asyncio.create_task(self._no_longer_pending(approval))
            try:
                await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (answering, watching):
                    task.cancel()
                await asyncio.wait({answering, watching})
            if answering.cancelled():
                return _standing(watching.result())
            try:
                said = await self._obey(approval, answering.result())
            except ApprovalDecidedError as error:
                return _standing(error.approval)
            except NotFoundError:
                return "It is gone, with its context."
            except (ProblemError, TransportError) as error:
                said = None
                self._display.notice(f"Not decided: {error.detail if isinstance(error, ProblemError) else error}")
            if said is not None:
                return said

    async def _obey(self, approval: ApprovalInfo, answer: str | None) -> str | None:
        """Does what the person says; None when that decides nothing."""
        match answer if answer is None else answer.strip().lower():
            case None:
                raise Leaving(0)
            case "a" | "approve":
                await self._client.approve(self._context_id, approval.id)
                return "Approved."
            case "d" | "deny":
                note = await self._keyboard.answer("Why? (Enter: no note) > ")
                if note is None:
                    raise Leaving(0)
                await self._client.deny(self._context_id, approval.id, note=note.strip() or None)
                return "Denied."
            case "e" | "edit" if approval.editable:
                return await self._edit(approval)
        return None

    async def _edit(self, approval: ApprovalInfo) -> str | None:
        """Approves with arguments that the person has changed; None when that was given up by an empty line."""
        text = exact(dict(approval.arguments))
        while True:
            with self._keyboard.aloud():
                line = await self._keyboard.line("", text)
            if line is None:
                raise Leaving(0)
            if not line.strip():
                return None
            arguments, fault = _arguments_in(line)
            if arguments is not None:
                changed = None if arguments == approval.arguments else arguments
                await self._client.approve(self._context_id, approval.id, arguments=changed)
                return "Approved." if changed is None else f"Approved with {harmless(exact(changed))}"
            self._display.notice(f"That is no JSON object: {fault}. An empty line goes back.")
            text = line

    async def _no_longer_pending(self, approval: ApprovalInfo) -> ApprovalInfo | None:
        """Returns once it is decided, or gone: what stands then."""
        while True:
            await self._due.wait()
            self._due.clear()
            try:
                found = await self._client.approvals(self._context_id, include_decided=True)
            except NotFoundError:
                return None
            except ClientError:
                continue  # A connection that comes back looks again.
            stands = next((each for each in found if each.id == approval.id), None)
            if stands is None or stands.status != "pending":
                return stands

    def _how_to_decide(self, pending: list[ApprovalInfo]) -> str:
        """For whoever reads standard error: what waits, and two ways to decide."""
        lines = []
        for approval in pending:
            url = shlex.quote(f"{self._url}/contexts/{self._context_id}/approvals/{approval.id}")
            lines += [
                f"{short(approval.tool)} waits for an approval: {exact(dict(approval.arguments))}",
                f"  curl -X POST {url} -H 'Content-Type: application/json' -d '{{\"decision\": \"approve\"}}'",
            ]
        return "\n".join(
            [*lines, 'Send "deny" in place of "approve" to refuse, or decide in a chat on a terminal. The reply waits.']
        )


def _question(approval: ApprovalInfo, count: int) -> str:
    more = f" (the first of {count})" if count > 1 else ""
    return f"{short(approval.tool)} waits for your approval{more}:\n{exact(dict(approval.arguments), indent=2)}"


def _standing(approval: ApprovalInfo | None) -> str:
    if approval is None:
        return "It is gone, with its context."
    said = _STANDS.get(approval.status, f"It is {short(approval.status)}.")
    return f"{said} ({short(approval.note)})" if approval.note else said


def _arguments_in(line: str) -> tuple[dict[str, Any] | None, str]:
    """The arguments, or what is wrong with them."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        return None, str(error)
    return (found, "") if isinstance(found, dict) else (None, "it begins with { and ends with }")
