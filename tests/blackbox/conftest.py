"""What the black-box tests share.

Those of a module with ``DATABASES = KINDS`` are run with a server on each database; what a test can only show on one of
them is marked: ``@pytest.mark.only("sqlite")``.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.blackbox.browser import BROWSERS, Page, installed, served
from tests.blackbox.calls import SCRIPTED
from tests.server import DATABASE_VARIABLE, Server


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    kinds = getattr(metafunc.module, "DATABASES", ())
    if kinds:
        only = metafunc.definition.get_closest_marker("only")
        metafunc.parametrize(
            "database_kind",
            [kind for kind in kinds if only is None or kind in only.args],
            scope="module",
            indirect=True,
        )


@pytest.fixture(scope="module", autouse=True)
def database_kind(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """The database of the servers that are started without naming one; None for that of the surroundings."""
    kind = getattr(request, "param", None)
    with pytest.MonkeyPatch.context() as patch:
        if kind is not None:
            patch.setenv(DATABASE_VARIABLE, kind)
        yield kind


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server of the test's own, whose agent is the metronome."""
    with Server(tmp_path, agent="metronome") as running:
        yield running


@pytest.fixture(scope="module")
def metronome(database_kind: str | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same for all tests of a module on one database; nobody stops it."""
    with Server(tmp_path_factory.mktemp("metronome"), agent="metronome") as running:
        yield running


@pytest.fixture(scope="module")
def scripted(database_kind: str | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose agent does what it is told, for all tests of a module on one database; nobody stops it."""
    with Server(tmp_path_factory.mktemp("scripted"), agent=SCRIPTED) as running:
        yield running


@pytest.fixture
def page() -> Iterator[Page]:
    """The pages of simple frontends, on a port of their own."""
    with served() as page:
        yield page


@pytest.fixture
def browser() -> str:
    """The program of a browser; without one the test is skipped, but not in CI."""
    found = installed()
    if found is not None:
        return found
    if os.environ.get("CI"):
        pytest.fail(f"none of {', '.join(BROWSERS)} is installed")
    pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
