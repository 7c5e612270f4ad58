"""The OpenAPI document as a page for people: one file without scripts, which loads nothing from anywhere.

Everything that stands on it is in the document; every text of the document is escaped on its way here.
"""

import json
import re
from collections.abc import Iterable, Mapping
from html import escape
from importlib.resources import files
from typing import Any

Json = Mapping[str, Any]


def render_page(document: Json) -> str:
    """The page for an OpenAPI document, as HTML."""
    info = document["info"]
    index = _index(document)
    title = escape(info["title"])
    style = files(__package__).joinpath("docs_page.css").read_text("utf-8")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: the API</title>
<style>
{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the text</a>
<details class="menu"><summary>{title}: contents</summary>
<nav class="index" aria-label="Contents">{index}</nav></details>
<div class="frame">
<aside class="side">
<p class="brand"><a href="#main">{title}</a></p>
<p class="version">{escape(info["version"])} · <a href="openapi.json">openapi.json</a></p>
<nav class="index" aria-label="Operations">{index}</nav>
</aside>
<main id="main">
<h1>{title}</h1>
<p class="lead">{escape(info["summary"])}</p>
{_prose(info["description"])}
{"".join(_group(document, tag) for tag in document["tags"])}
{_signals(document)}
{_problems(document)}
{_schemas(document)}
</main>
</div>
</body>
</html>
"""


# Contents


def _operations(document: Json, tag: str) -> Iterable[tuple[str, str, Json]]:
    """Method, path and operation of everything under a tag."""
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if tag in operation["tags"]:
                yield method.upper(), path, operation


def _index(document: Json) -> str:
    parts = []
    for tag in document["tags"]:
        entries = "".join(
            f'<li><a href="#{escape(operation["operationId"])}">{_badge(method)}{escape(operation["summary"])}</a></li>'
            for method, _, operation in _operations(document, tag["name"])
        )
        parts.append(f"<h2>{escape(tag['name'])}</h2><ul>{entries}</ul>")
    rest = (("signals", "Events"), ("problems", "Problem codes"), ("schemas", "Schemas"))
    entries = "".join(f'<li><a class="plain" href="#{anchor}">{name}</a></li>' for anchor, name in rest)
    return "".join(parts) + f"<h2>Reference</h2><ul>{entries}</ul>"


def _badge(method: str) -> str:
    shown = "DEL" if method == "DELETE" else method
    return f'<span class="method {method.lower()}">{escape(shown)}</span>'


# Operations


def _group(document: Json, tag: Json) -> str:
    operations = "".join(
        _operation(document, method, path, operation) for method, path, operation in _operations(document, tag["name"])
    )
    return f"<h2>{escape(tag['name'])}</h2>{_prose(tag['description'])}{operations}"


def _operation(document: Json, method: str, path: str, operation: Json) -> str:
    prefix = document["servers"][0]["url"].rstrip("/")
    route = re.sub(r"({\w+})", r"<var>\1</var>", escape(prefix + path))
    parts = [
        f'<section class="operation" id="{escape(operation["operationId"])}">',
        f"<h3>{escape(operation['summary'])}</h3>",
        f'<div class="route">{_badge(method)}<code>{route}</code></div>',
        _prose(operation["description"]),
        _parameters(operation.get("parameters", ())),
        _body(document, operation.get("requestBody")),
        "<h4>Example</h4>",
        *(f'<pre class="take"><code>{escape(sample["source"])}</code></pre>' for sample in operation["x-codeSamples"]),
        _answers(document, operation["responses"]),
        "</section>",
    ]
    return "".join(parts)


def _parameters(parameters: Iterable[Json]) -> str:
    rows = [
        f'<tr><th scope="row"><code>{escape(parameter["name"])}</code>'
        f'<span class="note">{escape(parameter["in"])}{", required" if parameter["required"] else ""}</span></th>'
        f"<td>{_type(parameter['schema'])}</td><td>{_prose(parameter.get('description', ''))}</td></tr>"
        for parameter in parameters
    ]
    return "<h4>Parameters</h4>" + _table(("Name", "Type", "Meaning"), rows) if rows else ""


def _body(document: Json, body: Json | None) -> str:
    if body is None:
        return ""
    need = "" if body["required"] else " It may be left out."
    return "<h4>Body</h4>" + "".join(
        f"<p><code>{escape(media_type)}</code>, {_type(content['schema'])}.{need}</p>"
        + _fields(document, content["schema"], opened=True)
        for media_type, content in body["content"].items()
    )


def _answers(document: Json, answers: Json) -> str:
    given = [_answer(document, status, answer) for status, answer in answers.items() if "x-codes" not in answer]
    refused = [_refusal(status, answer["x-codes"]) for status, answer in answers.items() if "x-codes" in answer]
    return (
        "<h4>Answers</h4>"
        + _table(("Status", "Answer"), given)
        + '<details class="refusals"><summary>Refusals, as problem documents</summary>'
        + f"{_table(('Status', 'Codes'), refused)}</details>"
    )


def _answer(document: Json, status: str, answer: Json) -> str:
    cells = [_prose(answer["description"])]
    for media_type, content in answer.get("content", {}).items():
        cells.append(f"<p><code>{escape(media_type)}</code>, {_type(content['schema'])}</p>")
        cells.append(_fields(document, content["schema"]))
    if "headers" in answer:
        names = ", ".join(f"<code>{escape(name)}</code>" for name in answer["headers"])
        cells.append(f'<p class="note">Headers: {names}</p>')
    head = f'<th scope="row"><span class="status good">{escape(status)}</span></th>'
    return f"<tr>{head}<td>{''.join(cells)}</td></tr>"


def _refusal(status: str, codes: Iterable[str]) -> str:
    links = ", ".join(f'<a href="#problem-{escape(code)}"><code>{escape(code)}</code></a>' for code in codes)
    return f'<tr><th scope="row"><span class="status bad">{escape(status)}</span></th><td>{links}</td></tr>'


# Reference


def _signals(document: Json) -> str:
    schemas = document["components"]["schemas"]
    kinds = {kind["$ref"]: kind for union in ("Signal", "InlineSignal") for kind in _kinds(schemas[union])}
    sections = []
    for kind in kinds.values():
        name, schema = _resolve(document, kind)
        line = json.dumps(schema["examples"][0], ensure_ascii=False)
        sections.append(
            f'<section class="schema" id="event-{escape(name)}">'
            f"<h3><code>{escape(schema['properties']['type']['const'])}</code></h3>"
            f"{_prose(schema['description'])}<pre><code>data: {escape(line)}</code></pre>"
            f"<details><summary>Fields</summary>{_field_table(schema)}</details></section>"
        )
    return f'<h2 id="signals">Events</h2>{_prose(_ABOUT_EVENTS)}{"".join(sections)}'


_ABOUT_EVENTS = """\
Events have no name, so that `EventSource.onmessage` gets them, and their kind is the `type` in their data; with \
`named=true` they are named as their type. The `id` is what `Last-Event-ID` takes. Those from `run_started` to \
`run_finished` come in the inline view of a message only, which is the one stream that carries text."""


def _problems(document: Json) -> str:
    rows = [
        f'<tr id="problem-{escape(code)}"><th scope="row"><code>{escape(code)}</code></th>'
        f'<td><span class="status bad">{facts["status"]}</span></td><td>{_prose(facts["description"])}</td></tr>'
        for code, facts in document["components"]["schemas"]["Problem"]["x-codes"].items()
    ]
    about = "Every refusal is a problem document (RFC 9457), `application/problem+json`, with a stable `code`."
    return f'<h2 id="problems">Problem codes</h2>{_prose(about)}' + _table(("Code", "Status", "Meaning"), rows)


def _schemas(document: Json) -> str:
    sections = []
    for name, schema in document["components"]["schemas"].items():
        shown = _fields(document, schema, opened=True) if schema.get("properties") else f"<p>{_type(schema)}</p>"
        sections.append(
            f'<section class="schema" id="schema-{escape(name)}"><h3>{escape(name)}</h3>'
            f"{_prose(schema.get('description', ''))}{shown}</section>"
        )
    return f'<h2 id="schemas">Schemas</h2>{"".join(sections)}'


# Schemas


def _resolve(document: Json, schema: Json) -> tuple[str, Json]:
    """The name of a component and the schema that a reference means; a schema in place has no name."""
    if "$ref" not in schema:
        return "", schema
    name = schema["$ref"].rpartition("/")[2]
    return name, document["components"]["schemas"][name]


def _fields(document: Json, schema: Json, *, opened: bool = False) -> str:
    """The fields of an object and an example, to be unfolded unless ``opened``; nothing for what has no fields."""
    name, schema = _resolve(document, schema)
    if not schema.get("properties"):
        return ""
    shown = _field_table(schema)
    if schema.get("examples"):
        text = json.dumps(schema["examples"][0], ensure_ascii=False, indent=2)
        shown += f"<details><summary>Example</summary><pre><code>{escape(text)}</code></pre></details>"
    if opened:
        return shown
    return f"<details><summary>Fields{f' of {escape(name)}' if name else ''}</summary>{shown}</details>"


def _field_table(schema: Json) -> str:
    required = schema.get("required", ())
    rows = [
        f'<tr><th scope="row"><code>{escape(field)}</code>'
        f"{'' if field in required else '<span class=note>optional</span>'}</th>"
        f"<td>{_type(about)}</td><td>{_prose(about.get('description', ''))}</td></tr>"
        for field, about in schema["properties"].items()
    ]
    return _table(("Field", "Type", "Meaning"), rows)


def _type(schema: Json) -> str:
    """What a value may be, in a few words of HTML, and below them what limits it."""
    notes = ", ".join(_notes(schema))
    return _words(schema) + (f'<span class="note">{notes}</span>' if notes else "")


def _kinds(schema: Json) -> list[Json]:
    """The alternatives of a union; none for anything else."""
    return [kind for union in ("anyOf", "oneOf") for kind in schema.get(union, ()) if "required" not in kind]


def _words(schema: Json) -> str:
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        return f'<a href="#schema-{name}">{name}</a>'
    if kinds := _kinds(schema):
        return " or ".join(map(_words, kinds))
    if "const" in schema:
        return f"<code>{escape(json.dumps(schema['const']))}</code>"
    if "enum" in schema:
        return " or ".join(f"<code>{escape(json.dumps(value))}</code>" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_words(schema['items'])}"
    return escape(schema.get("type", "any"))


def _notes(schema: Json) -> Iterable[str]:
    """What limits a value, and what it is when it is left out."""
    for kind in _kinds(schema):
        yield from _notes(kind)
    if "format" in schema:
        yield escape(schema["format"])
    if "contentSchema" in schema:
        yield f"{_words(schema['contentSchema'])} as JSON"
    if "minimum" in schema and "maximum" in schema:
        yield f"{schema['minimum']} to {schema['maximum']}"
    if "minLength" in schema:
        yield f"at least {schema['minLength']} character"
    if "maxLength" in schema:
        yield f"at most {schema['maxLength']} characters"
    if "pattern" in schema:
        yield f"<code>{escape(schema['pattern'])}</code>"
    if schema.get("default") is not None:
        yield f"else <code>{escape(json.dumps(schema['default']))}</code>"


# Text


def _table(heads: Iterable[str], rows: Iterable[str]) -> str:
    columns = "".join(f'<th scope="col">{head}</th>' for head in heads)
    return f"<table><thead><tr>{columns}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _prose(text: str) -> str:
    """Paragraphs, `code` and **stress** of CommonMark as HTML."""
    shown = escape(text, quote=False)
    shown = re.sub(r"`([^`]+)`", r"<code>\1</code>", shown)
    shown = re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", shown)
    return "".join(f"<p>{paragraph}</p>" for paragraph in shown.split("\n\n") if paragraph)
