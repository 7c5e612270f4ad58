"""Files: bytes in a folder, and a row for each of them; both, or neither.

A file comes in two steps: its bytes become durable, then its row is committed. It goes the other way round. While
either is under way the folder has a mark for it; what a crash leaves in between is settled by the sweep at a later
start.
"""

import asyncio
import errno
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import TracebackType
from typing import BinaryIO, ParamSpec, Self, TypeVar

import structlog

from context_server.errors import ContextServerError, FilesUnavailable, FileUnknown, OutcomeUnknown, StorageFull
from context_server.folder import Folder, Incoming
from context_server.records import FileRef, new_id
from context_server.store.files import StoredFile, StoredFiles
from context_server.store.idempotency import Once, Replayed

log = structlog.get_logger("context_server.files")

P = ParamSpec("P")
T = TypeVar("T")

MAX_NAME_BYTES = 255
"""Longest name of a file: what most file systems take where a client saves it."""
_SUFFIX_BYTES = 20
"""So much of the end of a name is kept when it is cut, since the end says what can open it."""
_FALLBACK_NAME = "file"
_WRITE_BYTES = 262_144
"""What a thread writes at once: a hop into a thread for each packet would cost more than the writing."""
_SWEEP_AGE_SECONDS = 86_400.0
"""Far above the longest upload, and the clocks of nodes that share a folder may differ."""
_SWEEP_AT_ONCE = 500
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})

# Separators of every system; control characters; marks that turn the direction of text, by which gpj.exe reads exe.jpg.
_NOT_IN_NAMES = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileLimits:
    """How large a file may be, and of which media types: patterns such as ``image/*``."""

    max_bytes: int
    types: tuple[str, ...]


class Files:
    """The files of all owners."""

    def __init__(self, stored: StoredFiles, folder: Folder, limits: FileLimits) -> None:
        self._stored = stored
        self._folder = folder
        self.types = limits.types
        self.max_bytes = limits.max_bytes

    def takes(self, media_type: str) -> bool:
        """Whether files of this type are taken."""
        return any(fnmatchcase(media_type, pattern) for pattern in self.types)

    def upload(self) -> "Upload":
        """A file that is coming in; use it with ``async with``, and nothing is left of it unless it was kept."""
        return Upload(self._stored, self._folder)

    async def open(self, owner: str, file_id: str) -> tuple[StoredFile, BinaryIO]:
        """A file and its bytes, to be read and closed.

        Raises:
            FileUnknown: there is none, or it belongs to another owner.
            FilesUnavailable: its bytes cannot be read here.
        """
        file = await self._stored.file(owner, file_id)
        try:
            return file, await asyncio.to_thread(self._folder.open, file_id)
        except OSError as error:
            await self._stored.file(owner, file_id)  # Else it was deleted in this moment, which is no failure.
            _log_failure(error)
            raise FilesUnavailable from error

    async def read(self, owner: str, file_id: str) -> bytes:
        """All bytes of a file.

        Raises:
            FileNotFoundError: there is none, it belongs to another owner, or its bytes cannot be read here.
        """
        try:
            _, opened = await self.open(owner, file_id)
            with opened:
                return await asyncio.to_thread(opened.read)
        except (FileUnknown, FilesUnavailable, OSError):
            raise FileNotFoundError(file_id) from None

    async def delete(self, owner: str, file_id: str) -> None:
        """Deletes a file: its row, and then its bytes.

        Raises:
            FileUnknown: there is none, or it belongs to another owner.
        """
        await self._stored.file(owner, file_id)  # A mark is set for no file of somebody else.
        await asyncio.to_thread(_try, self._folder.mark, file_id)  # Not on a full disk; there too it can be deleted.
        try:
            await self._stored.delete(owner, file_id)
        except (OutcomeUnknown, FileUnknown):
            raise  # Whether there are bytes to be deleted says a later sweep, or who deleted it first does so.
        except ContextServerError:
            await asyncio.to_thread(self._folder.settle, file_id)
            raise
        await asyncio.to_thread(_try, self._folder.remove, file_id)

    async def sweep(self, min_age_seconds: float = _SWEEP_AGE_SECONDS) -> int:
        """Settles what a crash left so long ago: bytes without a row are deleted; how many."""
        try:
            pending = await asyncio.to_thread(lambda: list(self._folder.pending(min_age_seconds)))
        except OSError as error:
            _log_failure(error)
            return 0
        swept = 0
        for start in range(0, len(pending), _SWEEP_AT_ONCE):
            some = pending[start : start + _SWEEP_AT_ONCE]
            known = await self._stored.known(some)
            swept += await asyncio.to_thread(self._settle, some, known)
        if swept:
            log.info("files_swept", files=swept)
        return swept

    def _settle(self, file_ids: Sequence[str], known: frozenset[str]) -> int:
        for file_id in file_ids:
            if file_id in known:
                self._folder.settle(file_id)
            else:
                _try(self._folder.remove, file_id)
        return sum(file_id not in known for file_id in file_ids)


class Upload:
    """A file that is coming in."""

    def __init__(self, stored: StoredFiles, folder: Folder) -> None:
        self._stored = stored
        self._folder = folder
        self._incoming: Incoming | None = None
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._is_settled = False
        self.size_bytes = 0

    async def __aenter__(self) -> Self:
        """Begins; nothing is on the disk before the first bytes are."""
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Deletes what was written, unless it was kept or nobody knows whether it was."""
        if self._incoming is not None and not self._is_settled:
            # Whoever waits may be cancelled once more; the deletion goes on.
            await asyncio.shield(asyncio.to_thread(_try, self._incoming.discard))

    async def write(self, data: bytes) -> None:
        """Adds bytes.

        Raises:
            StorageFull, FilesUnavailable.
        """
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        self.size_bytes += len(data)
        if self._waiting_bytes >= _WRITE_BYTES:
            await self._flush()

    async def _flush(self) -> Incoming:
        data, self._waiting, self._waiting_bytes = b"".join(self._waiting), [], 0
        if self._incoming is None:
            self._incoming = await _on_disk(self._folder.begin, new_id())
        await _on_disk(self._incoming.write, data)
        return self._incoming

    async def keep(
        self, owner: str, *, name: str, media_type: str, once: Callable[[str], Once[StoredFile] | None]
    ) -> StoredFile:
        """The file, durable; ``once`` is given the digest of its bytes.

        Raises:
            StorageFull, FilesUnavailable, and what a transaction raises.
            Replayed, IdempotencyKeyReused: the request was made before; the file of then is the one that is kept.
        """
        incoming = await self._flush()
        await _on_disk(incoming.finish)
        ref = FileRef(
            id=incoming.file_id,
            name=clean_name(name),
            media_type=media_type,
            size_bytes=self.size_bytes,
            sha256=incoming.sha256,
        )
        self._is_settled = True
        try:
            file = await self._stored.add(owner, ref, once(ref.sha256))
        except OutcomeUnknown:
            raise
        except (ContextServerError, Replayed):
            self._is_settled = False
            raise
        await asyncio.to_thread(self._folder.settle, ref.id)
        return file


def clean_name(name: str) -> str:
    """A name that can be saved everywhere: ``../a/b.txt`` → ``b.txt``; never empty, and at most 255 bytes."""
    last = re.split(r"[/\\]", _NOT_IN_NAMES.sub("", name))[-1].strip()
    if last.strip(".") == "":
        return _FALLBACK_NAME
    encoded = last.encode()
    if len(encoded) <= MAX_NAME_BYTES:
        return last
    stem, dot, suffix = last.rpartition(".")
    end = dot + suffix if stem and len((dot + suffix).encode()) <= _SUFFIX_BYTES else ""
    return encoded[: MAX_NAME_BYTES - len(end.encode())].decode(errors="ignore") + end


async def _on_disk(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Does ``work`` in a thread.

    Raises:
        StorageFull, FilesUnavailable: what its OSError means.
    """
    try:
        return await asyncio.to_thread(work, *args, **kwargs)
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFull from error
        _log_failure(error)
        raise FilesUnavailable from error


def _try(work: Callable[[str], None] | Callable[[], None], *args: str) -> None:
    """Does ``work``; a failure is in the log and nowhere else."""
    try:
        work(*args)
    except OSError as error:
        _log_failure(error)


def _log_failure(error: OSError) -> None:
    """Never with a path or a name, which may say what a file is about."""
    log.error("file_storage_failed", reason=errno.errorcode.get(error.errno or 0, os.strerror(error.errno or 0)))
