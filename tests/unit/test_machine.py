"""The state machine, against the documented table written out here once more, pair by pair."""

from itertools import product

import pytest

from context_server.api.schemas import machine_body
from context_server.machine import ALLOWED_COMMANDS, BUSY, TRANSITIONS, Event, TransitionRefused, advance, phase_event
from context_server.records import ChunkKind, State

TABLE = {
    ("idle", "message_posted"): "queued",
    ("failed", "message_posted"): "queued",
    ("queued", "run_claimed"): "thinking",
    ("thinking", "output_appended"): "streaming",
    ("thinking", "tool_started"): "calling_tool",
    ("streaming", "tool_started"): "calling_tool",
    ("calling_tool", "tool_finished"): "thinking",
    ("thinking", "approval_requested"): "awaiting_approval",
    ("streaming", "approval_requested"): "awaiting_approval",
    ("calling_tool", "approval_requested"): "awaiting_approval",
    ("awaiting_approval", "approval_decided"): "queued",
    ("queued", "cancel_requested"): "idle",
    ("awaiting_approval", "cancel_requested"): "idle",
    ("thinking", "cancel_requested"): "cancelling",
    ("streaming", "cancel_requested"): "cancelling",
    ("calling_tool", "cancel_requested"): "cancelling",
    ("cancelling", "run_stopped"): "idle",
    ("thinking", "run_succeeded"): "idle",
    ("streaming", "run_succeeded"): "idle",
    ("calling_tool", "run_succeeded"): "idle",
    ("thinking", "run_failed"): "failed",
    ("streaming", "run_failed"): "failed",
    ("calling_tool", "run_failed"): "failed",
    ("thinking", "lease_expired"): "failed",
    ("streaming", "lease_expired"): "failed",
    ("calling_tool", "lease_expired"): "failed",
    ("cancelling", "lease_expired"): "idle",
}
COMMANDS = {
    "idle": ["send"],
    "queued": ["cancel"],
    "thinking": ["cancel"],
    "streaming": ["cancel"],
    "calling_tool": ["cancel"],
    "awaiting_approval": ["approve", "deny", "cancel"],
    "cancelling": [],
    "failed": ["send"],
}


@pytest.mark.scenario("runs", "Every state and event")
@pytest.mark.parametrize(("state", "event"), list(product(State, Event)))
def test_a_pair_leads_where_the_table_says_or_is_refused(state: State, event: Event) -> None:
    target = TABLE.get((state.value, event.value))
    if target is not None:
        assert advance(state, event) == target
        return
    with pytest.raises(TransitionRefused) as refusal:
        advance(state, event)
    assert (refusal.value.state, refusal.value.event) == (state, event)


def test_the_table_knows_every_state_and_event() -> None:
    assert {state for state, _ in TABLE} | set(TABLE.values()) == set(State)
    assert {event for _, event in TABLE} == set(Event)
    assert len(TRANSITIONS) == len(TABLE)


@pytest.mark.scenario("runs", "Every state and event")
def test_the_commands_of_each_state() -> None:
    assert {state: list(commands) for state, commands in ALLOWED_COMMANDS.items()} == COMMANDS


def test_cancel_is_allowed_where_it_leads_somewhere() -> None:
    leads = {state for state, event in TABLE if event == "cancel_requested"}
    assert leads == {state for state, commands in COMMANDS.items() if "cancel" in commands}
    sends = {state for state, event in TABLE if event == "message_posted"}
    assert sends == {state for state, commands in COMMANDS.items() if "send" in commands} == set(State) - BUSY


@pytest.mark.scenario("contexts", "State machine as data")
def test_the_machine_for_clients_is_the_table() -> None:
    machine = machine_body().model_dump(mode="json")
    found = {
        (state, event): target for state, node in machine["states"].items() for event, target in node["on"].items()
    }
    assert machine["initial"] == "idle"
    assert found == TABLE
    assert {state: node["meta"]["allowed_commands"] for state, node in machine["states"].items()} == COMMANDS


OUTPUT = [ChunkKind.TEXT, ChunkKind.REASONING, ChunkKind.ERROR]


@pytest.mark.parametrize("kind", OUTPUT)
def test_output_moves_a_thinking_context_and_no_other(kind: ChunkKind) -> None:
    for open_tools in (0, 1):
        assert phase_event(State.THINKING, kind, open_tools) is Event.OUTPUT_APPENDED
        for state in set(State) - {State.THINKING}:
            assert phase_event(state, kind, open_tools) is None


def test_a_step_moves_nothing() -> None:
    assert {phase_event(state, ChunkKind.STEP, open_tools) for state in State for open_tools in (0, 1)} == {None}


def test_the_first_call_and_the_last_result_of_parallel_tools_move_a_context() -> None:
    state = State.STREAMING
    states = []
    open_tools = 0
    for kind, change in (
        (ChunkKind.TOOL_CALL, 1),
        (ChunkKind.TOOL_CALL, 1),
        (ChunkKind.TEXT, 0),
        (ChunkKind.TOOL_RESULT, -1),
        (ChunkKind.REASONING, 0),
        (ChunkKind.TOOL_RESULT, -1),
        (ChunkKind.TEXT, 0),
    ):
        open_tools += change
        if event := phase_event(state, kind, open_tools):
            state = advance(state, event)
        states.append(str(state))
    assert states == [*["calling_tool"] * 5, "thinking", "streaming"]


@pytest.mark.parametrize("state", [State.THINKING, State.STREAMING, State.IDLE, State.CANCELLING])
def test_a_result_without_a_call_moves_nothing(state: State) -> None:
    assert phase_event(state, ChunkKind.TOOL_RESULT, -1) is None


@pytest.mark.parametrize(("state", "kind", "open_tools"), list(product(State, ChunkKind, (-1, 0, 1, 2))))
def test_what_a_chunk_causes_is_always_allowed(state: State, kind: ChunkKind, open_tools: int) -> None:
    event = phase_event(state, kind, open_tools)
    assert event is None or (state.value, event.value) in TABLE
