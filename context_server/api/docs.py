"""The OpenAPI document and the page that shows it."""

from starlette.requests import Request
from starlette.responses import Response

from context_server.api.openapi import Documents

_HEADERS = {"Cache-Control": "no-cache"}
_PAGE_HEADERS = {
    **_HEADERS,
    # The page has one style of its own and needs nothing else, so nothing else may run or load.
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
}


def _documents_of(request: Request) -> Documents:
    """The documents of the application, with paths as this client sees them where it is mounted below another."""
    documents: Documents = request.app.state.openapi
    return documents.below(request.scope.get("root_path", ""))


async def openapi_json(request: Request) -> Response:
    """The OpenAPI 3.1 document."""
    return Response(_documents_of(request).as_json, media_type="application/json", headers=_HEADERS)


async def docs_page(request: Request) -> Response:
    """The OpenAPI document as a page that loads nothing from anywhere."""
    return Response(_documents_of(request).as_html, media_type="text/html", headers=_PAGE_HEADERS)
