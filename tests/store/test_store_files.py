"""The rows of files: add, read, list, refer to, delete, and whose they are."""

from datetime import UTC, datetime, timedelta

import pytest

from context_server.errors import FileUnknown, IdempotencyKeyReused
from context_server.records import FileRef, new_id
from context_server.store import Store
from context_server.store.files import StoredFile
from context_server.store.idempotency import Once, Replayed
from tests.store.writing import OWNER, STRANGER, sha256


def ref(name: str = "notes.txt") -> FileRef:
    return FileRef(id=new_id(), name=name, media_type="text/plain", size_bytes=len(name), sha256=sha256(name))


def once(fingerprint: str = "f") -> Once[StoredFile]:
    return Once(key="key", fingerprint=fingerprint, encode=lambda file: file.ref.id, lifetime_ms=60_000)


async def test_a_file_is_found_as_it_was_added(store: Store) -> None:
    first, second = ref("naïve 😀.txt"), ref("x" * 255)
    added = [await store.files.add(OWNER, each) for each in (first, second)]

    assert [file.ref for file in added] == [first, second]
    assert [await store.files.file(OWNER, file.ref.id) for file in added] == added
    assert datetime.now(UTC) - added[0].created_at < timedelta(seconds=30)


async def test_files_are_listed_newest_first_page_by_page(store: Store) -> None:
    added = [(await store.files.add(OWNER, ref(str(number)))).ref.id for number in range(7)]

    listed: list[str] = []
    before: tuple[int, str] | None = None
    while True:
        files, before = await store.files.page(OWNER, before=before, limit=3)
        listed += [file.ref.id for file in files]
        if before is None:
            break
    # Some share a millisecond, in which the id decides.
    assert sorted(listed) == sorted(added)
    times = [(await store.files.file(OWNER, file_id)).created_at for file_id in listed]
    assert times == sorted(times, reverse=True)


async def test_messages_refer_to_files_in_their_order(store: Store) -> None:
    one, two = ref("one"), ref("two")
    for each in (one, two):
        await store.files.add(OWNER, each)

    assert await store.files.refs(OWNER, []) == ()
    assert await store.files.refs(OWNER, [two.id, one.id, two.id]) == (two, one, two)
    for wrong in (new_id(), "", "a\x00b", "\ud800", "../x"):
        with pytest.raises(FileUnknown) as refusal:
            await store.files.refs(OWNER, [one.id, wrong])
        assert refusal.value.file_id == wrong


async def test_a_deleted_file_is_gone_and_others_stay(store: Store) -> None:
    gone, kept = ref("gone"), ref("kept")
    for each in (gone, kept):
        await store.files.add(OWNER, each)

    await store.files.delete(OWNER, gone.id)

    with pytest.raises(FileUnknown):
        await store.files.file(OWNER, gone.id)
    with pytest.raises(FileUnknown):
        await store.files.delete(OWNER, gone.id)
    assert await store.files.known([gone.id, kept.id, new_id()]) == frozenset({kept.id})
    assert [file.ref for file in (await store.files.page(OWNER))[0]] == [kept]


@pytest.mark.scenario("files", "File of another owner")
async def test_a_file_of_another_owner_does_not_exist(store: Store) -> None:
    mine = ref("mine")
    await store.files.add(OWNER, mine)

    for there in (mine.id, new_id()):
        for attempt in (
            lambda there=there: store.files.file(STRANGER, there),
            lambda there=there: store.files.refs(STRANGER, [there]),
            lambda there=there: store.files.delete(STRANGER, there),
        ):
            with pytest.raises(FileUnknown) as refusal:
                await attempt()
            assert str(refusal.value) == f"There is no file {there!r}."
    assert await store.files.page(STRANGER) == ([], None)
    assert (await store.files.file(OWNER, mine.id)).ref == mine


async def test_a_key_adds_one_file(store: Store) -> None:
    first = await store.files.add(OWNER, ref("first"), once())

    with pytest.raises(Replayed) as replay:
        await store.files.add(OWNER, ref("first"), once())
    with pytest.raises(IdempotencyKeyReused):
        await store.files.add(OWNER, ref("other"), once("another"))

    assert replay.value.answer == first.ref.id
    assert [file.ref.id for file in (await store.files.page(OWNER))[0]] == [first.ref.id]
