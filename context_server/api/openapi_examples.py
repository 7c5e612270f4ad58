"""Examples for the OpenAPI document: values of each model, and a request with curl for each operation.

One conversation runs through all of them, so that ids, versions and sequences agree.
"""

import json
import shlex
from typing import Any
from urllib.parse import quote

Json = dict[str, Any]

CONTEXT_ID = "019aa5d2-7c1e-7b4f-9a55-3f0d2c6b8e11"
MESSAGE_ID = "019aa5d2-8f30-7d02-8c1b-6e4a90d7f2c3"
REPLY_ID = "019aa5d2-8f31-7aa0-b9d6-51c7e83b04f8"
RUN_ID = "019aa5d2-8f32-7e6d-a2f4-0b9c1d5e7a36"
FILE_ID = "019aa5d2-7f04-7c55-8e2b-9a1d3c5f7b60"
EPOCH = "019aa5c0-1a2b-7c3d-8e4f-5a6b7c8d9e0f"
TIME = "2026-11-21T10:00:00.123Z"
ADDRESS = "http://127.0.0.1:8000"
"""Where the server listens unless it is told otherwise."""

_CONTEXT: Json = {
    "id": CONTEXT_ID,
    "epoch": EPOCH,
    "title": "Release notes",
    "mode": "act",
    "model": None,
    "state": "streaming",
    "version": 5,
    "head_message_id": REPLY_ID,
    "active_run": {"id": RUN_ID, "message_id": REPLY_ID, "status": "running", "attempt": 1, "tool": None},
    "allowed_commands": ["cancel"],
    "metadata": {"project": "apollo"},
    "created_at": TIME,
    "updated_at": TIME,
}
_MESSAGE: Json = {
    "id": REPLY_ID,
    "context_id": CONTEXT_ID,
    "parent_id": MESSAGE_ID,
    "role": "assistant",
    "status": "streaming",
    "sequence": 13,
    "final_sequence": None,
    "payload": None,
    "run_id": RUN_ID,
    "error": None,
    "usage": None,
    "digest": None,
    "client_metadata": {},
    "mode": "act",
    "created_at": TIME,
    "completed_at": None,
}
_POSTED: Json = {
    "context_id": CONTEXT_ID,
    "message_id": MESSAGE_ID,
    "reply_message_id": REPLY_ID,
    "run_id": RUN_ID,
    "state": "queued",
    "version": 2,
}
_FILE: Json = {
    "id": FILE_ID,
    "name": "notes.txt",
    "media_type": "text/plain",
    "size_bytes": 7,
    "sha256": "8bcc07e3af5963927125230b5cbe9472ed79adbcd37b09082eba58d8ae50ac7d",
    "created_at": TIME,
}
_CALL: Json = {"id": "call-1", "name": "search_docs", "arguments": {"query": "resume"}}
_REPLY: Json = {"context_id": CONTEXT_ID, "message_id": REPLY_ID}

MODELS: dict[str, Json] = {
    "NewContext": {"title": "Release notes", "metadata": {"project": "apollo"}},
    "ContextChange": {"title": "Release notes, second draft"},
    "NewMessage": {
        "payload": {"type": "text", "content": "How do I resume after a break?", "display": None},
        "client_metadata": {"tab": "left"},
    },
    "NewChat": {"content": "How do I resume after a break?", "client_timezone_offset": -60},
    "Nothing": {},
    "Context": _CONTEXT,
    "ContextPage": {"items": [_CONTEXT], "next_cursor": None},
    "Message": {**_MESSAGE, "content": "Subscribe again, then pull "},
    "MessagePage": {"items": [_MESSAGE], "next_cursor": None},
    "Posted": _POSTED,
    "Content": {
        **_REPLY,
        "from_sequence": 10,
        "sequence": 13,
        "content": "then pull ",
        "status": "streaming",
        "final_sequence": None,
        "digest": None,
        "up_to_date": True,
        "epoch": EPOCH,
    },
    "TextChunk": {"sequence": 13, "kind": "text", "text": "then pull "},
    "DataChunk": {"sequence": 2, "kind": "tool_call", "data": _CALL},
    "WholeChunk": {"sequence": 2, "kind": "tool_call", "data": _CALL},
    "File": _FILE,
    "FilePage": {"items": [_FILE], "next_cursor": None},
    "Problem": {
        "type": "about:blank",
        "title": "Command not allowed",
        "status": 409,
        "code": "command-not-allowed",
        "detail": "'send' is not allowed while the context is 'streaming'; allowed now: cancel.",
        "state": "streaming",
        "allowed_commands": ["cancel"],
    },
    "StateChanged": {
        "type": "state_changed",
        "context_id": CONTEXT_ID,
        "new_state": "streaming",
        "previous_state": "thinking",
        "version": 5,
        "epoch": EPOCH,
        "run_id": RUN_ID,
        "timestamp": TIME,
    },
    "ContentDelta": {"type": "content_delta", **_REPLY, "current_sequence": 13, "timestamp": TIME},
    "MessageCompleted": {
        "type": "message_completed",
        **_REPLY,
        "final_sequence": 42,
        "status": "completed",
        "version": 6,
        "timestamp": TIME,
    },
    "ContextChanged": {"type": "context_changed", "context_id": CONTEXT_ID, "version": 7, "timestamp": TIME},
    "ContextDeleted": {"type": "context_deleted", "context_id": CONTEXT_ID, "version": 8, "timestamp": TIME},
    "Heartbeat": {"type": "heartbeat", "timestamp": TIME, "heads": [{**_REPLY, "current_sequence": 13}]},
    "Goodbye": {"type": "goodbye", "retry_ms": 1830, "timestamp": TIME},
    "RunStarted": {
        "type": "run_started",
        **_REPLY,
        "sequence": 0,
        "timestamp": TIME,
        "posted": _POSTED,
    },
    "TextDelta": {"type": "text_delta", "sequence": 13, "text": "then pull "},
    "ReasoningDelta": {"type": "reasoning_delta", "sequence": 1, "text": "They ask about breaks."},
    "ToolCallStarted": {"type": "tool_call_started", "sequence": 2, "data": _CALL},
    "ToolCallFinished": {
        "type": "tool_call_finished",
        "sequence": 3,
        "data": {"id": "call-1", "status": "ok", "result": "Subscribe again.", "seconds": 0.21},
    },
    "Step": {"type": "step", "sequence": 4, "data": {"number": 2, "total": 3, "status": "started"}},
    "ApprovalRequested": {
        "type": "approval_requested",
        "sequence": 5,
        "data": {
            "id": "call-2",
            "name": "send_mail",
            "arguments": {"to": "team"},
            "approval": {"id": "019aa5d2-9a01-7e11-8b7c-2d9f4a6c1e53", "editable": True, "expires_at": TIME},
        },
    },
    "ErrorReported": {"type": "error", "sequence": 6, "data": {"message": "The search is out of reach."}},
    "ReplyFailed": {"type": "error", "code": "agent-error", "detail": "The agent raised an error."},
    "RunFinished": {
        "type": "run_finished",
        **_REPLY,
        "run_id": RUN_ID,
        "status": "completed",
        "final_sequence": 42,
        "usage": {"input_tokens": 812, "output_tokens": 96, "requests": 2, "tool_calls": 1, "estimated": False},
        "digest": "8bcc07e3af5963927125230b5cbe9472ed79adbcd37b09082eba58d8ae50ac7d",
        "timestamp": TIME,
    },
    "DialectData": {"delta": "then pull "},
}

_QUERIES: dict[str, tuple[str, ...]] = {
    # Which query parameters the example request shows; the others keep their defaults.
    "pull_content": ("from_sequence", "wait"),
    "stream_context": ("types",),
    "stream_contexts": ("context",),
    "list_contexts": ("limit",),
    "list_messages": ("limit",),
    "list_files": ("limit",),
    "upload_file": ("name",),
    "message_events": ("from_sequence",),
}


def curl(method: str, url: str, operation: Json) -> str:
    """A request of an operation from the examples of its parameters and body, for a POSIX shell."""
    query, lines = [], []
    for parameter in operation.get("parameters", ()):
        name, example = parameter["name"], parameter.get("example")
        if parameter["in"] == "path":
            url = url.replace("{" + name + "}", str(example))
        elif name in _QUERIES.get(operation["operationId"], ()):
            value = ",".join(example) if isinstance(example, list) else str(example)
            query.append(f"{name}={quote(value, safe=',:')}")
        elif name == "Idempotency-Key":
            # A key of its own: the same one on another call would be refused.
            lines.append(f"-H 'Idempotency-Key: {operation['operationId']}-1'")
        elif name == "If-Match" and method == "PATCH":
            lines.append(f"-H {shlex.quote(f'{name}: {example}')}")
    content = operation.get("requestBody", {}).get("content", {})
    if "text/plain" in content:
        lines += ["-H 'Content-Type: text/plain'", f"--data-binary {shlex.quote(content['text/plain']['example'])}"]
    elif content:
        example = operation["requestBody"]["content"]["application/json"].get("example", {})
        lines += ["-H 'Content-Type: application/json'", f"-d {shlex.quote(json.dumps(example, ensure_ascii=False))}"]
    target = shlex.quote(url + ("?" + "&".join(query) if query else ""))
    return " \\\n  ".join([f"curl{_flags(method, operation)} {target}", *lines])


def _flags(method: str, operation: Json) -> str:
    """What curl must be told beside headers and body: a body makes it POST, ``-N`` shows events as they come."""
    if "requestBody" in operation:
        return "" if method == "POST" else f" -X {method}"
    streams = "text/event-stream" in operation["responses"].get("200", {}).get("content", {})
    return f" -X {method}" if method != "GET" else " -N" if streams else ""
