"""Files on disk and their rows: both or neither, whatever breaks in between."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from context_server.errors import FilesUnavailable, FileUnknown, OutcomeUnknown, StorageFull
from context_server.files import MAX_NAME_BYTES, FileLimits, Files, clean_name
from context_server.folder import Folder, Incoming
from context_server.records import FileRef, new_id
from context_server.store import Store
from context_server.store.files import StoredFile, StoredFiles
from context_server.store.idempotency import Once

OWNER = "alice"


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    async with Store.open(f"sqlite:///{tmp_path / 'context-server.db'}") as opened:
        yield opened


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "files"


@pytest.fixture
def files(store: Store, folder: Path) -> Files:
    return room(store.files, folder)


def room(stored: StoredFiles, folder: Path) -> Files:
    return Files(stored, Folder(folder), FileLimits(max_bytes=1000, types=("image/*", "text/plain")))


def never(_sha256: str) -> None:
    """No idempotency key."""


async def keep(files: Files, data: bytes = b"bytes", name: str = "a.txt") -> FileRef:
    async with files.upload() as upload:
        await upload.write(data)
        return (await upload.keep(OWNER, name=name, media_type="text/plain", once=never)).ref


def on_disk(folder: Path) -> list[str]:
    """Every file of the folder, and every mark."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


def leave(folder: Path, *names: str) -> list[str]:
    """Makes files of somebody else."""
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"precious")
    return on_disk(folder)


async def test_a_file_that_was_kept_can_be_read(files: Files, folder: Path) -> None:
    large = bytes(range(256)) * 4000
    ref = await keep(files, large)
    assert await files.read(OWNER, ref.id) == large
    assert on_disk(folder) == [ref.id]
    assert [mode_of(folder), mode_of(folder / ref.id)] == [0o700, 0o600]


async def test_an_empty_file_is_a_file(files: Files) -> None:
    assert await files.read(OWNER, (await keep(files, b"")).id) == b""


async def test_an_upload_that_is_not_kept_leaves_nothing(files: Files, folder: Path) -> None:
    for data in (b"", b"few", b"x" * 1_000_000):
        with suppress(RuntimeError):
            async with files.upload() as upload:
                await upload.write(data)
                raise RuntimeError
    assert on_disk(folder) == []


async def test_a_deleted_file_leaves_nothing(files: Files, folder: Path) -> None:
    gone, kept = await keep(files), await keep(files)
    await files.delete(OWNER, gone.id)
    assert on_disk(folder) == [kept.id]
    for file_id in (gone.id, new_id(), "../context-server.db", "/etc/passwd"):
        with pytest.raises(FileNotFoundError):
            await files.read(OWNER, file_id)
        with pytest.raises(FileUnknown):
            await files.delete(OWNER, file_id)


async def test_no_path_is_made_of_anything_but_an_id(folder: Path) -> None:
    for name in ("../x", "pending", "", "A" * 36, f"{new_id()}/", f"{new_id()}\n"):
        with pytest.raises(FileNotFoundError):
            Folder(folder).open(name)


async def test_bytes_that_are_missing_are_said_to_be(files: Files, folder: Path) -> None:
    ref = await keep(files)
    (folder / ref.id).unlink()
    with pytest.raises(FilesUnavailable):
        await files.open(OWNER, ref.id)
    with pytest.raises(FileNotFoundError):
        await files.read(OWNER, ref.id)
    await files.delete(OWNER, ref.id)
    assert await files.sweep(0) == 0


# Disks that fail


@pytest.fixture(params=[(errno.ENOSPC, StorageFull), (errno.EDQUOT, StorageFull), (errno.EIO, FilesUnavailable)])
def failing(request: pytest.FixtureRequest) -> tuple[OSError, type[Exception]]:
    number, kind = request.param
    return OSError(number, os.strerror(number)), kind


@pytest.mark.parametrize("step", [(Incoming, "write"), (Incoming, "finish"), (Folder, "mark"), (os, "open")])
async def test_a_disk_that_fails_acknowledges_nothing_and_keeps_nothing(
    files: Files,
    store: Store,
    folder: Path,
    failing: tuple[OSError, type[Exception]],
    step: tuple[Any, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error, kind = failing
    kept = await keep(files)

    def fail(*_arguments: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(*step, fail)
        with pytest.raises(kind):
            await keep(files)

    assert on_disk(folder) == [kept.id]
    assert [file.ref.id for file in (await store.files.page(OWNER))[0]] == [kept.id]
    assert await files.read(OWNER, (await keep(files)).id) == b"bytes"


async def test_on_a_full_disk_files_can_be_deleted(files: Files, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = await keep(files)

    def fail(*_arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "mark", fail)
        await files.delete(OWNER, ref.id)
    assert on_disk(folder) == []


# Databases that fail, and processes that die


class Lossy(StoredFiles):
    """Rows of a database that fails after, or before, it has done what it was asked."""

    def __init__(self, stored: StoredFiles, error: Exception, *, is_done: bool) -> None:
        self._stored = stored
        self._error = error
        self._is_done = is_done

    async def add(self, owner: str, ref: FileRef, once: Once[StoredFile] | None = None) -> StoredFile:
        if self._is_done:
            await self._stored.add(owner, ref, once)
        raise self._error

    async def file(self, owner: str, file_id: str) -> StoredFile:
        return await self._stored.file(owner, file_id)

    async def delete(self, owner: str, file_id: str) -> None:
        if self._is_done:
            await self._stored.delete(owner, file_id)
        raise self._error


async def test_a_row_that_was_refused_leaves_no_bytes(store: Store, folder: Path) -> None:
    with pytest.raises(StorageFull):
        await keep(room(Lossy(store.files, StorageFull(), is_done=False), folder))
    assert on_disk(folder) == []


@pytest.mark.scenario("files", "What a crash left")
@pytest.mark.parametrize("is_done", [True, False])
async def test_what_is_in_doubt_is_settled_by_what_the_database_holds(
    store: Store, folder: Path, *, is_done: bool
) -> None:
    files = room(store.files, folder)
    lossy = room(Lossy(store.files, OutcomeUnknown(), is_done=is_done), folder)
    to_delete = await keep(files)
    with pytest.raises(OutcomeUnknown):
        await keep(lossy)
    with pytest.raises(OutcomeUnknown):
        await lossy.delete(OWNER, to_delete.id)
    assert len(on_disk(folder)) == 4

    assert await files.sweep(3600) == 0, "it may still be under way elsewhere"
    assert len(on_disk(folder)) == 4

    assert await files.sweep(0) == 1
    rows = [file.ref.id for file in (await store.files.page(OWNER))[0]]
    assert on_disk(folder) == rows
    assert await files.read(OWNER, rows[0]) == b"bytes"
    assert rows == [to_delete.id] if not is_done else rows != [to_delete.id]


async def test_a_sweep_leaves_alone_what_nobody_marked(store: Store, folder: Path) -> None:
    """A server on another database, or on an older copy of it, finds files that it does not know."""
    before = leave(folder, new_id(), "somebody's.txt")
    assert await room(store.files, folder).sweep(0) == 0
    assert on_disk(folder) == before


async def test_a_sweep_of_many_takes_several_looks(store: Store, folder: Path) -> None:
    pending = Folder(folder)
    for _ in range(1100):
        pending.begin(new_id()).finish()
    assert await room(store.files, folder).sweep(0) == 1100
    assert on_disk(folder) == []


async def test_a_sweep_without_a_folder_finds_nothing(files: Files, folder: Path) -> None:
    assert await files.sweep(0) == 0
    assert on_disk(folder) == []


async def test_whoever_is_cancelled_leaves_nothing(files: Files, folder: Path) -> None:
    begun = asyncio.Event()

    async def upload() -> None:
        async with files.upload() as coming:
            await coming.write(b"x" * 1_000_000)
            begun.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(upload())
    await begun.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert on_disk(folder) == []


def test_a_file_that_was_discarded_takes_no_late_bytes(folder: Path) -> None:
    incoming = Folder(folder).begin(new_id())
    incoming.discard()
    incoming.write(b"late")
    assert on_disk(folder) == []


# Names and types


@pytest.mark.parametrize(
    ("given", "cleaned"),
    [
        ("notes.txt", "notes.txt"),
        ("../../etc/passwd", "passwd"),
        ("C:\\Users\\me\\photo.png", "photo.png"),
        ("a\x00b\r\nc\x85.txt", "abc.txt"),
        ("\u202egpj.exe", "gpj.exe"),
        (" naïve 😀.txt ", "naïve 😀.txt"),
        *((each, "file") for each in ("", ".", "..", "/", "a/", "  ", "\x00", "a/..", "\ud800")),
        (".bashrc", ".bashrc"),
        ("x" * 300 + ".tar", "x" * 251 + ".tar"),
        ("x" * 300, "x" * 255),
        ("ü" * 200 + ".txt", "ü" * 125 + ".txt"),
        ("a." + "y" * 300, "a." + "y" * 253),
    ],
)
def test_names_are_cleaned(given: str, cleaned: str) -> None:
    assert clean_name(given) == cleaned
    assert len(cleaned.encode()) <= MAX_NAME_BYTES


async def test_types_are_taken_by_their_patterns(files: Files) -> None:
    taken: Callable[[str], bool] = files.takes
    assert [taken(each) for each in ("image/png", "text/plain")] == [True, True]
    assert [taken(each) for each in ("text/html", "image", "imagex/png", "application/image/png")] == [False] * 4
