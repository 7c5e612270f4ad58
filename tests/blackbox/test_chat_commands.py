"""What the terminal chat shows of an agent's work, and what a person can tell the chat."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.blackbox.calls import SCRIPTED, Calls, marked, release, script
from tests.blackbox.chatting import CONTEXT, Piped, Terminal
from tests.server import Server

CALL = {"id": "call-1", "name": "search_docs", "arguments": {"query": "resume", "most": 3}}
EVIL = "\x1b]0;owned\x07\x9b2J\u202e\rX"
"""Sets the title of a terminal, clears its screen, and turns the direction of text."""


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    with Server(tmp_path_factory.mktemp("told"), agent=SCRIPTED) as server:
        yield Calls(server)


def result(call: dict[str, Any], status: str, value: Any, seconds: float | None = 0.2) -> list[Any]:
    return ["data", "tool_result", {"id": call["id"], "status": status, "result": value, "seconds": seconds}]


def piped(calls: Calls, *lines: str, options: tuple[str, ...] = ()) -> tuple[Piped, str]:
    """A chat between pipes that has been given these lines and has ended well; and the id of its first context."""
    with Piped(calls.server.url, *options) as chat:
        context_id = chat.notices.until(CONTEXT.pattern)[1]
        chat.type("".join(f"{line}\n" for line in lines))
        assert chat.end() == 0, chat.notices.text
    return chat, context_id


@pytest.mark.scenario("terminal-chat", "The agent's work is shown")
def test_on_a_terminal_the_work_of_the_agent_is_shown(calls: Calls) -> None:
    with Terminal(calls.server.url) as chat:
        chat.screen.until("> ")
        steps = (
            ["data", "step", {"number": 2, "total": 5}],
            ["textual", "reasoning", "Let me "],
            ["textual", "reasoning", "look."],
            ["data", "tool_call", CALL],
            ["mark", "shown-mark"],
            ["wait", "shown"],
            result(CALL, "ok", ["a", "b"]),
            ["data", "tool_call", {**CALL, "id": "call-2", "name": "fetch"}],
            result({"id": "call-2"}, "error", "no network"),
            ["text", "It ", "is so."],
        )
        chat.type(script(*steps) + "\n")
        marked(calls.server, "shown-mark")
        begun = chat.screen.until("→ search_docs").start()
        chat.screen.until(r"step 2 of 5 · search_docs\(.*\d s", begun)  # Beside the spinner, with its seconds.
        release(calls.server, "shown")
        for line in (r'✓ search_docs: \["a", "b"\] \(0\.2 s\)', "✗ fetch: error: no network", "It is so."):
            begun = chat.screen.until(line, begun).end()
    shown = chat.screen.text
    assert shown.index("\x1b[2mstep 2 of 5\x1b[0m") < shown.index("\x1b[2;3mLet me look.\x1b[0m")
    assert shown.index("Let me look.\x1b[0m") < shown.index('→ search_docs(query="resume", most=3)')


@pytest.mark.scenario("terminal-chat", "The agent's work is shown")
def test_in_a_pipe_the_work_is_on_standard_error(calls: Calls) -> None:
    chat, _ = piped(
        calls,
        script(
            ["data", "step", {"number": 1}],
            ["textual", "reasoning", "Let me "],
            ["textual", "reasoning", "look.\nAgain"],
            ["data", "tool_call", CALL],
            result(CALL, "ok", {"found": 3}),
            ["data", "step", {"number": 1, "status": "finished"}],
            ["data", "step", {"number": 2, "name": "writing"}],
            ["data", "error", {"code": "oops", "detail": "half of it failed"}],
            ["text", "It is so."],
        ),
    )
    assert chat.output.text == "It is so.\n"
    assert chat.notices.text.splitlines()[1:-1] == [
        "reasoning: Let me look.",
        "reasoning: Again",
        '→ search_docs(query="resume", most=3)',
        '✓ search_docs: {"found": 3} (0.2 s)',
        "step 2: writing",
        "✗ half of it failed",
    ]


@pytest.mark.scenario("terminal-chat", "Reasoning is folded")
def test_reasoning_is_folded_when_it_is_not_wanted(calls: Calls) -> None:
    thought = script(["textual", "reasoning", "I think. "], ["text", "So."])
    chat, _ = piped(calls, "/reasoning off", thought, "/reasoning on", thought)
    told = chat.notices.text
    assert told.count("reasoning: I think.") == 1
    assert told.index("(reasoning of 9 characters") < told.index("Reasoning is shown") < told.index("I think.")
    assert chat.output.text == "So.\nSo.\n"


@pytest.mark.scenario("terminal-chat", "Nothing steers the terminal")
def test_nothing_of_an_agent_steers_the_terminal(calls: Calls) -> None:
    context_id = calls.create()
    evil = {"id": "call-1", "name": f"tool{EVIL}", "arguments": {f"key{EVIL}": EVIL}}
    calls.run(
        context_id,
        ["text", f"text{EVIL}"],
        ["textual", "reasoning", f"thought{EVIL}"],
        ["data", "tool_call", evil],
        result(evil, f"ok{EVIL}", EVIL),
        ["data", "step", {"number": 2, "name": EVIL}],
        ["data", "error", {"detail": EVIL}],
        ["approve", {"id": "call-2", "tool": f"send{EVIL}", "arguments": {"to": EVIL}, "editable": True}],
        ["text", "done"],
    )
    calls.settled(context_id, "awaiting_approval")
    with Terminal(calls.server.url, "--context", context_id) as chat:
        question = chat.screen.until(r"\[e\]dit > ").end()
        chat.type("e\n")
        chat.screen.until("owned", question)
        chat.type("\n")
        chat.screen.until("done", question)
        chat.screen.until("\n> ", len(chat.screen.text) - 40)
        shown = chat.screen.text
    assert "\\u202e" in shown  # What is decided on is shown exactly, and harmlessly.
    for steering in ("\x1b]0", "\x07", "\x9b", "\u202e\rX"):
        assert steering not in shown
    assert calls.approvals(context_id, "all")[0]["edited_arguments"] is None


@pytest.mark.scenario("terminal-chat", "Commands of the server")
def test_what_the_chat_does_not_know_the_server_is_asked(calls: Calls) -> None:
    chat, context_id = piped(calls, "/help", "/ping", "/mode plan", "/nothing", "/etc/hosts it is", "/mode act")
    told = chat.notices.text
    assert told.index("/regenerate") < told.index("Of the server:") < told.index("/identity")
    assert told.count("/usage ") == 1
    for answer in (
        "pong",
        "The mode is plan",
        "There is no command /nothing",
        "/etc/hosts is no command",
        "The mode is act",
    ):
        assert answer in told
    assert calls.context(context_id)["mode"] == "act"
    assert chat.output.text == ""


@pytest.mark.scenario("terminal-chat", "Branches")
def test_messages_are_edited_regenerated_and_forked(calls: Calls) -> None:
    chat, context_id = piped(
        calls,
        "/regenerate",
        script(["text", "one"]),
        f"/edit {script(['text', 'two'])}",
        "/edit",
        "/regenerate",
        "/branch",
        "/branch 1",
        "/branch 9",
        "/fork",
        script(["text", "three"]),
    )
    assert [message["content"] for message in calls.messages(context_id)][1:] == ["one"]
    listed = [line for line in chat.notices.text.splitlines() if line[:1] in ("*", " ") and line[2:3].isdigit()]
    assert [line[:3] for line in listed] == ["  1", "* 2", "  3", "* 4"]
    assert chat.output.text == f"one\ntwo\ntwo\n> {script(['text', 'one'])}\none\nthree\n"
    for told in ("There is no reply yet.", "Say what it should have been", "/branch NUMBER goes to one"):
        assert told in chat.notices.text
    fork_id = CONTEXT.findall(chat.notices.text)[-1]
    assert fork_id != context_id
    assert [message["content"] for message in calls.messages(fork_id)][1::2] == ["one", "three"]


@pytest.mark.scenario("terminal-chat", "Branches")
def test_on_a_terminal_the_last_message_is_there_to_be_edited(calls: Calls) -> None:
    with Terminal(calls.server.url) as chat:
        context_id = chat.screen.until(CONTEXT.pattern)[1]
        begun = chat.screen.until("> ").end()
        chat.type('[["text", "one"]]\n')
        ended = chat.screen.until("\n> ", begun).end()
        chat.type("/edit\n")
        chat.screen.until(r'\[\["text", "one"\]\]', ended)
        chat.type("\x7f" * 6 + 'two"]]\n')
        chat.screen.until("two\r\n", ended)
    assert [message["content"] for message in calls.messages(context_id)] == ['[["text", "two"]]', "two"]


@pytest.mark.scenario("terminal-chat", "What waits")
def test_a_message_waits_while_another_client_is_answered(calls: Calls) -> None:
    with Piped(calls.server.url) as chat:
        context_id = chat.notices.until(CONTEXT.pattern)[1]
        calls.run(context_id, ["wait", "chat-busy"], ["text", "a"])
        waiting = calls.run(context_id, ["text", "never"], if_busy="queue")
        chat.type("too early\n")
        chat.notices.until("Not sent: the context is")
        chat.type("/queue\n/unqueue 2\n/unqueue 1\n/queue\n")
        chat.notices.until("Nothing waits.")
        chat.type(f"/queue {script(['text', 'b'])}\n")
        release(calls.server, "chat-busy")
        assert chat.end() == 0
    assert chat.output.text.endswith("\nb\n")
    for told in ('1  [["text", "never"]]', "/unqueue NUMBER takes one back", "Taken back."):
        assert told in chat.notices.text
    said = [message["content"] for message in calls.messages(context_id)]
    assert said[1::2] == ["a", "b"]
    assert calls.call("GET", f"/contexts/{context_id}/messages/{waiting['message_id']}").status == 404


@pytest.mark.scenario("terminal-chat", "A file goes with a message")
def test_a_file_goes_with_the_next_message(calls: Calls, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("rain")
    chat, context_id = piped(
        calls,
        "/file",
        f"/file {tmp_path / 'none.txt'}",
        f"/file {tmp_path / 'notes.txt'}",
        script(["text", "one"]),
        script(["text", "two"]),
    )
    files = [message["payload"]["files"] for message in calls.messages(context_id)[::2]]
    assert [[file["name"] for file in each] for each in files] == [["notes.txt"], []]
    for told in ("/file PATH", "Not read: No such file", "notes.txt (text/plain, 4 bytes)"):
        assert told in chat.notices.text
    again, _ = piped(calls, options=("--context", context_id))
    assert f"> {script(['text', 'one'])}\n[notes.txt]\none\n" in again.output.text


@pytest.mark.scenario("terminal-chat", "Usage")
def test_usage_is_told_on_demand(calls: Calls) -> None:
    used = {"input_tokens": 3, "output_tokens": 4, "requests": 1, "tool_calls": 0}
    chat, _ = piped(calls, script(["usage", used], ["text", "x"]), script(["usage", used], ["text", "y"]), "/usage")
    assert "The last reply: 3 tokens in, 4 out, 1 requests, 0 tool calls." in chat.notices.text
    assert "6 tokens in, 8 out, in 2 replies" in chat.notices.text


@pytest.mark.scenario("terminal-chat", "Many lines of work")
def test_long_calls_and_results_are_one_short_line(calls: Calls) -> None:
    long = {"id": "call-1", "name": "read", "arguments": {"page": "x" * 30_000}}
    chat, _ = piped(calls, script(["data", "tool_call", long], result(long, "ok", "a\nb " * 9_000), ["text", "x"]))
    lines = [line for line in chat.notices.text.splitlines() if "read" in line]
    assert [len(line) <= 210 for line in lines] == [True, True]
    assert json.dumps("x" * 50)[1:-1] in lines[0]
