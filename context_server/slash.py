"""Slash commands: what a person types to the server and not to the agent, such as ``/help``. Answered at once.

A package of a user's adds its own by an entry point of the group ``context_server.commands``: its name is that of the
command, and it names an ``async def command(call: Call) -> Answer``, whose docstring's first line is its help.
"""

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import entry_points
from typing import Any

import structlog

from context_server.commands import Commands
from context_server.errors import ContextServerError, without_words
from context_server.records import Mode, now
from context_server.store import Store

log = structlog.get_logger("context_server.slash")

GROUP = "context_server.commands"
_COMMAND = re.compile(r"/([a-z][a-z0-9_-]{0,39})(?:\s+(.*))?", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What everybody may know of the server; ``settings`` are those that hold no secret."""

    version: str
    agent: str
    model: str
    models: tuple[str, ...]
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A command that somebody gave, and what it may be carried out with; ``context_id`` is None outside of one."""

    name: str
    args: tuple[str, ...]
    owner: str
    context_id: str | None
    facts: Facts
    store: Store
    commands: Commands
    slash: "SlashCommands"

    def the_context(self) -> str:
        """The context that the command is about.

        Raises:
            Refusal: it was given outside of one.
        """
        if self.context_id is None:
            raise Refusal(f"/{self.name} is about a context: give its context_id, or type it in one.")
        return self.context_id


class Refusal(Exception):
    """A command that cannot be carried out; the text says what was wrong and what is allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a command answers: a line for people, and data for programs."""

    message: str
    data: Mapping[str, Any] = field(default_factory=dict)
    is_error: bool = False


SlashCommand = Callable[[Call], Awaitable[Answer]]


def parse(text: str) -> tuple[str, tuple[str, ...]] | None:
    """``/mode plan`` → ``("mode", ("plan",))``; None where the text is no command, as a path or ``//`` is none."""
    match = _COMMAND.fullmatch(text.strip())
    return None if match is None else (match[1], tuple((match[2] or "").split()))


class SlashCommands:
    """The commands that there are, by name."""

    def __init__(self, store: Store, commands: Commands, facts: Facts) -> None:
        self._store = store
        self._commands = commands
        self.facts = facts
        self.known: dict[str, SlashCommand] = BUILT_IN | _installed()

    def find(self, text: str) -> tuple[str, tuple[str, ...]] | None:
        """The name and the arguments of the command that a message is; None where it is none that there is."""
        parsed = parse(text)
        return parsed if parsed is not None and parsed[0] in self.known else None

    def unescaped(self, text: str) -> str:
        """What a message says: ``//help`` → ``/help``; any other as it is, also ``//`` before what is no command."""
        return text[1:] if text.startswith("//") and self.find(text[1:]) is not None else text

    async def execute(self, owner: str, context_id: str | None, name: str, args: tuple[str, ...]) -> Answer:
        """Carries a command out; whatever goes wrong with it is in the answer."""
        command = self.known.get(name)
        if command is None:
            known = ", ".join(f"/{each}" for each in sorted(self.known))
            return Answer(message=f"There is no command /{name}. There are: {known}.", is_error=True)
        call = Call(
            name=name,
            args=args,
            owner=owner,
            context_id=context_id,
            facts=self.facts,
            store=self._store,
            commands=self._commands,
            slash=self,
        )
        if args and command in _WITHOUT_ARGUMENTS:
            message = f"/{name} takes nothing behind it. To say it to the agent, begin with //."
            return Answer(message=message, is_error=True)
        try:
            return await command(call)
        except Refusal as error:
            return Answer(message=str(error), is_error=True)
        except ContextServerError as error:
            return Answer(message=str(error), data={"code": error.code}, is_error=True)
        except Exception as error:
            log.error("command_failed", command=name, **without_words(error))  # noqa: TRY400  # no message
            return Answer(message=f"/{name} failed; the log says where.", is_error=True)


def _installed() -> dict[str, SlashCommand]:
    """The commands of installed packages; one that cannot be loaded is said and left out."""
    found: dict[str, SlashCommand] = {}
    for point in entry_points(group=GROUP):
        try:
            found[point.name] = point.load()
        except Exception as error:
            log.error("command_not_loaded", command=point.name, **without_words(error))  # noqa: TRY400
    return found


async def _help(call: Call) -> Answer:
    """Lists the commands."""
    lines = {f"/{name}": _first_line(command) for name, command in sorted(call.slash.known.items())}
    return Answer(message="\n".join(f"{name}  {line}" for name, line in lines.items()), data={"commands": lines})


def _first_line(command: SlashCommand) -> str:
    return (command.__doc__ or "").strip().partition("\n")[0]


async def _ping(_call: Call) -> Answer:
    """Says that the server answers."""
    return Answer(message="pong", data={"timestamp": now().isoformat(timespec="milliseconds")})


async def _config(call: Call) -> Answer:
    """Shows how the server is set up; never a secret."""
    facts = call.facts
    data = {
        "version": facts.version,
        "agent": facts.agent,
        "model": facts.model or None,
        "models": list(facts.models),
        "settings": dict(facts.settings),
    }
    return Answer(message=f"context-server {facts.version}, agent {facts.agent}", data=data)


async def _identity(call: Call) -> Answer:
    """Says as whom the server knows you."""
    return Answer(message=f"You are {call.owner}.", data={"owner": call.owner})


async def _clear(call: Call) -> Answer:
    """Begins afresh in this context; what was said before is kept as a branch."""
    context_id = call.the_context()
    context = await call.commands.change_context(call.owner, context_id, {"head_message_id": None}, if_match=None)
    return Answer(message="A fresh start; the history is kept.", data={"version": context.version})


async def _mode(call: Call) -> Answer:
    """Shows the mode of this context, or sets it: /mode plan, /mode act."""
    context_id = call.the_context()
    if not call.args:
        context = await call.store.context(call.owner, context_id)
        return Answer(message=f"The mode is {context.mode}.", data={"mode": context.mode})
    if call.args[0] not in list(Mode) or len(call.args) > 1:
        raise Refusal(f"/mode takes one of: {', '.join(Mode)}.")
    mode = Mode(call.args[0])
    await call.commands.change_context(call.owner, context_id, {"mode": mode}, if_match=None)
    return Answer(message=f"The mode is {mode}, from the next step on.", data={"mode": mode})


async def _model(call: Call) -> Answer:
    """Shows the model of this context, or sets it: /model NAME."""
    context_id, facts = call.the_context(), call.facts
    if not call.args:
        model = (await call.store.context(call.owner, context_id)).model or facts.model
        data = {"model": model or None, "models": list(facts.models)}
        return Answer(message=f"The model is {model}." if model else "The agent has its own model.", data=data)
    name = call.args[0]
    if name not in facts.models or len(call.args) > 1:
        known = ", ".join(facts.models) or "none (the setting models lists them)"
        raise Refusal(f"/model takes one of: {known}.")
    await call.commands.change_context(call.owner, context_id, {"model": name}, if_match=None)
    return Answer(message=f"The model is {name}, from the next message on.", data={"model": name})


async def _usage(call: Call) -> Answer:
    """Shows what this context has used, or outside of one all of yours."""
    used, replies = await call.store.usage(call.owner, call.context_id)
    about = "about " if used.estimated else ""
    message = f"{about}{used.input_tokens} tokens in, {used.output_tokens} out, in {replies} replies"
    return Answer(message=message, data={**asdict(used), "replies": replies})


_WITHOUT_ARGUMENTS: frozenset[SlashCommand] = frozenset({_help, _ping, _config, _identity, _clear, _usage})
BUILT_IN: dict[str, SlashCommand] = {
    "help": _help,
    "ping": _ping,
    "config": _config,
    "clear": _clear,
    "mode": _mode,
    "model": _model,
    "usage": _usage,
    "identity": _identity,
}
