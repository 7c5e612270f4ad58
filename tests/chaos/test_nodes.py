"""Several nodes on one PostgreSQL, broken in short; ``python -m tests.chaos.nodes`` has the long forms.

Each trial runs beside its negative control: the same with the protection off, which the checker must find.
"""

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.checker import Bounds
from tests.chaos.nodes.kill import CONTROL as NO_REAPER
from tests.chaos.nodes.kill import kill
from tests.chaos.nodes.outage import CONTROL as BLIND_RETRY
from tests.chaos.nodes.outage import outage
from tests.chaos.nodes.partition import CONTROL as UNFENCED
from tests.chaos.nodes.partition import partition
from tests.chaos.nodes.suspend import suspend
from tests.chaos.nodes.trial import Result
from tests.chaos.nodes.wakeups import CONTROL as NO_LOOK
from tests.chaos.nodes.wakeups import Loss, wakeups
from tests.engines import Postgres, Redis

SEED = 7
CONTROL_TRIES = 3
_names = (f"trial_{number}" for number in itertools.count())


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """A server that every trial may break, as long as it leaves it running."""
    with Postgres(quick=True) as server:
        yield server


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """For a trial and its control."""
    (tmp_path / "trial").mkdir()
    (tmp_path / "control").mkdir()
    return tmp_path / "trial", tmp_path / "control"


async def both(
    trial: Coroutine[Any, Any, Result], control: Callable[[Path], Coroutine[Any, Any, Result]], folder: Path, kind: str
) -> tuple[Result, Result]:
    """A trial and its control at the same time.

    The control is tried again where its fault came at a moment at which nothing was written, so that it showed nothing.
    """

    async def find() -> Result:
        for number in range(CONTROL_TRIES):
            (folder / str(number)).mkdir()
            result = await control(folder / str(number))
            if result.counts[kind]:
                break
        return result

    async with asyncio.TaskGroup() as tasks:
        found = tasks.create_task(trial), tasks.create_task(find())
    return found[0].result(), found[1].result()


def off(protection: str) -> tuple[str, str]:
    return "--defect", protection


@pytest.mark.scenario("many-nodes", "Nodes killed one after another")
async def test_nodes_are_killed_one_after_another(postgres: Postgres, folders: tuple[Path, Path]) -> None:
    result, control = await both(
        kill(
            folders[0], postgres.create(next(_names)), seed=SEED, seconds=3, conversations=6, words=(10, 30),
            pause_seconds=(0.5, 1.0), lease_seconds=1,
        ),
        lambda folder: kill(
            folder, postgres.create(next(_names)), seed=SEED, seconds=0.1, nodes=2, conversations=4,
            words=(10, 30), pause_seconds=(0.5, 0.5), rest_seconds=5, lease_seconds=2, defects=off(NO_REAPER),
        ),
        folders[1],
        "stuck",
    )  # fmt: skip

    assert result.passed, result.report()
    assert control.counts["stuck"], control.report()


@pytest.mark.scenario("many-nodes", "Stopped past the lease and continued")
async def test_a_node_is_stopped_past_its_lease(postgres: Postgres, folders: tuple[Path, Path]) -> None:
    result, control = await both(
        suspend(
            folders[0], postgres.create(next(_names)), seed=SEED, rounds=2, nodes=2, conversations=4, lease_seconds=1
        ),
        lambda folder: suspend(
            folder, postgres.create(next(_names)), seed=SEED, rounds=2, nodes=2, conversations=4, lease_seconds=1,
            rest_seconds=1, defects=off(UNFENCED),
        ),
        folders[1],
        "changed",
    )  # fmt: skip

    assert result.passed, result.report()
    assert result.figures["late appends"] == 0
    assert result.figures["losses in the log"] == result.figures["runs taken"]
    assert control.counts["changed"], control.report()


@pytest.mark.scenario("many-nodes", "Database crashes while replies are written")
async def test_the_database_crashes_while_replies_are_written(postgres: Postgres, folders: tuple[Path, Path]) -> None:
    with Postgres(quick=True) as other:
        result, control = await both(
            outage(
                folders[0], postgres.create(next(_names)), postgres, seed=SEED, seconds=3, conversations=6,
                words=(40, 60), pause_seconds=(0.5, 1.0), gone_seconds=(0, 0.5),
            ),
            lambda folder: outage(
                folder, other.create(next(_names)), other, seed=SEED, seconds=0.1, nodes=1, conversations=6,
                words=(40, 60), pause_seconds=(1.0, 1.0), gone_seconds=(0, 0), rest_seconds=10,
                defects=off(BLIND_RETRY),
            ),
            folders[1],
            "foreign",
        )  # fmt: skip

    assert result.passed, result.report()
    assert control.counts["foreign"], control.report()


@pytest.mark.scenario("many-nodes", "Node cut off from the database")
async def test_a_node_is_cut_off_from_the_database(postgres: Postgres, folders: tuple[Path, Path]) -> None:
    result, control = await both(
        partition(
            folders[0], postgres.create(next(_names)), postgres, seed=SEED, cut_seconds=5, conversations=4,
            lease_seconds=1,
        ),
        lambda folder: partition(
            folder, postgres.create(next(_names)), postgres, seed=SEED, cut_seconds=5, conversations=4,
            lease_seconds=1, rest_seconds=2, defects=off(UNFENCED),
        ),
        folders[1],
        "digest",
    )  # fmt: skip

    assert result.passed, result.report()
    assert control.counts["digest"], control.report()


@pytest.mark.scenario("many-nodes", "Wake-ups lost")
async def test_wake_ups_are_lost(postgres: Postgres, tmp_path: Path) -> None:
    bounds = Bounds(late=8)

    def lose(loss: Loss, name: str, **more: Any) -> Coroutine[Any, Any, Result]:
        (tmp_path / name).mkdir()
        given = {"whole_seconds": 7, "fresh_seconds": 4} | more
        return wakeups(
            tmp_path / name, postgres.create(next(_names)), loss, seed=SEED, gone_seconds=4, conversations=3,
            words=(10, 20), bounds=bounds, **given,
        )  # fmt: skip

    with Redis() as redis:
        *results, control = await asyncio.gather(
            lose(Loss.DROPPED, "dropped"),
            lose(Loss.POSTGRESQL, "postgresql"),
            lose(Loss.REDIS, "redis", redis=redis),
            lose(Loss.DROPPED, "control", whole_seconds=0, rest_seconds=9, defects=off(NO_LOOK)),
        )

    for result in results:
        assert result.passed, result.report()
    assert control.counts["late"], control.report()
