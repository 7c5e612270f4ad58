"""Files over HTTP: upload, download, ranges, lists, deletion, and whatever breaks an upload."""

import hashlib
import http.client
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.blackbox.calls import SCRIPTED, Answer, Calls, eventually, faults
from tests.blackbox.wire import UNKNOWN_ID, problem, raw, rows, together, wheres
from tests.chaos.test_storage import small_disk
from tests.databases import KINDS
from tests.server import Server

DATABASES = KINDS

MAX_BYTES = 3_000_000
PICTURE = bytes(range(256)) * 4000
FIELDS = {"id", "name", "media_type", "size_bytes", "sha256", "created_at"}
STALL_SECONDS = 30.0


@pytest.fixture(scope="module")
def calls(database_kind: str | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    directory = tmp_path_factory.mktemp("files")
    settings: dict[str, Any] = {"log_format": "json", "max_file_bytes": MAX_BYTES}
    with Server(directory, agent=SCRIPTED, files_directory=directory / "kept", **settings) as server:
        yield Calls(server)
        assert faults(server) == []


def kept(calls: Calls) -> list[str]:
    """Every file on the server's disk, and every mark of one."""
    return sorted(path.name for path in (calls.server.directory / "kept").rglob("*") if path.is_file())


def upload(
    calls: Calls, data: bytes, media_type: str = "image/png", name: str | None = "picture.png", **headers: str
) -> Answer:
    query = "" if name is None else f"?name={quote(name)}"
    return calls.call("POST", f"/files{query}", data, headers={"Content-Type": media_type, **headers})


def upload_form(
    calls: Calls, data: bytes, filename: str = "picture.png", media_type: str = "image/png", query: str = ""
) -> Answer:
    head = f'--edge\r\nContent-Disposition: form-data; name="f"; filename="{filename}"\r\nContent-Type: {media_type}'
    body = head.encode() + b"\r\n\r\n" + data + b"\r\n--edge--\r\n"
    return calls.call("POST", f"/files{query}", body, headers={"Content-Type": "multipart/form-data; boundary=edge"})


def stored(answer: Answer) -> dict[str, Any]:
    assert answer.status == 201, answer
    return dict(answer.json)


def download(calls: Calls, file_id: str, **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return calls.call("GET", f"/files/{file_id}", headers=named)


# Upload


@pytest.mark.scenario("files", "Upload of a file")
def test_a_file_is_stored_as_it_was_sent(calls: Calls) -> None:
    answer = upload(calls, PICTURE, "Image/PNG; charset=binary")
    file = stored(answer)
    assert set(file) == FIELDS
    assert (file["name"], file["media_type"], file["size_bytes"]) == ("picture.png", "image/png", len(PICTURE))
    assert file["sha256"] == hashlib.sha256(PICTURE).hexdigest()
    assert answer.headers["location"] == f"/files/{file['id']}"
    assert download(calls, file["id"]).body == PICTURE
    assert (calls.server.directory / "kept" / file["id"]).read_bytes() == PICTURE


@pytest.mark.scenario("files", "Upload by a form")
def test_a_form_with_one_file_is_taken(calls: Calls) -> None:
    file = stored(upload_form(calls, PICTURE, "naïve.png"))
    assert (file["name"], file["media_type"], file["size_bytes"]) == ("naïve.png", "image/png", len(PICTURE))
    assert download(calls, file["id"]).body == PICTURE
    assert stored(upload_form(calls, b"", query="?name=other.png"))["name"] == "other.png"


def test_a_form_that_is_none_is_refused(calls: Calls) -> None:
    before = kept(calls)
    for body in (b"", b"rubbish", b"--edge\r\n\r\n\r\n--edge--\r\n", b"--edge\r\nContent-Disposition: form-data"):
        headers = {"Content-Type": "multipart/form-data; boundary=edge"}
        assert wheres(calls.call("POST", "/files", body, headers=headers)) == ["body"]
    answer = calls.call("POST", "/files", b"x", headers={"Content-Type": "multipart/form-data"})
    assert wheres(answer) == ["header.Content-Type"]
    assert kept(calls) == before


@pytest.mark.scenario("files", "Name with a path")
def test_a_name_is_cleaned_and_never_a_path(calls: Calls) -> None:
    for name, cleaned in (
        ("../../etc/passwd", "passwd"),
        ("..\\..\\boot.ini", "boot.ini"),
        ("a\x00\r\nb.png", "ab.png"),
        ("..", "file"),
        ("x" * 1000, "x" * 255),
    ):
        file = stored(upload(calls, b"1", name=name))
        assert file["name"] == cleaned
        assert file["id"] in kept(calls)
    assert stored(upload(calls, b"1", name=None))["name"] == "file"
    assert stored(upload_form(calls, b"1", "../../etc/passwd"))["name"] == "passwd"
    assert wheres(upload(calls, b"1", name="x" * 1025)) == ["query.name"]
    outside = {path.name for path in calls.server.directory.iterdir()}
    assert outside <= {"kept", "server.log", *(f"context-server.db{end}" for end in ("", "-shm", "-wal", ".lock"))}


@pytest.mark.scenario("files", "Type that is not taken")
def test_another_type_is_refused(calls: Calls) -> None:
    before = kept(calls)
    for media_type in ("application/x-msdownload", "application/octet-stream", "x", "image/", "application/json5", ""):
        problem(upload(calls, PICTURE, media_type), 415, "unsupported-media-type")
        problem(upload_form(calls, PICTURE, media_type=media_type), 415, "unsupported-media-type")
    problem(raw(calls.server.port, b"POST /files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n\r\n1"), 415,
            "unsupported-media-type")  # fmt: skip
    assert kept(calls) == before


@pytest.mark.scenario("files", "File that is too large")
def test_a_file_that_is_too_large_is_refused(calls: Calls) -> None:
    exact = stored(upload(calls, b"x" * MAX_BYTES))
    assert (exact["size_bytes"], stored(upload_form(calls, b"x" * MAX_BYTES))["size_bytes"]) == (MAX_BYTES, MAX_BYTES)
    before = kept(calls)
    problem(upload(calls, b"x" * (MAX_BYTES + 1)), 413, "content-too-large")
    problem(upload_form(calls, b"x" * (MAX_BYTES + 1)), 413, "content-too-large")
    problem(upload_form(calls, b"x" * (MAX_BYTES + 100_000)), 413, "content-too-large")
    head = b"POST /files HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
    # Without a length, it is cut off where it is too much.
    piece = b"%x\r\n%s\r\n" % (1_000_000, b"x" * 1_000_000)
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n" + piece * 4 + b"0\r\n\r\n"
    problem(raw(calls.server.port, chunked), 413, "content-too-large")
    # The length alone is enough: none of the body has come yet.
    problem(raw(calls.server.port, head + b"Content-Length: 3000001\r\n\r\n"), 413, "content-too-large")
    assert kept(calls) == before


@pytest.mark.scenario("files", "Upload that breaks off")
@pytest.mark.parametrize("as_form", [False, True])
def test_an_upload_that_breaks_off_leaves_nothing(calls: Calls, *, as_form: bool) -> None:
    before, listed = kept(calls), len(rows(calls.server, "SELECT id FROM files"))
    media_type = "multipart/form-data; boundary=edge" if as_form else "image/png"
    part = b'--edge\r\nContent-Disposition: form-data; filename="a"\r\nContent-Type: image/png\r\n\r\n'
    head = f"POST /files HTTP/1.1\r\nHost: localhost\r\nContent-Type: {media_type}\r\nContent-Length: 2000000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", calls.server.port)) as connection:
        connection.sendall(head.encode() + (part if as_form else b"") + b"x" * 1_000_000)
        eventually(lambda: len(kept(calls)) > len(before), "the first bytes on the disk")
    eventually(lambda: kept(calls) == before, "a folder without them")
    assert len(rows(calls.server, "SELECT id FROM files")) == listed


@pytest.mark.scenario("files", "Upload that stalls")
@pytest.mark.only("sqlite")
def test_an_upload_that_stalls_is_given_up(calls: Calls) -> None:
    before = kept(calls)
    head = b"POST /files HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 2000000\r\n\r\n"
    begun = time.monotonic()
    problem(raw(calls.server.port, head + b"x" * 1_000_000), 408, "request-timeout")
    assert time.monotonic() - begun > STALL_SECONDS - 1
    assert kept(calls) == before


@pytest.mark.scenario("files", "Upload sent again")
def test_an_upload_sent_again_makes_no_second_file(calls: Calls) -> None:
    first = upload(calls, PICTURE, **{"Idempotency-Key": "once"})
    before = kept(calls)
    again = upload(calls, PICTURE, **{"Idempotency-Key": "once"})
    assert (again.status, again.body, again.headers["idempotency-replayed"]) == (201, first.body, "true")
    assert again.headers["location"] == first.headers["location"]
    for other in (upload(calls, b"other", **{"Idempotency-Key": "once"}),
                  upload(calls, PICTURE, name="other", **{"Idempotency-Key": "once"})):  # fmt: skip
        problem(other, 422, "idempotency-key-reused")
    assert wheres(upload(calls, PICTURE, **{"Idempotency-Key": "a b"})) == ["header.Idempotency-Key"]
    assert kept(calls) == before

    both = together(4, lambda _: upload(calls, b"at once", **{"Idempotency-Key": "together"}))
    assert len({answer.json["id"] for answer in both}) == 1
    assert len(kept(calls)) == len(before) + 1


def test_uploads_side_by_side_do_not_mix(calls: Calls) -> None:
    def one(number: int) -> bool:
        data = bytes([number]) * (100_000 + number)
        return download(calls, stored(upload(calls, data))["id"]).body == data

    assert all(together(8, one))


# Download


@pytest.mark.scenario("files", "Download of a file")
def test_a_download_is_an_attachment_that_a_browser_does_not_run(calls: Calls) -> None:
    page = b"<script>alert(1)</script>"
    file = stored(upload(calls, page, "text/html", 'ü "quoted".html'))
    answer = download(calls, file["id"])
    assert (answer.status, answer.body) == (200, page)
    expected = {
        "content-type": "text/html",
        "content-length": str(len(page)),
        "content-disposition": "attachment; filename*=utf-8''%C3%BC%20%22quoted%22.html",
        "x-content-type-options": "nosniff",
        "content-security-policy": "sandbox",
        "etag": f'"{file["sha256"]}"',
        "accept-ranges": "bytes",
        "cache-control": "private, no-cache",
    }
    assert {name: answer.headers.get(name) for name in expected} == expected
    head = calls.call("HEAD", f"/files/{file['id']}", headers={"Range": "bytes=0-1"})
    assert (head.status, head.body) == (200, b"")
    assert {**head.headers, "date": ""} == {**answer.headers, "date": ""}


@pytest.mark.scenario("files", "Range of a file")
@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [("0-0", 0, 1), ("5-9", 5, 10), ("1023990-", 1_023_990, None), ("-10", 1_023_990, None), ("0-99999999", 0, None)],
)
def test_a_range_gives_its_bytes(calls: Calls, asked: str, start: int, end: int | None) -> None:
    file = stored(upload(calls, PICTURE))
    end = len(PICTURE) if end is None else end
    answer = download(calls, file["id"], Range=f"bytes={asked}", If_Range=f'"{file["sha256"]}"')
    assert (answer.status, answer.body) == (206, PICTURE[start:end])
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{len(PICTURE)}"
    assert answer.headers["content-length"] == str(end - start)


@pytest.mark.scenario("files", "Range that is none")
def test_what_is_no_range_gives_the_whole_and_an_empty_one_is_refused(calls: Calls) -> None:
    file = stored(upload(calls, PICTURE))
    for asked in (
        "bytes=9-5",
        "bytes=-",
        "bytes=a-b",
        "lines=0-5",
        "x",
        "",
        "bytes=0-1,5-6",
        "bytes=" + "9" * 40 + "-",
    ):
        answer = download(calls, file["id"], Range=asked)
        assert (answer.status, len(answer.body)) == (200, len(PICTURE)), asked
    assert download(calls, file["id"], Range="bytes=0-1", If_Range='"other"').status == 200
    for asked in (f"bytes={len(PICTURE)}-", "bytes=-0", "bytes=99999999-"):
        answer = download(calls, file["id"], Range=asked)
        problem(answer, 416, "range-not-satisfiable")
        assert answer.headers["content-range"] == f"bytes */{len(PICTURE)}"
    empty = stored(upload(calls, b""))
    assert download(calls, empty["id"]).body == b""
    problem(download(calls, empty["id"], Range="bytes=0-"), 416, "range-not-satisfiable")


@pytest.mark.scenario("files", "Unchanged file")
def test_a_file_that_the_client_has_is_not_sent_again(calls: Calls) -> None:
    file = stored(upload(calls, PICTURE))
    for known in (f'"{file["sha256"]}"', f'"x", "{file["sha256"]}"', "*"):
        answer = download(calls, file["id"], If_None_Match=known)
        assert (answer.status, answer.body, answer.headers["etag"]) == (304, b"", f'"{file["sha256"]}"')
    assert download(calls, file["id"], If_None_Match='"x"').status == 200


def test_a_reader_that_leaves_takes_nothing_along(calls: Calls) -> None:
    file = stored(upload(calls, b"x" * MAX_BYTES))
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", calls.server.port)) as connection:
            connection.sendall(f"GET /files/{file['id']} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            connection.recv(1000)
    descriptors = Path(f"/proc/{calls.server.pid}/fd")
    place = str(calls.server.directory / "kept")
    if descriptors.is_dir():
        eventually(
            lambda: not [each for each in descriptors.iterdir() if _target(each).startswith(place)], "all closed"
        )
    assert len(download(calls, file["id"]).body) == MAX_BYTES


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""


# Lists, deletion, and what is not there


@pytest.mark.scenario("files", "List of files")
def test_files_are_listed_newest_first(calls: Calls) -> None:
    made = [stored(upload(calls, b"1", name=str(number)))["id"] for number in range(5)]
    first = calls.call("GET", "/files?limit=3").json
    second = calls.call("GET", f"/files?limit=3&cursor={first['next_cursor']}").json
    listed = [file["id"] for page in (first, second) for file in page["items"]]
    assert listed[:5] == made[::-1]
    assert set(first["items"][0]) == FIELDS
    for query in ("limit=0", "limit=201", "cursor=x", "unknown=1"):
        assert wheres(calls.call("GET", f"/files?{query}")) == [f"query.{query.partition('=')[0]}"]
    everything: list[dict[str, Any]] = []
    cursor = ""
    while cursor is not None:
        page = calls.call("GET", f"/files?limit=200{cursor and f'&cursor={cursor}'}").json
        everything += page["items"]
        cursor = page["next_cursor"]
    assert len({file["id"] for file in everything}) == len(everything) == len(rows(calls.server, "SELECT 1 FROM files"))


@pytest.mark.scenario("files", "Deletion of a file")
def test_a_deleted_file_is_gone_from_the_list_and_the_disk(calls: Calls) -> None:
    file = stored(upload(calls, PICTURE))
    before = kept(calls)
    answer = calls.call("DELETE", f"/files/{file['id']}")
    assert (answer.status, answer.body) == (204, b"")
    assert kept(calls) == [name for name in before if name != file["id"]]
    for method in ("GET", "DELETE"):
        problem(calls.call(method, f"/files/{file['id']}"), 404, "file-not-found")
    assert file["id"] not in [each["id"] for each in calls.call("GET", "/files").json["items"]]


@pytest.mark.parametrize("part", [UNKNOWN_ID, "x", "%00", "%ff", "%2e%2e", "pending", "..%2Fserver.log", "a" * 5000])
def test_an_unknown_file_is_not_found(calls: Calls, part: str) -> None:
    before = kept(calls)
    for method in ("GET", "DELETE"):
        answer = calls.call(method, f"/files/{part}")
        problem(answer, 404, "not-found" if "%2F" in part else "file-not-found")
    assert kept(calls) == before


def test_other_methods_are_told_the_right_ones(calls: Calls) -> None:
    assert calls.call("PUT", "/files").headers["allow"] == "GET, HEAD, POST"
    assert calls.call("POST", f"/files/{UNKNOWN_ID}").headers["allow"] == "DELETE, GET, HEAD"
    evil = {"Content-Type": "text/plain", "Origin": "http://evil.example"}
    problem(calls.call("POST", "/files", b"1", headers=evil), 403, "origin-not-allowed")


# What breaks


@pytest.mark.scenario("files", "File after a crash")
def test_a_file_that_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    with Server(tmp_path, agent=SCRIPTED) as server:
        calls = Calls(server)
        file = stored(upload(calls, PICTURE))
        server.kill()
        server.start()
        assert download(calls, file["id"]).body == PICTURE
        assert calls.call("GET", "/files").json["items"] == [file]
        folder = "context-server.db-files" if server.database_url.startswith("sqlite") else "context-server-files"
        assert (tmp_path / folder / file["id"]).read_bytes() == PICTURE


@pytest.mark.scenario("files", "What a crash left")
def test_what_a_kill_left_of_an_upload_is_deleted_a_day_later(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    with Server(tmp_path, agent=SCRIPTED, files_directory=folder, log_format="json") as server:
        calls = Calls(server)
        file = stored(upload(calls, PICTURE))
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            head = (
                b"POST /files HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 2000000\r\n\r\n"
            )
            connection.sendall(head + b"x" * 1_000_000)
            eventually(lambda: len(kept(calls)) == 3, "the first bytes on the disk, and the mark")
            server.kill()
        server.start()
        assert len(kept(calls)) == 3
        (mark,) = (folder / "pending").iterdir()
        server.kill()
        two_days_ago = time.time() - 2 * 86_400
        os.utime(mark, (two_days_ago, two_days_ago))
        server.start()
        assert kept(calls) == [file["id"]]
        assert '"files_swept"' in server.log.read_text()
        assert download(calls, file["id"]).body == PICTURE


@pytest.mark.scenario("files", "Bytes that are missing")
def test_bytes_that_are_missing_are_a_failure_of_the_server(tmp_path: Path) -> None:
    with Server(tmp_path, agent=SCRIPTED, files_directory=tmp_path / "kept", log_format="json") as server:
        calls = Calls(server)
        file = stored(upload(calls, PICTURE, name="secret-name.png"))
        (tmp_path / "kept" / file["id"]).unlink()
        problem(download(calls, file["id"]), 503, "files-unavailable")
        assert [line for line in faults(server) if '"file_storage_failed"' in line and "ENOENT" in line]
        assert "secret-name" not in server.log.read_text()
        assert calls.call("DELETE", f"/files/{file['id']}").status == 204


@pytest.mark.scenario("files", "Disk full during an upload")
@pytest.mark.only("sqlite")
def test_a_full_disk_refuses_an_upload_and_keeps_what_it_had(tmp_path: Path) -> None:
    with small_disk(tmp_path) as (disk, fill, empty), Server(tmp_path, files_directory=disk / "kept") as server:
        calls = Calls(server)
        file = stored(upload(calls, PICTURE))
        fill(server)
        problem(upload(calls, PICTURE), 507, "storage-full")
        assert [path.name for path in (disk / "kept").rglob("*") if path.is_file()] == [file["id"]]
        assert download(calls, file["id"]).body == PICTURE
        assert calls.call("GET", "/files").json["items"] == [file]
        empty(server)
        stored(upload(calls, PICTURE))
        fill(server)
        assert calls.call("DELETE", f"/files/{file['id']}").status == 204
        assert not (disk / "kept" / file["id"]).exists()
        assert "Traceback" not in server.log.read_text()


def test_types_and_prefix_are_as_set(tmp_path: Path) -> None:
    with Server(tmp_path, agent=SCRIPTED, file_types="application/x-own", path_prefix="/api/v1") as server:
        calls = Calls(server)
        headers = {"Content-Type": "application/x-own"}
        answer = calls.call("POST", "/api/v1/files", b"1", headers=headers)
        assert calls.call("GET", answer.headers["location"]).body == b"1"
        problem(calls.call("POST", "/api/v1/files", b"1", headers={"Content-Type": "image/png"}), 415,
                "unsupported-media-type")  # fmt: skip


def test_an_upload_is_not_held_in_memory(tmp_path: Path) -> None:
    """Ten uploads of 40 MB at once take far less than 400 MB more."""
    with Server(tmp_path, agent=SCRIPTED, max_file_bytes=50_000_000) as server:
        calls = Calls(server)
        stored(upload(calls, b"1"))
        status = Path(f"/proc/{server.pid}/status")
        if not status.is_file():
            pytest.skip("the peak of a process's memory is read from /proc")
        before = _peak_kib(status)
        data = b"x" * 40_000_000
        assert {answer.status for answer in together(10, lambda _: upload(calls, data))} == {http.client.CREATED}
        assert _peak_kib(status) - before < 100_000


def _peak_kib(status: Path) -> int:
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1])
