"""The state machine of a context, as data. Pure.

``TRANSITIONS`` is the whole of it; a pair that is not in the table is refused. ``docs/architecture.md`` draws it and a
test compares the drawing with the table.
"""

from collections.abc import Iterable
from enum import StrEnum
from types import MappingProxyType

from context_server.records import ChunkKind, Command, State


class Event(StrEnum):
    """What can happen to a context."""

    MESSAGE_POSTED = "message_posted"
    RUN_CLAIMED = "run_claimed"
    OUTPUT_APPENDED = "output_appended"
    TOOL_STARTED = "tool_started"
    TOOL_FINISHED = "tool_finished"
    APPROVAL_REQUESTED = "approval_requested"
    APPROVAL_DECIDED = "approval_decided"
    CANCEL_REQUESTED = "cancel_requested"
    RUN_STOPPED = "run_stopped"
    RUN_SUCCEEDED = "run_succeeded"
    RUN_FAILED = "run_failed"
    LEASE_EXPIRED = "lease_expired"


class TransitionRefused(Exception):
    """The event cannot happen in the state."""

    def __init__(self, state: State, event: Event) -> None:
        super().__init__(f"{event} cannot happen in state {state}")
        self.state = state
        self.event = event


WORKING: frozenset[State] = frozenset({State.THINKING, State.STREAMING, State.CALLING_TOOL})
"""A run is on and has not been told to stop."""

BUSY: frozenset[State] = WORKING | {State.QUEUED, State.AWAITING_APPROVAL, State.CANCELLING}
"""The context has an active run."""


def _each(states: Iterable[State], event: Event, target: State) -> dict[tuple[State, Event], State]:
    return {(state, event): target for state in states}


TRANSITIONS: MappingProxyType[tuple[State, Event], State] = MappingProxyType(
    _each((State.IDLE, State.FAILED), Event.MESSAGE_POSTED, State.QUEUED)
    | _each((State.QUEUED,), Event.RUN_CLAIMED, State.THINKING)
    | _each((State.THINKING,), Event.OUTPUT_APPENDED, State.STREAMING)
    | _each((State.THINKING, State.STREAMING), Event.TOOL_STARTED, State.CALLING_TOOL)
    | _each((State.CALLING_TOOL,), Event.TOOL_FINISHED, State.THINKING)
    | _each(WORKING, Event.APPROVAL_REQUESTED, State.AWAITING_APPROVAL)
    | _each((State.AWAITING_APPROVAL,), Event.APPROVAL_DECIDED, State.QUEUED)
    | _each((State.QUEUED, State.AWAITING_APPROVAL), Event.CANCEL_REQUESTED, State.IDLE)
    | _each(WORKING, Event.CANCEL_REQUESTED, State.CANCELLING)
    | _each((State.CANCELLING,), Event.RUN_STOPPED, State.IDLE)
    | _each(WORKING, Event.RUN_SUCCEEDED, State.IDLE)
    | _each(WORKING, Event.RUN_FAILED, State.FAILED)
    | _each(WORKING, Event.LEASE_EXPIRED, State.FAILED)
    | _each((State.CANCELLING,), Event.LEASE_EXPIRED, State.IDLE)
)

ALLOWED_COMMANDS: MappingProxyType[State, tuple[Command, ...]] = MappingProxyType(
    {
        State.IDLE: (Command.SEND,),
        State.QUEUED: (Command.CANCEL,),
        State.THINKING: (Command.CANCEL,),
        State.STREAMING: (Command.CANCEL,),
        State.CALLING_TOOL: (Command.CANCEL,),
        State.AWAITING_APPROVAL: (Command.APPROVE, Command.DENY, Command.CANCEL),
        State.CANCELLING: (),
        State.FAILED: (Command.SEND,),
    }
)


def advance(state: State, event: Event) -> State:
    """The state after ``event``.

    Raises:
        TransitionRefused: the pair is not in ``TRANSITIONS``.
    """
    target = TRANSITIONS.get((state, event))
    if target is None:
        raise TransitionRefused(state, event)
    return target


def phase_event(state: State, kind: ChunkKind, open_tools: int) -> Event | None:
    """The event that a chunk of ``kind`` causes in a working ``state``, or None when it moves nothing.

    A step says where the agent is, and is no output. ``open_tools`` counts the tool calls without a result, this chunk
    included: with tools in parallel a context is ``calling_tool`` from the first call to the last result.
    """
    match kind, state:
        case ChunkKind.TOOL_CALL, State.THINKING | State.STREAMING:
            return Event.TOOL_STARTED
        case ChunkKind.TOOL_RESULT, State.CALLING_TOOL if open_tools <= 0:
            return Event.TOOL_FINISHED
        case ChunkKind.TEXT | ChunkKind.REASONING | ChunkKind.ERROR, State.THINKING:
            return Event.OUTPUT_APPENDED
    return None
