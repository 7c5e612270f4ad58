"""Stands before every route: who may talk to the server at all.

Loopback is no protection by itself: a web page can have its own name resolve to 127.0.0.1 (DNS rebinding), and any page
can send simple requests to it. So the Host header must name this server, and a browser's write must come from a page of
this server or of an origin that was allowed.
"""

from starlette.types import ASGIApp, Receive, Scope, Send

from context_server.api.problems import HostNotAllowed, OriginNotAllowed, answer
from context_server.errors import ContextServerError
from context_server.metrics import Metrics

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


def host_name(header: str) -> str:
    """The name in a Host header, lower case and without its port: ``[::1]:8000`` → ``::1``."""
    if header.startswith("["):
        return header[1:].partition("]")[0].lower()
    return header.partition(":")[0].lower().rstrip(".")


class Guard:
    """Pure ASGI middleware around all routes."""

    def __init__(
        self, app: ASGIApp, *, allowed_hosts: frozenset[str], allowed_origins: frozenset[str], metrics: Metrics
    ) -> None:
        self._app = app
        self._allowed_hosts = allowed_hosts
        self._allowed_origins = allowed_origins
        self._metrics = metrics
        # Host headers seen and found good: the check of a pull is one look-up.
        self._good: set[bytes] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or answers it with a problem."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await answer(refusal, self._metrics)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> ContextServerError | None:
        host = origin = None
        for name, value in scope["headers"]:
            if name == b"host":
                if host is not None:
                    return HostNotAllowed("A request names one Host.")
                host = value
            elif name == b"origin":
                origin = value
        if host not in self._good:
            name = host_name((host or b"").decode("latin-1"))
            if name not in self._allowed_hosts:
                return HostNotAllowed(f"Host {name!r} is not a host of this server; add it with --allowed-host.")
            if host is not None and len(self._good) < 100:
                self._good.add(host)
        if origin is not None and scope["method"] not in _SAFE_METHODS:
            return self._check_origin(origin.decode("latin-1"), (host or b"").decode("latin-1"))
        return None

    def _check_origin(self, origin: str, host: str) -> ContextServerError | None:
        if origin in self._allowed_origins or origin.partition("://")[2] == host:
            return None
        return OriginNotAllowed(f"Origin {origin!r} may not write here; allow it with --cors-origin.")
