"""How tools, steps and endings are put into words: each on one line, and nothing in them can steer a terminal."""

import json
from collections.abc import Mapping
from typing import Any

from context_server.client import MessageInfo

MAX_LINE = 200
"""Characters of a line about a tool. All of it is in the log."""

# What an agent wrote must not steer the terminal: control characters are shown as U+FFFD.
_CONTROLS = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0)], "\N{REPLACEMENT CHARACTER}")
_HARMLESS = str.maketrans(_CONTROLS | {ord("\n"): "\n", ord("\t"): "    ", ord("\r"): None})


def harmless(text: str) -> str:
    """``text`` without anything that a terminal obeys, but for line ends."""
    return text.translate(_HARMLESS)


def exact(value: Any, indent: int | None = None) -> str:
    r"""``value`` as JSON to decide on: what cannot be seen is escaped, so that nothing looks like something else.

    U+202E, which turns the text behind it around, is ``\u202e``.
    """
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return "".join(each if each.isprintable() or each == "\n" else json.dumps(each)[1:-1] for each in text)


def short(text: str, at_most: int = MAX_LINE) -> str:
    """The beginning of ``text`` on one line."""
    line = "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in " ".join(text.split()))
    return line if len(line) <= at_most else line[: at_most - 1] + "…"


def call_line(name: str, arguments: Any) -> str:
    """``send_mail(to="ann", text="Hi")``."""
    if isinstance(arguments, Mapping):
        shown = ", ".join(f"{key}={exact(value)}" for key, value in arguments.items())
    else:
        shown = "" if arguments is None else str(arguments)
    return short(f"{name}({shown})")


def result_line(name: str, data: Mapping[str, Any]) -> str:
    """``✓ send_mail: sent (0.2 s)``, or ``✗ send_mail: denied: not now``."""
    status, result, seconds = data.get("status", "ok"), data.get("result"), data.get("seconds")
    words = [name] if status == "ok" else [name, str(status)]
    if result not in (None, ""):
        words.append(result if isinstance(result, str) else exact(result))
    took = f" ({seconds:.1f} s)" if isinstance(seconds, int | float) and seconds >= 0.1 else ""
    mark = "✓" if status == "ok" else "✗"
    return f"{mark} {short(': '.join(words), MAX_LINE - len(took))}{took}"


def step_line(data: Mapping[str, Any]) -> str | None:
    """``step 2 of 5``, with its name where it has one; None where it is no step that begins."""
    number, total, name = data.get("number"), data.get("total"), data.get("name")
    if not isinstance(number, int) or data.get("status") in ("finished", "completed"):
        return None
    line = f"step {number}" + (f" of {total}" if isinstance(total, int) else "")
    return short(f"{line}: {name}") if isinstance(name, str) and name else line


def error_line(data: Mapping[str, Any]) -> str:
    """What an agent reports as failed, and goes on after."""
    told = next((data[key] for key in ("detail", "message", "code") if isinstance(data.get(key), str)), exact(data))
    return f"✗ {short(told)}"


def ending(message: MessageInfo) -> str | None:
    """What is to be said about how a reply has ended; None when it is whole."""
    code = str((message.error or {}).get("code", "unknown"))
    if message.status == "cancelled":
        return "(cancelled: nobody decided in time)" if code == "approval-expired" else "(cancelled)"
    return f"(the reply failed: {short(code)}; what was written is kept)" if message.status == "failed" else None


def usage_line(usage: Mapping[str, Any]) -> str:
    """``about 120 tokens in, 40 out, 2 requests, 1 tool calls``."""
    about = "about " if usage.get("estimated") else ""
    counts = {key: usage.get(key) or 0 for key in ("input_tokens", "output_tokens", "requests", "tool_calls")}
    return about + "{input_tokens} tokens in, {output_tokens} out, {requests} requests, {tool_calls} tool calls".format(
        **counts
    )
