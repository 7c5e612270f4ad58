"""The frontends of ``seed_dialects.js`` in a real browser: each reads a reply of this server to its end."""

from pathlib import Path
from typing import Any

import pytest

from tests.blackbox.browser import Page, opened
from tests.blackbox.calls import SCRIPTED, Calls, script
from tests.blackbox.wire import CALL, RESULT
from tests.server import Server

REPLY = (
    ["data", "step", {"number": 1, "total": 2, "status": "started"}],
    ["textual", "reasoning", "Let me see."],
    ["data", "tool_call", CALL],
    ["wait", "called"],
    ["data", "tool_result", RESULT],
    ["data", "step", {"number": 1, "status": "finished"}],
    ["words", 100, 1.0],
)
WORDS = "".join(f"{number} " for number in range(100))
FAILING = (["words", 20, 0.2], ["fail", "secret"])


def read(part: str, steps: Any, directory: Path, page: Page, browser: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a frontend made of a reply, and the message as the server has it."""
    (directory / "called").touch()
    with Server(directory, agent=SCRIPTED, cors_origins=page.origin) as server:
        calls = Calls(server)
        made = calls.create()
        parameters = {"part": part, "context": made, "text": script(*steps)}
        with opened(browser, page, directory, calls, document="seed_dialects.html", **parameters):
            found = page.next("read")
        (context_id,) = [
            each["id"] for each in calls.call("GET", "/contexts").json["items"] if each["head_message_id"] is not None
        ]
        assert (context_id == made) == (part != "nexus")
        return found, calls.messages(context_id)[-1]


@pytest.mark.scenario("dialects", "A frontend that reads the stream of its POST")
def test_the_nexus_frontend_reads_to_the_end(tmp_path: Path, page: Page, browser: str) -> None:
    found, message = read("nexus", REPLY, tmp_path, page, browser)
    assert (found["text"], message["content"]) == (WORDS, WORDS)
    events = found["events"]
    assert [name for name, _ in events if name != "text_chunk"] == [
        "run_started",
        "tool_call_started",
        "tool_call_finished",
        "run_finished",
    ]
    assert events[0][1] == {"owner_key": "a-public-key", "user_input": script(*REPLY)}
    assert [payload["is_final"] for name, payload in events if name == "text_chunk"][-2:] == [False, True]
    assert [payload["tool_name"] for name, payload in events if name.startswith("tool_")] == ["look_up"] * 2
    assert events[-1][1] == {"status": "completed"}


@pytest.mark.scenario("dialects", "A frontend that reads the stream of its POST")
def test_the_assistant_frontend_reads_to_the_end_with_fetch(tmp_path: Path, page: Page, browser: str) -> None:
    found, message = read("assistantByFetch", REPLY, tmp_path, page, browser)
    assert (found["text"], message["content"]) == (WORDS, WORDS)
    labels = [label for label, *_ in found["events"] if label != "Delta:"]
    assert labels == ["Assistant is typing...", "Usage updated:", "Message completed:"]
    assert found["events"][-1][1]["content"] == WORDS


@pytest.mark.scenario("dialects", "A frontend with an EventSource")
def test_the_assistant_frontend_reads_to_the_end_with_an_event_source(tmp_path: Path, page: Page, browser: str) -> None:
    found, message = read("assistant", REPLY, tmp_path, page, browser)
    assert (found["text"], message["content"]) == (WORDS, WORDS)
    assert found["finalized"].items() >= {"content": WORDS, "status": "completed", "digest": message["digest"]}.items()


@pytest.mark.scenario("dialects", "A frontend with an EventSource")
def test_the_agent_frontend_reads_to_the_end(tmp_path: Path, page: Page, browser: str) -> None:
    found, message = read("agent", REPLY, tmp_path, page, browser)
    assert found["result"] == message["content"] == WORDS
    assert found["text"] == f"Agent start\n[step 1/2]\nthinks Let me see.\ncalls look_up done\n{WORDS}"


@pytest.mark.scenario("dialects", "Failure in a dialect")
@pytest.mark.parametrize("part", ["assistant", "agent"])
def test_a_frontend_shows_that_a_reply_failed(tmp_path: Path, page: Page, browser: str, part: str) -> None:
    found, message = read(part, FAILING, tmp_path, page, browser)
    assert message["status"] == "failed"
    assert found["error"] == message["error"]["detail"]
    assert "19 " in found["text"]
