"""The terminal chat as a person, and as a pipe, uses it."""

import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest

from tests.blackbox.chatting import CONTEXT, SECONDS, Piped, Terminal, command, environment
from tests.ports import free_port
from tests.server import Server


def messages(server: Server, context_id: str) -> list[dict[str, Any]]:
    answer = httpx2.get(f"{server.url}/contexts/{context_id}/messages?include=content", trust_env=False)
    return list(answer.json()["items"])


@contextmanager
def a_context_with_a_reply(server: Server, text: str) -> Iterator[str]:
    """The id of a context in which ``text`` was posted by a chat that has left since."""
    with Piped(server.url) as chat:
        context_id = chat.notices.until(CONTEXT.pattern)[1]
        chat.type(text + "\n")
        chat.output.until("0:")
        yield context_id


@pytest.mark.scenario("operations", "Terminal chat streams a reply")
def test_between_pipes_it_prints_the_reply_and_nothing_else(metronome: Server) -> None:
    with Piped(metronome.url) as chat:
        context_id = chat.notices.until(CONTEXT.pattern)[1]
        chat.type("\nrate=8 seconds=2.5\n")
        chat.output.until("0:")
        assert "19:" not in chat.output.text
        chat.type("/nothing\n//rate=0 words=3")  # The last line has no end.
        assert chat.end() == 0
        asked = messages(metronome, context_id)
    assert [message["content"] for message in asked if message["role"] == "user"] == [
        "rate=8 seconds=2.5",
        "/rate=0 words=3",
    ]
    assert chat.output.text == "".join(message["content"] + "\n" for message in asked if message["role"] == "assistant")
    assert "There is no command /nothing" in chat.notices.text
    assert f"Resume with: context-server chat --url {metronome.url} --context {context_id}" in chat.notices.text


@pytest.mark.scenario("operations", "Terminal chat streams a reply")
def test_a_resumed_context_shows_its_history_and_the_reply_that_runs(metronome: Server) -> None:
    with a_context_with_a_reply(metronome, "rate=0 words=2") as context_id, Piped(metronome.url) as other:
        other_id = other.notices.until(CONTEXT.pattern)[1]
        other.type("rate=20 seconds=1.5\n")
        other.output.until("0:")
        with (
            Piped(metronome.url, "--context", other_id) as attached,
            Piped(metronome.url, "--context", context_id) as ended,
        ):
            assert ended.end() == 0
            assert attached.end() == 0
    running, whole = messages(metronome, other_id), messages(metronome, context_id)
    assert attached.output.text == f"> rate=20 seconds=1.5\n{running[1]['content']}\n"
    assert ended.output.text == f"> rate=0 words=2\n{whole[1]['content']}\n"
    assert running[1]["status"] == "completed"


@pytest.mark.scenario("operations", "Terminal chat streams a reply")
def test_on_a_terminal_it_shows_the_state_and_the_reply_as_it_grows(metronome: Server) -> None:
    with Terminal(metronome.url) as chat:
        context_id = chat.screen.until(CONTEXT.pattern)[1]
        prompt = chat.screen.until("> ").end()
        chat.type("rate=8 seconds=2.5\n")
        chat.screen.until("writing…", prompt)
        begun = chat.screen.until("0:[0-9]", prompt).end()
        assert "19:" not in chat.screen.text[begun:]
        end = chat.screen.until("\n> ", begun).end()
        written = messages(metronome, context_id)[1]["content"].split()
        assert all(word in chat.screen.text for word in written)
        chat.type("/help\n")
        chat.screen.until("/cancel", end)
        chat.type("/new\n")
        assert chat.screen.until(CONTEXT.pattern, end)[1] != context_id
        chat.type("/quit\n")
        chat.screen.until("Bye", end)
        assert chat.process.wait(SECONDS) == 0


@pytest.mark.scenario("operations", "Terminal chat through a restart")
def test_a_killed_server_costs_no_character(server: Server) -> None:
    with Piped(server.url) as chat:
        context_id = chat.notices.until(CONTEXT.pattern)[1]
        chat.type("rate=50 seconds=60\n")
        chat.output.until("10:[0-9]")
        server.kill()
        chat.notices.until("connection lost, resuming")
        server.start()
        chat.notices.until("the reply failed: interrupted")
        chat.type("rate=0 words=3\n")
        chat.output.until("\n0:.* 2:[0-9]+ \n")
        assert chat.end() == 0
    kept = [message for message in messages(server, context_id) if message["role"] == "assistant"]
    assert [message["status"] for message in kept] == ["failed", "completed"]
    assert chat.output.text == "".join(message["content"] + "\n" for message in kept)


@pytest.mark.scenario("operations", "Terminal chat through a restart")
def test_on_a_terminal_a_restart_is_shown_and_passed(server: Server) -> None:
    with Terminal(server.url) as chat:
        begun = chat.screen.until("> ").end()
        chat.type("rate=50 seconds=60\n")
        chat.screen.until("5:[0-9]", begun)
        server.kill()
        chat.screen.until("connection lost, resuming", begun)
        server.start()
        ended = chat.screen.until("the reply failed: interrupted", begun).end()
        chat.screen.until("> ", ended)
        chat.type("rate=0 words=3\n")
        chat.screen.until("2:[0-9]+ ", ended)


@pytest.mark.scenario("operations", "Terminal chat cancels")
def test_an_interrupt_cancels_the_reply_and_the_next_one_leaves(metronome: Server) -> None:
    with Piped(metronome.url) as chat:
        context_id = chat.notices.until(CONTEXT.pattern)[1]
        chat.type("rate=50 seconds=60\n")
        chat.output.until("5:[0-9]")
        chat.process.send_signal(signal.SIGINT)
        chat.notices.until(re.escape("(cancelled)"))
        chat.type("rate=0 words=3\n")
        chat.output.until("\n0:.* 2:[0-9]+ \n")
        chat.process.send_signal(signal.SIGINT)
        chat.notices.until("Bye")
        assert chat.process.wait(SECONDS) == 0
        printed = chat.output.rest()
    replies = [message for message in messages(metronome, context_id) if message["role"] == "assistant"]
    assert [message["status"] for message in replies] == ["cancelled", "completed"]
    assert printed == "".join(message["content"] + "\n" for message in replies)


@pytest.mark.scenario("operations", "Terminal chat cancels")
def test_on_a_terminal_control_c_does_the_same(metronome: Server) -> None:
    with Terminal(metronome.url) as chat:
        begun = chat.screen.until("> ").end()
        chat.type("rate=50 seconds=60\n")
        chat.screen.until("5:[0-9]", begun)
        chat.type("\x03")
        ended = chat.screen.until(re.escape("(cancelled)"), begun).end()
        chat.screen.until("> ", ended)
        chat.type("\x03")
        chat.screen.until("Bye", ended)
        assert chat.process.wait(SECONDS) == 0
    assert "Traceback" not in chat.screen.text


def test_without_a_server_it_says_so_in_one_line(metronome: Server) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    absent = subprocess.run(command(nowhere), input="hello\n", capture_output=True, text=True, env=environment())
    unknown = subprocess.run(
        command(metronome.url, "--context", "nothing"),
        input="hello\n",
        capture_output=True,
        text=True,
        env=environment(),
    )
    for refused in (absent, unknown):
        assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
    assert f"There is no context server at {nowhere}" in absent.stderr
    assert "There is no context nothing" in unknown.stderr
