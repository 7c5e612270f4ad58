"""The documented nginx configuration before nodes that are dead, off, stopping, or gone before they had answered."""

import asyncio
import ssl
import time
from collections.abc import Callable

import httpx2
import pytest

from context_server.client import ContextClient
from tests.blackbox.calls import Calls
from tests.proxy import upstreams
from tests.proxy.curl import Answer, Stream, call
from tests.proxy.nginx import Nginx, seconds_of
from tests.server import Server

ROUNDS = 4
MOST_ROUNDS = 40
"""Calls in a row: each goes to one of two nodes, like a coin."""
ALWAYS_REPEATED = ("error timeout http_503;", "error timeout http_503 non_idempotent;")


def posted(nginx: Nginx, keys: bool, until: Callable[[list[Answer]], bool] = lambda _: True) -> list[Answer]:
    """The answers to posts of a new context each, with or without keys: some, and more until that is enough."""
    answers: list[Answer] = []
    while len(answers) < ROUNDS or not until(answers):
        assert len(answers) < MOST_ROUNDS, answers
        headers = {"Idempotency-Key": f"{nginx.port}-{len(answers)}"} if keys else {}
        answers.append(call(nginx, "POST", "/contexts", {}, headers=headers))
    return answers


def contexts(node: Server) -> int:
    return len(Calls(node).call("GET", "/contexts?limit=200").json["items"])


@pytest.mark.scenario("operations", "A post behind nginx is done once")
@pytest.mark.parametrize("keys", [False, True])
def test_a_post_whose_answer_was_lost_is_done_once(nodes, keys):
    before = contexts(nodes[0])
    with upstreams.Forgetful(nodes[0].port) as forgetful, Nginx([forgetful.port, nodes[1].port]) as nginx:
        answers = posted(nginx, keys, until=lambda _: forgetful.done > 0)
    assert contexts(nodes[0]) == before + len(answers)
    statuses = sorted(answer.status for answer in answers)
    if keys:
        assert set(statuses) == {201}
        replayed = [answer for answer in answers if answer.headers.get("idempotency-replayed") == "true"]
        assert len(replayed) == forgetful.done
    else:
        assert statuses == [201] * (len(answers) - forgetful.done) + [502] * forgetful.done


def test_a_post_without_key_that_nginx_repeats_is_done_twice(nodes):
    before = contexts(nodes[0])
    with (
        upstreams.Forgetful(nodes[0].port) as forgetful,
        Nginx([forgetful.port, nodes[1].port], ALWAYS_REPEATED) as nginx,
    ):
        answers = posted(nginx, keys=False, until=lambda _: forgetful.done > 0)
    assert {answer.status for answer in answers} == {201}
    assert contexts(nodes[0]) == before + len(answers) + forgetful.done


def refusals(nginx: Nginx, keys: bool) -> list[Answer]:
    """What posts, reads and streams get that is no success, while one of two nodes fails."""
    answers = posted(nginx, keys)
    answers += [call(nginx, "GET", f"/contexts/{answer.json['id']}") for answer in answers]
    for _ in range(ROUNDS):
        with Stream(nginx, "/stream") as stream:
            stream.next()
            answers.append(stream.answer)
    return [answer for answer in answers if answer.status >= 300]


@pytest.mark.scenario("operations", "A node that fails behind nginx")
def test_a_dead_node_costs_nothing(ports):
    with Nginx([upstreams.dead(), ports[0]]) as nginx:
        assert refusals(nginx, keys=False) == []


@pytest.mark.scenario("operations", "A node that fails behind nginx")
def test_a_node_that_cannot_be_reached_costs_a_second(ports):
    with upstreams.unreachable() as port, Nginx([port, ports[0]]) as nginx:
        tried_at = time.monotonic() + seconds_of("proxy_connect_timeout") + 0.5
        answers = posted(nginx, keys=False, until=lambda _: time.monotonic() > tried_at)
        assert {answer.status for answer in answers} == {201}
        with Stream(nginx, "/stream") as stream:
            assert stream.next() is not None


@pytest.mark.scenario("operations", "A node that fails behind nginx")
def test_a_node_that_stops_is_passed_over(ports):
    def some_refused(answers: list[Answer]) -> bool:
        return 503 in {answer.status for answer in answers}

    with upstreams.refusing() as port, Nginx([port, ports[0]]) as nginx:
        assert refusals(nginx, keys=True) == []
        # Without a key nginx does not know what was done: the client is told, and repeats it.
        assert {answer.status for answer in posted(nginx, keys=False, until=some_refused)} <= {201, 503}


@pytest.mark.scenario("operations", "Rolling restart behind nginx")
async def test_nodes_are_restarted_one_after_the_other_and_nobody_notices(nginx, nodes):
    statuses: list[int] = []

    async def note(response: httpx2.Response) -> None:
        statuses.append(response.status_code)

    trust = ssl.create_default_context(cafile=nginx.certificate)
    async with (
        httpx2.AsyncClient(verify=trust, trust_env=False, event_hooks={"response": [note]}) as http,
        ContextClient(f"https://localhost:{nginx.port}", http=http) as client,
    ):
        restarted = asyncio.Event()

        async def converse() -> int:
            """Replies that were read whole; it goes on until the nodes are restarted."""
            replies = 0
            context_id = (await client.create_context()).id
            while not restarted.is_set():
                # It compares the digest of what it joined with that of the log, and raises when the reply has failed.
                text = "".join([text async for text in client.reply(context_id, "rate=50 words=25")])
                assert [int(word.partition(":")[0]) for word in text.split()] == list(range(25))
                replies += 1
            return replies

        async with asyncio.TaskGroup() as group:
            talks = [group.create_task(converse()) for _ in range(3)]
            for node in nodes:
                before = len(statuses)
                assert await asyncio.to_thread(node.stop) == 0
                await asyncio.to_thread(node.start)
                assert len(statuses) > before
            restarted.set()
    assert min(talk.result() for talk in talks) >= 2
    assert max(statuses) < 500, nginx.log.read_text()


def test_without_another_try_the_failing_node_shows(ports):
    never = ("error timeout http_503;", "off;"), ("error timeout http_503 non_idempotent;", "off;")

    def some_failed(answers: list[Answer]) -> bool:
        return max(answer.status for answer in answers) >= 500

    with upstreams.refusing() as port, Nginx([port, ports[0]], *never) as nginx:
        assert {answer.status for answer in posted(nginx, keys=True, until=some_failed)} <= {201, 503}
    with Nginx([upstreams.dead(), ports[0]], *never) as nginx:
        assert {answer.status for answer in posted(nginx, keys=True, until=some_failed)} <= {201, 502}
