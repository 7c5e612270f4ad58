"""Events for clients that show an assistant: typing, deltas, and one event that closes the stream.

Such clients close their stream at ``assistant_error``, so only the failure of the reply is one: an error that an agent
reports in the middle of a reply, and goes on, is passed over.
"""

from context_server.api.dialects.table import Begin, Dialect, End, Ended, Moment, Payload, Reply, Row, Told, usage_of


def _begun(reply: Reply) -> Payload:
    return {"chat_id": reply.context_id, "message_id": reply.message_id}


def _delta(told: Told) -> Payload:
    return {"delta": told.text}


def _approval(told: Told) -> Payload:
    names = ("id", "name", "arguments", "approval")
    return {name: told.data.get(name) for name in names}


def _usage(ended: Ended) -> Payload:
    return {**_begun(ended.reply), "usage": usage_of(ended.message)}


def _complete(ended: Ended) -> Payload:
    message = ended.message
    return {**_begun(ended.reply), "content": ended.content, "status": message.status, "digest": message.digest}


def _failure(ended: Ended) -> Payload:
    error = ended.message.error
    if error is None:
        return {**_begun(ended.reply), "error": "The reply failed.", "code": "agent-error"}
    return {**_begun(ended.reply), "error": error.detail or error.code, "code": error.code}


ASSISTANT = Dialect(
    name="assistant",
    begins={
        Begin.STARTED: (Row("assistant_typing", _begun),),
        Begin.REGENERATING: (Row("assistant_regenerating", _begun),),
    },
    chunks={
        Moment.TEXT: (Row("assistant_delta", _delta),),
        Moment.APPROVAL: (Row("approval_requested", _approval),),
    },
    ends={
        End.FINISHED: (Row("usage_info", _usage), Row("assistant_complete", _complete)),
        End.REGENERATED: (Row("usage_info", _usage), Row("assistant_regenerated", _complete)),
        End.FAILED: (Row("usage_info", _usage), Row("assistant_error", _failure)),
    },
    asks_content=True,
)
