"""The OpenAPI document and its page, held against the route table, the schemas and what is written on the wire."""

import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from typing import Any

import jsonschema_rs
import pytest
from schemathesis.specs.openapi.definitions import OPENAPI_31

from context_server import records
from context_server.api import problems, schemas, signals
from context_server.api.openapi import Documents, operation_id
from context_server.api.openapi_examples import MODELS
from context_server.api.routes import ENDPOINTS, build_routes
from context_server.records import Chunk, ChunkKind, MessageStatus, Page, State

DOCUMENTS = Documents(ENDPOINTS)
DOCUMENT: dict[str, Any] = json.loads(DOCUMENTS.as_json)
OPERATIONS = [
    (method.upper(), path, operation) for path, item in DOCUMENT["paths"].items() for method, operation in item.items()
]
PAGE = DOCUMENTS.as_html.decode()
NOW = datetime(2026, 11, 21, 10, 0, 0, 123_000, tzinfo=UTC)

TEXT = Chunk(11, ChunkKind.TEXT, "one ")
CALL = Chunk(12, ChunkKind.TOOL_CALL, None, {"name": "search_docs"})
OPEN_PAGE = Page(
    context_id="c",
    message_id="m",
    from_sequence=10,
    sequence=12,
    chunks=(TEXT, CALL),
    status=MessageStatus.STREAMING,
    head=12,
    final_sequence=None,
    digest=None,
    closed=False,
)


def violations(component: str, value: Any) -> list[str]:
    """What is wrong with a value by a schema of the document; with the formats of strings."""
    schema = {"$ref": f"#/components/schemas/{component}", "components": DOCUMENT["components"]}
    validator = jsonschema_rs.Draft202012Validator(schema, validate_formats=True)
    return [error.message for error in validator.iter_errors(value)]


def test_the_document_is_valid_openapi_3_1() -> None:
    validator = jsonschema_rs.validator_for(OPENAPI_31)

    assert [error.message for error in validator.iter_errors(DOCUMENT)] == []
    assert [error.message for error in validator.iter_errors({**DOCUMENT, "paths": []})] != []


@pytest.mark.parametrize("name", DOCUMENT["components"]["schemas"])
def test_every_component_is_a_valid_schema_and_its_examples_fit_it(name: str) -> None:
    schema = DOCUMENT["components"]["schemas"][name]

    jsonschema_rs.Draft202012Validator({**schema, "components": DOCUMENT["components"]})
    for example in schema.get("examples", ()):
        assert violations(name, example) == []


def test_every_example_belongs_to_a_schema_and_every_reference_leads_to_one() -> None:
    components = DOCUMENT["components"]["schemas"].keys()
    references = set(re.findall(r'"#/components/schemas/(\w+)"', DOCUMENTS.as_json.decode()))

    assert references <= components
    assert MODELS.keys() <= components


def test_the_document_names_exactly_the_routes_that_are_served() -> None:
    served = {route.path for route in build_routes()}  # type: ignore[attr-defined]

    assert {(method, path) for method, path, _ in OPERATIONS} == {(e.method, e.path) for e in ENDPOINTS}
    assert DOCUMENT["paths"].keys() == served


def test_operation_ids_and_every_link_between_them_are_unambiguous() -> None:
    names = [operation["operationId"] for _, _, operation in OPERATIONS]
    linked = {
        link["operationId"]
        for _, _, operation in OPERATIONS
        for answer in operation["responses"].values()
        for link in answer.get("links", {}).values()
    }

    assert len(set(names)) == len(names)
    assert {"pull_content", "get_context"} <= linked <= set(names)


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=operation_id)
def test_an_operation_says_what_its_row_of_the_table_says(endpoint: Any) -> None:
    operation = DOCUMENT["paths"][endpoint.path][endpoint.method.lower()]
    parameters = {(parameter["in"], parameter["name"]) for parameter in operation.get("parameters", ())}
    refused = {int(status) for status, answer in operation["responses"].items() if "x-codes" in answer}

    assert operation["summary"] == endpoint.summary
    assert len(operation["description"]) > 20
    assert {name for place, name in parameters if place == "query"} == endpoint.query.model_fields.keys()
    assert {name for place, name in parameters if place == "header"} == set(endpoint.headers)
    assert {name for place, name in parameters if place == "path"} == set(re.findall(r"{(\w+)}", endpoint.path))
    assert {int(status) for status in operation["responses"]} - refused == endpoint.answers.keys()
    assert {*endpoint.problems, 421, 500} <= refused
    assert (403 in refused) == (endpoint.method != "GET")
    assert ("requestBody" in operation) == (endpoint.body is not None or endpoint.takes_file)
    if endpoint.body is not None:
        assert operation["requestBody"]["required"] == (not endpoint.body_optional)


def test_every_refusal_is_a_problem_document_with_at_least_one_code_of_its_status() -> None:
    known = {kind.code: status for kind, (status, _) in problems.STATUSES.items()} | {"internal-error": 500}
    for _, _, operation in OPERATIONS:
        for status, answer in operation["responses"].items():
            if int(status) >= 400:
                assert answer["content"].keys() == {"application/problem+json"}
                assert {known[code] for code in answer["x-codes"]} == {int(status)}
                assert all(f"`{code}`" in answer["description"] for code in answer["x-codes"])


def test_every_code_is_listed_and_all_but_the_routers_own_belong_to_an_operation() -> None:
    listed = DOCUMENT["components"]["schemas"]["Problem"]["x-codes"].keys()
    answered = {
        code for _, _, op in OPERATIONS for answer in op["responses"].values() for code in answer.get("x-codes", ())
    }

    assert listed == {kind.code for kind in problems.STATUSES} | {"internal-error"}
    assert listed - answered == {"not-found", "method-not-allowed"}


def test_query_parameters_have_the_bounds_of_their_models() -> None:
    pull = {p["name"]: p for p in DOCUMENT["paths"][ENDPOINTS[0].path]["get"]["parameters"]}
    streams = {p["name"]: p for p in DOCUMENT["paths"]["/stream"]["get"]["parameters"]}

    assert pull["from_sequence"]["schema"] == {"type": "integer", "minimum": 0, "maximum": 2**53 - 1, "default": 0}
    assert (pull["wait"]["schema"]["minimum"], pull["wait"]["schema"]["maximum"]) == (0, 30)
    assert (streams["context"]["style"], streams["context"]["explode"]) == ("form", True)
    assert streams["context"]["schema"]["type"] == "array"


@pytest.mark.parametrize("view", ["content", "chunks"])
@pytest.mark.parametrize(
    "page",
    [
        OPEN_PAGE,
        replace(OPEN_PAGE, chunks=(), sequence=10, head=10),
        replace(OPEN_PAGE, status=MessageStatus.COMPLETED, final_sequence=12, digest="0" * 64),
        replace(OPEN_PAGE, closed=True),
    ],
    ids=["open", "nothing-new", "ended", "closed"],
)
def test_what_a_pull_writes_is_what_the_schema_says(page: Page, view: str) -> None:
    body = json.loads(schemas.content_body(page, view, "e"))

    assert violations("Content", body) == []
    assert violations("Content", {**body, "content": "", "chunks": []}) != []
    assert violations("Content", {name: value for name, value in body.items() if name != "sequence"}) != []


REPLY = {"context_id": "c", "message_id": "m"}
INLINE = (
    "RunStarted",
    "TextDelta",
    "ReasoningDelta",
    "ToolCallStarted",
    "ToolCallFinished",
    "Step",
    "ApprovalRequested",
    "ErrorReported",
    "ReplyFailed",
    "RunFinished",
)
SIGNALS: dict[str, records.Signal] = {
    "StateChanged": records.StateChanged(
        context_id="c",
        new_state=State.CALLING_TOOL,
        previous_state=None,
        version=2,
        run_id=None,
        timestamp=NOW,
        tool="look",
    ),
    "ContentDelta": records.ContentDelta(**REPLY, current_sequence=3, timestamp=NOW),
    "MessageCompleted": records.MessageCompleted(
        **REPLY, final_sequence=3, status=MessageStatus.FAILED, version=4, timestamp=NOW
    ),
    "ContextChanged": records.ContextChanged(context_id="c", version=5, timestamp=NOW),
    "ContextDeleted": records.ContextDeleted(context_id="c", version=6, timestamp=NOW),
}


@pytest.mark.parametrize("component", SIGNALS)
def test_signals_are_written_as_their_schemas_say(component: str) -> None:
    written = json.loads(signals.signal_json(SIGNALS[component], "e"))

    assert violations(component, written) == []
    assert violations("Signal", written) == []
    assert written.keys() == DOCUMENT["components"]["schemas"][component]["properties"].keys()


def test_heartbeat_and_goodbye_are_written_as_their_schemas_say() -> None:
    assert violations("Heartbeat", signals.heartbeat_fields([("c", "m", 3)])) == []
    assert violations("Goodbye", signals.goodbye_fields(700)) == []


@pytest.mark.parametrize("name", INLINE)
def test_the_example_of_an_inline_event_is_one_and_no_signal_and_of_no_dialect(name: str) -> None:
    assert violations("InlineSignal", MODELS[name]) == []
    assert violations("InlineSignal", {"type": MODELS[name]["type"]}) != []
    assert violations("Signal", MODELS[name]) != []
    assert violations("DialectData", MODELS[name]) != []


def test_a_signal_with_text_would_not_fit() -> None:
    assert violations("Signal", {"type": "text_delta", "sequence": 1, "text": "canary"}) != []


class _Page(HTMLParser):
    """What a page refers to, and which anchors it has."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.anchors: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "href", "srcset", "action", "data", "poster"):
                self.references.append(value or "")
            elif name == "id":
                self.anchors.append(value or "")


def read_page(text: str) -> _Page:
    page = _Page()
    page.feed(text)
    return page


def test_the_page_shows_every_operation_code_and_event() -> None:
    page = read_page(PAGE)

    for _, path, operation in OPERATIONS:
        assert operation["operationId"] in page.anchors
        assert re.sub(r"({\w+})", r"<var>\1</var>", path) in PAGE
    for code in DOCUMENT["components"]["schemas"]["Problem"]["x-codes"]:
        assert f"problem-{code}" in page.anchors
    assert {f"event-{name}" for name in (*SIGNALS, *INLINE, "Heartbeat", "Goodbye")} <= set(page.anchors)


def test_the_page_loads_nothing_and_its_links_lead_somewhere() -> None:
    page = read_page(PAGE)
    anchors = {f"#{anchor}" for anchor in page.anchors}

    assert len(anchors) == len(page.anchors)
    assert set(page.references) <= anchors | {"openapi.json"}
    assert page.tags.isdisjoint({"script", "link", "img", "iframe", "object", "embed", "base"})
    assert re.search(r"@import|url\(", PAGE) is None


def test_the_page_escapes_what_the_document_says() -> None:
    hostile = replace(ENDPOINTS[0], summary='<script>alert("1")</script>')

    page = Documents([hostile]).as_html.decode()

    assert "<script" not in page
    assert "&lt;script&gt;alert(&quot;1&quot;)" in page


def test_example_requests_show_the_path_as_it_is_served() -> None:
    document = Documents(ENDPOINTS, "/api/v1").document
    sample = document["paths"]["/machine"]["get"]["x-codeSamples"][0]["source"]

    assert document["servers"] == [{"url": "/api/v1"}]
    assert sample == "curl http://127.0.0.1:8000/api/v1/machine"


def test_below_a_mount_the_server_is_where_the_mount_is() -> None:
    documents = Documents(ENDPOINTS, "/api")

    mounted = documents.below("/chat")

    assert mounted.document["servers"] == [{"url": "/chat/api"}]
    assert documents.below("/chat") is mounted
    assert documents.below("") is documents


def test_paths_of_mounts_that_clients_choose_do_not_pile_up() -> None:
    documents = Documents(ENDPOINTS)
    first = documents.below("/tenant-0")

    for number in range(1, 20):
        documents.below(f"/tenant-{number}")

    assert documents.below("/tenant-0") is not first
