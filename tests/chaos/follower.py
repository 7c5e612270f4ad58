"""A client that posts, follows and resumes by itself, on any of several nodes, and writes down all that it was told."""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from tests.chaos import wire
from tests.chaos.history import Followed, History, Operation, Outcome

Prompt = Callable[[random.Random, int], str]
_COME_BACK_SECONDS = (0.01, 0.05)
_NOTHING_DONE = (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.INSUFFICIENT_STORAGE)


def quick(dice: random.Random, number: int) -> str:
    """The prompt of a reply that lasts for less than a second."""
    return f"words={dice.randint(60, 200)} rate=200 seed={number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """How a client behaves."""

    prompt: Prompt = quick
    patience_seconds: float = wire.ANSWER_SECONDS
    """How long it waits for an answer."""
    silence_seconds: float = 2.5 * 15
    """How long it stays with a stream that says nothing: two and a half heartbeats."""


class Refused(Exception):
    """The server gave an answer that a careful client must never get."""


class Follower:
    """Converses in one context until it is told to stop: one message after the other, one pull at a time.

    It posts, streams and pulls at ports of its own choice, others for each message, and goes to another one when one
    fails.
    """

    def __init__(
        self,
        ports: Sequence[int],
        context_id: str,
        dice: random.Random,
        habits: Habits | None = None,
        **ports_for: Sequence[int],
    ) -> None:
        """``ports_for`` are other ports for one kind of request: ``post``, ``stream`` or ``pull``."""
        self.history = History(context_id)
        self._dice = dice
        self._habits = habits or Habits()
        self._ports = {kind: ports_for.get(kind, ports) for kind in ("post", "stream", "pull")}
        self._doors = {kind: dice.choice(known) for kind, known in self._ports.items()}
        self._stopping = False
        self._moved = asyncio.Event()

    async def run(self) -> None:
        """Converses; ends after the reply during which ``stop`` was called."""
        try:
            while not self._stopping:
                reply = await self._post()
                while not reply.ended:
                    await self._stream(reply)
        except Refused as refusal:
            self.history.refused.append(str(refusal))

    def stop(self) -> None:
        """Lets it end after the present reply."""
        self._stopping = True

    async def streams(self, words: int) -> None:
        """Returns once it holds ``words`` sequences of a reply that it began to follow after this call."""
        known = len(self.history.replies)
        while len(self.history.replies) <= known or self.history.replies[-1].sequence < words:
            self._moved.clear()
            await self._moved.wait()

    def _note(self, kind: str, began: float, outcome: Outcome, detail: str) -> None:
        """Writes an operation down; after one that was not ok, the next of its kind goes to another port."""
        self.history.operations.append(Operation(kind, self._doors[kind], began, time.time(), outcome, detail))
        if outcome is not Outcome.OK:
            others = [port for port in self._ports[kind] if port != self._doors[kind]]
            self._doors[kind] = self._dice.choice(others or self._ports[kind])

    async def _ask(
        self, kind: str, method: str, target: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Any:
        """The answer to a request that is sent again, to another port each time, until there is one.

        Raises:
            Refused.
        """
        while True:
            began = time.time()
            try:
                answer = await wire.call(
                    self._doors[kind], method, target, body, headers, self._habits.patience_seconds
                )
            except wire.BROKEN as error:
                # A refused connection carried nothing; any other break may have come after the work was done.
                nothing_done = isinstance(error, ConnectionRefusedError)
                self._note(kind, began, Outcome.FAILED if nothing_done else Outcome.UNKNOWN, repr(error))
            else:
                if answer.status < HTTPStatus.BAD_REQUEST:
                    self._note(kind, began, Outcome.OK, str(answer.status))
                    return answer.json
                code = answer.json["code"]
                if answer.status not in _NOTHING_DONE:
                    raise Refused(f"{kind}: {answer.status} {code}")
                unknown = code == "outcome-unknown"
                self._note(kind, began, Outcome.UNKNOWN if unknown else Outcome.FAILED, f"{answer.status} {code}")
            await self._rest()

    async def _rest(self) -> None:
        await asyncio.sleep(self._dice.uniform(*_COME_BACK_SECONDS))

    async def _post(self) -> Followed:
        """Posts a message with one idempotency key until it knows the answer."""
        context_id, number = self.history.context_id, len(self.history.posted)
        self._doors = {kind: self._dice.choice(known) for kind, known in self._ports.items()}
        prompt = self._habits.prompt(self._dice, number)
        key = f"{context_id}:{number}"
        self.history.posted[key] = prompt
        target = f"/contexts/{context_id}/messages"
        receipt = await self._ask("post", "POST", target, wire.message(prompt), {"Idempotency-Key": key})
        reply = Followed(context_id, receipt["reply_message_id"], prompt)
        self.history.replies.append(reply)
        return reply

    async def _stream(self, reply: Followed) -> None:
        """Follows the reply by one stream, to the end of either."""
        began = time.time()
        try:
            await self._follow(reply)
        except wire.BROKEN as error:
            self._note("stream", began, Outcome.FAILED, repr(error))
            await self._rest()
        else:
            self._note("stream", began, Outcome.OK, "")

    async def _follow(self, reply: Followed) -> None:
        """Pulls at each signal about the reply, and once at the start."""
        target = f"/contexts/{reply.context_id}/stream"
        async with wire.stream(self._doors["stream"], target, silence_seconds=self._habits.silence_seconds) as signals:
            await self._pull(reply)
            async for signal in signals:
                if signal.type == "state_changed":
                    self.history.versions.append(signal.data["version"])
                if not _concerns(signal, reply):
                    continue
                if signal.type == "content_delta":
                    reply.signalled.append(signal.data["current_sequence"])
                elif signal.type == "message_completed":
                    reply.endings.append((signal.data["status"], signal.data["final_sequence"]))
                    reply.signalled.append(signal.data["final_sequence"])
                await self._pull(reply)
                while reply.endings and reply.sequence < reply.endings[-1][1]:
                    await self._rest()  # The signal came from one node, and another has not heard of it yet.
                    await self._pull(reply)
                if reply.endings:
                    reply.end(time.time())
                if reply.ended and reply.endings:
                    return

    async def _pull(self, reply: Followed) -> None:
        target = f"/contexts/{reply.context_id}/messages/{reply.message_id}/content?from_sequence={reply.sequence}"
        page = await self._ask("pull", "GET", target)
        reply.pulled(page, time.time())
        self._moved.set()


def _concerns(signal: wire.Event, reply: Followed) -> bool:
    """Whether a signal calls for a pull of the reply: one about it, or a heartbeat that shows that some were lost."""
    if signal.type != "heartbeat":
        return bool(signal.data.get("message_id") == reply.message_id)
    heads = {head["message_id"]: head["current_sequence"] for head in signal.data["heads"]}
    return heads.get(reply.message_id, reply.sequence + 1) > reply.sequence
