"""Files: uploaded, downloaded, deleted."""

import asyncio
import mimetypes
from pathlib import Path

from context_server.client.caller import Caller, path_of
from context_server.client.parsing import parse
from context_server.client.records import FileInfo

_UNKNOWN_TYPE = "application/octet-stream"


class FileCalls(Caller):
    """The caller's files, which messages refer to by their ids."""

    async def upload(
        self,
        content: bytes | Path,
        *,
        name: str | None = None,
        media_type: str | None = None,
        idempotency_key: str | None = None,
    ) -> FileInfo:
        """Stores a file: bytes, or all of what is at a path; once, however often it is tried.

        Without ``name`` and ``media_type``, they are those that the path tells.

        Raises:
            OSError: there is no such file, or it cannot be read.
        """
        if isinstance(content, Path):
            name = name or content.name
            content = await asyncio.to_thread(content.read_bytes)
        kind = media_type or mimetypes.guess_type(name or "")[0] or _UNKNOWN_TYPE
        params = {} if name is None else {"name": name}
        answer = await self._request(
            "POST",
            "/files",
            body=content,
            params=params,
            headers={"Content-Type": kind},
            idempotency_key=idempotency_key,
        )
        return parse(FileInfo, answer)

    async def download(self, file_id: str) -> bytes:
        """All the bytes of a file."""
        content = await self._request("GET", path_of("files", file_id), headers={"Accept": "*/*"}, as_bytes=True)
        return bytes(content)

    async def delete_file(self, file_id: str) -> None:
        """Deletes a file. Messages keep what they say of it, and no agent can read it any more."""
        await self._request("DELETE", path_of("files", file_id))
