"""What a person meets who starts, configures, migrates and watches the server from a shell."""

import json
import os
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine

from context_server.__main__ import main
from context_server.store.tables import metadata
from tests.nursery import nursery
from tests.ports import free_port
from tests.server import Server

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 120


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """This process's, with variables by the names of ``Settings``."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CONTEXT_SERVER_")}
    given = {f"CONTEXT_SERVER_{name.upper()}": value for name, value in variables.items()}
    return inherited | given | {"PYTHONPATH": str(ROOT)}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "context_server", *arguments]


@dataclass(frozen=True, slots=True)
class Finished:
    """A command that has ended."""

    code: int
    output: str
    errors: str


def run(directory: Path, *arguments: str, **variables: str) -> Finished:
    """``context-server`` with arguments, in a folder, once it has ended."""
    with TemporaryDirectory() as name:
        output, errors = Path(name, "output"), Path(name, "errors")
        given = environment(variables)
        child = nursery().bear("context_server", arguments, cwd=directory, environment=given, log=output, errors=errors)
        return Finished(child.wait(SECONDS), output.read_text(), errors.read_text())


def the_line(finished: Finished) -> str:
    """The one line that a refused command wrote."""
    assert finished.code == 2
    assert finished.output == ""
    assert finished.errors.endswith("\n")
    assert finished.errors.count("\n") == 1
    return finished.errors


@contextmanager
def serving(directory: Path, *arguments: str, **variables: str) -> Iterator[list[str]]:
    """The lines that ``context-server serve`` prints until it is there; it runs until this is left."""
    with subprocess.Popen(
        command("serve", *arguments), cwd=directory, env=environment(variables), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        lines = []
        try:
            for line in process.stdout:
                lines.append(line.rstrip("\n"))
                if "Ctrl-C stops the server" in line or '"event": "serving"' in line:
                    break
            yield lines
        finally:
            process.terminate()
            process.wait(SECONDS)


def shell(line: str, directory: Path) -> str:
    """What a command prints that is typed as it was shown."""
    done = subprocess.run(
        ["bash", "-c", line], cwd=directory, capture_output=True, text=True, timeout=SECONDS, check=True
    )
    return done.stdout


@pytest.mark.scenario("operations", "Serve with defaults")
def test_serve_runs_in_an_empty_folder_and_says_what_to_try(tmp_path: Path) -> None:
    port = free_port()
    with serving(tmp_path, "--port", str(port)) as lines:
        shown = "\n".join(lines).replace("\\\n", " ")
        create, follow = (line.strip() for line in shown.splitlines() if line.strip().startswith("curl"))
        context = json.loads(shell(create, tmp_path))
        events = shell(follow.replace("<id>", context["id"]), tmp_path)
        listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if " 0A " in line]
        beyond_loopback = [address for address in listening if address.endswith(f":{port:04X}")]

    assert (tmp_path / "context-server.db").exists()
    assert f"http://127.0.0.1:{port}/docs" in shown
    assert f"context-server chat --url http://127.0.0.1:{port}" in shown
    assert '"type":"run_finished"' in events
    assert '"status":"completed"' in events
    assert beyond_loopback == [f"0100007F:{port:04X}"]


WRONG = {
    "port that is no number": (["--port", "many"], {}, "--port"),
    "port out of range": (["--port", "70000"], {}, "--port"),
    "variable out of range": ([], {"heartbeat_seconds": "0"}, "CONTEXT_SERVER_HEARTBEAT_SECONDS"),
    "variable that is no number": ([], {"max_streams": "lots"}, "CONTEXT_SERVER_MAX_STREAMS"),
    "choice": (["--log-format", "xml"], {}, "--log-format"),
    "inexact origin": (["--cors-origin", "*"], {}, "--cors-origin"),
    "inexact origin in a variable": ([], {"cors_origins": "http://a/b"}, "CONTEXT_SERVER_CORS_ORIGINS"),
    "host with a star": (["--allowed-host", "*.example"], {}, "--allowed-host"),
    "prefix": ([], {"path_prefix": "api/"}, "CONTEXT_SERVER_PATH_PREFIX"),
    "bounds that contradict": ([], {"max_reply_bytes": "2048"}, "max_pending_bytes"),
    "unknown option": (["--colour"], {}, "--colour"),
}
"""Options, variables, and what the line names."""

USELESS = {
    "unknown agent": ("--agent", "nobody", "demo, metronome"),
    "agent that is not there": ("--agent", "no.such:thing", "no.such"),
    "agent that does not yield": ("--agent", "asyncio:sleep", "async generator"),
    "another database": ("--database", "mysql://localhost/x", "mysql"),
    "database in memory": ("--database", "sqlite://", "in-memory"),
    "folder that is not there": ("--database", "no/such/folder/file.db", "no/such/folder/file.db"),
    "bus that is of no use": ("--bus", "redis://127.0.0.1", "SQLite"),
    "address of another machine": ("--host", "192.0.2.1", "192.0.2.1"),
}


@pytest.mark.scenario("operations", "Wrong setting")
@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_setting_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], case: str
) -> None:
    arguments, variables, named = WRONG[case]
    for name, value in variables.items():
        monkeypatch.setenv(f"CONTEXT_SERVER_{name.upper()}", value)

    with pytest.raises(SystemExit) as ended:
        main(["serve", *arguments])

    assert ended.value.code == 2
    out, line = capfd.readouterr()
    assert (out, line.count("\n")) == ("", 1)
    assert line.endswith("\n")
    assert named in line


@pytest.mark.scenario("operations", "Wrong setting")
@pytest.mark.parametrize("case", USELESS)
def test_a_setting_that_cannot_be_used_is_one_line_and_exit_code_2(tmp_path: Path, case: str) -> None:
    *arguments, named = USELESS[case]

    assert named in the_line(run(tmp_path, "serve", *arguments, port="0"))


@pytest.mark.scenario("operations", "Wrong setting")
def test_a_variable_takes_effect_and_an_option_beats_it(tmp_path: Path) -> None:
    port, other = free_port(), free_port()
    variables = {"port": str(other), "database": "by-variable.db", "log_format": "json", "agent": "metronome"}
    with serving(tmp_path, "--port", str(port), **variables):
        ready = httpx2.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).json()

    assert ready["agent"] == "metronome"
    assert (tmp_path / "by-variable.db").exists()


def test_a_taken_port_is_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = the_line(run(tmp_path, "serve", "--port", str(port)))

    assert str(port) in line
    assert not (tmp_path / "context-server.db").exists()


@pytest.mark.scenario("operations", "Second server refused")
def test_a_file_has_one_server(tmp_path: Path) -> None:
    with Server(tmp_path, agent="metronome") as first:
        line = the_line(run(tmp_path, "serve", "--port", "0"))
        assert "context-server.db" in line
        assert str(first.pid) in line
        assert the_line(run(tmp_path, "migrate"))
        assert httpx2.get(f"{first.url}/readyz", trust_env=False).status_code == 200

        first.kill()
        with Server(tmp_path, agent="metronome") as second:
            assert httpx2.get(f"{second.url}/readyz", trust_env=False).status_code == 200


def schema_of(database: Path) -> set[str]:
    """The tables of a file."""
    connection = sqlite3.connect(database)
    try:
        return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    finally:
        connection.close()


@pytest.mark.scenario("operations", "Migrate up and down")
def test_the_schema_goes_up_down_and_up(tmp_path: Path) -> None:
    database = tmp_path / "context-server.db"
    ours = set(metadata.tables)

    for arguments, expected in (((), ours), (("--down", "--to", "base"), set()), (("--to", "head"), ours)):
        done = run(tmp_path, "migrate", *arguments)
        assert (done.code, done.errors) == (0, "")
        assert "schema revision" in done.output
        assert schema_of(database) & ours == expected

    engine = create_engine(f"sqlite:///{database}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()
    with Server(tmp_path, agent="metronome") as server:
        assert httpx2.post(f"{server.url}/contexts", trust_env=False).status_code == 201


@pytest.mark.scenario("operations", "Migrate up and down")
def test_a_revision_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    assert "9999" in the_line(run(tmp_path, "migrate", "--to", "9999"))


@pytest.mark.scenario("operations", "Newer schema refused")
def test_a_newer_schema_is_left_alone(tmp_path: Path) -> None:
    database = tmp_path / "context-server.db"
    assert run(tmp_path, "migrate").code == 0
    connection = sqlite3.connect(database)
    connection.execute("UPDATE alembic_version SET version_num = 'from_the_future'")
    connection.commit()
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    before = database.read_bytes()

    for command_name in ("serve", "migrate", "new-epoch"):
        assert "from_the_future" in the_line(run(tmp_path, command_name, port="0"))

    assert database.read_bytes() == before


@pytest.mark.scenario("resume", "Epoch over a restart")
def test_a_new_epoch_can_be_made(tmp_path: Path) -> None:
    def epoch() -> str:
        with Server(tmp_path, agent="metronome") as server:
            return str(httpx2.get(f"{server.url}/readyz", trust_env=False).json()["epoch"])

    before = epoch()
    made = run(tmp_path, "new-epoch").output.split()[-1]

    assert made != before
    assert epoch() == made


def test_json_logs_are_json_and_nothing_else(tmp_path: Path) -> None:
    with Server(tmp_path, agent="metronome", log_format="json") as server:
        assert server.stop() == 0

    entries = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert entries[0]["event"] == "serving"
    assert {entry["level"] for entry in entries} <= {"info", "warning"}
    assert all(entry["timestamp"].endswith("Z") for entry in entries)


def test_a_database_of_another_kind_of_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "context-server.db").write_text("This is no database, whatever its name says. " * 100)

    assert "SQLITE_NOTADB" in the_line(run(tmp_path, "serve", "--port", "0"))
