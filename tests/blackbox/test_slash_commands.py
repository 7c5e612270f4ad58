"""Commands that a person types to the server: answered at once, by their own call or as a message."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.blackbox.calls import SCRIPTED, Calls, faults, release
from tests.server import Server

SETTINGS = {"models": "openai-chat:small,openai-chat:large", "log_format": "json"}


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    with Server(tmp_path_factory.mktemp("slash"), agent=SCRIPTED, **SETTINGS) as server:
        yield Calls(server)
        assert faults(server) == []


def execute(calls: Calls, command: str, *args: str, context_id: str | None = None) -> dict[str, Any]:
    body = {"command": command, "args": list(args)} | ({} if context_id is None else {"context_id": context_id})
    answer = calls.call("POST", "/commands/execute", body)
    assert answer.status == 200, answer
    assert set(answer.json) == {"status", "message", "data"}
    return dict(answer.json)


@pytest.mark.scenario("commands", "Execute a command")
def test_ping_is_answered(calls: Calls) -> None:
    for command in ("/ping", "ping"):
        assert execute(calls, command)["message"] == "pong"


@pytest.mark.scenario("commands", "List the commands")
def test_help_lists_every_command(calls: Calls) -> None:
    answer = execute(calls, "/help")
    assert set(answer["data"]["commands"]) == {
        *("/help", "/ping", "/config", "/clear", "/mode", "/model", "/usage", "/identity")
    }
    assert all(answer["data"]["commands"].values())


@pytest.mark.scenario("commands", "An unknown command")
def test_an_unknown_command_is_named_with_those_there_are(calls: Calls) -> None:
    answer = execute(calls, "/nothing")
    assert answer["status"] == "error"
    assert "/nothing" in answer["message"]
    assert "/help" in answer["message"]


@pytest.mark.scenario("commands", "A message that is a command")
def test_a_message_that_is_a_command_is_carried_out_and_not_stored(calls: Calls) -> None:
    context_id = calls.create()
    answer = calls.send(context_id, "/mode plan")
    assert (answer.status, answer.json["status"], answer.json["data"]) == (200, "success", {"mode": "plan"})
    assert calls.context(context_id)["mode"] == "plan"
    assert calls.messages(context_id) == []


@pytest.mark.parametrize("text", ["/etc/hosts is a file", "/nothing of ours", "// a comment", "/"])
def test_what_only_looks_like_a_command_is_a_message(metronome: Server, text: str) -> None:
    calls = Calls(metronome)
    context_id = calls.create()
    posted = calls.post(context_id, text)
    assert calls.message(context_id, posted["message_id"])["content"] == text


def test_a_message_may_say_what_is_a_command(metronome: Server) -> None:
    calls = Calls(metronome)
    context_id = calls.create()
    posted = calls.post(context_id, "//help me")
    assert calls.message(context_id, posted["message_id"])["content"] == "/help me"


@pytest.mark.scenario("commands", "A fresh start")
def test_clear_begins_afresh_and_keeps_the_history(calls: Calls) -> None:
    context_id = calls.create()
    calls.ended(context_id, calls.run(context_id, ["text", "one"])["reply_message_id"])
    assert execute(calls, "/clear", context_id=context_id)["status"] == "success"
    assert calls.messages(context_id) == []
    assert len(calls.call("GET", f"/contexts/{context_id}/messages?tree=true").json["items"]) == 2
    posted = calls.run(context_id, ["wait", "clear-gate"])
    refused = execute(calls, "/clear", context_id=context_id)
    release(calls.server, "clear-gate")
    calls.ended(context_id, posted["reply_message_id"])
    assert (refused["status"], refused["data"]["code"]) == ("error", "command-not-allowed")


@pytest.mark.parametrize("command", ["/mode", "/model", "/clear"])
def test_a_command_about_a_context_says_that_it_needs_one(calls: Calls, command: str) -> None:
    answer = execute(calls, command)
    assert answer["status"] == "error"
    assert "context_id" in answer["message"]
    assert execute(calls, command, context_id="nowhere")["data"]["code"] == "context-not-found"


@pytest.mark.scenario("commands", "Choose a model")
def test_a_model_is_one_of_those_that_are_allowed(calls: Calls) -> None:
    context_id = calls.create()
    assert execute(calls, "/model", "openai-chat:large", context_id=context_id)["status"] == "success"
    assert calls.context(context_id)["model"] == "openai-chat:large"
    refused = execute(calls, "/model", "gpt-9", context_id=context_id)
    assert (refused["status"], "openai-chat:small" in refused["message"]) == ("error", True)
    assert calls.call("PATCH", f"/contexts/{context_id}", {"model": "gpt-9"}).status == 422
    assert calls.call("PATCH", f"/contexts/{context_id}", {"model": None}).json["model"] is None


@pytest.mark.scenario("commands", "Nothing secret is shown")
def test_config_shows_no_secret(tmp_path: Path) -> None:
    secret = "sk-very-secret"  # noqa: S105 - it is none
    database = f"sqlite:///{tmp_path}/{secret}.db"
    with Server(tmp_path, agent=SCRIPTED, database=database) as server:
        answer = execute(Calls(server), "/config")
    assert answer["status"] == "success"
    assert secret not in str(answer)
    assert answer["data"]["settings"]["max_run_steps"] == 50


@pytest.mark.scenario("commands", "Usage")
def test_usage_is_summed_over_a_context_and_over_all(calls: Calls) -> None:
    before = calls.call("GET", "/usage").json
    context_id = calls.create()
    for number in (3, 4):
        numbers = {"input_tokens": number, "output_tokens": 10 * number, "requests": 1, "tool_calls": 2}
        posted = calls.run(context_id, ["usage", numbers], ["text", "x"])
        message = calls.ended(context_id, posted["reply_message_id"])
        assert message["usage"] == {**numbers, "estimated": False}
    total = {"replies": 2, "input_tokens": 7, "output_tokens": 70, "requests": 2, "tool_calls": 4, "estimated": False}
    assert calls.call("GET", f"/usage?context={context_id}").json == {"context_id": context_id, **total}
    after = calls.call("GET", "/usage").json
    assert after["output_tokens"] - before["output_tokens"] == 70
    assert execute(calls, "/usage", context_id=context_id)["data"] == total
    assert calls.call("GET", "/usage?context=nowhere").status == 404


@pytest.mark.scenario("commands", "A command of a user's package")
def test_a_package_adds_a_command(tmp_path: Path) -> None:
    info = tmp_path / "site" / "weather_command-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: weather-command\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[context_server.commands]\nweather = weather_command:weather\n")
    (tmp_path / "site" / "weather_command.py").write_text(
        "from context_server.slash import Answer\n\n\n"
        "async def weather(call):\n"
        '    """Says how the weather is."""\n'
        '    return Answer(message=f"It rains in {call.args[0]}.", data={"city": call.args[0]})\n'
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    program = (
        "import asyncio\n"
        "from context_server.slash import Call, Facts, SlashCommands\n"
        "facts = Facts(version='1', agent='a', model='', models=(), settings={})\n"
        "slash = SlashCommands(None, None, facts)\n"
        "print(asyncio.run(slash.execute('me', None, 'weather', ('Oslo',))).message)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "It rains in Oslo."
