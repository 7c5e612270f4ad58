"""A PostgreSQL server that is away, or is lost while it commits: what clients are answered, and what is done."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import make_url

from tests.chaos import wire
from tests.chaos.proxy import Proxy
from tests.databases import new_database, run_beside
from tests.server import Server
from tests.unit.rooms import until


@contextmanager
def far_server(folder: Path) -> Iterator[tuple[Server, Proxy, str]]:
    """A server whose database is behind a network that can be broken, and the database's own URL."""
    with new_database("postgresql", folder) as url, Proxy(make_url(url).port or 5432) as network:
        far = make_url(url).set(host="127.0.0.1", port=network.port).render_as_string(hide_password=False)
        with Server(folder, agent="metronome", log_format="json", database=far) as server:
            yield server, network, url


@pytest.mark.scenario("many-nodes", "Database unreachable")
async def test_while_the_database_is_away_everything_says_so_and_then_goes_on(tmp_path: Path) -> None:
    with far_server(tmp_path) as (server, network, _):
        context_id = await wire.new_context(server.port)
        path = f"/contexts/{context_id}"
        network.refuse()
        refused = [
            await wire.call(server.port, "GET", path),
            await wire.call(server.port, "GET", f"{path}/messages"),
            await wire.call(server.port, "POST", f"{path}/messages", wire.message("rate=0 words=1")),
        ]
        ready = await wire.call(server.port, "GET", "/readyz")
        alive = await wire.call(server.port, "GET", "/healthz")
        network.mend()
        posted = await wire.call(server.port, "POST", f"{path}/messages", wire.message("rate=0 words=1"))
        ready_again = await wire.call(server.port, "GET", "/readyz")

    assert [(answer.status, answer.json["code"]) for answer in refused] == [(503, "database-unreachable")] * 3
    assert all("retry-after" in answer.headers for answer in refused)
    assert b"Connection" not in refused[0].body  # What the driver said is for the person who runs the server.
    assert (ready.status, alive.status, ready_again.status, posted.status) == (503, 200, 200, 202)


@pytest.mark.scenario("many-nodes", "Command with an unknown outcome")
async def test_a_message_whose_commit_was_lost_is_posted_once(tmp_path: Path) -> None:
    with far_server(tmp_path) as (server, network, url):
        path = f"/contexts/{await wire.new_context(server.port)}/messages"
        key = {"Idempotency-Key": "once"}

        async def is_there() -> bool:
            return bool(await asyncio.to_thread(run_beside, url, "SELECT 1 FROM messages"))

        network.lose_answers_to(b"COMMIT;")
        posting = asyncio.create_task(wire.call(server.port, "POST", path, wire.message("rate=0 words=1"), key))
        await until(is_there)
        network.lose_nothing()
        network.reset()
        unknown = await posting
        again = await wire.call(server.port, "POST", path, wire.message("rate=0 words=1"), key)
        held = run_beside(url, "SELECT count(*) FROM messages WHERE role = 'user'")

    assert (unknown.status, unknown.json["code"]) == (503, "outcome-unknown")
    assert (again.status, again.headers["idempotency-replayed"]) == (202, "true")
    assert held == [(1,)]
