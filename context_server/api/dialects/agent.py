"""Events for clients that show an agent at work: steps, thinking, tool calls, and its result.

Such clients close their stream at ``ERROR``, so only the failure of the reply is one: an error that an agent reports in
the middle of a reply, and goes on, is passed over.
"""

from context_server.api.dialects.table import Begin, Dialect, End, Ended, Moment, Payload, Reply, Row, Told, usage_of


def _start(reply: Reply) -> Payload:
    return {"input": reply.question, "config": {}, "context_id": reply.context_id, "message_id": reply.message_id}


def _step_start(told: Told) -> Payload:
    return {"step": told.data.get("number"), "max_steps": told.data.get("total")}


def _step_finish(told: Told) -> Payload:
    return {"step": told.data.get("number")}


def _chunk(told: Told) -> Payload:
    return {"content": told.text, "delta": told.text}


def _thinking(told: Told) -> Payload:
    return {"content": told.text}


def _tool_start(told: Told) -> Payload:
    return {"tool_name": told.data.get("name"), "parameters": told.data.get("arguments")}


def _approval(told: Told) -> Payload:
    return {**_tool_start(told), "approval": told.data.get("approval")}


def _tool_finish(told: Told) -> Payload:
    return {"tool_name": told.tool, "result": told.data.get("result"), "status": told.data.get("status")}


def _failure(ended: Ended) -> Payload:
    error = ended.message.error
    code = "agent-error" if error is None else error.code
    message = (error.detail if error is not None else None) or code
    return {"error_type": code, "message": message, "error": message}


def _finish(ended: Ended) -> Payload:
    return {
        "result": ended.content,
        "duration": ended.seconds,
        "status": ended.message.status,
        "usage": usage_of(ended.message),
    }


AGENT = Dialect(
    name="agent",
    begins={Begin.STARTED: (Row("AGENT_START", _start),)},
    chunks={
        Moment.TEXT: (Row("LLM_CHUNK", _chunk),),
        Moment.REASONING: (Row("THINKING", _thinking),),
        Moment.TOOL_CALL: (Row("TOOL_CALL_START", _tool_start),),
        Moment.APPROVAL: (Row("TOOL_CALL_START", _tool_start), Row("APPROVAL_REQUESTED", _approval)),
        Moment.TOOL_RESULT: (Row("TOOL_CALL_FINISH", _tool_finish),),
        Moment.STEP_STARTED: (Row("STEP_START", _step_start),),
        Moment.STEP_FINISHED: (Row("STEP_FINISH", _step_finish),),
    },
    ends={
        End.FINISHED: (Row("AGENT_FINISH", _finish),),
        End.FAILED: (Row("ERROR", _failure),),
    },
    names_tools=True,
    asks_question=True,
    asks_content=True,
)
