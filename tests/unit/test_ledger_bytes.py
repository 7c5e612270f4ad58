"""How much text one commit takes: many long replies are committed one after the other, and a longer one alone."""

import pytest

from context_server.records import ChunkKind, Delta, Outcome
from context_server.storable import MAX_CHUNK_CHARACTERS
from tests.unit.rooms import ledger_limits, open_rooms, until

MEBIBYTE = 1_048_576


@pytest.mark.parametrize(
    ("mebibytes", "commits"),
    [([3, 3, 3, 3, 3], 3), ([4, 4, 1], 2), ([9, 1, 1], 2), ([1, 9, 1], 3), ([1] * 8, 1)],
    ids=lambda value: str(value).replace(" ", ""),
)
async def test_a_commit_takes_eight_mebibytes(tmp_path, mebibytes, commits):
    async with open_rooms(tmp_path, ledger=ledger_limits(max_pending_bytes=64 * MEBIBYTE)) as rooms:
        replies = [await rooms.begin() for _ in mebibytes]
        for reply, size in zip(replies, mebibytes, strict=True):
            await rooms.ledger.append(reply, Delta(ChunkKind.TEXT, "x" * (size * MEBIBYTE)))

        async def all_is_durable() -> bool:
            return rooms.metric("bytes_committed_total") == sum(mebibytes) * MEBIBYTE

        await until(all_is_durable)
        assert rooms.metric("commit_chunks_count") == commits
        assert rooms.metric("chunks_committed_total") == sum(mebibytes) * MEBIBYTE // MAX_CHUNK_CHARACTERS
        await rooms.ledger.end(replies[-1], Outcome.SUCCEEDED)
        assert len((await rooms.message(replies[-1].run)).content) == mebibytes[-1] * MEBIBYTE
