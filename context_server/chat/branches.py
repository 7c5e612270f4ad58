"""The branches of a conversation, as a list that a person can choose from."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from context_server.client import MessageInfo


@dataclass(frozen=True, slots=True)
class Branch:
    """One of several messages that follow the same message; ``tip_id`` is where going on from it would go on."""

    message: MessageInfo
    tip_id: str
    is_current: bool


def branches_of(line: Sequence[MessageInfo], tree: Sequence[MessageInfo]) -> list[Branch]:
    """Every branch at every place where the line could have gone on otherwise, oldest place first.

    ``line`` are the messages that lead to the head, ``tree`` are all. Of an empty line, the beginnings.
    """
    children: dict[str | None, list[MessageInfo]] = defaultdict(list)
    for message in tree:
        children[message.parent_id].append(message)
    taken = {message.id for message in line}
    parents = [message.parent_id for message in line] or [None]
    return [
        Branch(message, _tip(message, children), message.id in taken)
        for parent in parents
        if len(children[parent]) > 1 or not line
        for message in children[parent]
    ]


def _tip(message: MessageInfo, children: dict[str | None, list[MessageInfo]]) -> str:
    """The end of the newest line below a message."""
    found = message
    while below := children.get(found.id):
        found = below[-1]
    return found.id
