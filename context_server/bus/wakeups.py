"""The wake-ups: what the rooms tell each other, in one process or across several. Ids and numbers, never text."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RunQueued:
    """A run waits for a runner."""


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """A running run was told to stop."""

    run_id: str


@dataclass(frozen=True, slots=True)
class RunDeleted:
    """The context of a running run is gone."""

    run_id: str


@dataclass(frozen=True, slots=True)
class Moved:
    """A context has changed: it is at least at ``version``, and the message's log reaches at least ``sequence``.

    ``None`` is not said. One that says neither a version nor a message means that anything in the context may have
    changed. Versions and sequences only ever grow, so of two the larger is the newer, in whatever order they arrive.
    """

    context_id: str
    owner_tag: str
    version: int | None
    message_id: str | None
    sequence: int | None


WakeUp = RunQueued | CancelRequested | RunDeleted | Moved


def owner_tag(owner: str) -> str:
    """8 hex digits that stand for an owner: streams of all contexts find theirs, and the name does not cross.

    Two owners may share a tag; what is read because of it is read for one owner all the same.
    """
    return hashlib.blake2s(owner.encode(), digest_size=4).hexdigest()
