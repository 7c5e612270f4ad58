"""The words of the OpenAPI document: what the route table and the schemas cannot say by themselves.

Everything is keyed by operation (the name of its handler), header, parameter or schema. Texts are CommonMark, of which
only paragraphs and `code` are used.
"""

from typing import Any

from context_server.api.dialects import DIALECTS
from context_server.api.openapi_examples import CONTEXT_ID, FILE_ID, REPLY_ID
from context_server.api.signals import SIGNAL_TYPES
from context_server.records import MAX_INTEGER

INFO = """\
The text of a reply never travels in the event stream. It is appended to a durable log as chunks with contiguous \
sequences 1, 2, 3, …; subscribers get signals, which say only how far the log reaches, and pull the text that they lack.

To follow a reply: create a context, post a message, subscribe to the context's signals, and pull after the sequence \
that you hold whenever a signal names a higher one. You are done when what you hold reaches `final_sequence`. A signal \
may be lost, repeated or merged with a later one without harm; after any break, subscribe again and pull once.

Ids are UUIDv7. Times are RFC 3339, UTC, with milliseconds. Integers stay within 2^53-1. Clients pass over fields and \
signal types that they do not know. Every GET that is no stream answers HEAD too; any other method is refused with 405 \
`method-not-allowed` and an `Allow` header, and an unknown path with 404 `not-found`."""

TAGS: dict[str, tuple[str, str]] = {
    # Module of the handler: name of the tag, what it is about.
    "contexts": ("Contexts", "A context is one conversation: messages, a state, a version."),
    "chat": ("Messages", "A message is what one author said: the user, or the agent that replies."),
    "inline": ("Messages", "A message is what one author said: the user, or the agent that replies."),
    "messages": ("Messages", "A message is what one author said: the user, or the agent that replies."),
    "content": ("The pull", "Reads the chunks after a sequence. The most frequent request of all."),
    "stream": ("Signals", "Server-sent events that say how far the log reaches; they never carry text."),
    "files": ("Files", "A file is uploaded once, and messages refer to it by its id."),
    "runs": ("Runs", "A run is one execution of an agent for one reply."),
    "operations": ("Operations", "For the people who run the server."),
    "docs": ("Description", "This document, for programs and for people."),
}

NOTES: dict[str, str] = {
    "create_context": "The context is `idle` and allows `send`. With an `Idempotency-Key` a repeat makes no other one.",
    "list_contexts": "The most recently active context comes first. Go on with `cursor` until `next_cursor` is null.",
    "get_context": (
        "The strong `ETag` is the context's version in quotes: send it back as `If-None-Match` to learn whether "
        "anything changed, or as `If-Match` to change only what you have seen."
    ),
    "change_context": "Fields that are left out stay as they are. Subscribers get `context_changed`.",
    "delete_context": (
        "Deletes the context with its messages and their content, and cancels what runs. Subscribers get "
        "`context_deleted`."
    ),
    "post_message": (
        "Stores the message and starts a run. The reply exists from this moment, empty and `pending`, as "
        "`reply_message_id`. With `Accept: text/event-stream` the same call answers with the reply as an inline "
        "stream, whose `run_started` holds this answer as `posted`; so it does with a `dialect`.\n\n"
        "Allowed while the context's `allowed_commands` has `send`. With an `Idempotency-Key` a repeat of the same "
        "request is answered as the first one was, for 24 hours."
    ),
    "list_messages": (
        "The oldest message comes first. With `include=content` each item has its text so far, and its `sequence` is "
        "the sequence which that text reaches: go on from there by pulling. The texts of one page are at most 1 MiB."
    ),
    "get_message": "The answer holds the whole text in `content`.",
    "pull_content": (
        "`from_sequence` is the last sequence that the client **has**; the answer holds everything after it, up to "
        "`sequence`. So a client keeps one number, sends it, and replaces it by the answer's `sequence`. Nothing new: "
        '`content` is `""`. Done when `sequence` equals `final_sequence`; `digest` is the SHA-256 of the whole '
        "text.\n\n"
        "A page holds at most 1 MiB of text: `up_to_date` is false while there is more. With `wait` the answer waits "
        "for the next chunk or the end. With `to_sequence` the answer of a range that the log holds is closed: it "
        "never changes, may be cached for ever, and says nothing that can still change."
    ),
    "get_chunk": (
        "Where `view=chunks` or the inline view shows long data of a tool cut, `url` in that data leads here. The "
        "bytes of a sequence never change, so the answer may be cached for ever."
    ),
    "upload_file": (
        "The body is the file as it is, with its own `Content-Type` and its name in `name`; or `multipart/form-data` "
        "with one part that has a filename. Allowed are the types and the size that the server is set to take. The "
        "file is durable when the answer is sent, and nothing is left of an upload that breaks off."
    ),
    "list_files": "The newest file comes first. Go on with `cursor` until `next_cursor` is null.",
    "get_file": (
        "The answer has the file's own `Content-Type`, and is always an attachment. One range of bytes may be asked "
        "for; what is no range, or several, is answered by the whole file."
    ),
    "delete_file": "Messages keep what they say of the file; no agent can read it any more.",
    "message_events": (
        "The log of one message pushed as events, for `curl -N` and simple clients: `run_started`, then an event for "
        "each chunk with its sequence as `id`, and at the end `run_finished` with `<final_sequence>:end` as `id`. Then "
        "the stream ends. After a break, `Last-Event-ID` goes on exactly there.\n\n"
        "With `dialect` the same log is told in the event names and payloads of other frontends, always as named "
        "events. `types` leaves out all other events, but never the one that ends the stream."
    ),
    "chat": (
        "For frontends that know no contexts: posts `content` and streams the reply in the dialect `nexus`, as named "
        "events. Without `context_id` the conversation is the caller's own, and made when it is not there: one for "
        "each key of `Authorization: Bearer KEY`, and one for all who send none. When the connection breaks, the reply "
        "goes on."
    ),
    "cancel": (
        "With nothing to cancel, the answer is the context as it is: cancelling is idempotent. A running run ends a "
        "moment later, and what it wrote is kept."
    ),
    "machine": "A machine configuration for XState v5; `meta.allowed_commands` of each state says what it allows.",
    "stream_context": (
        "Begins with the state as it is, how far the newest reply reaches, and whether it has ended. Then signals as "
        "they come, the newest in place of unsent older ones, and a `heartbeat` when nothing else is sent. The `id` "
        "of an event is the context's version: with `Last-Event-ID` you also get the ending of every message that "
        "ended since."
    ),
    "stream_contexts": (
        "One connection for many contexts: browsers allow six per host. Each `context` is an id, or `id:version` to "
        "be told of every message that ended since. Without `context`: all active contexts, the 100 most recently "
        "active, and every one that is created later. The `id` of an event is `<context_id>:<version>`."
    ),
    "healthz": "Says that the process runs, not that it can work.",
    "readyz": "503 `not-ready` while the server cannot use its database, or is stopping.",
    "metrics": "Counts, sizes and durations in Prometheus's text format. No metric carries text of messages.",
    "openapi_json": "OpenAPI 3.1, made from the route table and the schemas by which requests are checked.",
    "docs_page": "It loads nothing from anywhere.",
}

ANSWERS: dict[tuple[str, int], str] = {
    ("create_context", 201): "The new context.",
    ("post_message", 202): "The ids of the message and of its reply.",
    ("post_message", 200): "With `Accept: text/event-stream`: the reply as an inline stream.",
    ("regenerate", 200): "With `Accept: text/event-stream`: the new reply as an inline stream.",
    ("message_events", 204): "`Last-Event-ID` names the end: there is nothing more. An `EventSource` stops on it.",
    ("delete_context", 204): "The context is gone.",
    ("upload_file", 201): "The file as it was stored.",
    ("get_file", 200): "The bytes of the file, in its own media type.",
    ("get_file", 206): "With `Range`: the bytes of that range.",
    ("delete_file", 204): "The file is gone.",
    ("cancel", 202): "The context; it may be `cancelling` for a moment.",
    ("metrics", 200): "Metrics in Prometheus's text format.",
    ("openapi_json", 200): "The OpenAPI document.",
    ("docs_page", 200): "The page.",
    ("stream_context", 200): "A stream of signals.",
    ("stream_contexts", 200): "A stream of signals.",
    ("message_events", 200): "An inline stream.",
    ("chat", 200): "The reply as an inline stream of the dialect `nexus`.",
}
NOT_MODIFIED = "Nothing changed since the answer that `If-None-Match` names; no body."

SCHEMAS: dict[str, str] = {
    "State": "Where a context is; `GET /machine` says how it moves.",
    "JsonValue": "Any JSON value.",
}

FIELDS: dict[str, str] = {
    # What a field means wherever it stands, or in one schema, when its model says nothing.
    "active_run": "The run that the context is busy with.",
    "allowed_commands": "What may be asked of the context in its present state.",
    "attempt": "How often the run was begun.",
    "chunks": "With `view=chunks`: the chunks, of every kind.",
    "client_metadata": "Whatever the client posted with the message; at most 16 KiB as JSON.",
    "code": "Stable, kebab-case: what programs should look at.",
    "completed_at": "When the message ended; null while it is open.",
    "content": "The text.",
    "context_id": "Id of the context.",
    "current_sequence": "The highest sequence that can be pulled.",
    "detail": "For people.",
    "digest": "SHA-256 of the whole text in UTF-8, as 64 hexadecimal digits; null while the message is open.",
    "display": "Kept for clients, of any shape; at most 16 KiB as JSON.",
    "epoch": "Names the history. With another one, forget every sequence that you hold.",
    "error": "Why the reply failed; null unless it did.",
    "errors": "Every single thing that is wrong with the request.",
    "final_sequence": "The last sequence of the message; null while it is open.",
    "from_sequence": "As asked for.",
    "head_message_id": "The newest message.",
    "message_id": "Id of the message.",
    "media_type": "Such as `image/png`; lower case, without parameters.",
    "metadata": "Whatever the client wants to keep with the context; at most 16 KiB as JSON.",
    "File.name": "As it was given, cleaned: no folders, no control characters, at most 255 bytes.",
    "next_cursor": "Send it as `cursor` for the next page; null on the last one.",
    "parent_id": "The message that this one answers or follows.",
    "NewMessage.payload": "What the user says.",
    "payload": "What a user posted; null for a reply.",
    "reply_message_id": "The reply, which can be read and followed from now on.",
    "run_id": "The run that writes, or wrote, the reply.",
    "Content.sequence": "The last sequence that this answer holds; the next pull begins after it.",
    "Message.sequence": "How far the log reaches, or the text in `content`.",
    "TextChunk.sequence": "Position in the message: 1, 2, 3, …",
    "DataChunk.sequence": "Position in the message: 1, 2, 3, …",
    "ErrorReported.sequence": "Position in the message: 1, 2, 3, …",
    "ApprovalRequested.sequence": "Position in the message: 1, 2, 3, …",
    "Step.sequence": "Position in the message: 1, 2, 3, …",
    "ToolCallFinished.sequence": "Position in the message: 1, 2, 3, …",
    "ToolCallStarted.sequence": "Position in the message: 1, 2, 3, …",
    "ReasoningDelta.sequence": "Position in the message: 1, 2, 3, …",
    "TextDelta.sequence": "Position in the message: 1, 2, 3, …",
    "client_timestamp_utc": "When the message was written, by the client's clock; kept with it.",
    "client_timezone_offset": "Minutes from the client's time to UTC, as JavaScript gives them; kept with it.",
    "NewChat.context_id": "The context to post to, in place of the caller's own.",
    "NewChat.content": "What the user says.",
    "sha256": "SHA-256 of the bytes, as 64 hexadecimal digits; in quotes it is the `ETag`.",
    "size_bytes": "How many bytes it has.",
    "state": "Where the context is.",
    "timestamp": "When the server wrote the event.",
    "up_to_date": "Whether the answer reaches the end of the log as it is.",
    "usage": "What the agent says that the reply cost.",
    "RunError.code": "`agent-error`, `interrupted` or `reply-too-large`.",
    "Health.version": "Version of the program.",
    "SQLiteFacts.version": "Version of SQLite.",
    "version": "Rises with every change of the context other than content.",
    "where": "Such as `body.payload.content` or `query.limit`.",
}

# An empty one counts as none: browsers send it so after an event without an id.
VERSION_ID, SEQUENCE_ID = "^(([0-9A-Za-z-]{1,36}:)?[0-9]{1,15})?$", "^([0-9]{1,15}(:end)?)?$"

HEADERS: dict[str, dict[str, Any]] = {
    "Idempotency-Key": {
        "description": "1 to 255 visible ASCII characters: a repeat with the same key and body does nothing new.",
        "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
        "example": "post_message-1",
    },
    "If-Match": {
        "description": "A version in quotes, or `*`: 412 when the context has moved on.",
        "schema": {"anyOf": [{"type": "string", "pattern": '^"[0-9]{1,15}"$'}, {"type": "string", "const": "*"}]},
        "example": '"5"',
    },
    "If-None-Match": {
        "description": "An `ETag` of an earlier answer: 304 when nothing changed since.",
        "schema": {"type": "string"},
        "example": '"5"',
    },
    "Range": {
        "description": "One range of bytes, such as `bytes=0-1023`; with `If-Range`, only of that `ETag`.",
        "schema": {"type": "string"},
        "example": "bytes=0-1023",
    },
    "Last-Event-ID": {
        "description": "The `id` of the last event that the client got; an `EventSource` sends it by itself.",
        "schema": {"type": "string"},
    },
}

ANSWER_HEADERS: dict[str, dict[str, Any]] = {
    "ETag": {"description": "Strong.", "required": True, "schema": {"type": "string", "pattern": '^"[^"]+"$'}},
    "Location": {"description": "Path of what was made.", "required": True, "schema": {"type": "string"}},
    "Idempotency-Replayed": {
        "description": "`true` when the answer is that of an earlier request with the same key.",
        "schema": {"type": "string", "enum": ["true"]},
    },
    "Cache-Control": {"description": "How long the answer may be kept.", "schema": {"type": "string"}},
    "X-Accel-Buffering": {"description": "Tells proxies not to gather events.", "schema": {"type": "string"}},
    "Retry-After": {"description": "Seconds to wait.", "required": True, "schema": {"type": "integer", "minimum": 0}},
}

PATH_PARAMETERS: dict[str, dict[str, Any]] = {
    "context_id": {"description": "Id of the context.", "example": CONTEXT_ID},
    "message_id": {"description": "Id of the message.", "example": REPLY_ID},
    "file_id": {"description": "Id of the file.", "example": FILE_ID},
    "sequence": {
        "description": "Sequence of the chunk.",
        "schema": {"type": "integer", "minimum": 1, "maximum": MAX_INTEGER},
        "example": 3,
    },
}

QUERY: dict[str, dict[str, Any]] = {
    # What a parameter means wherever it stands, or in one operation.
    "types": {
        "description": "Signal types to send, in at most 200 characters; `heartbeat` and `goodbye` always come.",
        "schema": {
            "type": "array",
            "items": {"type": "string", "enum": [*SIGNAL_TYPES.values(), "heartbeat", "goodbye"]},
        },
        "style": "form",
        "explode": False,
        "example": ["content_delta", "message_completed"],
    },
    **{
        f"{operation}.types": {
            "description": "Types to send, of the dialect, in at most 200 characters; the last event always comes.",
            "schema": {
                "type": "array",
                "items": {
                    "type": "string",
                    "enum": [*dict.fromkeys(name for dialect in DIALECTS.values() for name in dialect.types)],
                },
            },
            "style": "form",
            "explode": False,
            "example": ["text_delta", "step"],
        }
        for operation in ("post_message", "regenerate", "message_events")
    },
    "dialect": {"schema": {"type": "string", "enum": [*DIALECTS]}, "example": "agent"},
    "last_event_id": {"schema": {"type": "string", "maxLength": 64, "pattern": VERSION_ID}},
    "context": {"style": "form", "explode": True, "example": [CONTEXT_ID]},
    "limit": {"description": "How many items a page has at most.", "example": 20},
    "from_sequence": {"example": 10},
    "name": {"example": "notes.txt"},
    "wait": {"example": 20},
}

FILE_BODY: dict[str, Any] = {
    "description": "The file, of any media type that the server is set to take; `text/plain` stands for all of them.",
    "required": True,
    "content": {
        "text/plain": {"schema": {"type": "string"}, "example": "Notes.\n"},
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {"file": {"type": "string", "format": "binary", "description": "The file."}},
                "required": ["file"],
                "additionalProperties": False,
            },
            "encoding": {"file": {"contentType": "text/plain"}},
        },
    },
}

LINKS: dict[tuple[str, int], dict[str, dict[str, str]]] = {
    ("create_context", 201): {
        operation: {"context_id": "$response.body#/id"}
        for operation in ("get_context", "change_context", "post_message", "list_messages", "cancel", "delete_context")
    },
    ("upload_file", 201): {operation: {"file_id": "$response.body#/id"} for operation in ("get_file", "delete_file")},
    ("post_message", 202): {
        operation: {"context_id": "$response.body#/context_id", "message_id": "$response.body#/reply_message_id"}
        for operation in ("pull_content", "get_message")
    },
}
