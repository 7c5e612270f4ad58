"""An application within another's process logs as that one likes: what is logged must hold no words by itself."""

import subprocess
import sys
from pathlib import Path

import pytest

MOUNTED = """
import asyncio, contextlib, json, sqlite3, sys
from context_server.app import create_app
from context_server.settings import Settings

FOLDER = sys.argv[1]
# A defect whose message holds what was written: a trigger that takes it for a path in a JSON document.
DEFECT = (
    "CREATE TRIGGER defect_of_{table} AFTER INSERT ON {table} BEGIN SELECT "
    "json_extract('{{}}', CASE WHEN NEW.{column} LIKE 'a canary%' THEN NEW.{column} ELSE '$' END); END"
)

async def agent(history, run):
    yield "a canary of the agent"

def break_writing(table, column):
    with contextlib.closing(sqlite3.connect(FOLDER + "/context-server.db")) as database, database:
        database.execute(DEFECT.format(table=table, column=column))

async def post(app, path, body):
    answer = []
    given = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    async def receive():
        return given.pop() if given else {"type": "http.disconnect"}
    async def send(message):
        answer.append(message)
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"", "headers": headers,
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }
    await app(scope, receive, send)
    return answer[0]["status"], b"".join(part.get("body", b"") for part in answer[1:])

async def main():
    broken = asyncio.Event()
    app = create_app(
        Settings(database=FOLDER + "/context-server.db"), agent=agent, on_broken=lambda _: broken.set()
    )
    async with app.router.lifespan_context(app):
        # Triggers may call no JSON function by default.
        await app.state.rooms.store._write(lambda writer: writer.exec_driver_sql("PRAGMA trusted_schema=ON"))
        status, created = await post(app, "/contexts", {"title": "fine"})
        assert status == 201, status
        break_writing("contexts", "title")
        status, problem = await post(app, "/contexts", {"title": "a canary of the client"})
        assert status == 500 and b"canary" not in problem, (status, problem)
        break_writing("chunks", "text")
        message = {"payload": {"type": "text", "content": "Hello", "display": None}, "client_metadata": {}}
        status, _ = await post(app, f"/contexts/{json.loads(created)['id']}/messages", message)
        assert status == 202, status
        async with asyncio.timeout(60):
            await broken.wait()

asyncio.run(main())
"""


@pytest.mark.scenario("operations", "Logs and metrics carry no text")
def test_defects_are_logged_without_words_where_logs_are_not_ours(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MOUNTED, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    logged = ran.stdout + ran.stderr
    assert ran.returncode == 0, logged
    for event in ("request_failed", "commit_failed"):
        assert event in logged
    assert logged.count("OperationalError") >= 2
    assert "canary" not in logged
