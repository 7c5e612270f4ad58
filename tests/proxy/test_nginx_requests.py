"""The documented nginx configuration: hosts, origins, sizes, compression, and where the plain port leads."""

import httpx2
import pytest

from tests.blackbox.calls import eventually
from tests.proxy.curl import Stream, call, create, post
from tests.proxy.nginx import CONFIGURATION, NAME, Nginx


@pytest.mark.scenario("operations", "Host, origin and sizes behind nginx")
def test_a_node_sees_host_and_origin_as_the_client_sent_them(nginx):
    ours = call(nginx, "POST", "/contexts", {}, headers={"Origin": nginx.url})
    assert (ours.status, ours.version) == (201, "2")
    assert ours.headers["location"].startswith("/contexts/")
    assert call(nginx, "POST", "/contexts", {}, headers={"Origin": f"https://{NAME}"}).json["code"] == (
        "origin-not-allowed"
    )
    assert call(nginx, "GET", "/contexts", headers={"Host": "evil.example"}).json["code"] == "host-not-allowed"


def test_without_the_port_in_host_a_page_of_our_own_is_refused(ports):
    with Nginx(ports, ("Host $http_host", "Host $host")) as nginx:
        assert call(nginx, "POST", "/contexts", {}, headers={"Origin": nginx.url}).status == 403


@pytest.mark.scenario("operations", "Host, origin and sizes behind nginx")
def test_what_is_too_large_is_refused_by_the_node(nginx):
    text = {"payload": {"type": "text", "content": "x" * 1_500_000}}
    refused = call(nginx, "POST", f"/contexts/{create(nginx)}/messages", text)
    assert (refused.status, refused.json["code"]) == (413, "content-too-large")
    # As many contexts as a stream may name: the node is asked, which knows none of them; nginx refuses nothing.
    many = "&".join(f"context=01890000-0000-7000-8000-{number:012}:1" for number in range(200))
    assert call(nginx, "GET", f"/stream?{many}").json["code"] == "context-not-found"
    assert call(nginx, "GET", "/metrics").status == call(nginx, "GET", "/readyz").status == 404
    assert call(nginx, "GET", "/healthz").status == 200


@pytest.mark.scenario("operations", "Host, origin and sizes behind nginx")
def test_text_is_compressed_and_versions_are_not_weakened(nginx):
    zipped = {"Accept-Encoding": "gzip"}
    context = call(nginx, "POST", "/contexts", {"metadata": {"notes": "word " * 2000}}, headers=zipped)
    assert "content-encoding" not in context.headers
    path = f"/contexts/{context.json['id']}"
    tag = call(nginx, "GET", path, headers=zipped).headers["etag"]
    assert call(nginx, "PATCH", path, {"title": "new"}, headers={"If-Match": tag, **zipped}).status == 200
    reply_id = post(nginx, context.json["id"], "rate=0 words=500")
    content = f"{path}/messages/{reply_id}/content"
    eventually(lambda: call(nginx, "GET", content).json["final_sequence"], "the end of the reply")
    pulled = call(nginx, "GET", content, options=("--compressed",))
    assert pulled.headers["content-encoding"] == "gzip"
    assert pulled.json == call(nginx, "GET", content).json
    known = {"If-None-Match": pulled.headers["etag"], **zipped}
    assert call(nginx, "GET", content, headers=known).status == 304
    with Stream(nginx, f"{path}/stream", ("-H", "Accept-Encoding: gzip")) as stream:
        assert stream.next() is not None
        assert "content-encoding" not in stream.answer.headers


def test_gzip_for_everything_would_break_if_match(ports):
    everything = ("server_tokens off;", "server_tokens off; gzip on; gzip_types application/json;")
    with Nginx(ports, everything) as nginx:
        made = call(nginx, "POST", "/contexts", {"metadata": {"notes": "word " * 2000}})
        path = f"/contexts/{made.json['id']}"
        tag = call(nginx, "GET", path, options=("--compressed",)).headers["etag"]
        assert call(nginx, "PATCH", path, {"title": "new"}, headers={"If-Match": tag}).status == 422


def test_the_plain_port_sends_clients_to_tls(nginx):
    away = httpx2.get(f"http://127.0.0.1:{nginx.plain_port}/contexts?limit=1", headers={"Host": NAME}, trust_env=False)
    assert (away.status_code, away.headers["location"]) == (308, f"https://{NAME}/contexts?limit=1")


def test_the_file_is_linked_from_the_how_to():
    assert CONFIGURATION.name in (CONFIGURATION.parent / "how-to-run-many-nodes.md").read_text(encoding="utf-8")
