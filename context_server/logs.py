"""Structured logs: ids, states, sizes, durations; never a word of what was said, and no query string."""

import logging
import sys
from typing import Literal

import structlog

from context_server.errors import without_words


def configure_logs(log_format: Literal["console", "json"], level: str, worker: int | None = None) -> None:
    """Sends our logs and the libraries' to standard error, as lines for people or as JSON; each names ``worker``."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        *([] if worker is None else [_naming(worker)]),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _without_words,
    ]
    renderer: structlog.typing.Processor
    if log_format == "json":
        renderer = structlog.processors.JSONRenderer()
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer]
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.getLogger("context_server").setLevel(level.upper())
    # At DEBUG these libraries write what passes through them; at INFO they report what we report.
    for name in ("sse_starlette", "uvicorn", "uvicorn.error", "sqlalchemy", "asyncio", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # What passes through these was said, or says where models are; their failures reach us as errors.
    for name in ("anthropic", "fastmcp", "httpcore", "httpcore2", "httpx", "httpx2", "mcp", "openai", "pydantic_ai"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _naming(worker: int) -> structlog.typing.Processor:
    """Puts the worker's number into every line, from whichever thread."""

    def name(
        _logger: structlog.typing.WrappedLogger, _method: str, event: structlog.typing.EventDict
    ) -> structlog.typing.EventDict:
        event["worker"] = worker
        return event

    return name


def _without_words(
    _logger: structlog.typing.WrappedLogger, _method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """Keeps of an exception its type and its stack."""
    error = event.pop("exc_info", None)
    if error is True:
        error = sys.exc_info()
    if isinstance(error, tuple):
        error = error[1]
    if isinstance(error, BaseException):
        event.update(without_words(error))
    if event.get("logger") == "asyncio":
        # "Exception in callback f(<arguments>)", then lines with a task and its exception as Python shows them.
        event["event"] = str(event["event"]).partition("\n")[0].partition("(")[0]
    return event
