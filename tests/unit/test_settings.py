"""Settings: what is taken from variables, what is refused, and how the refusal reads."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from context_server.settings import Settings


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    """As on a fresh machine."""
    import os

    for name in [name for name in os.environ if name.startswith("CONTEXT_SERVER_")]:
        monkeypatch.delenv(name)


def test_the_defaults_listen_on_loopback_and_keep_their_own_rules():
    settings = Settings()
    assert (settings.host, settings.port, settings.agent) == ("127.0.0.1", 8000, "demo")
    assert (settings.allowed_hosts, settings.cors_origins, settings.path_prefix) == ((), (), "")


def test_every_setting_is_a_variable(monkeypatch):
    values = {
        "host": "0.0.0.0",  # noqa: S104  # Is read, not listened on.
        "port": 9000,
        "log_format": "json",
        "log_level": "debug",
        "path_prefix": "/api/v1",
        "database": "other.db",
        "agent": "metronome",
        "cancel_grace_seconds": 0.5,
        "max_reply_bytes": 1_000_000,
    }
    for name, value in values.items():
        monkeypatch.setenv(f"CONTEXT_SERVER_{name.upper()}", str(value))
    assert {name: getattr(Settings(), name) for name in values} == values


def test_an_argument_beats_its_variable_and_an_empty_variable_is_none(monkeypatch):
    monkeypatch.setenv("CONTEXT_SERVER_PORT", "9000")
    monkeypatch.setenv("CONTEXT_SERVER_AGENT", "")
    assert Settings().port == 9000
    assert Settings(port=9001).port == 9001
    assert Settings().agent == "demo"


def test_lists_are_written_with_commas(monkeypatch):
    monkeypatch.setenv("CONTEXT_SERVER_ALLOWED_HOSTS", "example.org, 10.0.0.1 ,,")
    monkeypatch.setenv("CONTEXT_SERVER_CORS_ORIGINS", "http://localhost:5173,https://example.org")
    monkeypatch.setenv("CONTEXT_SERVER_MCP", "http://127.0.0.1:9000/mcp,python3 tools.py")
    settings = Settings()
    assert settings.mcp == ("http://127.0.0.1:9000/mcp", "python3 tools.py")
    assert settings.allowed_hosts == ("example.org", "10.0.0.1")
    assert settings.cors_origins == ("http://localhost:5173", "https://example.org")
    assert Settings(allowed_hosts=("a", "b")).allowed_hosts == ("a", "b")


def test_types_of_files_are_patterns(monkeypatch):
    monkeypatch.setenv("CONTEXT_SERVER_FILE_TYPES", "image/*, application/pdf,*/*,application/vnd.api+json")
    assert Settings().file_types == ("image/*", "application/pdf", "*/*", "application/vnd.api+json")
    for wrong in ("image", "Image/png", "image/png; q=1", "a/b/c", "/", "image/[a-z]"):
        with pytest.raises(ValidationError):
            Settings(file_types=(wrong,))


@pytest.mark.scenario("operations", "Wrong setting")
@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("port", 65536, "less than or equal to 65535"),
        ("port", "many", "valid integer"),
        ("log_level", "loud", "'debug', 'info', 'warning' or 'error'"),
        ("path_prefix", "api", "should match pattern"),
        ("path_prefix", "/api/", "should match pattern"),
        ("path_prefix", "/api?x", "should match pattern"),
        ("database", "", "at least 1 character"),
        ("heartbeat_seconds", 0, "greater than 0"),
        ("heartbeat_seconds", float("nan"), "less than or equal to 300"),
        ("send_timeout_seconds", float("inf"), "less than or equal to 300"),
        ("cors_origins", "*", "is not an exact origin; write scheme://host"),
        ("cors_origins", "https://*.example.org", "is not an exact origin"),
        ("cors_origins", "example.org", "is not an exact origin"),
        ("cors_origins", "https://example.org/", "is not an exact origin"),
        ("cors_origins", "ftp://example.org", "is not an exact origin"),
        ("cors_origins", "https://", "is not an exact origin"),
        ("allowed_hosts", "*", "is not a host name"),
        ("allowed_hosts", "http://example.org", "is not a host name"),
        ("max_body_bytes", 0, "greater than or equal to 1024"),
        ("no_such_setting", 1, "Extra inputs are not permitted"),
    ],
)
def test_a_wrong_value_is_refused_by_name(name, value, complaint):
    with pytest.raises(ValidationError) as refusal:
        Settings(**{name: value})
    (error,) = refusal.value.errors()
    assert error["loc"][0] == name
    assert complaint in error["msg"]


def test_bounds_that_contradict_each_other_are_refused():
    with pytest.raises(ValidationError, match="max_pending_bytes must not exceed max_reply_bytes"):
        Settings(max_pending_bytes=4096, max_reply_bytes=2048)
    assert Settings(max_pending_bytes=2048, max_reply_bytes=2048).max_reply_bytes == 2048


def test_settings_do_not_change():
    with pytest.raises(ValidationError, match="frozen"):
        Settings().port = 1


@pytest.mark.parametrize("database", ["x.db", "/data/x.db", "~/x.db", "with space.db"])
def test_a_path_is_a_sqlite_file(database):
    url = Settings(database=database).database_url
    assert url.startswith("sqlite")
    assert url.endswith(f":///{Path(database).expanduser().absolute()}")


def test_a_url_is_taken_as_it_is():
    assert Settings(database="postgresql://localhost/x").database_url == "postgresql://localhost/x"
