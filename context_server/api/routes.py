"""The whole URL table on one screen; the OpenAPI document is made from it."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from context_server.api import (
    chat,
    contexts,
    docs,
    files,
    forms,
    inline,
    messages,
    operations,
    runs,
    schemas,
    slash,
    stream,
)
from context_server.api.content import PullContent, get_chunk
from context_server.api.problems import MethodNotAllowed, PathNotFound, answer
from context_server.api.requests import parse_query
from context_server.errors import (
    ApprovalNotFound,
    ChunkNotFound,
    ContextNotFound,
    FileUnknown,
    MessageNotFound,
    NotFound,
)

Handler = Callable[[Request], Awaitable[Response]]

SSE = "text/event-stream"
BYTES = "*/*"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One call: how it is made, what answers it, what it may be refused with, and what a reader should know."""

    method: str
    path: str
    handler: Handler | PullContent
    summary: str
    answers: Mapping[int, type[BaseModel] | str | None]
    query: type[BaseModel] = forms.NoQuery
    body: type[BaseModel] | None = None
    body_optional: bool = False
    takes_file: bool = False
    headers: tuple[str, ...] = ()
    problems: tuple[int, ...] = field(default=())

    @property
    def is_stream(self) -> bool:
        """Whether it answers with a stream only; such a call has no HEAD."""
        return set(self.answers.values()) <= {SSE, None}


KEY, IF_MATCH, IF_NONE_MATCH, LAST_ID = "Idempotency-Key", "If-Match", "If-None-Match", "Last-Event-ID"
RANGE = "Range"
CONTEXT, MESSAGE = "/contexts/{context_id}", "/contexts/{context_id}/messages/{message_id}"

# The pull stands first: routes are tried in order, and it is asked for most.
ENDPOINTS: tuple[Endpoint, ...] = (
    Endpoint(method="GET", path=f"{MESSAGE}/content", handler=PullContent(), summary="Pull the text after a sequence",
             answers={200: schemas.Content, 304: None}, query=forms.ContentQuery, headers=(IF_NONE_MATCH,),
             problems=(404, 409, 422, 503)),
    Endpoint(method="GET", path=f"{MESSAGE}/chunks/{{sequence}}", handler=get_chunk, summary="Read one chunk, whole",
             answers={200: schemas.WholeChunk, 304: None}, headers=(IF_NONE_MATCH,), problems=(404, 409, 422, 503)),
    Endpoint(method="GET", path=f"{CONTEXT}/stream", handler=stream.stream_context, summary="Signals of one context",
             answers={200: SSE}, query=forms.StreamQuery, headers=(LAST_ID,), problems=(404, 422, 503)),
    Endpoint(method="GET", path="/stream", handler=stream.stream_contexts, summary="Signals of many contexts",
             answers={200: SSE}, query=forms.StreamsQuery, headers=(LAST_ID,), problems=(404, 422, 503)),
    Endpoint(method="POST", path=f"{CONTEXT}/messages", handler=messages.post_message, summary="Post a message",
             answers={202: schemas.Posted, 200: SSE}, query=forms.InlineQuery, body=forms.NewMessage,
             headers=(KEY, IF_MATCH), problems=(400, 404, 408, 409, 412, 413, 415, 422, 503, 507)),
    Endpoint(method="GET", path=f"{CONTEXT}/messages", handler=messages.list_messages, summary="List messages",
             answers={200: schemas.MessagePage}, query=forms.MessagesQuery, problems=(404, 422, 503)),
    Endpoint(method="GET", path=MESSAGE, handler=messages.get_message, summary="Read one message, whole",
             answers={200: schemas.Message}, problems=(404, 422, 503)),
    Endpoint(method="GET", path=f"{MESSAGE}/events", handler=inline.message_events, summary="Follow a message inline",
             answers={200: SSE, 204: None}, query=forms.EventsQuery, headers=(LAST_ID,),
             problems=(404, 409, 422, 503)),
    Endpoint(method="POST", path="/chat", handler=chat.chat, summary="Post and stream in one call",
             answers={200: SSE}, body=forms.NewChat, headers=(KEY,),
             problems=(400, 404, 408, 409, 413, 415, 422, 503, 507)),
    Endpoint(method="POST", path=f"{CONTEXT}/cancel", handler=runs.cancel, summary="Cancel what runs or waits",
             answers={202: schemas.Context}, body=forms.Nothing, body_optional=True, headers=(KEY, IF_MATCH),
             problems=(400, 404, 408, 412, 413, 415, 422, 503, 507)),
    Endpoint(method="GET", path=f"{CONTEXT}/approvals", handler=runs.list_approvals, summary="List approvals",
             answers={200: schemas.Approvals}, query=forms.ApprovalsQuery, problems=(404, 422, 503)),
    Endpoint(method="POST", path=f"{CONTEXT}/approvals/{{approval_id}}", handler=runs.decide,
             summary="Approve or deny a call", answers={200: schemas.Approval}, body=forms.NewDecision,
             headers=(IF_MATCH,), problems=(400, 404, 408, 409, 412, 413, 415, 422, 503, 507)),
    Endpoint(method="GET", path=f"{CONTEXT}/queue", handler=runs.list_queue, summary="List what waits",
             answers={200: schemas.Queue}, problems=(404, 422, 503)),
    Endpoint(method="DELETE", path=f"{CONTEXT}/queue/{{message_id}}", handler=runs.remove_from_queue,
             summary="Take back what waits", answers={204: None}, headers=(IF_MATCH,),
             problems=(404, 412, 422, 503, 507)),
    Endpoint(method="POST", path=f"{MESSAGE}/regenerate", handler=messages.regenerate, summary="Regenerate a reply",
             answers={202: schemas.Posted, 200: SSE}, query=forms.InlineQuery, body=forms.Nothing, body_optional=True,
             headers=(KEY, IF_MATCH), problems=(400, 404, 408, 409, 412, 413, 415, 422, 503, 507)),
    Endpoint(method="POST", path=f"{CONTEXT}/fork", handler=contexts.fork_context, summary="Fork a context",
             answers={201: schemas.Context}, body=forms.NewFork, headers=(KEY,),
             problems=(400, 404, 408, 409, 413, 415, 422, 503, 507)),
    Endpoint(method="POST", path="/contexts", handler=contexts.create_context, summary="Create a context",
             answers={201: schemas.Context}, body=forms.NewContext, body_optional=True, headers=(KEY,),
             problems=(400, 408, 413, 415, 422, 503, 507)),
    Endpoint(method="GET", path="/contexts", handler=contexts.list_contexts, summary="List contexts",
             answers={200: schemas.ContextPage}, query=forms.PageQuery, problems=(422, 503)),
    Endpoint(method="GET", path=CONTEXT, handler=contexts.get_context, summary="Read a context",
             answers={200: schemas.Context, 304: None}, headers=(IF_NONE_MATCH,), problems=(404, 422, 503)),
    Endpoint(method="PATCH", path=CONTEXT, handler=contexts.change_context, summary="Change a context",
             answers={200: schemas.Context}, body=forms.ContextChange, headers=(IF_MATCH,),
             problems=(400, 404, 408, 409, 412, 413, 415, 422, 503, 507)),
    Endpoint(method="DELETE", path=CONTEXT, handler=contexts.delete_context, summary="Delete a context",
             answers={204: None}, headers=(IF_MATCH,), problems=(404, 412, 422, 503, 507)),
    Endpoint(method="POST", path="/files", handler=files.upload_file, summary="Upload a file",
             answers={201: schemas.File}, query=forms.FileQuery, takes_file=True, headers=(KEY,),
             problems=(408, 413, 415, 422, 503, 507)),
    Endpoint(method="GET", path="/files", handler=files.list_files, summary="List files",
             answers={200: schemas.FilePage}, query=forms.PageQuery, problems=(422, 503)),
    Endpoint(method="GET", path="/files/{file_id}", handler=files.get_file, summary="Download a file",
             answers={200: BYTES, 206: BYTES, 304: None}, headers=(IF_NONE_MATCH, RANGE),
             problems=(404, 416, 422, 503)),
    Endpoint(method="DELETE", path="/files/{file_id}", handler=files.delete_file, summary="Delete a file",
             answers={204: None}, problems=(404, 422, 503, 507)),
    Endpoint(method="POST", path="/commands/execute", handler=slash.execute_command, summary="Carry out a command",
             answers={200: schemas.CommandAnswer}, body=forms.NewCommand, problems=(400, 408, 413, 415, 422, 503)),
    Endpoint(method="GET", path="/usage", handler=slash.usage, summary="What replies have used",
             answers={200: schemas.UsageTotal}, query=forms.UsageQuery, problems=(404, 422, 503)),
    Endpoint(method="GET", path="/machine", handler=runs.machine, summary="The state machine, for XState",
             answers={200: schemas.Machine}),
    Endpoint(method="GET", path="/healthz", handler=operations.healthz, summary="The process answers",
             answers={200: schemas.Health}),
    Endpoint(method="GET", path="/readyz", handler=operations.readyz, summary="The process can do its work",
             answers={200: schemas.Ready}, problems=(503,)),
    Endpoint(method="GET", path="/metrics", handler=operations.metrics, summary="Metrics for Prometheus",
             answers={200: "text/plain"}),
    Endpoint(method="GET", path="/openapi.json", handler=docs.openapi_json, summary="This document",
             answers={200: "application/json"}),
    Endpoint(method="GET", path="/docs", handler=docs.docs_page, summary="This document, for people",
             answers={200: "text/html"}),
)  # fmt: skip


class Resource:
    """Everything that one path answers, by method."""

    def __init__(self, endpoints: list[Endpoint]) -> None:
        self._endpoints = {endpoint.method: endpoint for endpoint in endpoints}
        get = self._endpoints.get("GET")
        if get is not None and not get.is_stream:
            self._endpoints["HEAD"] = get
        self._allow = ", ".join(sorted(self._endpoints))

    def _endpoint(self, method: str) -> Endpoint:
        endpoint = self._endpoints.get(method)
        if endpoint is None:
            raise MethodNotAllowed(method, self._allow)
        return endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers the request; every failure becomes a problem document here, and nowhere else."""
        request = Request(scope, receive)
        try:
            endpoint = self._endpoint(scope["method"])
            refuse_impossible_ids(scope["path_params"])
            if isinstance(endpoint.handler, PullContent):
                await endpoint.handler(scope, receive, send)
                return
            if endpoint.query is forms.NoQuery:
                parse_query(request, forms.NoQuery)
            response = await endpoint.handler(request)
        except Exception as error:
            response = answer(error, request.app.state.metrics)
        await response(scope, receive, send)


def refuse_impossible_ids(path_params: Mapping[str, str]) -> None:
    """Refuses ids with U+0000, which PostgreSQL does not even take for a comparison.

    Raises:
        NotFound: the one of what the id is of.
    """
    kinds: dict[str, Callable[[str], NotFound]] = {
        "approval_id": ApprovalNotFound,
        "context_id": ContextNotFound,
        "file_id": FileUnknown,
        "sequence": ChunkNotFound,
    }
    for name, value in path_params.items():
        if "\x00" in value:
            raise kinds.get(name, MessageNotFound)(value)


async def path_not_found(scope: Scope, receive: Receive, send: Send) -> None:
    """What a path that is none of ours is answered."""
    await answer(PathNotFound(), scope["app"].state.metrics)(scope, receive, send)


def build_routes(prefix: str = "") -> list[BaseRoute]:
    """The routes of the application, below ``prefix``."""
    by_path: dict[str, list[Endpoint]] = {}
    for endpoint in ENDPOINTS:
        by_path.setdefault(endpoint.path, []).append(endpoint)
    return [Route(prefix + path, Resource(endpoints)) for path, endpoints in by_path.items()]
