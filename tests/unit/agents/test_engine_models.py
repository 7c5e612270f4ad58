"""Models over a real network path: what goes wrong with their servers, and what is told of it."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from pydantic_ai import Agent as LibraryAgent

from context_server.agents import AgentFailed, Choice, load_agent
from context_server.agents.engine import EngineAgent
from context_server.agents.engine.choosing import model_for
from context_server.agents.engine.failures import ModelFailed, Retrying
from context_server.errors import AgentNotLoadable
from context_server.records import ChunkKind, FileRef
from tests.model_server import (
    CUT,
    DONE,
    END,
    MODEL,
    SILENCE,
    ModelServer,
    call,
    finish,
    reason,
    rubbish,
    say,
    status,
    whole,
)
from tests.ports import free_port
from tests.unit.agents.conversing import RUN, Written, said, write

AT_ONCE = Retrying(retries=2, first_pause_seconds=0)


@pytest.fixture
def server() -> Iterator[ModelServer]:
    with ModelServer() as running:
        yield running


@pytest.fixture(autouse=True)
def no_keys(monkeypatch):
    for name in [name for name in os.environ if name.endswith("_API_KEY")]:
        monkeypatch.delenv(name)


@pytest.fixture
async def engine_at() -> AsyncIterator[Callable[..., EngineAgent]]:
    """Makes the agent of a model at a URL."""
    made: list[Any] = []

    def make(url: str, retrying: Retrying = AT_ONCE) -> EngineAgent:
        model = model_for(f"openai-chat:{MODEL}", url)
        made.append(model)
        return EngineAgent(LibraryAgent(), model=model, retrying=retrying)

    yield make
    for model in made:
        await model.client.close()


async def failing(engine: EngineAgent, written: Written | None = None) -> AgentFailed:
    with pytest.raises(AgentFailed) as failure:
        await write(engine, said("my secret"), written=written)
    assert "secret" not in failure.value.detail
    return failure.value


@pytest.mark.scenario("agents", "A model without code")
async def test_a_model_of_a_compatible_server_replies(server, engine_at):
    server.answers = [whole(reason("hm"), say("It is ", "cold."))]
    written = await write(engine_at(server.url), said("weather?"))
    assert written.shape == ["step started", "reasoning", "text", "step finished"]
    assert written.text == "It is cold."
    assert (written.usage.input_tokens, written.usage.output_tokens, written.usage.estimated) == (12, 5, False)
    (asked,) = server.asked
    assert (asked["model"], asked["stream"]) == (MODEL, True)
    assert asked["messages"] == [{"role": "user", "content": "weather?"}]
    assert server.keys == ["Bearer unused"]


async def test_the_key_of_the_environment_is_used(server, monkeypatch, engine_at):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    server.answers = [whole(say("ok"))]
    await write(engine_at(server.url))
    assert server.keys == ["Bearer sk-mine"]


async def test_usage_is_estimated_where_the_server_counts_nothing(server, engine_at):
    server.answers = [[say("word " * 20), finish("stop"), DONE]]
    written = await write(engine_at(server.url), said("x" * 40))
    assert (written.usage.input_tokens, written.usage.output_tokens, written.usage.estimated) == (10, 25, True)
    assert written.usage.requests == 1


NO_HTTP = "<html>a proxy's page</html>"


async def test_an_answer_that_reached_its_limit_of_tokens_says_so(server, engine_at):
    server.answers = [whole(say("and so"), why="length")]
    written = await write(engine_at(server.url))
    assert written.data(ChunkKind.STEP)[-1]["reason"] == "length"


@pytest.mark.scenario("agents", "Failures of models")
@pytest.mark.parametrize(
    ("answer", "code", "requests"),
    [
        (status(429), "model-rate-limited", 3),
        (status(429, {"Retry-After": "3600"}), "model-rate-limited", 1),
        (status(500), "model-unavailable", 3),
        (status(503), "model-unavailable", 3),
        (status(529), "model-unavailable", 3),
        (status(400), "model-rejected", 1),
        (status(401), "model-rejected", 1),
        (status(402), "model-rejected", 1),
        (status(404), "model-unknown", 1),
        (status(418), "model-rejected", 1),
        (status(200, {"Content-Type": "text/html"}, NO_HTTP), "model-malformed", 3),
        ([CUT], "model-unavailable", 3),
        ([END], "model-malformed", 3),
        ([rubbish("{")], "model-malformed", 3),
        ([rubbish("not json"), DONE], "model-malformed", 3),
        ([rubbish('{"error": {"message": "overloaded", "code": 503}}'), DONE], "model-unavailable", 3),
        ([rubbish("[]"), DONE], "model-malformed", 3),
        ([rubbish("7"), DONE], "model-malformed", 3),
        ([rubbish('{"choices": "none"}'), DONE], "model-malformed", 3),
        ([rubbish("{}"), DONE], "model-cut", 3),
    ],
)
async def test_a_failure_of_the_model_has_its_code_and_passing_ones_are_tried_again(
    server, answer, code, requests, engine_at
):
    server.answers = [answer]
    written = Written()
    failure = await failing(engine_at(server.url), written)
    assert (failure.code, len(server.asked)) == (code, requests)
    assert written.shape == ["step started"]


async def test_a_server_that_is_not_there_is_unavailable(engine_at):
    failure = await failing(engine_at(f"http://127.0.0.1:{free_port()}/v1"))
    assert failure.code == "model-unavailable"


@pytest.mark.scenario("agents", "Retries before the first word")
async def test_a_request_is_sent_again_until_the_server_answers(server, engine_at):
    server.answers = [status(429, {"Retry-After": "0.1"}), [CUT], whole(say("At last."))]
    written = await write(engine_at(server.url))
    assert written.text == "At last."
    assert [each["number"] for each in written.data(ChunkKind.STEP)] == [1, 1]
    assert len(server.asked) == 3


async def test_a_retry_waits_as_long_as_the_server_asks(engine_at):
    asked = ModelFailed("model-rate-limited", "wait", 2.0)
    assert 2 <= (Retrying().pause_seconds(asked, 0) or 0) <= 2.5
    assert (Retrying(longest_asked_pause_seconds=1).pause_seconds(asked, 0)) is None
    assert (Retrying(retries=0).pause_seconds(asked, 0)) is None
    assert all((Retrying().pause_seconds(ModelFailed("model-cut", ""), 9) or 0) <= 8 for _ in range(20))


@pytest.mark.scenario("agents", "An answer that is cut")
@pytest.mark.parametrize(
    "rest",
    [
        [CUT],
        [END],
        [DONE],
        [rubbish('{"error": {"message": "gone", "code": 500}}'), DONE],
        [rubbish("{"), DONE],
    ],
)
async def test_an_answer_that_is_cut_is_kept_and_fails_without_a_retry(server, rest, engine_at):
    server.answers = [[say("As I ", "was "), *rest]]
    written = Written()
    failure = await failing(engine_at(server.url), written)
    assert failure.code in ("model-cut", "model-unavailable", "model-malformed")
    assert failure.code == "model-cut" or len(rest) == 2
    assert written.text == "As I was "
    assert len(server.asked) == 1
    assert (written.usage.requests, written.usage.estimated) == (1, True)
    assert written.usage.output_tokens >= 2


async def test_a_call_that_is_cut_is_not_made(server, engine_at):
    made: list[str] = []
    engine = engine_at(server.url, Retrying(retries=0))
    engine.agent.tool_plain(name="look")(lambda city: made.append(city))  # type: ignore[attr-defined]
    server.answers = [[say("So "), call("look", {"city": "Oslo"}), END]]
    assert (await failing(engine)).code == "model-cut"
    assert made == []


async def test_tools_are_called_and_their_results_sent_back(server, engine_at):
    engine = engine_at(server.url)

    def look(city: str) -> dict[str, Any]:
        return {"city": city, "celsius": 4}

    engine.agent.tool_plain(look)  # type: ignore[attr-defined]
    server.answers = [whole(call("look", {"city": "Oslo"}), why="tool_calls"), whole(say("4 degrees."))]
    written = await write(engine)
    assert written.text == "4 degrees."
    *_, asked, returned = server.asked[1]["messages"]
    assert asked["tool_calls"][0]["id"] == returned["tool_call_id"] == "call_0"
    assert "celsius" in returned["content"]
    assert written.usage.tool_calls == 1


async def test_no_retry_once_a_tool_was_called(server, engine_at):
    engine = engine_at(server.url)
    engine.agent.tool_plain(name="look")(lambda: "seen")  # type: ignore[attr-defined]
    server.answers = [whole(call("look", {}), why="tool_calls"), status(500)]
    assert (await failing(engine)).code == "model-unavailable"
    assert len(server.asked) == 2


async def test_a_silent_model_is_let_go_at_once_when_the_reply_is_cancelled(server, engine_at):
    server.answers = [[say("well"), SILENCE]]
    begun = asyncio.Event()

    async def consume() -> None:
        async for _ in engine_at(server.url)([said("hello")], RUN):
            begun.set() if server.asked else None

    task = asyncio.create_task(consume())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(server.closed.wait, 30)


async def test_a_file_that_the_model_does_not_take_is_said_to_be_the_reason(server, engine_at):
    film = FileRef(id="f", name="film.mp4", media_type="video/mp4", size_bytes=1, sha256="0" * 64)

    async def read(_file_id: str) -> bytes:
        return b"film"

    with pytest.raises(AgentFailed) as failure:
        await write(engine_at(server.url), said("watch", files=(film,)), run=replace(RUN, read_file=read))
    assert (failure.value.code, server.asked) == ("model-rejected", [])


async def test_the_responses_api_is_asked_at_a_url_where_the_name_says_so(server):
    model = model_for("openai:small", server.url)
    assert type(model).__name__ == "OpenAIResponsesModel"
    await model.client.close()  # type: ignore[attr-defined]


# Choosing


@pytest.mark.scenario("agents", "The model of a context")
async def test_a_context_has_the_model_that_it_asks_for(server):
    server.play(whole(say("ok")))
    choice = Choice(model="openai-chat:small", models=("openai-chat:large",), model_url=server.url)
    found = load_agent("demo", choice)
    assert isinstance(found, EngineAgent)
    for name in (None, "openai-chat:large", "openai-chat:small"):
        await write(found, run=replace(RUN, model=name))
    assert [asked["model"] for asked in server.asked] == ["small", "large", "small"]
    with pytest.raises(AgentFailed) as failure:
        await write(found, run=replace(RUN, model="openai-chat:gone"))
    assert failure.value.code == "model-unknown"
    for name in choice.models:
        await found._chosen(name).client.close()  # type: ignore[union-attr]
    await found._chosen(None).client.close()  # type: ignore[union-attr]


@pytest.mark.scenario("agents", "A model that cannot be had")
@pytest.mark.parametrize(
    ("agent", "choice", "complaint"),
    [
        ("demo", Choice(model="nobody:model"), "model 'nobody:model': Unknown model"),
        ("demo", Choice(model="model"), "model 'model': Unknown model"),
        ("demo", Choice(model="openai-chat:gpt"), "OPENAI_API_KEY"),
        ("demo", Choice(model="anthropic:claude"), "anthropic"),
        ("demo", Choice(model="anthropic:claude", model_url="http://x/v1"), "it is written as openai-chat:NAME"),
        ("demo", Choice(model="openai-chat:", model_url="http://x/v1"), "it is written as openai-chat:NAME"),
        ("demo", Choice(model="openai-chat:x", model_url="x"), "begins with http://"),
        ("demo", Choice(model_url="http://x/v1"), "needs a model"),
        ("demo", Choice(models=("nobody:model",), model="openai-chat:x", model_url="http://x/v1"), "Unknown model"),
        ("demo", Choice(mcp=("http://x",)), "takes no model and no MCP servers"),
        ("metronome", Choice(model="openai-chat:x", model_url="http://x/v1"), "takes no model and no MCP servers"),
    ],
)
def test_what_cannot_be_had_is_one_line_at_the_start(agent, choice, complaint):
    with pytest.raises(AgentNotLoadable, match=complaint) as refusal:
        load_agent(agent, choice)
    assert "\n" not in str(refusal.value)


def test_the_extra_for_mcp_servers_is_named():
    with pytest.raises(AgentNotLoadable, match=r"pip install 'pydantic-ai-slim\[mcp\]'"):
        load_agent("demo", Choice(model="openai-chat:x", model_url="http://x/v1", mcp=("http://x",)))


def test_the_extra_for_models_is_named_when_it_is_missing(monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.startswith("context_server.agents.engine")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pydantic_ai", None)
    with pytest.raises(AgentNotLoadable, match=r"pip install 'context-server\[agents\]'"):
        load_agent("demo", Choice(model="openai-chat:x"))


async def test_an_agent_of_the_library_is_loaded_by_its_name_and_gets_the_model(
    server, tmp_path, monkeypatch, engine_at
):
    (tmp_path / "small_agent.py").write_text("from pydantic_ai import Agent\nagent = Agent(instructions='Be brief.')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    server.answers = [whole(say("ok"))]
    found = load_agent("small_agent:agent", Choice(model=f"openai-chat:{MODEL}", model_url=server.url))
    assert isinstance(found, EngineAgent)
    assert (await write(found)).text == "ok"
    assert server.asked[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    await found._chosen(None).client.close()  # type: ignore[union-attr]
