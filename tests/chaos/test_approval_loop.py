"""The approvals trial in short, and its negative controls."""

from pathlib import Path

import pytest

from tests.chaos.approval_loop import DEFECTS, approval_loop


@pytest.mark.scenario("approvals", "Killed at any point")
async def test_a_server_that_is_killed_at_any_point_makes_approved_calls_at_most_once(tmp_path: Path) -> None:
    result = await approval_loop(tmp_path, kills=4, seed=11)
    assert not result.broken, result.details
    assert result.passed
    assert result.kills == 4


@pytest.mark.parametrize("defect", DEFECTS)
async def test_a_missing_protection_is_seen(tmp_path: Path, defect: str) -> None:
    for seed in (12, 13, 14):  # Whether a kill falls on what is unprotected is a matter of luck.
        directory = tmp_path / str(seed)
        directory.mkdir()
        result = await approval_loop(directory, kills=3, seed=seed, defect=defect)
        if result.broken[defect]:
            break
    assert result.broken[defect], result.details
