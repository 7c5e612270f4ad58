"""Events for clients that read ``event:`` and ``{event, run_id, payload}``: chat with chunks and tool calls."""

import json

from context_server.api.dialects.table import Begin, Dialect, End, Ended, Moment, Payload, Reply, Row, Told


def _started(reply: Reply) -> Payload:
    return {"owner_key": reply.owner_key, "user_input": reply.question or ""}


def _chunk(told: Told) -> Payload:
    return {"chunk": told.text, "is_final": False}


def _last_chunk(_ended: Ended) -> Payload:
    return {"chunk": "", "is_final": True}


def _tool_started(told: Told) -> Payload:
    return {"tool_name": told.data.get("name"), "args": told.data.get("arguments")}


def _tool_finished(told: Told) -> Payload:
    result = told.data.get("result")
    text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
    return {"tool_name": told.tool, "status": told.data.get("status"), "result": text}


def _approval(told: Told) -> Payload:
    return {**_tool_started(told), "approval": told.data.get("approval")}


def _error(told: Told) -> Payload:
    return {"message": str(told.data.get("message") or told.data.get("detail") or "The agent reports an error.")}


def _failure(ended: Ended) -> Payload:
    error = ended.message.error
    return {"message": "The reply failed." if error is None else error.detail or error.code}


def _finished(_ended: Ended) -> Payload:
    return {"status": "completed"}


def _finished_in_error(_ended: Ended) -> Payload:
    return {"status": "error"}


def _enveloped(name: str, reply: Reply, payload: Payload) -> Payload:
    return {"event": name, "run_id": reply.run_id, "payload": payload}


NEXUS = Dialect(
    name="nexus",
    begins={Begin.STARTED: (Row("run_started", _started),)},
    chunks={
        Moment.TEXT: (Row("text_chunk", _chunk),),
        Moment.TOOL_CALL: (Row("tool_call_started", _tool_started),),
        Moment.APPROVAL: (Row("tool_call_started", _tool_started), Row("approval_requested", _approval)),
        Moment.TOOL_RESULT: (Row("tool_call_finished", _tool_finished),),
        Moment.ERROR: (Row("error", _error),),
    },
    ends={
        End.FINISHED: (Row("text_chunk", _last_chunk), Row("run_finished", _finished)),
        End.FAILED: (
            Row("text_chunk", _last_chunk),
            Row("error", _failure),
            Row("run_finished", _finished_in_error),
        ),
    },
    frame=_enveloped,
    names_tools=True,
    asks_question=True,
)
