"""What the logs keep of failures: where and of which kind, and not a word of their messages or variables."""

import subprocess
import sys

import pytest

FAILURES = """
import asyncio, logging, structlog
from context_server.logs import configure_logs

configure_logs({log_format!r}, "debug")
log = structlog.get_logger("context_server.test")

def fail(said):
    raise ValueError("message " + said)

async def main():
    try:
        fail("canary")
    except ValueError as error:
        log.exception("ours", runs=1)
        log.error("given", exc_info=error)
        logging.getLogger("library").exception("theirs")
    task = asyncio.create_task(asyncio.to_thread(fail, "canary"))
    await asyncio.wait([task])
    del task  # asyncio complains that nobody looked at its exception.
    asyncio.get_running_loop().call_soon(fail, "canary")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    log.info("done", canary_seen=False)

asyncio.run(main())
"""


@pytest.mark.scenario("operations", "Logs and metrics carry no text")
@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_logged_failure_is_its_kind_and_its_place(log_format: str) -> None:
    program = FAILURES.format(log_format=log_format)
    logged = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stderr
    for event in (
        "ours",
        "given",
        "theirs",
        "Task exception was never retrieved",
        "Exception in callback fail",
        "done",
    ):
        assert event in logged
    assert logged.count("ValueError") == 5
    assert logged.count("in fail") >= 5
    assert "message" not in logged
    assert logged.count("canary") == 1  # In the key of the last line, which shows that it would be found.
