"""Which bus is chosen, and what is said where one cannot be had."""

import subprocess
import sys

import pytest

from context_server.bus import BusState, InProcessBus, RunQueued, open_bus
from context_server.bus.linked import LinkedBus
from context_server.bus.postgresql import connect_arguments
from context_server.errors import BusNotAvailable
from context_server.metrics import Metrics

SQLITE = "sqlite:///chat.db"
POSTGRES = "postgresql+asyncpg://me@db/chat"


def opened(database_url, bus=""):
    return open_bus(database_url, bus, namespace="test", metrics=Metrics())


@pytest.mark.scenario("wake-ups", "Choose the bus")
@pytest.mark.parametrize(
    ("database_url", "bus", "kind"),
    [
        (SQLITE, "", "in-process"),
        ("sqlite:///chat.db", "", "in-process"),
        (POSTGRES, "", "postgresql"),
        ("postgresql://me@db/chat", "", "postgresql"),
        (POSTGRES, "redis://127.0.0.1:6379/0", "redis"),
        (POSTGRES, "rediss://:secret@127.0.0.1:6379/0", "redis"),
    ],
)
def test_the_bus_is_chosen_by_the_database_and_the_setting(database_url, bus, kind):
    assert opened(database_url, bus).kind == kind


@pytest.mark.scenario("wake-ups", "A bus that cannot be had")
@pytest.mark.parametrize(
    ("database_url", "bus", "words"),
    [
        (SQLITE, "redis://:secret@127.0.0.1:6379/0", "SQLite"),
        (POSTGRES, "nats://secret@127.0.0.1", "redis://"),
        (POSTGRES, "secret", "redis://"),
        (POSTGRES, "redis://:secret@127.0.0.1:port/0", "redis://"),
        (POSTGRES, "redis://:secret@127.0.0.1?nonsense=1", "redis://"),
        (POSTGRES, "redis://:secret@127.0.0.1?socket_timeout=x", "redis://"),
    ],
)
def test_a_bus_that_cannot_be_had_is_one_line_without_secrets(database_url, bus, words):
    with pytest.raises(BusNotAvailable) as failure:
        opened(database_url, bus)
    assert words in str(failure.value)
    assert "secret" not in str(failure.value)
    assert "\n" not in str(failure.value)
    assert failure.value.__cause__ is None


@pytest.mark.scenario("wake-ups", "A bus that cannot be had")
@pytest.mark.parametrize(
    ("driver", "bus", "extra"), [("redis", "redis://127.0.0.1", "redis"), ("asyncpg", "", "postgres")]
)
def test_a_driver_that_is_not_installed_is_named_with_its_extra(monkeypatch, driver, bus, extra):
    for name in ("context_server.bus.redis", "context_server.bus.postgresql"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == driver]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, driver, None)
    with pytest.raises(BusNotAvailable, match=rf"pip install 'context-server\[{extra}\]'"):
        opened(POSTGRES, bus)


@pytest.mark.scenario("wake-ups", "Choose the bus")
def test_a_driver_is_imported_when_it_is_chosen():
    program = """
import sys
from context_server.bus import open_bus
from context_server.metrics import Metrics
open_bus("sqlite:///chat.db", "", namespace="", metrics=Metrics())
assert not {"asyncpg", "redis"} & set(sys.modules)
open_bus("postgresql://db/chat", "", namespace="", metrics=Metrics())
assert "asyncpg" in sys.modules and "redis" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


async def test_the_bus_of_one_process_calls_its_listeners_and_is_always_connected():
    heard, gaps = [], []
    async with InProcessBus() as bus:
        bus.subscribe(lambda *told: heard.append(told))
        bus.on_gap(lambda: gaps.append(1))
        for interest in (bus.follow, bus.unfollow):
            interest("a context")
        bus.follow_all()
        bus.unfollow_all()
        bus.publish(RunQueued())
        assert (bus.kind, bus.state) == ("in-process", BusState.CONNECTED)
    assert heard == [(RunQueued(), False)]
    assert gaps == []


async def test_a_bus_that_was_never_opened_can_be_closed():
    bus = opened(POSTGRES)
    assert isinstance(bus, LinkedBus)
    bus.follow("a context")
    bus.unfollow("a context")
    bus.unfollow_all()
    await bus.__aexit__(None, None, None)
    assert bus.state is BusState.POLLING


@pytest.mark.parametrize(
    ("url", "arguments"),
    [
        ("postgresql+asyncpg://me@db:5433/chat", {"host": "db", "port": 5433, "user": "me", "database": "chat"}),
        (
            "postgresql+asyncpg://m%40e:p%2Fw@[::1]/a%20b?ssl=require",
            {"host": "::1", "user": "m@e", "password": "p/w", "database": "a b", "ssl": "require"},
        ),
        ("postgresql:///chat?host=/var/run/postgresql&port=5434",
         {"host": "/var/run/postgresql", "port": 5434, "database": "chat"}),
        ("postgresql+asyncpg://", {}),
    ],
)  # fmt: skip
def test_the_driver_is_told_what_the_url_says(url, arguments):
    assert connect_arguments(url) == arguments
