"""A store of each database that the server supports: every test here must pass on all of them.

What a test can only show on one of them is marked: ``@pytest.mark.only("sqlite")``.
"""

from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from context_server.store import Store
from tests.databases import KINDS, emptied_database, lapse_leases, new_database, run_beside


@pytest.fixture(params=KINDS)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database without contexts."""
    only = request.node.get_closest_marker("only")
    if only is not None and request.param not in only.args:
        pytest.skip(f"of {', '.join(only.args)} alone")
    make = new_database if request.node.get_closest_marker("new_database") else emptied_database
    with make(request.param, tmp_path) as url:
        yield url


@pytest.fixture
async def store(database_url: str) -> AsyncIterator[Store]:
    """An open store."""
    async with Store.open(database_url, connections=4) as opened:
        yield opened


@pytest.fixture
def rows(database_url: str) -> Callable[[str], list[tuple[Any, ...]]]:
    """Reads the database directly: ``rows("SELECT …")``."""
    return partial(run_beside, database_url)


@pytest.fixture
def lapse(database_url: str) -> Callable[[], None]:
    """Lets the time of every lease run out."""
    return partial(lapse_leases, database_url)


@pytest.fixture
def backdate(database_url: str) -> Callable[..., None]:
    """Lets time pass for every idempotency key that exists: ``backdate(hours=2)``."""

    def make_older(*, hours: int) -> None:
        run_beside(database_url, f"UPDATE idempotency_keys SET created_at = created_at - {hours * 3_600_000}")

    return make_older
