"""Clients that live through crash after crash; ``crash_loop.py`` says how, and has a long form."""

from pathlib import Path

import pytest

from tests.chaos.crash_loop import crash_loop, report

SLOW_DISK = ("--commit-delay-ms", "60")
SLOWER_DISK = ("--commit-delay-ms", "300")
"""Long enough for most kills to come between the two halves of what must be one order: commit, then signal. That client
and server are late on a busy machine changes nothing about it."""


@pytest.mark.scenario("resume", "Clients through many kills")
async def test_nothing_that_was_signalled_is_lost_by_kills(tmp_path: Path) -> None:
    result = await crash_loop(tmp_path, kills=5, seed=20)

    assert result.passed, report(result, 20)
    assert result.kills == 5
    assert result.signals > 100


@pytest.mark.scenario("resume", "Clients through many kills")
async def test_a_slow_disk_changes_nothing(tmp_path: Path) -> None:
    result = await crash_loop(tmp_path, kills=1, seed=21, contexts=2, defects=SLOW_DISK)

    assert result.passed, report(result, 21)


@pytest.mark.scenario("resume", "Clients through many kills")
async def test_signalling_before_the_commit_is_caught(tmp_path: Path) -> None:
    result = await crash_loop(
        tmp_path, kills=20, seed=21, contexts=2, defects=(*SLOWER_DISK, "--publish-before-commit")
    )

    assert result.counts["lost"] > 0
    assert not result.passed
