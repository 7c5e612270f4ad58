"""What the black-box tests share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.blackbox.calls import SCRIPTED
from tests.server import Server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server of the test's own, whose agent is the metronome."""
    with Server(tmp_path, agent="metronome") as running:
        yield running


@pytest.fixture(scope="module")
def metronome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same for all tests of a module; nobody stops it."""
    with Server(tmp_path_factory.mktemp("metronome"), agent="metronome") as running:
        yield running


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose agent does what it is told, for all tests of a module; nobody stops it."""
    with Server(tmp_path_factory.mktemp("scripted"), agent=SCRIPTED) as running:
        yield running
