"""The group commit renews leases: what that must not do."""

from pathlib import Path

from structlog.testing import capture_logs

from context_server.records import ChunkKind, Delta, Outcome
from tests.databases import new_database
from tests.unit.rooms import ledger_limits, open_rooms, until


async def test_a_run_that_ends_in_the_commit_that_renews_its_lease_is_not_lost(tmp_path: Path) -> None:
    with new_database("postgresql", tmp_path) as url, capture_logs() as lines:
        async with open_rooms(tmp_path, database_url=url, ledger=ledger_limits(renewal=2.0)) as rooms:
            reply = await rooms.begin()
            await rooms.ledger.append(reply, Delta(ChunkKind.TEXT, "word"))

            async def is_written() -> bool:
                return bool(await rooms.chunks(reply.run))

            await until(is_written)
            rooms.ledger._renew_at = 0.0  # The time for it has come.

            await rooms.ledger.end(reply, Outcome.SUCCEEDED)

    assert (rooms.fenced, [line["event"] for line in lines if line["event"] == "run_fenced"]) == ([], [])
