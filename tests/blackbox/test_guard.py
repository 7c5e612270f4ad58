"""Who may talk to a server on somebody's laptop: names, origins and content types."""

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from tests.chaos import wire
from tests.server import Server

ORIGIN = "http://localhost:5173"
FOREIGN = ("http://localhost:5174", "https://localhost:5173", "http://localhost", "http://evil.example", "null")
EXPOSED = {"ETag", "Location", "Retry-After", "Idempotency-Replayed"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("guarded")
    with Server(directory, agent="metronome", allowed_hosts="chat.example", cors_origins=ORIGIN) as running:
        yield running
        assert "error" not in running.log.read_text()


@pytest.fixture
def http(server: Server) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, trust_env=False) as client:
        yield client


def contexts(http: httpx2.Client) -> int:
    return len(http.get("/contexts?limit=200").json()["items"])


@pytest.mark.scenario("operations", "Foreign host")
@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "[::1]", "chat.example", "CHAT.example", "LocalHost"])
@pytest.mark.parametrize("port", ["", ":8000"])
def test_the_names_of_the_server_are_served(http: httpx2.Client, name: str, port: str) -> None:
    assert http.post("/contexts", headers={"Host": name + port}).status_code == 201


@pytest.mark.scenario("operations", "Foreign host")
@pytest.mark.parametrize(
    "name",
    [
        "evil.example",
        "localhost.evil.example",
        "evil.example:80",
        "127.0.0.1.evil.example",
        "127.0.0.2",
        "[::2]:80",
        "",
    ],
)
def test_another_name_is_refused_and_does_nothing(http: httpx2.Client, server: Server, name: str) -> None:
    before = contexts(http)

    for method, path in (("POST", "/contexts"), ("GET", "/contexts"), ("GET", "/stream"), ("GET", "/metrics")):
        answer = http.request(method, path, headers={"Host": name})
        assert (answer.status_code, answer.json()["code"]) == (421, "host-not-allowed")

    assert contexts(http) == before


def cors_of(answer: httpx2.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control-")}


@pytest.mark.scenario("operations", "Exact origins")
def test_the_page_of_the_origin_may_read_what_it_needs(http: httpx2.Client) -> None:
    page = {"Origin": ORIGIN}
    context_id = http.post("/contexts", headers=page).json()["id"]
    answers = [
        http.get(f"/contexts/{context_id}", headers=page),
        http.post("/contexts", headers=page),
        http.get("/contexts/unknown", headers=page),
        http.post("/contexts", headers=page, content=b"{", params={}),
        http.request("PUT", "/contexts", headers=page),
    ]
    with http.stream("GET", f"/contexts/{context_id}/stream", headers=page) as stream:
        answers.append(stream)

    assert [answer.status_code for answer in answers] == [200, 201, 404, 415, 405, 200]
    for answer in answers:
        given = cors_of(answer)
        assert given["access-control-allow-origin"] == ORIGIN
        assert set(given["access-control-expose-headers"].split(", ")) >= EXPOSED
        assert "access-control-allow-credentials" not in given


@pytest.mark.scenario("operations", "Exact origins")
@pytest.mark.parametrize("method", ["GET", "POST", "PATCH", "DELETE"])
def test_a_preflight_of_the_origin_is_granted(http: httpx2.Client, method: str) -> None:
    wanted = "content-type, idempotency-key, if-match, if-none-match, last-event-id"
    asked = {"Origin": ORIGIN, "Access-Control-Request-Method": method, "Access-Control-Request-Headers": wanted}

    answer = http.options("/contexts/any/messages", headers=asked)

    assert answer.status_code == 200
    assert cors_of(answer)["access-control-allow-origin"] == ORIGIN
    assert method in cors_of(answer)["access-control-allow-methods"]
    allowed = cors_of(answer)["access-control-allow-headers"].lower()
    assert all(name in allowed for name in wanted.split(", "))


@pytest.mark.scenario("operations", "Exact origins")
@pytest.mark.parametrize("origin", FOREIGN)
def test_pages_of_other_origins_get_nothing(http: httpx2.Client, origin: str) -> None:
    page = {"Origin": origin}
    context_id = http.post("/contexts").json()["id"]
    before = contexts(http)
    preflight = http.options("/contexts", headers=page | {"Access-Control-Request-Method": "POST"})
    with http.stream("GET", f"/contexts/{context_id}/stream", headers=page) as stream:
        answers = [preflight, stream, http.get(f"/contexts/{context_id}", headers=page)]
    written = [
        http.post("/contexts", headers=page),
        http.patch(f"/contexts/{context_id}", headers=page, json={"title": "theirs"}),
        http.delete(f"/contexts/{context_id}", headers=page),
    ]

    assert preflight.status_code >= 400
    assert not any("access-control-allow-origin" in answer.headers for answer in (*answers, *written))
    for answer in written:
        assert (answer.status_code, answer.json()["code"]) == (403, "origin-not-allowed")
    assert contexts(http) == before
    assert http.get(f"/contexts/{context_id}").json()["title"] is None


def test_a_page_of_the_server_itself_may_write(http: httpx2.Client, server: Server) -> None:
    assert http.post("/contexts", headers={"Origin": server.url}).status_code == 201


def writes(context_id: str) -> list[tuple[str, str, Any]]:
    """Every route that takes a body, with a valid one."""
    return [
        ("POST", "/contexts", {"title": "written"}),
        ("PATCH", f"/contexts/{context_id}", {"title": "written"}),
        ("POST", f"/contexts/{context_id}/messages", wire.message("words=1")),
        ("POST", f"/contexts/{context_id}/cancel", {}),
    ]


@pytest.mark.scenario("operations", "Content type demanded")
@pytest.mark.parametrize(
    "media_type",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonp", None],
)
async def test_a_body_that_is_not_declared_as_json_is_refused(server: Server, media_type: str | None) -> None:
    context_id = await wire.new_context(server.port)
    before = await wire.call(server.port, "GET", "/contexts?limit=200")

    for method, path, body in writes(context_id):
        answer = await wire.call(server.port, method, path, body, {"Content-Type": media_type or ""})
        assert (answer.status, answer.json["code"]) == (415, "unsupported-media-type")

    assert (await wire.call(server.port, "GET", "/contexts?limit=200")).json == before.json
    assert (await wire.call(server.port, "GET", f"/contexts/{context_id}/messages")).json["items"] == []


@pytest.mark.scenario("operations", "Content type demanded")
@pytest.mark.parametrize("media_type", ["application/json; charset=utf-8", "Application/JSON"])
async def test_json_is_accepted_however_it_is_written(server: Server, media_type: str) -> None:
    context_id = await wire.new_context(server.port)

    answers = [
        await wire.call(server.port, method, path, body, {"Content-Type": media_type})
        for method, path, body in writes(context_id)
    ]

    assert [answer.status for answer in answers] == [201, 200, 202, 202]
