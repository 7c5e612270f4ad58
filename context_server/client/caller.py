"""What all calls of the client are made with."""

from typing import Any
from urllib.parse import quote

from context_server.client.connection import Connection


class Caller:
    """Requests that are tried again for ``retry_seconds``."""

    def __init__(self, connection: Connection, retry_seconds: float) -> None:
        self._connection = connection
        self._retry_seconds = retry_seconds

    async def _request(self, method: str, path: str, **rest: Any) -> Any:
        return await self._connection.request(method, path, give_up_seconds=self._retry_seconds, **rest)


def path_of(*parts: str) -> str:
    """``/contexts/A/messages/B`` of these parts, each made harmless."""
    return "".join(f"/{quote(part, safe='')}" for part in parts)
