"""The only place that knows status codes: failures to problem documents (RFC 9457)."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import structlog
from starlette.responses import Response

from context_server import errors, records
from context_server.api import schemas
from context_server.errors import ContextServerError, without_words
from context_server.metrics import Metrics

log = structlog.get_logger("context_server.api")

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_SECONDS = 1


class PathNotFound(ContextServerError):
    """There is nothing at this path."""

    code = "not-found"

    def __init__(self) -> None:
        super().__init__("There is nothing at this path; /docs lists what there is.")


class MethodNotAllowed(ContextServerError):
    """The path has no such method."""

    code = "method-not-allowed"

    def __init__(self, method: str, allow: str) -> None:
        super().__init__(f"{method} is not allowed here; allowed: {allow}.")
        self.allow = allow


class InvalidJson(ContextServerError):
    """The body is not JSON."""

    code = "invalid-json"


class UnsupportedMediaType(ContextServerError):
    """The body is not declared as JSON; or a file is of a type that is not taken."""

    code = "unsupported-media-type"


class ContentTooLarge(ContextServerError):
    """The body is larger than the server takes."""

    code = "content-too-large"


class RangeNotSatisfiable(ContextServerError):
    """The range that was asked for begins behind the end of the file."""

    code = "range-not-satisfiable"

    def __init__(self, size_bytes: int) -> None:
        super().__init__(f"The range begins behind the end of the file, which has {size_bytes} bytes.")
        self.size_bytes = size_bytes


class BodyTooSlow(ContextServerError):
    """The body does not arrive."""

    code = "request-timeout"


class HostNotAllowed(ContextServerError):
    """The Host header names no host of this server."""

    code = "host-not-allowed"


class OriginNotAllowed(ContextServerError):
    """A web page of another origin tried to write."""

    code = "origin-not-allowed"


class TooManyStreams(ContextServerError):
    """The server has as many open streams as it takes."""

    code = "too-many-streams"


class NotReady(ContextServerError):
    """The server cannot do its work now."""

    code = "not-ready"


STATUSES: dict[type[ContextServerError], tuple[int, str]] = {
    InvalidJson: (400, "Malformed JSON"),
    errors.InvalidRequest: (422, "Invalid request"),
    OriginNotAllowed: (403, "Origin not allowed"),
    PathNotFound: (404, "Not found"),
    errors.ChunkNotFound: (404, "Chunk not found"),
    errors.ContextNotFound: (404, "Context not found"),
    errors.FileUnknown: (404, "File not found"),
    errors.MessageNotFound: (404, "Message not found"),
    MethodNotAllowed: (405, "Method not allowed"),
    BodyTooSlow: (408, "Request timeout"),
    errors.ApprovalNotFound: (404, "Approval not found"),
    errors.WaitingNotFound: (404, "Not waiting"),
    errors.ApprovalDecided: (409, "Approval decided"),
    errors.ArgumentsNotEditable: (409, "Arguments not editable"),
    errors.MessageOpen: (409, "Message open"),
    errors.QueueFull: (409, "Queue full"),
    errors.CommandNotAllowed: (409, "Command not allowed"),
    errors.SequenceAhead: (409, "Sequence ahead of the log"),
    errors.VersionMismatch: (412, "Version mismatch"),
    ContentTooLarge: (413, "Content too large"),
    UnsupportedMediaType: (415, "Unsupported media type"),
    RangeNotSatisfiable: (416, "Range not satisfiable"),
    HostNotAllowed: (421, "Host not allowed"),
    errors.IdempotencyKeyReused: (422, "Idempotency key reused"),
    errors.DatabaseBusy: (503, "Database busy"),
    errors.DatabaseUnreachable: (503, "Database unreachable"),
    errors.FilesUnavailable: (503, "Files unavailable"),
    errors.OutcomeUnknown: (503, "Outcome unknown"),
    errors.ShuttingDown: (503, "Shutting down"),
    TooManyStreams: (503, "Too many streams"),
    NotReady: (503, "Not ready"),
    errors.StorageBroken: (503, "Storage broken"),
    errors.StorageFull: (507, "Storage full"),
}
"""Each failure that a client can meet: its status and title. Others are 500 ``internal-error``."""


def extras_of(error: ContextServerError) -> dict[str, Any]:
    """What a problem document says beside the common fields."""
    match error:
        case errors.InvalidRequest():
            return {"errors": [asdict(violation) for violation in error.violations]}
        case errors.CommandNotAllowed():
            return {"state": error.state, "allowed_commands": list(error.allowed)}
        case errors.ApprovalDecided(approval=records.Approval() as approval):
            return {"approval": schemas.Approval.of(approval).model_dump(mode="json")}
        case errors.SequenceAhead():
            return {"sequence": error.sequence}
        case errors.VersionMismatch():
            return {"version": error.version}
    return {}


def problem_body(status: int, title: str, code: str, detail: str, extras: Mapping[str, Any] | None = None) -> bytes:
    """A problem document as JSON."""
    fields = {"type": "about:blank", "title": title, "status": status, "code": code, "detail": detail}
    return json.dumps(fields | dict(extras or {})).encode()


def problem_response(error: ContextServerError) -> Response:
    """The answer for a named failure."""
    for kind in type(error).__mro__:
        if kind in STATUSES:
            status, title = STATUSES[kind]
            break
    else:
        return internal_error()
    headers = {"Cache-Control": "no-store"}
    if isinstance(error, MethodNotAllowed):
        headers["Allow"] = error.allow
    if isinstance(error, RangeNotSatisfiable):
        headers["Content-Range"] = f"bytes */{error.size_bytes}"
    if isinstance(error, BodyTooSlow):
        headers["Connection"] = "close"  # The rest of the body is not waited for.
    if status in (503, 507):
        headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    body = problem_body(status, title, error.code, str(error), extras_of(error))
    return Response(body, status, headers, MEDIA_TYPE)


def internal_error() -> Response:
    """The answer for a defect of ours; it says nothing about it, the log does."""
    body = problem_body(500, "Internal error", "internal-error", "The server met an error that it does not name.")
    return Response(body, 500, {"Cache-Control": "no-store"}, MEDIA_TYPE)


def answer(error: Exception, metrics: Metrics) -> Response:
    """The problem document for whatever went wrong, counted; a defect of ours is logged."""
    response = problem_response(error) if isinstance(error, ContextServerError) else internal_error()
    if response.status_code == 500:
        log.error("request_failed", **without_words(error))
    metrics.problems.labels(json.loads(bytes(response.body))["code"]).inc()
    return response
