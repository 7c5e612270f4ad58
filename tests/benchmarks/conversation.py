"""A conversation with the metronome that checks every word: one context, one subscriber, one connection for pulls.

The client's pattern is the documented one: one pull in flight, the latest target wins, text is never taken from events.
"""

import asyncio
import hashlib
from array import array
from dataclasses import dataclass, field
from typing import Any

from tests.benchmarks.load import Answer, Connection, LoadError, SignalStream

TINY_BUFFER_BYTES = 2048
"""Receive buffer of a reader that stalls, so that the server and not this side's kernel has to hold what is unread."""


@dataclass(slots=True)
class Tally:
    """What all conversations of a run saw together; the counts of faults, from ``lost`` on, should stay 0."""

    latencies_ns: "array[int]" = field(default_factory=lambda: array("q"))
    steady_latencies_ns: "array[int]" = field(default_factory=lambda: array("q"))
    """Those of the words that were written after ``steady_from_ns``."""
    steady_from_ns: int = 0
    words: int = 0
    signals: int = 0
    pulls: int = 0
    lost: int = 0
    repeated: int = 0
    out_of_order: int = 0
    early_signals: int = 0
    """Pulls that answered less than a signal had announced before they were sent."""
    not_completed: int = 0
    """Replies that ended failed or cancelled."""
    wrong_digests: int = 0
    unproved: int = 0
    """Conversations that did not reach their final sequence with the announced digest."""

    @property
    def faulty(self) -> bool:
        """Whether there is any fault."""
        return self.faults() != "0 / 0 / 0"

    def faults(self) -> str:
        """``lost / repeated / out of order`` and, only when there are any, the other faults."""
        text = f"{self.lost} / {self.repeated} / {self.out_of_order}"
        for name in ("early_signals", "not_completed", "wrong_digests", "unproved"):
            if count := getattr(self, name):
                text += f", {count} {name.replace('_', ' ')}"
        return text


class WordCheck:
    """Reads ``0:<ns> 1:<ns> `` and so on: counts what is lost, repeated or out of order, and notes latencies."""

    __slots__ = ("_digest", "_missing", "_next", "_tail", "_tally", "_timed")

    def __init__(self, tally: Tally, *, timed: bool) -> None:
        self._tally = tally
        self._timed = timed
        self._next = 0
        self._missing: set[int] = set()
        self._tail = ""
        self._digest = hashlib.sha256()

    @property
    def hexdigest(self) -> str:
        """The SHA-256 of the text so far."""
        return self._digest.hexdigest()

    def feed(self, text: str, received_ns: int) -> None:
        """Check the words of one pull."""
        self._digest.update(text.encode())
        *words, self._tail = (self._tail + text).split(" ")
        self._tally.words += len(words)
        if not self._timed:
            for word in words:
                self._count(int(word.partition(":")[0]))
            return
        note, note_steady = self._tally.latencies_ns.append, self._tally.steady_latencies_ns.append
        steady_from_ns = self._tally.steady_from_ns
        for word in words:
            index, _, time_ns = word.partition(":")
            written_ns = int(time_ns)
            self._count(int(index))
            note(received_ns - written_ns)
            if written_ns >= steady_from_ns:
                note_steady(received_ns - written_ns)

    def _count(self, index: int) -> None:
        if index == self._next:
            self._next += 1
        elif index > self._next:
            self._missing.update(range(self._next, index))
            self._next = index + 1
        elif index in self._missing:
            self._missing.remove(index)
            self._tally.out_of_order += 1
        else:
            self._tally.repeated += 1

    def finish(self, expected_words: int) -> None:
        """Count what never came."""
        self._tally.lost += len(self._missing) + max(0, expected_words - self._next)


class Conversation:
    """Posts ``ask`` to a new context and follows the reply until it is proved to be whole.

    It posts at ``writer_port``, where one is given, and reads at ``port``.
    """

    def __init__(
        self,
        host: str,
        port: int,
        ask: str,
        expected_words: int,
        tally: Tally,
        *,
        timed: bool = True,
        writer_port: int | None = None,
    ) -> None:
        self._host, self._port = host, port
        self._writer_port = writer_port
        self._ask = ask
        self._expected_words = expected_words
        self._tally = tally
        self._check = WordCheck(tally, timed=timed)
        self._connection: Connection | None = None
        self._path = ""
        self._held = 0
        self._target = 0
        self._announced = 0
        self._final: int | None = None
        self._proved: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._in_flight = False
        self.context_id = ""
        self.posted: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> None:
        """Open, post, follow, prove, close; the tally says what was wrong."""
        stream: SignalStream | None = None
        writer: Connection | None = None
        try:
            self._connection = await Connection.open(self._host, self._port)
            if self._writer_port is not None:
                writer = await Connection.open(self._host, self._writer_port)
            self.context_id = (await (writer or self._connection).request("POST", "/contexts", {}, 201))["id"]
            stream = await SignalStream.open(
                self._host, self._port, f"/contexts/{self.context_id}/stream", self._on_signal
            )
            await self._post(writer or self._connection)
            if not await self._proved:
                self._tally.unproved += 1
        finally:
            if stream is not None:
                self._tally.signals += stream.signals
                stream.close()
            for connection in (self._connection, writer):
                if connection is not None:
                    connection.close()
            self._check.finish(self._expected_words)

    async def _post(self, connection: Connection) -> None:
        body = {"payload": {"type": "text", "content": self._ask}}
        self._in_flight = True  # No pull before the answer: it has the path, and the connection may be busy with it.
        accepted = await connection.request("POST", f"/contexts/{self.context_id}/messages", body, 202)
        self._in_flight = False
        self._path = f"/contexts/{self.context_id}/messages/{accepted['reply_message_id']}/content?from_sequence="
        self.posted.set_result(None)
        self._pull()

    def _on_signal(self, signal: dict[str, Any]) -> None:
        match signal["type"]:
            case "content_delta":
                self._target = max(self._target, signal["current_sequence"])
            case "message_completed":
                self._final = signal["final_sequence"]
                self._target = max(self._target, signal["final_sequence"])
            case "heartbeat":
                for head in signal.get("heads", ()):
                    self._target = max(self._target, head["current_sequence"])
            case _:
                return
        if not self._in_flight and (self._target > self._held or self._final is not None):
            self._pull()

    def _pull(self) -> None:
        if self._connection is None or self._proved.done():
            return
        self._in_flight = True
        self._announced = self._target
        self._tally.pulls += 1
        self._connection.send("GET", f"{self._path}{self._held}", self._on_answer)

    def _on_answer(self, answer: Answer | None) -> None:
        self._in_flight = False
        if self._proved.done():
            return
        if answer is None or answer.status != 200:
            detail = "the connection ended" if answer is None else f"{answer.status} {answer.body[:300]!r}"
            self._proved.set_exception(LoadError(f"pull after {self._held}: {detail}"))
            return
        page = answer.json()
        if page["from_sequence"] != self._held:
            self._proved.set_exception(LoadError(f"asked from {self._held}, got from {page['from_sequence']}"))
            return
        self._check.feed(page["content"], answer.received_ns)
        self._held = page["sequence"]
        if page["up_to_date"] and self._held < self._announced:
            self._tally.early_signals += 1
        if page["final_sequence"] is not None and self._held == page["final_sequence"]:
            self._tally.not_completed += page["status"] != "completed"
            self._end(page["digest"])
        elif self._target > self._held or not page["up_to_date"] or self._final is not None:
            self._pull()

    def _end(self, digest: str | None) -> None:
        if digest != self._check.hexdigest:
            self._tally.wrong_digests += 1
        self._proved.set_result(digest == self._check.hexdigest)


class StalledReader:
    """Posts ``ask`` to a new context, stops reading its stream and its one pull, and reads everything at the end."""

    def __init__(self, host: str, port: int, ask: str, expected_words: int, tally: Tally) -> None:
        self._host, self._port = host, port
        self._ask = ask
        self._expected_words = expected_words
        self._tally = tally
        self._path = ""
        self._stream: SignalStream | None = None
        self._connection: Connection | None = None

    async def stall(self) -> None:
        """Start the reply, ask for its text once there is some, and read nothing more."""
        self._connection = await Connection.open(self._host, self._port, TINY_BUFFER_BYTES)
        context_id = (await self._connection.request("POST", "/contexts", {}, 201))["id"]
        some = asyncio.Event()

        def on_signal(signal: dict[str, Any]) -> None:
            if signal["type"] in ("content_delta", "message_completed"):
                some.set()

        path = f"/contexts/{context_id}/stream"
        self._stream = await SignalStream.open(self._host, self._port, path, on_signal, TINY_BUFFER_BYTES)
        body = {"payload": {"type": "text", "content": self._ask}}
        accepted = await self._connection.request("POST", f"/contexts/{context_id}/messages", body, 202)
        self._path = f"/contexts/{context_id}/messages/{accepted['reply_message_id']}/content?from_sequence="
        await some.wait()
        self._stream.stall()
        self._connection.send("GET", f"{self._path}0", lambda _: None)
        self._connection.stall()

    async def catch_up(self) -> None:
        """Close what is stalled and pull the whole reply on a new connection; the tally says what was wrong."""
        self.close()
        connection = await Connection.open(self._host, self._port)
        check, held = WordCheck(self._tally, timed=False), 0
        try:
            while True:
                page = await connection.request("GET", f"{self._path}{held}&wait=30")
                check.feed(page["content"], 0)
                held = page["sequence"]
                if held == page["final_sequence"]:
                    break
        finally:
            connection.close()
        check.finish(self._expected_words)
        self._tally.not_completed += page["status"] != "completed"
        self._tally.wrong_digests += page["digest"] != check.hexdigest

    def close(self) -> None:
        """Close both connections at once."""
        if self._stream is not None:
            self._stream.close()
        if self._connection is not None:
            self._connection.close()
