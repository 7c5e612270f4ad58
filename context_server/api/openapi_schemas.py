"""The schemas of the OpenAPI document, made from the pydantic models of requests, answers and events."""

import re
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode, models_json_schema

from context_server.api import events, schemas
from context_server.api import openapi_texts as texts
from context_server.api.openapi_examples import MODELS

Json = dict[str, Any]

REFERENCE = "#/components/schemas/{model}"


class Generator(GenerateJsonSchema):
    """Without a title for each field, which would repeat its name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Never."""
        return False


def component_schemas(requests: set[type[BaseModel]], answers: set[type[BaseModel]]) -> dict[str, Json]:
    """The schemas of bodies and answers, of problem documents and of events, by name."""
    spoken: set[type[BaseModel]] = {events.Signal, events.InlineSignal, events.DialectData}
    components = _definitions(answers | {schemas.Problem} | spoken, "serialization")
    for schema in components.values():
        _require_what_is_always_there(schema)
    components |= _definitions(requests, "validation")
    for field in components.get("ContextChange", {}).get("properties", {}).values():
        # Here the default of a field that is left out is what the context has.
        field.pop("default", None)
    for name, schema in components.items():
        _describe_fields(name, schema)
    for name, description in texts.SCHEMAS.items():
        if name in components:
            components[name]["description"] = description
    for name in components.keys() & MODELS.keys():
        components[name]["examples"] = [MODELS[name]]
    if "Content" in components:
        components["Content"]["oneOf"] = [{"required": ["content"]}, {"required": ["chunks"]}]
    components["SignalEvent"] = _event("Signal", "Version of the context, or `<context_id>:<version>`.")
    # Of no type, or else every event of ours would pass for one of a dialect.
    components["DialectData"]["not"] = {"required": ["type"]}
    inline = _event("InlineSignal", "Sequence of the chunk, or `<final_sequence>:end`.")
    known = [{"$ref": REFERENCE.format(model=model)} for model in ("InlineSignal", "DialectData")]
    inline["properties"]["data"]["contentSchema"] = {"anyOf": known}
    components["InlineEvent"] = inline
    return dict(sorted(components.items()))


def _describe_fields(name: str, schema: Json) -> None:
    for field_name, field in schema.get("properties", {}).items():
        about = texts.FIELDS.get(f"{name}.{field_name}") or texts.FIELDS.get(field_name)
        if about is not None:
            field.setdefault("description", about)


def _definitions(models: set[type[BaseModel]], mode: JsonSchemaMode) -> dict[str, Json]:
    ordered: list[tuple[type[BaseModel], JsonSchemaMode]] = [
        (model, mode) for model in sorted(models, key=lambda model: model.__name__)
    ]
    _, found = models_json_schema(ordered, ref_template=REFERENCE, schema_generator=Generator)
    definitions: dict[str, Json] = tidy(found.get("$defs", {}))
    return definitions


def _event(data: str, about_id: str) -> Json:
    """One server-sent event; its data is JSON of the schema ``data``."""
    return {
        "title": "Event",
        "type": "object",
        "description": f"One server-sent event; `data` is `{data}` as JSON.",
        "properties": {
            "id": {"type": "string", "description": about_id},
            "event": {"type": "string", "description": "The `type` in `data`, where named events were asked for."},
            "retry": {"type": "integer", "description": "Milliseconds to wait before coming back."},
            "data": {
                "type": "string",
                "contentMediaType": "application/json",
                "contentSchema": {"$ref": REFERENCE.format(model=data)},
            },
        },
        "required": ["data"],
    }


def reference(model: type[BaseModel]) -> Json:
    """A schema that refers to a model's."""
    return {"$ref": REFERENCE.format(model=model.__name__)}


def plain(docstring: str) -> str:
    """A docstring as CommonMark."""
    return re.sub(r"\s+", " ", docstring).strip().replace("``", "`")


def tidy(value: Any) -> Any:
    """A schema with bounds by their JSON Schema names (pydantic keeps its own after a validator) and CommonMark."""
    if isinstance(value, list):
        return [tidy(item) for item in value]
    if not isinstance(value, dict):
        return value
    names = {"ge": "minimum", "le": "maximum"}
    schema = {names.get(name, name): tidy(item) for name, item in value.items()}
    if isinstance(schema.get("description"), str):
        schema["description"] = plain(schema["description"])
    return schema


def without_null(schema: Json) -> Json:
    """``anyOf: [X, null]`` → ``X``."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind.get("type") != "null"]
    if len(kinds) != 1:
        return schema
    kind: Json = kinds[0]
    return {name: value for name, value in schema.items() if name != "anyOf"} | kind


def _require_what_is_always_there(schema: Json) -> None:
    """In an answer, a default of null means "may be left out, is never null"; any other field is always there."""
    fields, required = schema.get("properties", {}), schema.setdefault("required", [])
    for name, field in fields.items():
        if name in required:
            continue
        if field.pop("default", ...) is None:
            fields[name] = without_null(field)
        else:
            required.append(name)
    if not required:
        del schema["required"]
