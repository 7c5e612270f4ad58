"""A real nginx that runs the documented configuration before nodes of a test's own."""

import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.engines import missing
from tests.ports import free_port

CONFIGURATION = Path(__file__).resolve().parents[2] / "docs" / "nginx.conf"
NAME = "chat.example.com"
"""The name in the documented configuration; clients resolve it to loopback by themselves."""
START_SECONDS = 60.0
_DOCUMENTED_NODES = ("10.0.0.11:8000", "10.0.0.12:8000")

Change = tuple[str, str]
"""What a control has otherwise than the documentation: some text of the file, and what stands in its place."""


class Nginx:
    """nginx with exactly the documented file, but for ports, paths and the nodes; use it with ``with``."""

    def __init__(self, nodes: Sequence[int], *changes: Change, configuration: str | None = None) -> None:
        for program in ("nginx", "openssl"):
            if shutil.which(program) is None:
                missing(program)
        # Not below pytest's folders: the workers run as another user, who must get at it.
        self.directory = Path(tempfile.mkdtemp(prefix="context-server-nginx-"))
        self.directory.chmod(0o755)
        self.port, self.plain_port = free_port(), free_port()
        self.url = f"https://{NAME}:{self.port}"
        self.certificate = self.directory / "certificate.pem"
        self.log = self.directory / "error.log"
        text = configuration or CONFIGURATION.read_text(encoding="utf-8")
        for old, new in changes:
            text = _replaced(text, old, new)
        self._text = self._placed(text, nodes)

    def _placed(self, text: str, nodes: Sequence[int]) -> str:
        """The configuration with this run's ports, paths and nodes."""
        assert len(nodes) == len(_DOCUMENTED_NODES)
        for documented, port in zip(_DOCUMENTED_NODES, nodes, strict=True):
            text = _replaced(text, f"server {documented}", f"server 127.0.0.1:{port}")
        places = {
            "listen 443 ": f"listen 127.0.0.1:{self.port} ",
            "listen 80;": f"listen 127.0.0.1:{self.plain_port};",
            "/run/nginx.pid": f"{self.directory}/nginx.pid",
            "/var/log/nginx/error.log": str(self.log),
            f"/etc/ssl/certs/{NAME}.pem": str(self.certificate),
            f"/etc/ssl/private/{NAME}.key": f"{self.directory}/key.pem",
        }
        for old, new in places.items():
            text = _replaced(text, old, new)
        # Where the package keeps temporary files only root may write.
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = "".join(f"{kind}_temp_path {self.directory}/{kind}; " for kind in kinds)
        return _replaced(text, "http {", f"http {{ {paths}")

    def __enter__(self) -> Self:
        try:
            self._make_certificate()
            path = self.directory / "nginx.conf"
            path.write_text(self._text, encoding="utf-8")
            with (self.directory / "stderr.log").open("wb") as said:
                self._process = subprocess.Popen(
                    ["nginx", "-p", self.directory, "-e", self.log, "-c", path, "-g", "daemon off;"],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=said,
                )
            self._wait_until_it_listens()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait()
        self._remove()

    def _remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def _make_certificate(self) -> None:
        """A key, and a certificate for the name that only clients of the test trust."""
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
             "-days", "2", "-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME},DNS:localhost",
             "-keyout", self.directory / "key.pem", "-out", self.certificate],
            check=True, stdin=subprocess.DEVNULL, capture_output=True,
        )  # fmt: skip

    def _wait_until_it_listens(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._listens():
            said = (self.directory / "stderr.log").read_text()
            assert self._process.poll() is None, f"nginx ended:\n{said}"
            assert time.monotonic() < deadline, f"nginx did not start:\n{said}"
            time.sleep(0.01)

    def _listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=1.0).close()
        except OSError:
            return False
        return True

    def reload(self) -> None:
        """Has it read its configuration again: new workers begin, the old ones end."""
        subprocess.run(["nginx", "-p", self.directory, "-e", self.log, "-c", self.directory / "nginx.conf",
                        "-s", "reload"], check=True, stdin=subprocess.DEVNULL, capture_output=True)  # fmt: skip


def _replaced(text: str, old: str, new: str) -> str:
    """The text with ``old``, which must be there, replaced wherever it stands."""
    assert old in text, f"the configuration no longer has {old!r}"
    return text.replace(old, new)


def seconds_of(directive: str) -> float:
    """What the documented file sets a time to: ``proxy_read_timeout`` → 40.0."""
    found = re.findall(rf"^\s*{directive} (\d+)s;", CONFIGURATION.read_text(encoding="utf-8"), re.MULTILINE)
    (value,) = set(found)
    return float(value)


def bytes_of(directive: str) -> int:
    """What the documented file sets a size to: ``client_max_body_size`` → 2097152."""
    (value, unit), *_ = re.findall(
        rf"^\s*{directive} (?:\d+ )?(\d+)([km]);", CONFIGURATION.read_text(encoding="utf-8"), re.MULTILINE
    )
    return int(value) * {"k": 1024, "m": 1024**2}[unit]
