"""Where files lie on disk: a folder with one file for each id, and beside it a mark for each one that is in doubt.

    <folder>/019aa5d2-7c1e-7b4f-9a55-3f0d2c6b8e11             the bytes
    <folder>/pending/019aa5d2-7c1e-7b4f-9a55-3f0d2c6b8e11     its row is being added, or deleted

Nothing of a client is in a path: a name on disk is an id that the server made. Bytes without a row are found by nobody,
so a file is written in its place from the start. What a crash leaves has its mark, and nothing without one is ever
swept: a server that is started on another database, or on an older copy of it, deletes no file that it does not know.

Everything here blocks; ``files`` calls it in threads.
"""

import contextlib
import hashlib
import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Folder:
    """A folder of files; it is made when the first one comes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pending = path / "pending"

    def begin(self, file_id: str) -> "Incoming":
        """A new file to be written, marked as pending.

        Raises:
            OSError.
        """
        if not self._pending.is_dir():
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._pending.mkdir(mode=0o700, exist_ok=True)
            _sync_folder(self._path.parent)
        self.mark(file_id)
        try:
            return Incoming(self, file_id, os.open(self._file(file_id), _NEW, 0o600))
        except BaseException:
            self.settle(file_id)
            raise

    def mark(self, file_id: str) -> None:
        """Marks a file as pending, durably.

        Raises:
            OSError.
        """
        os.close(os.open(self._mark(file_id), os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        _sync_folder(self._pending)

    def settle(self, file_id: str) -> None:
        """Takes the mark away; one that stays is settled by a later sweep."""
        with contextlib.suppress(OSError):
            self._mark(file_id).unlink(missing_ok=True)

    def open(self, file_id: str) -> BinaryIO:
        """The file, to be read.

        Raises:
            FileNotFoundError, OSError.
        """
        return self._file(file_id).open("rb")

    def remove(self, file_id: str) -> None:
        """Deletes the bytes, if they are there, and then the mark.

        Raises:
            OSError: they could not be deleted; the mark stays.
        """
        self._file(file_id).unlink(missing_ok=True)
        self.settle(file_id)

    def sync(self) -> None:
        """Makes durable which files there are.

        Raises:
            OSError.
        """
        _sync_folder(self._path)

    def pending(self, min_age_seconds: float) -> Iterator[str]:
        """The ids of files that have been pending for so long.

        Raises:
            OSError.
        """
        if not self._pending.is_dir():
            return
        newest = time.time() - min_age_seconds
        with os.scandir(self._pending) as entries:
            for entry in entries:
                if _ID.fullmatch(entry.name) and entry.stat(follow_symlinks=False).st_mtime <= newest:
                    yield entry.name

    def _file(self, file_id: str) -> Path:
        return self._path / _safe(file_id)

    def _mark(self, file_id: str) -> Path:
        return self._pending / _safe(file_id)


class Incoming:
    """A file that is being written; ``finish`` or ``discard`` ends it.

    A thread may still be writing when its task was cancelled and another one discards the file: hence the lock.
    """

    def __init__(self, folder: Folder, file_id: str, descriptor: int) -> None:
        self.file_id = file_id
        self._folder = folder
        self._file: BinaryIO | None = os.fdopen(descriptor, "wb", buffering=0)
        self._digest = hashlib.sha256()
        self._lock = threading.Lock()

    @property
    def sha256(self) -> str:
        """The digest of what was written, as 64 hexadecimal digits."""
        return self._digest.hexdigest()

    def write(self, data: bytes) -> None:
        """Adds bytes.

        Raises:
            OSError: not all of them were written; the file is only good to be discarded.
        """
        with self._lock:
            if self._file is None:
                return
            self._digest.update(data)
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]

    def finish(self) -> None:
        """Makes all of it durable.

        Raises:
            OSError.
        """
        with self._lock:
            if self._file is not None:
                os.fsync(self._file.fileno())
                self._close()
        self._folder.sync()

    def discard(self) -> None:
        """Leaves nothing of it.

        Raises:
            OSError: it could not be deleted; the mark stays.
        """
        with self._lock:
            self._close()
        self._folder.remove(self.file_id)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _safe(file_id: str) -> str:
    """The id, once it is sure that it is one: whatever came before, no path is made of anything else."""
    if _ID.fullmatch(file_id) is None:
        raise FileNotFoundError(file_id)
    return file_id


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
