"""The documented nginx configuration, run by a real nginx before two nodes: streams, and how long they live."""

import asyncio
import contextlib
import ssl

import httpx2
import pytest

from context_server.api import forms
from context_server.client import ContextClient
from context_server.settings import Settings
from tests.blackbox.calls import Calls, eventually
from tests.proxy import upstreams
from tests.proxy.curl import ANSWER_SECONDS, PROMPT_SECONDS, Silence, Stream, call, create, post
from tests.proxy.nginx import Nginx, bytes_of, seconds_of
from tests.server import Server

PULLS = 5
SHORT_SECONDS = 2.5
"""A read time-out that a test can wait for; five heartbeats fit in, so that a pause of the machine cuts nothing."""
SHORT = ("proxy_read_timeout 40s", f"proxy_read_timeout {SHORT_SECONDS * 1000:.0f}ms")
BUFFERED = ("proxy_buffering off;", "proxy_buffering on; proxy_ignore_headers X-Accel-Buffering;")
ROUND = ("hash $spread consistent;", "")
"""Without this nginx has its requests go round the nodes."""
VERSIONS = {"1.1": "--http1.1", "2": "--http2"}


def require_prompt_signals(nginx: Nginx, version: str) -> None:
    """A reply's signals arrive while it is written.

    Raises:
        Silence: they do not.
    """
    context_id = create(nginx)
    with Stream(nginx, f"/contexts/{context_id}/stream", (VERSIONS[version],)) as stream:
        stream.next()
        post(nginx, context_id, "rate=20 words=60")
        begun = stream.seen[-1].at
        while stream.seen[-1].type != "message_completed":
            assert stream.next() is not None
            assert stream.seen[-1].at < begun + ANSWER_SECONDS / 2, stream.seen[-3:]
        assert (stream.answer.version, stream.answer.status) == (version, 200)
        assert stream.answer.headers["content-type"] == "text/event-stream"
    deltas = [event for event in stream.seen if event.type == "content_delta"]
    assert len(deltas) >= 5
    assert max(event.late_seconds for event in stream.seen[1:]) < PROMPT_SECONDS
    assert deltas[0].at < stream.seen[-1].at - 0.5  # And not all of them together at the end.


@pytest.mark.scenario("operations", "Signals through nginx")
@pytest.mark.parametrize("version", VERSIONS)
def test_signals_arrive_while_the_reply_is_written(nginx, version):
    require_prompt_signals(nginx, version)


def test_buffered_signals_are_found(ports):
    # HTTP/2 frames leave nginx as they come; over HTTP/1.1 it gathers.
    with Nginx(ports, BUFFERED) as buffering, pytest.raises(Silence):
        require_prompt_signals(buffering, "1.1")


@pytest.mark.scenario("operations", "Signals through nginx")
def test_a_post_that_is_answered_by_a_stream_is_not_buffered(nginx):
    path = f"/contexts/{create(nginx)}/messages"
    body = '{"payload": {"type": "text", "content": "rate=20 seconds=120"}}'
    options = ("-H", "Accept: text/event-stream", "-H", "Content-Type: application/json", "--data-binary", body)
    with Stream(nginx, path, options) as stream:
        first, second = stream.next(), stream.next()
    assert first is not None
    assert second is not None
    assert (first.type, second.type) == ("run_started", "text_delta")


# Which node


def pulls_of(node: Server) -> float:
    metric = Calls(node).metric
    return sum(metric(f'context_server_pulls_total{{source="{source}"}}') for source in ("memory", "database"))


@pytest.mark.scenario("operations", "One node for one context behind nginx")
def test_the_node_with_the_stream_of_a_context_gets_its_pulls(nginx, nodes):
    used = set()
    while len(used) < len(nodes):
        context_id = create(nginx)
        reply_id = post(nginx, context_id, "rate=0 words=3")
        with Stream(nginx, f"/contexts/{context_id}/stream") as stream:
            stream.until("message_completed")
            (node,) = [node for node in nodes if Calls(node).metric("context_server_open_streams") == 1]
            before = {each: pulls_of(each) for each in nodes}
            for _ in range(PULLS):
                assert call(nginx, "GET", f"/contexts/{context_id}/messages/{reply_id}/content").status == 200
            assert {each: pulls_of(each) - before[each] for each in nodes} == {
                each: PULLS if each is node else 0 for each in nodes
            }
        eventually(lambda: not any(Calls(each).metric("context_server_open_streams") for each in nodes), "the end")
        used.add(node)


@pytest.mark.scenario("operations", "Signals through nginx")
async def test_a_client_holds_everything_when_its_calls_go_round(ports, nodes):
    before = [pulls_of(node) for node in nodes]
    with Nginx(ports, ROUND) as nginx:
        trust = ssl.create_default_context(cafile=nginx.certificate)
        async with (
            httpx2.AsyncClient(verify=trust, trust_env=False) as http,
            ContextClient(f"https://localhost:{nginx.port}", http=http) as client,
        ):
            await asyncio.gather(*(follow_a_reply(nginx, client) for _ in range(4)))
    assert all(pulls_of(node) > earlier for node, earlier in zip(nodes, before, strict=True))


async def follow_a_reply(nginx: Nginx, client: ContextClient) -> None:
    """Follows a reply to its end, and compares what came with the log."""
    context = await client.create_context()
    # The client compares the digest of what it joined with that of the log.
    text = "".join([text async for text in client.reply(context.id, "rate=50 words=100")])
    assert [int(word.partition(":")[0]) for word in text.split()] == list(range(100))
    reply = (await client.list_messages(context.id))[1]
    path = f"/contexts/{context.id}/messages/{reply.id}/content?view=chunks"
    chunks = (await asyncio.to_thread(call, nginx, "GET", path)).json["chunks"]
    assert [chunk["sequence"] for chunk in chunks] == list(range(1, reply.final_sequence + 1))
    assert "".join(chunk["text"] for chunk in chunks) == text


# Time-outs


@pytest.mark.scenario("operations", "A silent stream behind nginx")
def test_heartbeats_keep_a_stream_open_beyond_the_time_out(ports):
    with Nginx(ports, SHORT) as nginx, Stream(nginx, f"/contexts/{create(nginx)}/stream") as stream:
        first = stream.next()
        assert first is not None
        while stream.seen[-1].at - first.at < 2 * SHORT_SECONDS:
            assert stream.next() is not None, "the stream was cut"


def test_a_stream_without_heartbeats_is_cut():
    with upstreams.silent() as port, Nginx([port, port], SHORT) as nginx, Stream(nginx, "/stream") as stream:
        assert stream.next() is not None
        assert stream.next(ANSWER_SECONDS) is None


def test_a_pull_that_waits_for_longer_than_the_time_out_is_cut(ports):
    with Nginx(ports, SHORT) as nginx:
        context_id = create(nginx)
        reply_id = post(nginx, context_id, "rate=0.05 seconds=60")
        path = f"/contexts/{context_id}/messages/{reply_id}/content"
        held = eventually(lambda: call(nginx, "GET", path).json["sequence"], "the first word")
        assert call(nginx, "GET", f"{path}?from_sequence={held}&wait=30").status == 504
        assert call(nginx, "POST", f"/contexts/{context_id}/cancel").status == 202


@pytest.mark.scenario("operations", "A silent stream behind nginx")
def test_the_documented_bounds_fit_those_of_a_node():
    defaults = {name: field.default for name, field in Settings.model_fields.items()}
    (longest_wait,) = [bound.le for bound in forms.ContentQuery.model_fields["wait"].metadata if hasattr(bound, "le")]
    assert seconds_of("proxy_read_timeout") > max(defaults["heartbeat_seconds"], longest_wait)
    assert seconds_of("keepalive_timeout") < 75  # timeout_keep_alive of the nodes' server
    assert bytes_of("client_max_body_size") > defaults["max_body_bytes"]
    assert bytes_of("client_body_buffer_size") >= bytes_of("client_max_body_size")


# Many streams at once


def test_a_reload_lets_go_of_old_streams_soon(ports):
    soon = ("worker_shutdown_timeout 30s", "worker_shutdown_timeout 1s")
    with Nginx(ports, soon) as nginx, Stream(nginx, "/stream") as stream:
        assert stream.next() is not None
        nginx.reload()
        while stream.next() is not None:
            assert stream.seen[-1].at < stream.seen[0].at + ANSWER_SECONDS


def test_without_the_bound_a_reload_keeps_old_streams(ports):
    with Nginx(ports, ("worker_shutdown_timeout 30s;", "")) as nginx, Stream(nginx, "/stream") as stream:
        assert stream.next() is not None
        nginx.reload()
        while stream.seen[-1].at < stream.seen[0].at + 3:
            assert stream.next() is not None


@pytest.mark.scenario("operations", "Streams that come back at once behind nginx")
def test_streams_that_come_at_once_are_spread(ports):
    count, rate = 7, 4
    with Nginx(ports, ("rate=400r/s", f"rate={rate}r/s")) as nginx, contextlib.ExitStack() as stack:
        streams = [stack.enter_context(Stream(nginx, "/stream")) for _ in range(count)]
        for stream in streams:
            assert stream.next(ANSWER_SECONDS) is not None
        opened = sorted(stream.seen[0].made_at for stream in streams)
    assert opened[-1] - opened[0] > (count - 2) / rate
