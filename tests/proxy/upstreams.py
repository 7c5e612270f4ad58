"""Nodes that fail as nodes do: dead, unreachable, refusing, or broken off after the work was done."""

import contextlib
import http.client
import http.server
import json
import socket
import threading
from collections.abc import Iterator

from tests.ports import free_port

_REFUSAL = json.dumps({"type": "about:blank", "status": 503, "code": "shutting-down"}).encode()


class _Quiet(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # as the library names it
        """Says nothing."""


@contextlib.contextmanager
def _serving(handler: type[_Quiet]) -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def dead() -> int:
    """The port of a node that was killed: its machine refuses connections."""
    return free_port()


@contextlib.contextmanager
def unreachable() -> Iterator[int]:
    """The port of a node whose machine is off: who connects hears nothing."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(2):  # The queue is full: the kernel drops what else knocks.
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


@contextlib.contextmanager
def refusing() -> Iterator[int]:
    """The port of a node that stops: it answers 503 to everything."""

    class Refuse(_Quiet):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(503)
            self.send_header("Content-Type", "application/problem+json")
            self.send_header("Content-Length", str(len(_REFUSAL)))
            self.end_headers()
            self.wfile.write(_REFUSAL)

        do_POST = do_GET  # noqa: N815  # as the library names it

    with _serving(Refuse) as port:
        yield port


@contextlib.contextmanager
def silent() -> Iterator[int]:
    """The port of a node whose streams say one thing and then nothing, not even a heartbeat."""
    ended = threading.Event()

    class Fall(_Quiet):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("X-Accel-Buffering", "no")
            self.end_headers()
            self.wfile.write(b'data: {"type": "state_changed"}\n\n')
            ended.wait()
            self.close_connection = True

    with _serving(Fall) as port:
        try:
            yield port
        finally:
            ended.set()


class Forgetful:
    """A node that dies between its commit and its answer: ``done`` counts how often. Use it with ``with``."""

    def __init__(self, target: int) -> None:
        self.done = 0
        self._target = target
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Forgetful":
        forgetful = self

        class Forget(_Quiet):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                connection = http.client.HTTPConnection("127.0.0.1", forgetful._target, timeout=30)
                with contextlib.closing(connection):
                    connection.request("POST", self.path, body, dict(self.headers))
                    assert connection.getresponse().read()
                forgetful.done += 1
                self.close_connection = True

        self.port = self._stack.enter_context(_serving(Forget))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
