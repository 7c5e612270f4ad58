"""A stream of all contexts while contexts are deleted: the caller named none, so none can be missing."""

import asyncio
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from starlette.applications import Starlette

from context_server.app import create_app
from context_server.settings import Settings
from tests.unit.rooms import OWNER


async def first_of(app: Starlette, path: str, query: str = "") -> tuple[int, bytes]:
    """The status of an answer and the first bytes of its body; then the caller is gone."""
    status = 0
    first: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def receive() -> dict[str, Any]:
        await first
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal status
        status = message.get("status", status)
        if message.get("body") and not first.done():
            first.set_result(message["body"])

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": query.encode(),
        "headers": [(b"host", b"127.0.0.1")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    async with asyncio.timeout(60):
        await app(scope, receive, send)
        return status, await first


@pytest.mark.scenario("signals", "Stream of all contexts")
async def test_a_context_that_goes_while_the_stream_opens_is_left_out(tmp_path: Path) -> None:
    app = create_app(Settings(database=str(tmp_path / "context-server.db")))
    async with app.router.lifespan_context(app):
        store = app.state.rooms.store
        gone, kept = [(await store.create_context(OWNER)).id for _ in range(2)]

        def delete(*_: object) -> None:
            """After the contexts to be followed have been read, and before how things stand with them is."""
            with closing(sqlite3.connect(tmp_path / "context-server.db")) as database, database:
                assert database.execute("DELETE FROM contexts WHERE id = ?", (gone,)).rowcount == 1

        event.listen(store._database._readers, "checkin", delete, once=True)
        status, body = await first_of(app, "/stream")

        assert status == 200
        events = [json.loads(line.removeprefix(b"data: ")) for line in body.splitlines() if line.startswith(b"data: ")]
        assert [found["context_id"] for found in events if found["type"] == "state_changed"] == [kept]
        status, _ = await first_of(app, "/stream", f"context={gone}")
        assert status == 404
