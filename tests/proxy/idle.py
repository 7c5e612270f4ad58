"""How an idle stream fares behind nginx for minutes: with the documented file, and with what nginx does by itself.

python -m tests.proxy.idle --seconds 300

Every case holds one stream of an idle context, so all that comes is its beginning and the heartbeats. What the
documented file does is compared with a bare ``proxy_pass``, in which HTTP/1.0 to the node, buffering and the read
time-out of 60 s are nginx's defaults. The controls take away what keeps the bare one going: the header by which nodes
ask for no buffering, and the heartbeat.
"""

import argparse
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.proxy.curl import Silence, Stream, call
from tests.proxy.nginx import CONFIGURATION, NAME, Nginx
from tests.server import Server

HEARTBEAT_SECONDS = 15.0
PROMPT_SECONDS = 2.0
_LOCATIONS = re.compile(r"        # Yours|        keepalive_requests.*(?=\n    }\n}\n)", re.DOTALL)


def bare(*more: str) -> str:
    """The documented file with nothing but a ``proxy_pass`` where it sets anything."""
    lines = ["proxy_pass http://context_server;", "proxy_set_header Host $http_host;", *more]
    location = "\n".join(["        location / {", *(f"            {line}" for line in lines), "        }"])
    return _LOCATIONS.sub(lambda _: location, CONFIGURATION.read_text(encoding="utf-8"), count=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One way to be behind nginx; ``holds`` says whether the stream must live and be prompt."""

    name: str
    configuration: str | None
    version: str = "--http1.1"
    heartbeats: bool = True
    holds: bool = True


CASES = (
    Case(name="the documented file, HTTP/2", configuration=None, version="--http2"),
    Case(name="the documented file, HTTP/1.1", configuration=None),
    Case(name="nginx's defaults", configuration=bare()),
    Case(
        name="control: defaults, X-Accel-Buffering ignored",
        configuration=bare("proxy_ignore_headers X-Accel-Buffering;"),
        holds=False,
    ),
    Case(name="control: defaults, no heartbeat", configuration=bare(), heartbeats=False, holds=False),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of a stream: its heartbeats, how late the latest event was, and when it was cut, if it was."""

    heartbeats: int
    latest_seconds: float | None
    cut_after_seconds: float | None


def watch(case: Case, node: Server, seconds: float) -> Result:
    """Holds a stream for so long."""
    with Nginx([node.port] * 2, configuration=case.configuration) as nginx:
        context_id = call(nginx, "POST", "/contexts", {}).json["id"]
        begun = time.monotonic()
        cut_after = None
        with Stream(nginx, f"/contexts/{context_id}/stream", (case.version,)) as stream:
            while (left := begun + seconds - time.monotonic()) > 0:
                try:
                    if stream.next(left) is None:
                        cut_after = time.monotonic() - begun
                        break
                except Silence:
                    break
        late = [event.late_seconds for event in stream.seen]
    return Result(
        heartbeats=sum(event.type == "heartbeat" for event in stream.seen),
        latest_seconds=max(late, default=None),
        cut_after_seconds=cut_after,
    )


def is_as_it_should_be(case: Case, result: Result, seconds: float) -> bool:
    """Whether the stream lived and was prompt, or, for a control, was not."""
    expected = int(seconds / HEARTBEAT_SECONDS) - 1
    held = (
        result.cut_after_seconds is None
        and result.heartbeats >= expected
        and result.latest_seconds is not None
        and result.latest_seconds < PROMPT_SECONDS
    )
    return held == case.holds


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs every case at the same time, prints a table, and says by its exit code whether all was as it should be."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=300.0, help="how long each stream is held; more than 60")
    seconds = parser.parse_args(arguments).seconds
    if seconds <= 61:
        parser.error("nginx cuts after 60 seconds: hold the streams for longer")
    settings = {"agent": "metronome", "allowed_hosts": NAME, "log_format": "json"}
    with ExitStack() as stack:
        nodes = {
            beats: stack.enter_context(
                Server(
                    Path(stack.enter_context(tempfile.TemporaryDirectory())),
                    heartbeat_seconds=HEARTBEAT_SECONDS if beats else 300,
                    **settings,
                )
            )
            for beats in (True, False)
        }
        with ThreadPoolExecutor(len(CASES)) as pool:
            results = list(pool.map(lambda case: watch(case, nodes[case.heartbeats], seconds), CASES))
    version = subprocess.run(["nginx", "-v"], capture_output=True, check=True).stderr.decode().strip()
    print(f"{version}; Python {platform.python_version()}; {platform.system()}; held for {seconds:g} s\n")
    print(
        "| behind | heartbeats | the latest came after | cut after | as it should be |\n| --- | --- | --- | --- | --- |"
    )
    good = True
    for case, result in zip(CASES, results, strict=True):
        late = "nothing came" if result.latest_seconds is None else f"{result.latest_seconds:.2f} s"
        cut = "not cut" if result.cut_after_seconds is None else f"{result.cut_after_seconds:.0f} s"
        fine = is_as_it_should_be(case, result, seconds)
        good = good and fine
        print(f"| {case.name} | {result.heartbeats} | {late} | {cut} | {'yes' if fine else 'NO'} |")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
