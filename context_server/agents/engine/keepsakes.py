"""What a provider wants back with its own words: signatures of reasoning, ids, and details it cannot do without.

It is kept in the ``step`` chunk that ends a step, since the text itself is in the log already: a layout of the response
that says how many characters each of its parts has. A step that was cut has none; then its reasoning is left out.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic_ai.messages import ModelResponse, ModelResponsePart, TextPart, ThinkingPart, ToolCallPart
from pydantic_core import to_jsonable_python

from context_server.agents.engine.steps import LoggedStep


def keepsake_of(response: ModelResponse) -> dict[str, Any] | None:
    """``{"name": "anthropic", "parts": [{"kind": "thinking", "characters": 80, "signature": "…"}, …]}``.

    None where the response can be put together again without.
    """
    entries = [entry for part in response.parts if (entry := _entry(part)) is not None]
    if all(entry.keys() <= {"kind", "characters", "call"} for entry in entries):
        return None
    return {"name": response.provider_name, "parts": entries}


def _entry(part: ModelResponsePart) -> dict[str, Any] | None:
    match part:
        case ThinkingPart():
            kept = {"signature": part.signature, "id": part.id, "details": part.provider_details}
            entry: dict[str, Any] = {"kind": "thinking", "characters": len(part.content)}
        case TextPart():
            signed = (part.provider_details or {}).get("thought_signature")
            kept = {"details": {"thought_signature": signed} if signed else None}
            entry = {"kind": "text", "characters": len(part.content)}
        case ToolCallPart():
            kept = {"details": part.provider_details}
            entry = {"kind": "call", "call": part.tool_call_id}
        case _:
            return None
    return entry | {key: to_jsonable_python(value) for key, value in kept.items() if value}


def parts_of(
    step: LoggedStep, calls: Sequence[ToolCallPart], provider: str | None, *, is_own: bool
) -> list[ModelResponsePart]:
    """The response that a step is in the log; ``calls`` are its calls, as the library takes them.

    Reasoning is among it where the same provider wants it back: what bears a signature always, the rest only within
    the reply that is being written (``is_own``).
    """
    plain: list[ModelResponsePart] = [TextPart(step.text)] if step.text else []
    plain += calls
    kept = step.provider
    if kept is None or not isinstance(kept.get("name"), str) or (provider is not None and kept["name"] != provider):
        return plain
    entries = [entry for entry in kept.get("parts", ()) if isinstance(entry, Mapping)]
    if not _fits(entries, step, calls):
        return plain
    return _laid_out(entries, step, calls, kept["name"], is_own=is_own)


def _fits(entries: list[Mapping[str, Any]], step: LoggedStep, calls: Sequence[ToolCallPart]) -> bool:
    """Whether the layout is of exactly what the log holds."""
    lengths = {"thinking": 0, "text": 0}
    for entry in entries:
        kind, characters = entry.get("kind"), entry.get("characters")
        if kind in lengths and type(characters) is int:
            lengths[kind] += characters
        elif kind != "call":
            return False
    named = [entry.get("call") for entry in entries if entry.get("kind") == "call"]
    return (
        lengths == {"thinking": len(step.reasoning), "text": len(step.text)}
        and len(calls) == len(step.calls) == len(named)
        and sorted(map(str, named)) == sorted(call.id for call in step.calls)
    )


def _laid_out(
    entries: list[Mapping[str, Any]], step: LoggedStep, calls: Sequence[ToolCallPart], provider: str, *, is_own: bool
) -> list[ModelResponsePart]:
    found: list[ModelResponsePart] = []
    by_id = {logged.id: call for logged, call in zip(step.calls, calls, strict=True)}
    reasoned = said = 0
    for entry in entries:
        details = entry.get("details")
        match entry["kind"]:
            case "thinking":
                content = step.reasoning[reasoned : reasoned + entry["characters"]]
                reasoned += len(content)
                if is_own or entry.get("signature") or details:
                    part = ThinkingPart(content, provider_name=provider, provider_details=details)
                    part.signature, part.id = entry.get("signature"), entry.get("id")
                    found.append(part)
            case "text":
                content = step.text[said : said + entry["characters"]]
                said += len(content)
                if content or details:
                    name = provider if details else None
                    found.append(TextPart(content, provider_name=name, provider_details=details))
            case "call":
                call = by_id[entry["call"]]
                if details:
                    call.provider_name, call.provider_details = provider, details
                found.append(call)
    return found
