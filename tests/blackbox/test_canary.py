"""Nothing that was said is in a signal, a log line or a metric: a word is put everywhere and looked for."""

from collections.abc import Mapping
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.blackbox.calls import PATIENCE_MS, SCRIPTED, Calls, script
from tests.databases import KINDS
from tests.server import Server

DATABASES = KINDS

CANARY = "xylographer"


def carriers(places: Mapping[str, bytes], word: str) -> list[str]:
    """The places in which a word stands: as it is, in another case, in parts of JSON, or percent-encoded."""
    return [name for name, content in places.items() if word.encode() in content.lower()]


def test_the_scanner_finds_what_is_there(tmp_path: Path) -> None:
    places = {
        "plain": b'data: {"text":"a XyloGrapher"}',
        "encoded": quote(f"?q={CANARY}").encode(),
        "traceback": f"RuntimeError: no {CANARY} here".encode(),
        "nothing": b'data: {"type":"heartbeat"}',
    }
    assert carriers(places, CANARY) == ["plain", "encoded", "traceback"]


@pytest.mark.scenario("signals", "Signals carry no text")
@pytest.mark.scenario("operations", "Logs and metrics carry no text")
@pytest.mark.scenario("runs", "Agent that raises")
@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_canary_is_in_the_pull_and_nowhere_else(tmp_path: Path, log_format: str) -> None:
    settings = {
        "log_format": log_format,
        "log_level": "debug",
        "heartbeat_seconds": 0.1,
        "signal_patience_ms": PATIENCE_MS,
    }
    with Server(tmp_path, agent=SCRIPTED, **settings) as server:
        calls = Calls(server)
        context_id = calls.create(title=f"about {CANARY}", metadata={CANARY: CANARY})
        streams = {
            "stream": calls.signals(context_id),
            "named stream": calls.signals(context_id, named="true"),
            "shared stream": calls.shared(),
        }
        with streams["stream"], streams["named stream"], streams["shared stream"]:
            replies = _say(calls, context_id)
            _send_what_is_refused(calls, context_id)
            pulled = [calls.pull(context_id, reply, view="chunks") for reply in replies]
            with calls.inline(context_id, replies[0]) as inline:
                inline.rest()
            with calls.signals(context_id, last_event_id="1") as late:
                late.until("heartbeat")
            for stream in streams.values():
                stream.until("message_completed", message_id=replies[-1])
                stream.until("heartbeat")
            metrics = calls.call("GET", "/metrics").body
            answers = [calls.call("GET", f"/contexts/{context_id}/messages/{reply}") for reply in replies]
        assert server.stop() == 0
        log = server.log.read_bytes()
    bodies = {name: bytes(stream.body) for name, stream in (*streams.items(), ("late stream", late))}
    assert carriers({**bodies, "log": log, "metrics": metrics}, CANARY) == []
    assert all(bodies.values())
    assert b"agent_failed" in log
    assert b"RuntimeError" in log
    # The same scanner finds it wherever it should be: in each kind of chunk, and in the view that sends text.
    found = {
        f"{number} {chunk['kind']}": str(chunk).encode()
        for number, page in enumerate(pulled)
        for chunk in page["chunks"]
    }
    assert carriers(found, CANARY) == ["0 text", "0 reasoning", "0 tool_call", "0 tool_result", "1 text"]
    assert carriers({"inline": bytes(inline.body)}, CANARY) == ["inline"]
    # An exception's text is in no answer either: the reply's own text is, its error is not.
    errors = {str(number): str(answer.json["error"]).encode() for number, answer in enumerate(answers)}
    assert carriers(errors, CANARY) == []
    assert [(answer.json["error"] or {}).get("code") for answer in answers] == [
        None,
        "agent-error",
        "agent-error",
        None,
    ]


def _say(calls: Calls, context_id: str) -> list[str]:
    """Has the canary said in every way; the replies: one whole, one that fails, one of rubbish, one cancelled."""
    data = {"id": CANARY, "name": CANARY, "arguments": {CANARY: CANARY}}
    whole = [
        ["text", f"{CANARY} "],
        ["textual", "reasoning", CANARY],
        ["data", "tool_call", data],
        ["data", "tool_result", data],
    ]
    replies = []
    for steps in (whole, [["text", CANARY], ["fail", f"no {CANARY}"]], [["rubbish", "bytes"], ["text", CANARY]]):
        body = {
            "payload": {"type": "text", "content": script(*steps), "display": {"shown": CANARY}},
            "client_metadata": {CANARY: [CANARY]},
        }
        headers = {"Idempotency-Key": f"{CANARY}-{len(replies)}"}
        posted = calls.call("POST", f"/contexts/{context_id}/messages", body, headers=headers)
        assert posted.status == 202, posted
        replies.append(posted.json["reply_message_id"])
        calls.ended(context_id, replies[-1])
    assert calls.call("PATCH", f"/contexts/{context_id}", {"title": f"still {CANARY}"}).status == 200
    posted = calls.run(context_id, ["mark", "held"], ["fail_when_stopped", "never", f"late {CANARY}"])
    with calls.signals(context_id) as stream:
        stream.until("state_changed", new_state="thinking")
    calls.cancel(context_id)
    calls.ended(context_id, posted["reply_message_id"])
    return [*replies, posted["reply_message_id"]]


def _send_what_is_refused(calls: Calls, context_id: str) -> None:
    """Requests with the canary that end in a problem, each of another kind."""
    messages = f"/contexts/{context_id}/messages"
    refused = [
        ("POST", messages, {"payload": {"type": CANARY, "content": CANARY}}, {}, 422),
        ("POST", messages, {CANARY: CANARY}, {}, 422),
        ("POST", messages, f'{{"payload": "{CANARY}'.encode(), {}, 400),
        ("POST", messages, CANARY.encode(), {"Content-Type": f"text/{CANARY}"}, 415),
        ("POST", messages, {}, {"Idempotency-Key": f"ä {CANARY}".encode().decode("latin-1")}, 422),
        ("GET", f"{messages}?{CANARY}={CANARY}", None, {}, 422),
        ("GET", f"{messages}?cursor={CANARY}", None, {}, 422),
        ("GET", f"{messages}/{CANARY}", None, {}, 404),
        ("GET", f"{messages}/{CANARY}/content?from_sequence={CANARY}", None, {}, 422),
        ("GET", f"/contexts/{context_id}/stream?types={CANARY}", None, {}, 422),
        ("GET", f"/contexts/{context_id}/stream", None, {"Last-Event-ID": CANARY}, 422),
        ("GET", f"/{CANARY}?{CANARY}", None, {}, 404),
        ("BREW", f"/contexts?{CANARY}", None, {}, 400),
        ("GET", "/contexts", None, {"Host": f"{CANARY}.example"}, 421),
        ("POST", "/contexts", {"title": CANARY}, {"Origin": f"http://{CANARY}.example"}, 403),
    ]
    for method, path, body, headers, status in refused:
        answer = calls.call(method, path, body, headers=headers)
        assert answer.status == status, (method, path, answer)
