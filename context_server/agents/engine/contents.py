"""What a person's message holds, as the library takes it: its text, its files, the workflow that it started."""

import json
from collections.abc import Awaitable, Callable

from pydantic_ai.messages import BinaryContent, UserContent, UserPromptPart

from context_server.records import FileRef, Turn

ReadFile = Callable[[str], Awaitable[bytes]]

NO_TEXT = "[a message without text]"
_TEXTUAL = frozenset(("application/json", "application/xml", "application/yaml", "application/toml"))
_BINARY = ("image/", "audio/", "video/", "application/pdf")


async def prompt_of(turn: Turn, read_file: ReadFile) -> UserPromptPart:
    """The message as a part of a request, never empty."""
    contents = await contents_of(turn, read_file)
    return UserPromptPart(contents[0] if len(contents) == 1 and isinstance(contents[0], str) else contents)


async def contents_of(turn: Turn, read_file: ReadFile) -> list[UserContent]:
    """The text first, then each file; a file that was deleted is a note that says so."""
    found: list[UserContent] = [turn.text] if turn.text else []
    if turn.workflow is not None:
        given = json.dumps(turn.workflow.input, ensure_ascii=False)
        found.append(f"[the workflow {turn.workflow.name} was started with {given}]")
    found += [await _content_of(file, read_file) for file in turn.files]
    return found or [NO_TEXT]


async def _content_of(file: FileRef, read_file: ReadFile) -> UserContent:
    is_textual = file.media_type.startswith("text/") or file.media_type in _TEXTUAL
    if not is_textual and not file.media_type.startswith(_BINARY):
        return f"[the file {file.name} is of the type {file.media_type}, which no model reads]"
    try:
        content = await read_file(file.id)
    except FileNotFoundError:
        return f"[the file {file.name} was deleted]"
    if is_textual:
        return f"[the file {file.name}]\n{content.decode(errors='replace')}"
    return BinaryContent(content, media_type=file.media_type, identifier=file.id)
