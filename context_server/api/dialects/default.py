"""The events of this server's own inline view."""

from context_server.api import schemas
from context_server.api.dialects.table import Begin, Dialect, End, Ended, Moment, Payload, Reply, Row, Told, usage_of
from context_server.records import now


def _run_started(reply: Reply) -> Payload:
    started = {
        "context_id": reply.context_id,
        "message_id": reply.message_id,
        "sequence": reply.sequence,
        "timestamp": schemas.format_time(now()),
    }
    return started if reply.posted is None else {**started, "posted": reply.posted}


def _text(told: Told) -> Payload:
    return {"sequence": told.sequence, "text": told.text}


def _data(told: Told) -> Payload:
    return {"sequence": told.sequence, "data": told.data}


def _failure(ended: Ended) -> Payload:
    error = ended.message.error
    return {"code": error.code if error else None, "detail": error.detail if error else None}


def _run_finished(ended: Ended) -> Payload:
    message = ended.message
    return {
        "context_id": message.context_id,
        "message_id": message.id,
        "run_id": message.run_id,
        "status": message.status,
        "final_sequence": message.final_sequence,
        "usage": usage_of(message),
        "digest": message.digest,
        "timestamp": schemas.format_time(now()),
    }


def _typed(name: str, _reply: Reply, payload: Payload) -> Payload:
    return {"type": name, **payload}


DEFAULT = Dialect(
    name="default",
    begins={Begin.STARTED: (Row("run_started", _run_started),)},
    chunks={
        Moment.TEXT: (Row("text_delta", _text),),
        Moment.REASONING: (Row("reasoning_delta", _text),),
        Moment.TOOL_CALL: (Row("tool_call_started", _data),),
        Moment.APPROVAL: (Row("approval_requested", _data),),
        Moment.TOOL_RESULT: (Row("tool_call_finished", _data),),
        Moment.STEP_STARTED: (Row("step", _data),),
        Moment.STEP_FINISHED: (Row("step", _data),),
        Moment.ERROR: (Row("error", _data),),
    },
    ends={
        End.FINISHED: (Row("run_finished", _run_finished),),
        End.FAILED: (Row("error", _failure), Row("run_finished", _run_finished)),
    },
    frame=_typed,
    always_named=False,
)
