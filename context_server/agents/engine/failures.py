"""What goes wrong with models, as the codes that clients are told; and when it is worth another try.

| code | the model's server |
|---|---|
| ``model-rate-limited`` | asked to wait (429) |
| ``model-unavailable`` | cannot be reached, or failed (5xx) |
| ``model-rejected`` | refused the request: credentials, quota, length, content |
| ``model-unknown`` | does not have the model (404) |
| ``model-malformed`` | answered with what is no answer |
| ``model-cut`` | stopped in the middle of the answer |

Details name no more than the kind: what a server says may repeat what was said.
"""

import json
import random
from dataclasses import dataclass

from pydantic import ValidationError
from pydantic_ai import exceptions
from pydantic_ai.messages import ModelResponse

from context_server.agents.protocol import AgentFailed

RATE_LIMITED = "model-rate-limited"
UNAVAILABLE = "model-unavailable"
REJECTED = "model-rejected"
UNKNOWN = "model-unknown"
MALFORMED = "model-malformed"
CUT = "model-cut"

_PASSING = frozenset((RATE_LIMITED, UNAVAILABLE, MALFORMED, CUT))
"""What another try may mend."""
_SERVER_ERRORS = 500

_ADAPTERS = (
    "pydantic_ai.models.",
    "pydantic_ai._parts_manager",
    "openai.",
    "anthropic.",
    "google.",
    "groq.",
    "mistralai.",
)
"""Where code that reads rubbish stumbles over it."""

_KINDS: tuple[tuple[type[Exception], str, str], ...] = (
    (exceptions.ModelRateLimitError, RATE_LIMITED, "The model's server takes no more requests for now."),
    (exceptions.ModelQuotaExceededError, REJECTED, "The quota of the account with the model's provider is used up."),
    (exceptions.ModelUnavailableError, UNAVAILABLE, "The model's server is not available."),
    (exceptions.ModelServerError, UNAVAILABLE, "The model's server failed."),
    (exceptions.ModelTimeoutError, UNAVAILABLE, "The model's server did not answer in time."),
    (exceptions.ModelRequestTimeout, UNAVAILABLE, "The model's server did not answer in time."),
    (exceptions.ModelConnectionError, UNAVAILABLE, "The model's server cannot be reached."),
    (exceptions.ModelAuthenticationError, REJECTED, "The model's server refused the credentials."),
    (exceptions.ModelNotFoundError, UNKNOWN, "The model's server does not have this model."),
    (exceptions.ModelContextWindowExceededError, REJECTED, "The conversation is longer than the model can read."),
    (exceptions.ModelRequestRejectedError, REJECTED, "The model's server refused the request."),
    (exceptions.ContentFilterError, REJECTED, "The model's provider refused to answer."),
    (exceptions.OutputTokenLimitExceeded, CUT, "The model reached its limit of tokens before it had answered."),
    (exceptions.UnexpectedModelBehavior, MALFORMED, "The model did not answer in a way that can be used."),
)
"""The most specific first."""


class ModelFailed(AgentFailed):
    """A model's failure; ``retry_after_seconds`` is what its server asked for, if it did."""

    def __init__(self, code: str, detail: str, retry_after_seconds: float | None = None) -> None:
        super().__init__(code, detail)
        self.retry_after_seconds = retry_after_seconds

    @property
    def is_passing(self) -> bool:
        """Whether another try may succeed."""
        return self.code in _PASSING


def failure_of(error: Exception, *, begun: bool) -> ModelFailed | None:
    """What to tell of a failed request to a model; None where the failure is not the model's.

    ``begun`` says that a part of the answer had arrived: a connection that ends then has cut it.
    """
    if begun and isinstance(error, exceptions.ModelConnectionError):
        return ModelFailed(CUT, "The connection to the model's server ended in the middle of the answer.")
    retry_after = getattr(error, "retry_after", None)
    for kind, code, detail in _KINDS:
        if isinstance(error, kind):
            return ModelFailed(code, detail, retry_after)
    match error:
        case exceptions.ModelHTTPError():
            is_down = error.status_code >= _SERVER_ERRORS
            detail = f"The model's server answered with status {error.status_code}."
            return ModelFailed(UNAVAILABLE if is_down else REJECTED, detail, retry_after)
        case exceptions.ModelAPIError(in_stream=True):
            return ModelFailed(UNAVAILABLE, "The model's server reported an error.", retry_after)
        case exceptions.ModelAPIError() | ValidationError() | json.JSONDecodeError() | UnicodeDecodeError():
            return ModelFailed(MALFORMED, "The model's server answered with what is no answer.")
        case exceptions.UserError() | NotImplementedError() if _is_of_an_adapter(error):
            return ModelFailed(REJECTED, "The model does not take what this conversation holds.")
        case AttributeError() | LookupError() | TypeError() | ValueError() if _is_of_an_adapter(error):
            return ModelFailed(MALFORMED, "The model's server answered with what is no answer.")
        case _:
            return None


def _is_of_an_adapter(error: Exception) -> bool:
    """Whether it was raised where the library or a provider's SDK reads answers, and not by an agent's own code."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__", ""))
    return place.startswith(_ADAPTERS)


def cut_short(response: ModelResponse, *, assumes_stop: bool) -> ModelFailed | None:
    """A failure where a provider's answer has ended without saying why it ended.

    ``assumes_stop`` says that the library takes a missing reason for ``stop``; then the details have none either.
    """
    if response.provider_url is None:
        return None  # A model without a server, such as a function, gives no reasons.
    details = response.provider_details or {}
    assumed = assumes_stop and response.finish_reason == "stop" and "finish_reason" not in details
    if response.finish_reason is None or assumed:
        return ModelFailed(CUT, "The answer of the model ended in the middle.")
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrying:
    """How often a request is sent again, and when: after a random part of a growing time, as AWS's "full jitter"."""

    retries: int = 2
    first_pause_seconds: float = 0.5
    longest_pause_seconds: float = 8.0
    longest_asked_pause_seconds: float = 30.0
    """A server that asks for more than this is not waited for."""

    def pause_seconds(self, failure: ModelFailed, retried: int) -> float | None:
        """How long to wait before the next try, after ``retried`` retries; None: there is none."""
        asked = failure.retry_after_seconds or 0.0
        if not failure.is_passing or retried >= self.retries or asked > self.longest_asked_pause_seconds:
            return None
        longest = min(self.longest_pause_seconds, self.first_pause_seconds * 2**retried)
        return asked + random.uniform(0, longest)  # noqa: S311  # Spreads requests; guards nothing.
