"""Requests made from the OpenAPI document, valid and broken, against a live server; and the document as it is served.

Schemathesis makes the requests and holds each answer against its description. Its own checks stand, but for one case:
what a schema cannot know.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.core.failures import Failure, FailureGroup
from schemathesis.core.transport import Response
from schemathesis.specs.openapi.checks import positive_data_acceptance
from schemathesis.specs.openapi.definitions import OPENAPI_31
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.responses import Response as StarletteResponse
from starlette.routing import Route

from context_server.api.openapi import Documents
from context_server.api.routes import ENDPOINTS, build_routes
from tests.blackbox.calls import Calls
from tests.server import Server

# Streams do not end by themselves: their first events are held against the description, then they are left.
CONFIG = {"max-stream-events": 2, "request-timeout": 90}
DESCRIBED = schemathesis.openapi.from_dict(Documents(ENDPOINTS).document, config=schemathesis.Config.from_dict(CONFIG))
EXAMPLES = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


INEXPRESSIBLE = {
    ("query.cursor", "is not a cursor of this list; use next_cursor of the page before"),
    ("query.to_sequence", "must not be less than from_sequence"),
    ("query.types", "String should have at most 200 characters"),
    ("body.arguments", "may be given with an approval only"),
    ("body.model", "must be null or one of: (none)"),
    ("body.parent_id", "cannot be given with if_busy 'steer'"),
}


class Subject:
    """A live server and conversations in it, so that requests meet more than 404."""

    def __init__(self, server: Server) -> None:
        self.url = server.url
        self.calls = Calls(server)
        self._ids = self._conversation()

    def _conversation(self) -> dict[str, str]:
        context_id = self.calls.create()
        posted = self.calls.call("POST", f"/contexts/{context_id}/messages", _message("rate=0 words=3"))
        file = self.calls.call("POST", "/files?name=a.txt", b"text", headers={"Content-Type": "text/plain"})
        return {
            "context_id": context_id,
            "message_id": posted.json["reply_message_id"],
            "file_id": file.json["id"],
        }

    def lead(self, case: Any) -> None:
        """Has half of the cases name what exists; ids that are broken on purpose stay as they are."""
        if "last_event_id" in case.query:
            # The header counts when both are there, and the query is not looked at.
            case.headers.pop("Last-Event-ID", None)
        if case.method == "DELETE":
            self._ids = self._conversation()
        for name, given in case.path_parameters.items():
            if _is_uuid(given) and UUID(given).int % 2:
                case.path_parameters[name] = self._ids.get(name, given)


def _message(text: str) -> dict[str, Any]:
    return {"payload": {"type": "text", "content": text}}


def _is_uuid(value: Any) -> bool:
    try:
        return str(UUID(value)) == value
    except (ValueError, TypeError, AttributeError):
        return False


def depends_on_what_the_server_holds(response: Response) -> bool:
    """Whether a request of the right shape was refused for a reason that no schema can state.

    The version that a context has, what an idempotency key was used for, which cursors were given out, which models
    there are, how two fields compare, which types a dialect has, how long a list is when it is written with commas, and
    where a file ends.
    """
    if response.status_code == 416:
        return True
    if response.status_code not in (412, 422):
        return False
    problem = json.loads(response.content)
    wrong = {(error["where"], error["detail"]) for error in problem.get("errors", ())}
    return problem["code"] in ("version-mismatch", "idempotency-key-reused") or (
        bool(wrong) and all(fault in INEXPRESSIBLE or _is_of_another_dialect(*fault) for fault in wrong)
    )


def _is_of_another_dialect(where: str, detail: str) -> bool:
    return where == "query.types" and detail.startswith("knows no ")


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    directory: Path = tmp_path_factory.mktemp("described")
    with Server(directory, agent="metronome", heartbeat_seconds=0.2) as server:
        yield Subject(server)


@pytest.mark.scenario("operations", "Requests made from the description")
@DESCRIBED.parametrize()
@EXAMPLES
def test_every_answer_fits_its_description(case: Any, subject: Subject) -> None:
    subject.lead(case)

    response = case.call(base_url=subject.url)

    assert response.status_code < 500
    excluded = [positive_data_acceptance] if depends_on_what_the_server_holds(response) else []
    case.validate_response(response, excluded_checks=excluded)


@pytest.mark.scenario("operations", "OpenAPI document")
def test_the_served_document_is_valid_and_names_exactly_the_routes_of_the_server(subject: Subject) -> None:
    answer = subject.calls.call("GET", "/openapi.json")
    document = answer.json
    page = subject.calls.call("GET", "/docs")

    assert [error.message for error in jsonschema_rs.validator_for(OPENAPI_31).iter_errors(document)] == []
    assert {route.path for route in build_routes()} == document["paths"].keys()  # type: ignore[attr-defined]
    for path, item in document["paths"].items():
        refused = subject.calls.call("PUT", path)
        assert refused.status == 405
        assert {method for method in refused.headers["allow"].split(", ") if method != "HEAD"} == {
            *map(str.upper, item)
        }
    assert answer.headers["content-type"] == "application/json"
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert re.findall(rb"""(?:src|href)\s*=\s*["']?(?:[a-z]+:)?//""", page.body) == []


@pytest.mark.parametrize(
    ("answer", "caught"),
    [
        (JSONResponse({"id": "context", "initial": "idle", "states": {}}), None),
        (JSONResponse({"status": 500}, 500), "Server error"),
        (JSONResponse({"id": "context"}), "Response violates schema"),
        (JSONResponse({}, 418), "Undocumented status code"),
    ],
    ids=["fits", "server-error", "wrong-body", "unknown-status"],
)
def test_control_what_does_not_fit_the_description_is_caught(answer: StarletteResponse, caught: str | None) -> None:
    async def endpoint(_request: Request) -> StarletteResponse:
        return answer

    app = Starlette(routes=[Route("/machine", endpoint)])
    case = schemathesis.openapi.from_dict(Documents(ENDPOINTS).document)["/machine"]["GET"].Case()
    response = case.call(app=app)

    if caught is None:
        case.validate_response(response)
        return
    with pytest.raises(FailureGroup) as failure:
        case.validate_response(response)
    assert caught in {found.title for found in failure.value.exceptions if isinstance(found, Failure)}
