"""What a reply has taken from its model; where the provider counts nothing, an estimate that says so."""

from collections.abc import Iterable

from pydantic_ai.messages import ModelMessage, ModelResponse, TextPart, ThinkingPart, ToolCallPart, ToolReturnPart
from pydantic_ai.usage import RunUsage

from context_server.records import Usage

CHARACTERS_PER_TOKEN = 4
"""English text, roughly, with the tokenizers in use."""


class Spending:
    """Counts over one attempt. Without an exact count the characters that went either way stand in for it."""

    def __init__(self) -> None:
        self._unmeasured_input = 0
        self._unmeasured_output = 0
        self._asked_characters = 0
        self.answered_characters = 0
        """What the model has said in the request that is under way."""

    def ask(self, messages: Iterable[ModelMessage]) -> None:
        """A request with these messages begins."""
        self._asked_characters = sum(map(_characters_of, messages))
        self.answered_characters = 0

    def under_way(self, counted: RunUsage) -> Usage:
        """An estimate in the middle of a request."""
        return self._usage(counted, *self._guess(), requests=1)

    def turned_down(self, counted: RunUsage) -> Usage:
        """After a request that brought no answer: it was made, and took no tokens that anybody knows of."""
        return self._usage(counted, 0, 0, requests=1)

    def answered(self, counted: RunUsage, response: ModelResponse) -> Usage:
        """What was taken once a response is whole."""
        if not response.usage.has_values():
            self.answered_characters = _characters_of(response)
            asked, answered = self._guess()
            self._unmeasured_input += asked
            self._unmeasured_output += answered
        return self.so_far(counted)

    def so_far(self, counted: RunUsage) -> Usage:
        """What was taken, between two requests."""
        return self._usage(counted, 0, 0, requests=0)

    def _guess(self) -> tuple[int, int]:
        return _tokens(self._asked_characters), _tokens(self.answered_characters)

    def _usage(self, counted: RunUsage, asked: int, answered: int, *, requests: int) -> Usage:
        unmeasured_input = self._unmeasured_input + asked
        unmeasured_output = self._unmeasured_output + answered
        return Usage(
            input_tokens=counted.input_tokens + unmeasured_input,
            output_tokens=counted.output_tokens + unmeasured_output,
            requests=counted.requests + requests,
            tool_calls=counted.tool_calls,
            estimated=unmeasured_input + unmeasured_output > 0,
        )


def _tokens(characters: int) -> int:
    return -(-characters // CHARACTERS_PER_TOKEN)


def _characters_of(message: ModelMessage) -> int:
    """The text of a message; files count nothing, since what they cost differs too much."""
    found = len(getattr(message, "instructions", None) or "")
    for part in message.parts:
        match part:
            case TextPart() | ThinkingPart():
                found += len(part.content)
            case ToolCallPart():
                found += len(part.tool_name) + len(part.args_as_json_str())
            case ToolReturnPart():
                found += len(part.model_response_str())
            case _:
                content = getattr(part, "content", "")
                pieces = [content] if isinstance(content, str) else content if isinstance(content, list) else []
                found += sum(len(piece) for piece in pieces if isinstance(piece, str))
    return found
