"""From decoded JSON to the records of this client."""

from dataclasses import MISSING, fields
from functools import cache
from typing import Any, TypeVar, get_origin, get_type_hints

from context_server.client.errors import UnexpectedAnswer
from context_server.client.records import Chunk, Page

Record = TypeVar("Record")


@cache
def _shape(cls: Any) -> tuple[tuple[str, ...], dict[str, type]]:
    """The names of all fields, and the type of each that must be there."""
    hints = get_type_hints(cls)
    needed = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
    return tuple(f.name for f in fields(cls)), {name: get_origin(hints[name]) or hints[name] for name in needed}


def parse(cls: type[Record], data: Any) -> Record:
    """A record from decoded JSON.

    Raises:
        UnexpectedAnswer: it is no object, or a key that must be there is missing or of another type.
    """
    given = data if isinstance(data, dict) else {}
    shaped: Any = cls
    names, required = _shape(shaped)
    for name, kind in required.items():
        if not isinstance(given.get(name), kind):
            raise UnexpectedAnswer(f"the answer is not a {cls.__name__}: {name!r} is missing or wrong")
    return cls(**{name: given[name] for name in names if given.get(name) is not None})


def parse_items(cls: type[Record], data: Any) -> list[Record]:
    """The records of a list, ``{"items": […]}``.

    Raises:
        UnexpectedAnswer: it is none, or one of them is not.
    """
    items = data.get("items") if isinstance(data, dict) else None
    if not isinstance(items, list):
        raise UnexpectedAnswer("the answer is not a list: 'items' is missing or wrong")
    return [parse(cls, item) for item in items]


def parse_page(data: Any, held: int) -> Page:
    """The page of a pull after ``held``, by chunks where the answer has them.

    Raises:
        UnexpectedAnswer: it is none, it goes back, or its chunks are not exactly those after ``held``.
    """
    listed = data.get("chunks") if isinstance(data, dict) else None
    if listed is not None:
        chunks = [parse(Chunk, each) for each in listed] if isinstance(listed, list) else []
        content = "".join(chunk.text or "" for chunk in chunks if chunk.kind == "text")
        data = data | {"chunks": tuple(chunks), "content": content}
    page = parse(Page, data)
    if page.sequence < held:
        raise UnexpectedAnswer(f"a pull after sequence {held} was answered up to {page.sequence}")
    sequences = [chunk.sequence for chunk in page.chunks]
    if listed is not None and sequences != list(range(held + 1, page.sequence + 1)):
        raise UnexpectedAnswer(f"a pull after sequence {held} up to {page.sequence} was answered by other chunks")
    return page
