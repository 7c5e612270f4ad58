"""What a person types to the chat and not to the agent. A command that is not here is one of the server's."""

import re
from collections.abc import Awaitable, Callable
from pathlib import Path

from context_server.chat.asking import Leaving
from context_server.chat.branches import Branch, branches_of
from context_server.chat.conversation import Conversation
from context_server.chat.wording import short, usage_line
from context_server.client import CommandAnswer, MessageInfo

COMMAND = re.compile(r"(?P<name>/[a-z][a-z0-9_-]*)(?:\s+(?P<argument>.*))?", re.DOTALL)
NOT_ONE = "is no command; /help lists them, and // before a text sends it with one slash."
TITLE_CHARACTERS = 60


async def obey(conversation: Conversation, line: str) -> None:
    """Does what a line that begins with a slash says.

    Raises:
        Leaving: it was /quit.
    """
    found = COMMAND.fullmatch(line)
    if found is None:
        conversation.display.notice(f"{short(line.split()[0])} {NOT_ONE}")
        return
    argument = (found["argument"] or "").strip()
    ours = COMMANDS.get(found["name"])
    if ours is not None:
        await ours[0](conversation, argument)
    else:
        show_answer(conversation, await conversation.client.execute(line, context_id=conversation.context_id))


def show_answer(conversation: Conversation, answer: CommandAnswer) -> None:
    """What the server says to a command of its own."""
    conversation.display.notice(answer.message)


async def unescaped(conversation: Conversation, line: str) -> str:
    """What is to be posted for ``//text``: one slash less, which the server itself takes from a command of its own."""
    found = COMMAND.fullmatch(line[1:])
    is_known = found is not None and found["name"] in await _commands_of_the_server(conversation)
    return line if is_known else line[1:]


async def _commands_of_the_server(conversation: Conversation) -> dict[str, str]:
    listed = (await conversation.client.execute("/help")).data.get("commands")
    return listed if isinstance(listed, dict) else {}


async def _help(conversation: Conversation, _argument: str) -> None:
    mine = "\n".join(f"{name:<12} {text}" for name, (_, text) in COMMANDS.items() if text)
    theirs = (await _commands_of_the_server(conversation)).items()
    served = "\n".join(f"{name:<12} {text}" for name, text in theirs if name not in COMMANDS)
    conversation.display.notice(
        f"{mine}\n//text       send a message that begins with a slash\n"
        "Ctrl-C while a reply is being written cancels the reply.\n"
        f"Of the server:\n{served}"
    )


async def _quit(_conversation: Conversation, _argument: str) -> None:
    raise Leaving(0)


async def _new(conversation: Conversation, _argument: str) -> None:
    conversation.enter((await conversation.client.create_context()).id)


async def _cancel(conversation: Conversation, _argument: str) -> None:
    await conversation.cancel()
    state = (await conversation.client.get_context(conversation.context_id)).state
    conversation.display.notice(f"The context is {state}.")


async def _regenerate(conversation: Conversation, _argument: str) -> None:
    reply = await _last(conversation, "assistant")
    if reply is None:
        conversation.display.notice("There is no reply yet.")
        return
    await conversation.exchange(lambda: conversation.client.regenerate(conversation.context_id, reply.id))


async def _edit(conversation: Conversation, argument: str) -> None:
    message = await _last(conversation, "user")
    if message is None:
        conversation.display.notice("There is no message yet.")
        return
    text: str | None = argument
    if not text:
        if not conversation.keyboard.interactive:
            conversation.display.notice("Say what it should have been: /edit TEXT")
            return
        text = await conversation.keyboard.line(prefill=message.content or "")
        if text is None:
            raise Leaving(0)
    if text.strip():
        kept = [str(file["id"]) for file in (message.payload or {}).get("files") or ()]
        await conversation.talk(text.strip(), parent_id=message.parent_id, files=kept)


async def _fork(conversation: Conversation, _argument: str) -> None:
    context = await conversation.client.get_context(conversation.context_id)
    if context.head_message_id is None:
        conversation.display.notice("There is nothing to fork yet.")
        return
    fork = await conversation.client.fork(conversation.context_id, context.head_message_id)
    conversation.display.notice("What was said is there too; the other conversation stays as it is.")
    conversation.enter(fork.id)


async def _branch(conversation: Conversation, argument: str) -> None:
    client, context_id = conversation.client, conversation.context_id
    line = await client.list_messages(context_id, include_content=False)
    branches = branches_of(line, await client.list_messages(context_id, tree=True))
    if not argument:
        conversation.display.notice("\n".join(map(_listed, range(1, len(branches) + 1), branches)) or "One line only.")
        return
    if not argument.isdecimal() or not 1 <= int(argument) <= len(branches):
        conversation.display.notice("/branch lists the branches by number, and /branch NUMBER goes to one.")
        return
    chosen = branches[int(argument) - 1]
    await client.move_head(context_id, chosen.tip_id)
    await conversation.show_history(from_message_id=chosen.message.id)


def _listed(number: int, branch: Branch) -> str:
    mark = "*" if branch.is_current else " "
    said = "" if branch.message.role == "user" else "reply: "
    return f"{mark} {number}  {said}{short(branch.message.content or '', TITLE_CHARACTERS)}"


async def _queue(conversation: Conversation, argument: str) -> None:
    if argument:
        await conversation.talk(argument, if_busy="queue")
        return
    waiting = await conversation.client.queue(conversation.context_id)
    lines = [
        f"{number}  {short(str(each.payload.get('content') or each.payload.get('name') or ''), TITLE_CHARACTERS)}"
        for number, each in enumerate(waiting, start=1)
    ]
    conversation.display.notice("\n".join(lines) or "Nothing waits.")


async def _unqueue(conversation: Conversation, argument: str) -> None:
    waiting = await conversation.client.queue(conversation.context_id)
    if not argument.isdecimal() or not 1 <= int(argument) <= len(waiting):
        conversation.display.notice("/queue lists what waits by number, and /unqueue NUMBER takes one back.")
        return
    await conversation.client.take_back(conversation.context_id, waiting[int(argument) - 1].message_id)
    conversation.display.notice("Taken back.")


async def _file(conversation: Conversation, argument: str) -> None:
    if not argument:
        conversation.display.notice("Say which: /file PATH")
        return
    try:
        path = Path(argument).expanduser()  # noqa: ASYNC240 - no file is touched
        file = await conversation.client.upload(path)
    except (OSError, RuntimeError) as error:
        conversation.display.notice(f"Not read: {getattr(error, 'strerror', None) or error}")
        return
    conversation.attach(file.id)
    conversation.display.notice(
        f"{short(file.name)} ({file.media_type}, {file.size_bytes} bytes) goes with your next message."
    )


async def _reasoning(conversation: Conversation, argument: str) -> None:
    if argument in ("on", "off"):
        conversation.shows_reasoning = argument == "on"
    conversation.display.notice(
        f"Reasoning is {'shown' if conversation.shows_reasoning else 'folded'}; /reasoning on|off."
    )


async def _usage(conversation: Conversation, _argument: str) -> None:
    reply = await _last(conversation, "assistant")
    if reply is not None and reply.usage:
        conversation.display.notice(f"The last reply: {usage_line(reply.usage)}.")
    show_answer(conversation, await conversation.client.execute("/usage", context_id=conversation.context_id))


async def _last(conversation: Conversation, role: str) -> MessageInfo | None:
    """The newest message of the line by that author."""
    line = await conversation.client.list_messages(conversation.context_id)
    return next((message for message in reversed(line) if message.role == role), None)


COMMANDS: dict[str, tuple[Callable[[Conversation, str], Awaitable[None]], str]] = {
    "/new": (_new, "begin a new context"),
    "/cancel": (_cancel, "cancel what runs in this context, for another client perhaps"),
    "/regenerate": (_regenerate, "have the last reply written anew; the first one stays as a branch"),
    "/edit": (_edit, "change your last message, as a new branch; /edit TEXT says at once what it becomes"),
    "/branch": (_branch, "list the branches; /branch NUMBER goes to one"),
    "/fork": (_fork, "go on in a new context that begins with this one"),
    "/queue": (_queue, "list what waits; /queue TEXT has a message wait for its turn"),
    "/unqueue": (_unqueue, "/unqueue NUMBER takes back what waits"),
    "/file": (_file, "/file PATH attaches a file to your next message"),
    "/reasoning": (_reasoning, "/reasoning on|off shows what the agent thinks, or folds it"),
    "/usage": (_usage, "what the last reply and this context have used"),
    "/help": (_help, "show this list"),
    "/quit": (_quit, "leave, as Ctrl-D and Ctrl-C do"),
    "/exit": (_quit, ""),
}
