"""The terminal chat asks a person for approvals, and guesses nothing where there is none."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.blackbox.calls import SCRIPTED, Calls, eventually, marked, release, script
from tests.blackbox.chatting import CONTEXT, SECONDS, Output, Piped, Terminal
from tests.server import Server

SEND = {"id": "call-1", "tool": "send_mail", "arguments": {"to": "ann", "text": "Hi"}}
QUESTION = r"\[a\]pprove  \[d\]eny > "
EDITABLE = r"\[a\]pprove  \[d\]eny  \[e\]dit > "
AFTER = ["text", "and ", "on."]
"""Shown as one, it looks different from the message that asks for it."""
LINE_AWAY = "\x15"  # Ctrl-U


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    with Server(tmp_path_factory.mktemp("asked"), agent=SCRIPTED) as server:
        yield Calls(server)


def ask(calls: Calls, *requests: dict[str, Any]) -> tuple[str, str]:
    """A context whose run waits for a person: its id, and the reply's."""
    context_id = calls.create()
    posted = calls.run(context_id, ["text", "Wait. "], ["approve", *(requests or (SEND,))], AFTER)
    calls.settled(context_id, "awaiting_approval")
    return context_id, posted["reply_message_id"]


@contextmanager
def asked(calls: Calls, *requests: dict[str, Any], question: str = QUESTION) -> Iterator[tuple[Terminal, Output, str]]:
    """A chat on a terminal in which a question stands; its screen, and the context's id."""
    context_id, _ = ask(calls, *requests)
    with Terminal(calls.server.url, "--context", context_id) as chat:
        chat.screen.until(question)
        yield chat, chat.screen, context_id


def begin_to_edit(chat: Terminal) -> int:
    """Asks to edit; how much was on the screen when the arguments stood there."""
    before = len(chat.screen.text)
    chat.type("e\n")
    return chat.screen.until(r'\{"to": "ann", "text": "Hi"\}', before).end()


def called(calls: Calls, context_id: str) -> list[str]:
    path = Path(calls.server.directory) / f"called-{context_id}"
    return path.read_text().split() if path.exists() else []


def statuses(calls: Calls, context_id: str) -> list[str]:
    return [each["status"] for each in calls.approvals(context_id, "all")]


@pytest.mark.scenario("terminal-chat", "A call is approved")
def test_a_call_is_approved(calls: Calls) -> None:
    with Terminal(calls.server.url) as chat:
        context_id = chat.screen.until(CONTEXT.pattern)[1]
        chat.screen.until("> ")
        chat.type(script(["approve", SEND], AFTER) + "\n")
        question = chat.screen.until("send_mail waits for your approval:")
        chat.screen.until(QUESTION, question.end())
        shown = chat.screen.text[question.end() :].rpartition("[a]pprove")[0]
        assert '"to": "ann"' in shown
        assert '"text": "Hi"' in shown
        assert called(calls, context_id) == []
        chat.type("a\n")
        done = chat.screen.until("✓ send_mail: ", question.end()).end()
        chat.screen.until(r"and on\.", done)
        chat.screen.until("\n> ", done)
    assert len(called(calls, context_id)) == 1


@pytest.mark.scenario("terminal-chat", "A call is approved")
def test_a_call_is_approved_on_a_terminal_that_can_do_little(calls: Calls) -> None:
    context_id, _ = ask(calls)
    with Terminal(calls.server.url, "--context", context_id, kind="dumb") as chat:
        asked = chat.screen.until(QUESTION).end()
        chat.type("a\n")
        chat.screen.until(r"and on\.", asked)
    assert len(called(calls, context_id)) == 1


@pytest.mark.scenario("terminal-chat", "A call is denied")
def test_a_call_is_denied_with_a_note(calls: Calls) -> None:
    with asked(calls) as (chat, screen, context_id):
        chat.type("d\n")
        screen.until("Why")
        chat.type("not now\n")
        screen.until("✗ send_mail: denied: not now")
        screen.until(r"and on\.")
        screen.until("\n> ", len(screen.text) - 20)
    (approval,) = calls.approvals(context_id, "all")
    assert (approval["status"], approval["note"]) == ("denied", "not now")
    assert called(calls, context_id) == []


@pytest.mark.scenario("terminal-chat", "Arguments are edited")
def test_arguments_are_edited_and_must_be_json(calls: Calls) -> None:
    with asked(calls, {**SEND, "editable": True}, question=EDITABLE) as (chat, screen, context_id):
        begun = begin_to_edit(chat)
        chat.type(LINE_AWAY + '{"to": \n')
        wrong = screen.until("That is no JSON object", begun).end()
        screen.until('{"to": ', wrong)
        chat.type('"bob"}\n')
        screen.until("Approved with", wrong)
        screen.until(r"and on\.", wrong)
    (approval,) = calls.approvals(context_id, "all")
    assert (approval["status"], approval["edited_arguments"]) == ("approved", {"to": "bob"})
    assert approval["arguments"] == SEND["arguments"]


@pytest.mark.scenario("terminal-chat", "Arguments are edited")
def test_what_cannot_be_edited_is_not_offered_for_it(calls: Calls) -> None:
    with asked(calls) as (chat, screen, context_id):
        for answer in ("e", "", "yes please", "A lot"):
            before = len(screen.text)
            chat.type(f"{answer}\n")
            screen.until(QUESTION, before)
        assert statuses(calls, context_id) == ["pending"]
        chat.type("A\n")
        screen.until(r"and on\.")
    assert statuses(calls, context_id) == ["approved"]


@pytest.mark.scenario("terminal-chat", "Arguments are edited")
def test_an_empty_line_goes_back_from_editing(calls: Calls) -> None:
    with asked(calls, {**SEND, "editable": True}, question=EDITABLE) as (chat, screen, context_id):
        edited = begin_to_edit(chat)
        chat.type(LINE_AWAY + "\n")
        screen.until(EDITABLE, edited)
        begin_to_edit(chat)
        chat.type("\n")
        screen.until(r"and on\.", edited)
    (approval,) = calls.approvals(context_id, "all")
    assert (approval["status"], approval["edited_arguments"]) == ("approved", None)


@pytest.mark.scenario("terminal-chat", "Several calls wait")
def test_several_calls_are_asked_about_one_after_the_other(calls: Calls) -> None:
    other = {"id": "call-2", "tool": "delete_box", "arguments": {"name": "old"}}
    with asked(calls, SEND, other) as (chat, screen, context_id):
        assert "the first of 2" in screen.text
        assert "delete_box waits" not in screen.text
        chat.type("a\n")
        second = screen.until("delete_box waits for your approval:").end()
        screen.until(QUESTION, second)
        chat.type("d\n")
        screen.until("Why", second)
        chat.type("\n")
        screen.until(r"and on\.", second)
    decided = {each["tool"]: each["status"] for each in calls.approvals(context_id, "all")}
    assert decided == {"send_mail": "approved", "delete_box": "denied"}
    assert len(called(calls, context_id)) == 1


@pytest.mark.scenario("terminal-chat", "Another client decides first")
def test_another_client_decides_first(calls: Calls) -> None:
    with asked(calls, SEND, {**SEND, "id": "call-2"}) as (chat, screen, context_id):
        first, second = sorted(calls.approvals(context_id), key=lambda each: str(each["tool_call_id"]))
        chat.type("a")  # Begun, and not sent: it must not answer the next question.
        calls.decide(context_id, first["id"], "deny", note="I was \x1b[2Jquicker")
        told = screen.until("Denied elsewhere.").end()
        screen.until(QUESTION, told)
        chat.type("\n")
        screen.until(QUESTION + r"\s+" + QUESTION, told)
        assert sorted(statuses(calls, context_id)) == ["denied", "pending"]
        calls.decide(context_id, second["id"], "approve")
        screen.until("Approved elsewhere.", told)
        screen.until(r"and on\.", told)
        ended = screen.until("\n> ", told).end()
        chat.type(script(["text", "the next ", "one"]) + "\n")
        screen.until("the next one", ended)
    assert "\x1b[2J" not in screen.text


@pytest.mark.scenario("terminal-chat", "Another client decides first")
def test_a_decision_that_comes_too_late_is_told_what_stands(calls: Calls) -> None:
    with asked(calls, {**SEND, "editable": True}, question=EDITABLE) as (chat, screen, context_id):
        begin_to_edit(chat)
        (approval,) = calls.approvals(context_id)
        calls.decide(context_id, approval["id"], "deny")
        eventually(lambda: calls.context(context_id)["state"] == "idle", "the end of the run")
        chat.type("\n")
        screen.until("Denied elsewhere.")
        screen.until("✗ send_mail: denied")
    assert called(calls, context_id) == []


@pytest.mark.scenario("terminal-chat", "What was typed before a question is no answer to it")
def test_what_was_typed_before_a_question_is_no_answer(calls: Calls) -> None:
    with Terminal(calls.server.url) as chat:
        context_id = chat.screen.until(CONTEXT.pattern)[1]
        chat.screen.until("> ")
        chat.type(script(["mark", "begun"], ["wait", "ahead"], ["approve", SEND], AFTER) + "\n")
        marked(calls.server, "begun")
        chat.screen.until("thinking")
        chat.type("a\n")
        release(calls.server, "ahead")
        question = chat.screen.until(QUESTION).end()
        assert statuses(calls, context_id) == ["pending"]
        chat.type("d\n")
        chat.screen.until("Why", question)
        assert statuses(calls, context_id) == ["pending"]


@pytest.mark.scenario("terminal-chat", "Leaving decides nothing")
@pytest.mark.parametrize("keys", ["d\n", ""], ids=["at the note", "at the question"])
def test_leaving_decides_nothing(calls: Calls, keys: str) -> None:
    with asked(calls) as (chat, screen, context_id):
        if keys:
            chat.type(keys)
            screen.until("Why")
        chat.type("\x04")
        screen.until("Bye")
        assert chat.process.wait(SECONDS) == 0
    assert statuses(calls, context_id) == ["pending"]
    assert calls.context(context_id)["state"] == "awaiting_approval"


@pytest.mark.scenario("terminal-chat", "Interrupted at a question")
def test_an_interrupt_cancels_the_reply_that_waits(calls: Calls) -> None:
    with asked(calls) as (chat, screen, context_id):
        chat.type("\x03")
        ended = screen.until(r"\(cancelled\)").end()
        screen.until("> ", ended)
    assert statuses(calls, context_id) == ["cancelled"]
    assert calls.context(context_id)["state"] == "idle"
    assert "Traceback" not in screen.text


@pytest.mark.scenario("terminal-chat", "Nobody is there to ask")
def test_in_a_pipe_nothing_is_guessed(calls: Calls) -> None:
    with Piped(calls.server.url) as chat:
        context_id = chat.notices.until(CONTEXT.pattern)[1]
        chat.type(script(["text", "Wait. "], ["approve", SEND], AFTER) + "\na\napprove\n")
        assert chat.end() == 3
    assert chat.output.text == "Wait. \n"
    assert f"send_mail waits for an approval: {json.dumps(SEND['arguments'])}" in chat.notices.text
    assert f"--context {context_id}" in chat.notices.text
    assert statuses(calls, context_id) == ["pending"]
    (line,) = [line for line in chat.notices.text.splitlines() if line.startswith("  curl")]
    subprocess.run(["sh", "-c", line], check=True, capture_output=True, timeout=SECONDS)
    eventually(lambda: calls.context(context_id)["state"] == "idle", "the end of the run")
    assert len(called(calls, context_id)) == 1
    with Piped(calls.server.url, "--context", context_id) as again:
        assert again.end() == 0
    assert again.output.text.endswith("Wait. and on.\n")


@pytest.mark.scenario("terminal-chat", "Nobody is there to ask")
def test_a_pipe_that_resumes_what_waits_says_so(calls: Calls) -> None:
    context_id, _ = ask(calls)
    with Piped(calls.server.url, "--context", context_id) as chat:
        assert chat.end() == 3
    assert "send_mail waits for an approval" in chat.notices.text
    assert statuses(calls, context_id) == ["pending"]


@pytest.mark.scenario("terminal-chat", "What waits survives a restart")
def test_a_question_survives_a_restart_of_the_server(tmp_path: Path) -> None:
    with Server(tmp_path, agent=SCRIPTED) as server:
        calls = Calls(server)
        with asked(calls) as (chat, screen, context_id):
            server.kill()
            server.start()
            chat.type("a\n")
            screen.until(r"and on\.")
        assert len(called(calls, context_id)) == 1
