"""An OpenAI-compatible model server of the tests' own: real HTTP, server-sent events, and every way to go wrong.

Each request to ``/v1/chat/completions`` takes the next of ``answers``; the last one serves all that follow. An answer
is a list of steps that are played on the socket, one after the other:

    say("It is ", "cold."), call("look", {"city": "Oslo"}), usage(12, 5), DONE
    status(429, {"Retry-After": "0"}), cut(), rubbish("{"), pause(gate), silence()
"""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

MODEL = "small"


class Hangup(Exception):
    """The server lets go of the connection here and now."""


@dataclass
class Line:
    """The connection that an answer is played on."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    begun: bool = False

    async def send(self, data: bytes) -> None:
        if not self.begun:
            self.begun = True
            head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
            self.writer.write(head.encode())
        self.writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        await self.writer.drain()

    async def event(self, data: str) -> None:
        await self.send(f"data: {data}\n\n".encode())


Step = Callable[[Line], Awaitable[None]]


def _chunk(delta: Mapping[str, Any] | None, finish: str | None = None, **fields: Any) -> str:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    return json.dumps(
        {
            "id": "answer-1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": MODEL,
            "choices": choices,
            **fields,
        }
    )


def say(*words: str, pause_seconds: float = 0) -> Step:
    """Text, each word an event of its own."""

    async def play(line: Line) -> None:
        for word in words:
            await line.event(_chunk({"role": "assistant", "content": word}))
            await asyncio.sleep(pause_seconds)

    return play


def reason(text: str) -> Step:
    """Reasoning, as DeepSeek, vLLM and others send it."""

    async def play(line: Line) -> None:
        await line.event(_chunk({"role": "assistant", "reasoning_content": text}))

    return play


def call(name: str, arguments: Any, call_id: str = "call_0", index: int = 0) -> Step:
    """A tool call; its arguments come in two pieces."""

    async def play(line: Line) -> None:
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        half = len(text) // 2
        first = {"name": name, "arguments": text[:half]}
        await line.event(
            _chunk({"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": first}]})
        )
        await line.event(_chunk({"tool_calls": [{"index": index, "function": {"arguments": text[half:]}}]}))

    return play


def finish(reason: str) -> Step:
    """Why the answer ends."""

    async def play(line: Line) -> None:
        await line.event(_chunk({}, reason))

    return play


def usage(prompt: int, completion: int) -> Step:
    """What the answer has cost."""

    async def play(line: Line) -> None:
        counted = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        await line.event(_chunk(None, usage=counted))

    return play


async def _done(line: Line) -> None:
    await line.event("[DONE]")
    line.writer.write(b"0\r\n\r\n")
    await line.writer.drain()


async def _end(line: Line) -> None:
    """The end of the stream, without a word why."""
    if not line.begun:
        await line.send(b": nothing\n\n")
    line.writer.write(b"0\r\n\r\n")
    await line.writer.drain()


async def _cut(line: Line) -> None:
    line.writer.transport.abort()
    raise Hangup


async def _silence(line: Line) -> None:
    """Nothing, until the client goes away."""
    if not line.begun:
        await line.send(b": wait\n\n")
    await line.reader.read()


DONE: Step = _done
END: Step = _end
CUT: Step = _cut
SILENCE: Step = _silence


def whole(*steps: Step, why: str = "stop") -> list[Step]:
    """A complete answer."""
    return [*steps, finish(why), usage(12, 5), DONE]


def rubbish(data: str) -> Step:
    """An event that is no part of an answer."""

    async def play(line: Line) -> None:
        await line.event(data)

    return play


def status(code: int, headers: Mapping[str, str] | None = None, body: Any = None) -> list[Step]:
    """An answer that is none."""

    async def play(line: Line) -> None:
        content = (json.dumps({"error": {"message": "no"}}) if body is None else body).encode()
        fields = {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}
        lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        line.writer.write(f"HTTP/1.1 {code} Status\r\n{lines}\r\n".encode() + content)
        await line.writer.drain()

    return [play]


def gate(event: threading.Event) -> Step:
    """Waits until somebody opens it."""

    async def play(_line: Line) -> None:
        while not event.is_set():  # noqa: ASYNC110  # The event is another thread's.
            await asyncio.sleep(0.005)

    return play


@dataclass
class ModelServer:
    """The server, in a thread of its own; ``asked`` holds the bodies of the requests, ``keys`` their credentials."""

    answers: list[list[Step]] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)
    """Set when a client has gone away from an answer that was silent."""
    port: int = 0

    def play(self, *answers: list[Step]) -> None:
        """Begins anew, with these answers."""
        self.answers = list(answers)
        self.asked.clear()
        self.keys.clear()
        self.closed.clear()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Self:
        ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, args=(ready,), daemon=True)
        self._thread.start()
        assert ready.wait(30)
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set_result, None)
        self._thread.join(30)

    def _run(self, ready: threading.Event) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve(ready))

    async def _serve(self, ready: threading.Event) -> None:
        self._stop: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._serving: set[asyncio.Task[None]] = set()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await self._stop
        server.close()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._talk(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._answer(reader, writer):
                pass
        except (Hangup, ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answers one request; False when there is none any more."""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
        except asyncio.IncompleteReadError:
            return False
        fields = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head.split("\r\n")[1:])
        }
        body = json.loads(await reader.readexactly(int(fields.get("content-length", "0"))))
        self.keys.append(fields.get("authorization", ""))
        self.asked.append(body)
        steps = self.answers[min(len(self.asked), len(self.answers)) - 1]
        line = Line(reader, writer)
        for step in steps:
            await step(line)
        if SILENCE in steps:
            self.closed.set()
            raise Hangup
        return True
