"""A real browser on the pages of simple frontends, which are served from another origin than the server's."""

import functools
import http.server
import json
import os
import queue
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from tests.blackbox.calls import Calls

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PAGE_SECONDS = 120.0
END_SECONDS = 60.0
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@dataclass(frozen=True, slots=True)
class Page:
    """Serves the page on a port of its own, and takes the page's reports."""

    port: int
    reports: "queue.Queue[tuple[str, Any]]"

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def next(self, kind: str) -> Any:
        """What the page reports next, which must be of this kind."""
        try:
            found, value = self.reports.get(timeout=PAGE_SECONDS)
        except queue.Empty:
            raise AssertionError(
                f"the page reported nothing in {PAGE_SECONDS} s where {kind!r} was due; see its browser.log"
            ) from None
        assert found == kind, value
        return value


@dataclass(frozen=True, slots=True)
class Shown:
    """What the page made of one reply, and what was written."""

    text: str
    written: str
    parts: int  # Pulls whose text was appended.
    overtaken: int  # How often a signal came while the pull for the one before was under way.
    longest_pause_ms: float  # For how long the page stood still.
    error: str | None

    @property
    def is_exact(self) -> bool:
        return self.text == self.written and not self.overtaken and self.error is None


class _Handler(http.server.SimpleHTTPRequestHandler):
    def __init__(self, *args: Any, reports: "queue.Queue[tuple[str, Any]]", **options: Any) -> None:
        self._reports = reports
        super().__init__(*args, **options)

    def do_POST(self) -> None:
        report = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._reports.put((report["kind"], report["value"]))
        self.send_response(204)  # Not before: the page sends the next report then, on another thread.
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # The name that the library calls it by.
        """Says nothing."""


def installed() -> str | None:
    """The program of a browser, if there is one."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextmanager
def served() -> Iterator[Page]:
    """The page, on a port of its own."""
    reports: queue.Queue[tuple[str, Any]] = queue.Queue()
    handler = functools.partial(_Handler, reports=reports, directory=str(Path(__file__).parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield Page(server.server_port, reports)
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def opened(
    browser: str, page: Page, directory: Path, calls: Calls, *, document: str = "seed_frontend.html", **parameters: Any
) -> Iterator[None]:
    """The page in a browser of its own, with the parameters in its query."""
    query = urlencode({"api": calls.server.url, **parameters}, doseq=True)
    url = f"{page.origin}/{document}?{query}"
    with (directory / "browser.log").open("ab") as log:
        process = subprocess.Popen(
            [browser, *FLAGS, f"--user-data-dir={directory / 'browser'}", url],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield
    finally:
        # The whole group: the program that was started may be a script, and it has children.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(END_SECONDS)


def converse(calls: Calls, page: Page, browser: str, directory: Path, texts: list[str]) -> list[Shown]:
    """Has the frontend hold a conversation of its own; ends early at a reply that ended in an error."""
    context_id = calls.create()
    with opened(browser, page, directory, calls, part="converse", context=context_id, text=texts):
        replies = page.next("replies")
    written = [calls.ended(context_id, each["id"])["content"] for each in calls.messages(context_id)[1::2]]
    return [Shown(**reply, written=each) for reply, each in zip(replies, written, strict=True)]
