"""The OpenAPI 3.1 document, made from the route table and the schemas: nothing is said twice.

What can be read from an endpoint is: its parameters and their bounds from its models, the statuses that it can answer
from its table row, the codes of each status from ``problems.STATUSES``. ``openapi_texts`` adds the words.
"""

import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from pydantic import BaseModel

from context_server import __version__
from context_server.api import openapi_texts as texts
from context_server.api import problems, schemas
from context_server.api.docs_page import render_page
from context_server.api.openapi_examples import ADDRESS, MODELS, curl
from context_server.api.openapi_schemas import (
    REFERENCE,
    Generator,
    Json,
    component_schemas,
    plain,
    reference,
    tidy,
    without_null,
)

if TYPE_CHECKING:
    from context_server.api.routes import Endpoint

_SSE = "text/event-stream"
_MAX_MOUNTS = 8
"""Bounds what is kept where the path of a mount has parameters, which clients choose."""
_WRITES = frozenset({"POST", "PATCH", "DELETE"})
_PATHS = {
    # What the path of an endpoint holds that can be refused with a code.
    "message-not-found": "{message_id}",
    "chunk-not-found": "{sequence}",
    "file-not-found": "{file_id}",
    "files-unavailable": "/files",
}
_DEFECT = {"status": 500, "title": "Internal error", "description": "The server met an error that it does not name."}


class Documents:
    """The description of an application, as JSON and as a page; each is made when it is first asked for."""

    def __init__(self, endpoints: "Sequence[Endpoint]", prefix: str = "") -> None:
        self._endpoints = tuple(endpoints)
        self._prefix = prefix
        self._mounted: dict[str, Documents] = {}

    def below(self, root_path: str) -> "Documents":
        """The same for an application that is mounted at ``root_path`` of another one."""
        if not root_path:
            return self
        if root_path not in self._mounted:
            if len(self._mounted) >= _MAX_MOUNTS:
                self._mounted.clear()
            self._mounted[root_path] = Documents(self._endpoints, root_path + self._prefix)
        return self._mounted[root_path]

    @cached_property
    def document(self) -> Json:
        """The OpenAPI document as JSON values."""
        return build_document(self._endpoints, self._prefix)

    @cached_property
    def as_json(self) -> bytes:
        """The OpenAPI document, UTF-8."""
        return json.dumps(self.document, ensure_ascii=False, separators=(",", ":")).encode()

    @cached_property
    def as_html(self) -> bytes:
        """The page that shows it, UTF-8."""
        return render_page(self.document).encode()


def build_document(endpoints: "Sequence[Endpoint]", prefix: str = "") -> Json:
    """The OpenAPI document of a route table whose paths lie below ``prefix``."""
    paths: dict[str, Json] = {}
    for endpoint in endpoints:
        operation = _operation(endpoint)
        sample = curl(endpoint.method, ADDRESS + prefix + endpoint.path, operation)
        operation["x-codeSamples"] = [{"lang": "Shell", "label": "curl", "source": sample}]
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = operation
    components = component_schemas(
        requests={endpoint.body for endpoint in endpoints if endpoint.body is not None},
        answers={what for endpoint in endpoints for what in endpoint.answers.values() if isinstance(what, type)},
    )
    components["Problem"]["x-codes"] = problem_codes()
    used = {operation["tags"][0] for item in paths.values() for operation in item.values()}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Context server",
            "summary": "Replies as a durable log, signals without text, text by pull.",
            "description": texts.INFO,
            "version": __version__,
            "license": {"name": "Apache License 2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": prefix or "/"}],
        "tags": [
            {"name": name, "description": about} for name, about in dict(texts.TAGS.values()).items() if name in used
        ],
        "paths": paths,
        "components": {"schemas": components},
    }


# Operations


def operation_id(endpoint: "Endpoint") -> str:
    """The name of the handler: ``pull_content`` for an object of a class ``PullContent``."""
    name = getattr(endpoint.handler, "__name__", None) or type(endpoint.handler).__name__
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _operation(endpoint: "Endpoint") -> Json:
    name = operation_id(endpoint)
    module = endpoint.handler.__module__.rpartition(".")[2]
    about = endpoint.handler.__doc__ or endpoint.summary
    operation: Json = {
        "operationId": name,
        "tags": [texts.TAGS.get(module, texts.TAGS["operations"])[0]],
        "summary": endpoint.summary,
        "description": texts.NOTES.get(name) or plain(about),
    }
    if parameters := [*_path_parameters(endpoint), *_query_parameters(endpoint), *_header_parameters(endpoint)]:
        operation["parameters"] = parameters
    if endpoint.body is not None:
        content: Json = {"schema": reference(endpoint.body)}
        if (example := MODELS.get(endpoint.body.__name__)) is not None:
            content["example"] = example
        operation["requestBody"] = {
            "required": not endpoint.body_optional,
            "content": {"application/json": content},
        }
    elif endpoint.takes_file:
        operation["requestBody"] = texts.FILE_BODY
    operation["responses"] = dict(sorted({**_answers(endpoint), **_problems(endpoint)}.items()))
    return operation


def _path_parameters(endpoint: "Endpoint") -> Iterator[Json]:
    for name in re.findall(r"{(\w+)}", endpoint.path):
        schema = {"type": "string", "format": "uuid"}
        yield {"name": name, "in": "path", "required": True, "schema": schema, **texts.PATH_PARAMETERS.get(name, {})}


def _query_parameters(endpoint: "Endpoint") -> Iterator[Json]:
    schema: Json = tidy(endpoint.query.model_json_schema(schema_generator=Generator))
    for name, given in schema.get("properties", {}).items():
        field = without_null(given)
        if field.get("default", ...) in (None, []):
            del field["default"]
        parameter: Json = {"name": name, "in": "query", "required": name in schema.get("required", ())}
        if "description" in field:
            parameter["description"] = field.pop("description")
        more = texts.QUERY.get(f"{operation_id(endpoint)}.{name}") or texts.QUERY.get(name, {})
        yield {**parameter, "schema": field, **more}


def _header_parameters(endpoint: "Endpoint") -> Iterator[Json]:
    for name in endpoint.headers:
        parameter = {"name": name, "in": "header", "required": False, **texts.HEADERS[name]}
        if name == "Last-Event-ID":
            inline = "{message_id}" in endpoint.path
            pattern = texts.SEQUENCE_ID if inline else texts.VERSION_ID
            parameter |= {"schema": {"type": "string", "pattern": pattern}, "example": "12" if inline else "5"}
        yield parameter


def _answers(endpoint: "Endpoint") -> dict[str, Json]:
    answers: dict[str, Json] = {}
    for status, what in endpoint.answers.items():
        key = operation_id(endpoint), status
        answer: Json = {"description": _answer_description(key, what)}
        if headers := {name: texts.ANSWER_HEADERS[name] for name in _answer_headers(endpoint, status, what)}:
            answer["headers"] = headers
        if what is not None:
            answer["content"] = _content(endpoint, what)
        if key in texts.LINKS:
            answer["links"] = {
                name: {"operationId": name, "parameters": parameters} for name, parameters in texts.LINKS[key].items()
            }
        answers[str(status)] = answer
    return answers


def _answer_description(key: tuple[str, int], what: type[BaseModel] | str | None) -> str:
    if key in texts.ANSWERS:
        return texts.ANSWERS[key]
    if isinstance(what, str) or what is None:
        return texts.NOT_MODIFIED if key[1] == 304 else "Done."
    return plain(what.__doc__ or what.__name__)


def _answer_headers(endpoint: "Endpoint", status: int, what: type[BaseModel] | str | None) -> Iterator[str]:
    if what in (schemas.Context, schemas.Content, schemas.WholeChunk, "*/*") or status == 304:
        yield "ETag"
    if status == 201:
        yield "Location"
    if "Idempotency-Key" in endpoint.headers:
        yield "Idempotency-Replayed"
    if what == _SSE:
        yield "X-Accel-Buffering"
    if what is not None and what not in (schemas.Machine, schemas.Posted):
        yield "Cache-Control"


def _content(endpoint: "Endpoint", what: type[BaseModel] | str) -> Json:
    """The media type of an answer, with its schema. Of a stream, the schema is that of each event."""
    if not isinstance(what, str):
        return {"application/json": {"schema": reference(what)}}
    if what == _SSE:
        is_inline = "{message_id}" in endpoint.path or endpoint.method == "POST"
        return {_SSE: {"schema": {"$ref": REFERENCE.format(model="InlineEvent" if is_inline else "SignalEvent")}}}
    return {what: {"schema": {"type": "object" if what == "application/json" else "string"}}}


# Problems


def problem_codes() -> dict[str, Json]:
    """Every code of a problem document, with its status, title and what it means."""
    named = {
        kind.code: {"status": status, "title": title, "description": plain(kind.__doc__ or title)}
        for kind, (status, title) in problems.STATUSES.items()
    }
    named["internal-error"] = _DEFECT
    return dict(sorted(named.items(), key=lambda item: (item[1]["status"], item[0])))


def _problems(endpoint: "Endpoint") -> dict[str, Json]:
    """The refusals of an endpoint: those of its row, and those that every one has."""
    statuses = {*endpoint.problems, 421, 500}
    if endpoint.method in _WRITES:
        statuses.add(403)
    if endpoint.problems:
        # Whatever can be refused reads the database, which may be out of reach.
        statuses.add(503)
    answers: dict[str, Json] = {}
    for status in statuses:
        possible = [code for code, facts in problem_codes().items() if facts["status"] == status]
        codes = [code for code in possible if _may_answer(endpoint, code)]
        listed = ", ".join(f"`{code}`" for code in codes)
        answer: Json = {
            "description": f"{problem_codes()[codes[0]]['title'] if len(codes) == 1 else 'Refused'}: {listed}.",
            "content": {problems.MEDIA_TYPE: {"schema": reference(schemas.Problem)}},
            "x-codes": codes,
        }
        if status in (503, 507):
            answer["headers"] = {"Retry-After": texts.ANSWER_HEADERS["Retry-After"]}
        answers[str(status)] = answer
    return answers


def _may_answer(endpoint: "Endpoint", code: str) -> bool:
    """Whether a code, of a status that the endpoint answers, is one of the endpoint's."""
    streams = _SSE in endpoint.answers.values()
    if code in _PATHS:
        return _PATHS[code] in endpoint.path
    match code:
        case "context-not-found":
            return "{message_id}" not in endpoint.path and "{file_id}" not in endpoint.path
        case "not-found" | "method-not-allowed":
            return False
        case "command-not-allowed":
            return endpoint.body is not None
        case "sequence-ahead":
            return "from_sequence" in endpoint.query.model_fields or "{sequence}" in endpoint.path
        case "idempotency-key-reused":
            return "Idempotency-Key" in endpoint.headers
        case "too-many-streams" | "shutting-down":
            return streams
        case "not-ready":
            return schemas.Ready in endpoint.answers.values()
    return True
