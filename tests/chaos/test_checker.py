"""The checker finds each kind of broken promise: one that found none would prove nothing."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.chaos.agents import script_of
from tests.chaos.checker import check, check_nodes
from tests.chaos.history import Fault, Followed, History, Operation, Outcome, without_stamps
from tests.chaos.rows import Logged, Rows, RunRow

PROMPT = "words=4 seed=1"
WORDS = script_of(PROMPT)
TEXT = "".join(WORDS)


def kept() -> tuple[Followed, Logged]:
    """A reply that was followed to its end, and the log that it was read from."""
    reply = Followed("c", "m", PROMPT, signalled=[2, 4], endings=[("completed", 4)], text=TEXT, sequence=4, ended=True)
    reply.pulls += [pulled(0, 2), pulled(2, 4)]
    digest = hashlib.sha256(TEXT.encode()).hexdigest()
    return reply, Logged(4, "completed", 4, digest, tuple(enumerate(WORDS, 1)))


def pulled(start: int, end: int, content: str | None = None) -> dict[str, Any]:
    content = "".join(WORDS[start:end]) if content is None else content
    return {"from_sequence": start, "sequence": end, "content": content}


def kinds(reply: Followed, log: dict[str, Logged]) -> set[str]:
    return {violation.kind for violation in check([History("c", [reply])], log)}


def test_nothing_is_wrong_with_a_promise_that_was_kept() -> None:
    reply, logged = kept()

    assert not check([History("c", [reply], versions=[1, 2, 2, 5])], {"m": logged})


SEEN: dict[str, Callable[[Followed], object]] = {
    "lost": lambda reply: reply.signalled.append(5),
    "regress": lambda reply: reply.signalled.append(3),
    "repeat": lambda reply: reply.pulls.append(pulled(1, 2)),
    "changed": lambda reply: reply.pulls.append(pulled(4, 4, "more")),
    "ending": lambda reply: reply.endings.append(("failed", 4)),
}


@pytest.mark.parametrize("kind", SEEN)
def test_what_a_client_saw_must_be_borne_out(kind: str) -> None:
    reply, logged = kept()
    SEEN[kind](reply)

    assert kind in kinds(reply, {"m": logged})


LOGS: dict[str, dict[str, Any]] = {
    "gap": {"chunks": ((1, WORDS[0]), (2, WORDS[1]), (4, WORDS[3]))},
    "repeat": {"chunks": (*enumerate(WORDS, 1), (4, WORDS[3]))},
    "lost": {"sequence": 3, "final_sequence": 3, "chunks": tuple(enumerate(WORDS[:3], 1))},
    "foreign": {"chunks": ((1, WORDS[0]), (2, WORDS[1]), (3, WORDS[2]), (4, "other"))},
    "changed": {"chunks": ((1, WORDS[1]), (2, WORDS[0]), (3, WORDS[2]), (4, WORDS[3]))},
    "digest": {"digest": hashlib.sha256(b"other").hexdigest()},
    "ending": {"status": "streaming", "final_sequence": None, "digest": None},
}


@pytest.mark.parametrize("kind", LOGS)
def test_the_log_must_be_whole(kind: str) -> None:
    reply, logged = kept()

    assert kind in kinds(reply, {"m": replace(logged, **LOGS[kind])})


def test_an_accepted_message_must_be_there() -> None:
    assert kinds(kept()[0], {}) == {"lost"}


def test_versions_must_not_go_back() -> None:
    assert [violation.kind for violation in check([History("c", versions=[2, 1])], {})] == ["regress"]


# Several nodes

PORT, OTHER_PORT = 1, 2
ENDED = 1000.0
"""When the reply ended, in the database; its client learned so a second later."""


def kept_by_nodes() -> tuple[History, Rows]:
    """A client that was served by two nodes to the end of a reply, and the rows of that."""
    reply, logged = kept()
    reply.ended_at = ENDED + 1
    reply.ages.append((ENDED, 2.0))
    history = History("c", [reply], posted={"c:0": PROMPT})
    history.operations.append(Operation("pull", PORT, ENDED, ENDED + 1, Outcome.OK, "200"))
    said = Logged(1, "completed", 1, "", ((1, PROMPT),), context_id="c", role="user")
    logged = replace(logged, context_id="c", completed_at=ENDED)
    return history, Rows({"u": said, "m": logged}, {"c": "idle"}, {"r": RunRow("c", "m", "succeeded", 1, "node")})


def node_kinds(history: History, rows: Rows, **more: Any) -> set[str]:
    return {violation.kind for violation in check_nodes([history], rows, **more)}


def failed_pull(port: int, at: float) -> Operation:
    return Operation("pull", port, at, at + 1, Outcome.UNKNOWN, "")


def test_nothing_is_wrong_with_nodes_that_kept_their_promises() -> None:
    history, rows = kept_by_nodes()

    assert node_kinds(history, rows, deaths={"node": ENDED}) == set()


BY_CLIENTS: dict[str, Callable[[History], object]] = {
    "late": lambda history: history.replies[0].ages.append((ENDED, 17.0)),
    "noticed": lambda history: history.operations.append(failed_pull(PORT, ENDED)),
    "refused": lambda history: history.refused.append("pull: 409 sequence-ahead"),
}


@pytest.mark.parametrize("kind", BY_CLIENTS)
def test_what_clients_of_nodes_noticed(kind: str) -> None:
    history, rows = kept_by_nodes()
    BY_CLIENTS[kind](history)

    assert node_kinds(history, rows) == {kind}


def test_the_end_of_a_reply_must_not_come_late() -> None:
    history, rows = kept_by_nodes()
    history.replies[0].ended_at = ENDED + 17

    assert node_kinds(history, rows) == {"late"}


def test_an_end_that_never_came_is_late_in_the_end() -> None:
    history, rows = kept_by_nodes()
    history.replies[0].ended, history.replies[0].ended_at = False, None

    assert node_kinds(history, replace(rows, read_at=ENDED + 15)) == {"ending"}
    assert node_kinds(history, replace(rows, read_at=ENDED + 17)) == {"ending", "late"}


@pytest.mark.parametrize(
    ("port", "at", "kinds"), [(PORT, 5, set()), (PORT, 20, {"noticed"}), (OTHER_PORT, 5, {"noticed"})]
)
def test_a_request_may_fail_by_a_fault_of_its_node_only(port: int, at: float, kinds: set[str]) -> None:
    history, rows = kept_by_nodes()
    history.operations.append(failed_pull(port, at))

    assert node_kinds(history, rows, faults=[Fault("kill", PORT, 1, 10)]) == kinds


def test_a_fault_may_concern_one_kind_of_request() -> None:
    history, rows = kept_by_nodes()
    history.operations.append(failed_pull(PORT, 5))

    assert node_kinds(history, rows, faults=[Fault("suspend", PORT, 1, 10, only="post")]) == {"noticed"}
    assert node_kinds(history, rows, faults=[Fault("suspend", PORT, 1, 10, only="pull")]) == set()


SAID = Logged(1, "completed", 1, "", ((1, PROMPT),), context_id="c", role="user")
BY_ROWS: dict[str, Callable[[Rows], Rows]] = {
    "twice": lambda rows: replace(rows, messages={**rows.messages, "again": SAID}),
    "foreign": lambda rows: replace(rows, messages={**rows.messages, "more": replace(SAID, chunks=((1, "else"),))}),
    "retaken": lambda rows: replace(rows, runs={"r": RunRow("c", "m", "succeeded", 2, "node")}),
    "stuck": lambda rows: replace(rows, states={"c": "streaming"}),
}


@pytest.mark.parametrize("kind", BY_ROWS)
def test_the_rows_of_nodes_must_be_in_order(kind: str) -> None:
    history, rows = kept_by_nodes()

    assert node_kinds(history, BY_ROWS[kind](rows)) == {kind}


def test_a_message_has_one_run() -> None:
    history, rows = kept_by_nodes()
    rows = replace(rows, runs={**rows.runs, "other": rows.runs["r"]})

    assert node_kinds(history, rows) == {"twice"}


def test_a_run_must_be_interrupted_soon_after_the_death_of_its_node() -> None:
    history, rows = kept_by_nodes()
    interrupted = replace(rows.messages["m"], status="failed", error_code="interrupted")
    history.replies[0].endings = [("failed", 4)]
    rows = replace(rows, messages={**rows.messages, "m": interrupted})

    assert node_kinds(history, rows, deaths={"node": ENDED - 9}) == set()
    assert node_kinds(history, rows, deaths={"other": ENDED - 11}) == set()
    assert node_kinds(history, rows, deaths={"node": ENDED - 11}) == {"orphan"}


def test_stamps_are_no_part_of_the_script() -> None:
    assert without_stamps("7.0@1763719200000 7.1@1763719200100 ") == "7.0 7.1 "
