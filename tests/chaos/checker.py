"""Says whether what clients saw agrees with what the log holds in the end, and with what the agent wrote.

Each violation has one of these kinds:

    lost      a sequence that was signalled or pulled, or a message that was accepted, is not in the log
    gap       the log's sequences are not 1, 2, 3, …
    repeat    a sequence is in the log twice, or a client was given text twice
    changed   text that a client was given is not the log's text of those sequences
    regress   a later signal names an earlier sequence, or an earlier version
    foreign   the log holds text that is not the beginning of what the agent writes, or not all of it when completed
    digest    the digest is not that of the text
    ending    a message ended twice or otherwise than was signalled, or has not ended

and where several nodes serve one database also one of these:

    twice     one idempotency key made two messages, or one message two runs
    retaken   a run was taken by a second node
    stuck     a context is in a running state when nothing can be running any more
    orphan    a run of a dead node was not ended as interrupted in time
    late      a word, or the end of a reply, came to a client too late
    noticed   a client's request to a healthy node failed
    refused   a client was given an answer that no careful client may get
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from tests.chaos.agents import script_of
from tests.chaos.history import Fault, Followed, History, Operation, Outcome, without_stamps
from tests.chaos.rows import Logged, Rows

KINDS = ("lost", "gap", "repeat", "changed", "regress", "foreign", "digest", "ending")
NODE_KINDS = ("twice", "retaken", "stuck", "orphan", "late", "noticed", "refused")
RESTING_STATES = ("idle", "failed")


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken promise."""

    kind: str
    message_id: str
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How soon things must have happened, in seconds."""

    late: float = 16.0
    orphan: float = 10.0


def check(histories: Iterable[History], log: Mapping[str, Logged], *, complete: bool = True) -> list[Violation]:
    """Everything that is wrong; ``complete`` demands that every reply has ended."""
    found: list[Violation] = []
    for history in histories:
        if history.versions != sorted(history.versions):
            found.append(Violation("regress", history.context_id, f"versions {history.versions}"))
        for reply in history.replies:
            logged = log.get(reply.message_id)
            if logged is None:
                found.append(Violation("lost", reply.message_id, "the message was accepted and is not there"))
                continue
            kinds = (_log_of(reply, logged), _seen_of(reply, logged), _ending_of(reply, logged, complete=complete))
            found += [Violation(kind, reply.message_id, detail) for part in kinds for kind, detail in part]
    return found


def check_nodes(
    histories: Sequence[History],
    rows: Rows,
    faults: Sequence[Fault] = (),
    deaths: Mapping[str, float] | None = None,
    bounds: Bounds | None = None,
) -> list[Violation]:
    """Everything that is wrong with what several nodes did, once they rest.

    Args:
        histories: what every client did and saw.
        rows: the database, after every reply has ended.
        faults: when which node could not be relied on; a request that met none of them must not have failed.
        deaths: when each node that died did, in Unix seconds, by its ``node_id``.
        bounds: how soon things must have happened.
    """
    bounds = bounds or Bounds()
    found = check(histories, rows.messages)
    for history in histories:
        kinds = (
            _posted_of(history, rows),
            _lateness_of(history, rows, bounds),
            (("noticed", _shown(each)) for each in history.operations if not _is_explained(each, faults)),
            (("refused", answer) for answer in history.refused),
        )
        found += [Violation(kind, history.context_id, detail) for part in kinds for kind, detail in part]
    found += [Violation(kind, where, detail) for kind, where, detail in _runs_of(rows, deaths or {}, bounds)]
    return found


def _log_of(reply: Followed, logged: Logged) -> Iterator[tuple[str, str]]:
    """What is wrong with the log by itself."""
    numbers = [number for number, _ in logged.chunks]
    if len(set(numbers)) < len(numbers):
        yield "repeat", f"sequences {numbers}"
    if set(numbers) != set(range(1, logged.sequence + 1)):
        yield "gap", f"{len(numbers)} chunks up to {logged.sequence}"
    script, text = "".join(script_of(reply.prompt)), logged.text()
    words = without_stamps(text)
    if not script.startswith(words) or (logged.status == "completed" and words != script):
        yield "foreign", f"{len(words)} characters of {len(script)}, {logged.status}"
    if logged.final_sequence is not None and logged.digest != hashlib.sha256(text.encode()).hexdigest():
        yield "digest", f"of {len(text)} characters"


def _seen_of(reply: Followed, logged: Logged) -> Iterator[tuple[str, str]]:
    """What a client saw that the log does not bear out."""
    seen = max([*reply.signalled, *(pull["sequence"] for pull in reply.pulls)], default=0)
    if seen > logged.sequence:
        yield "lost", f"saw {seen}, the log reaches {logged.sequence}"
    if reply.signalled != sorted(reply.signalled):
        yield "regress", f"signals {reply.signalled}"
    held = 0
    for pull in reply.pulls:
        start, end = pull["from_sequence"], pull["sequence"]
        if start < held:
            yield "repeat", f"text after {start} while {held} was held"
        if pull["content"] != logged.text(start, end):
            yield "changed", f"text of {start + 1} to {end}"
        held = max(held, end)
    if reply.text != logged.text(0, reply.sequence):
        yield "changed", f"the text held up to {reply.sequence}"
    if reply.ended and hashlib.sha256(reply.text.encode()).hexdigest() != logged.digest:
        yield "digest", "of the text that the client holds"


def _ending_of(reply: Followed, logged: Logged, *, complete: bool) -> Iterator[tuple[str, str]]:
    """How endings disagree."""
    if len(set(reply.endings)) > 1:
        yield "ending", f"signalled as {reply.endings}"
    if reply.endings and reply.endings[-1] != (logged.status, logged.final_sequence):
        yield "ending", f"signalled as {reply.endings[-1]}, is {logged.status} at {logged.final_sequence}"
    if complete and (logged.final_sequence is None or not reply.ended):
        yield "ending", "has not ended"


def _posted_of(history: History, rows: Rows) -> Iterator[tuple[str, str]]:
    """Whether each idempotency key made the one message that it was for; each prompt names its key's number."""
    said = Counter(
        logged.text()
        for logged in rows.messages.values()
        if logged.context_id == history.context_id and logged.role == "user"
    )
    for key, prompt in history.posted.items():
        if said[prompt] > 1:
            yield "twice", f"{said[prompt]} messages by the key {key}"
    for prompt in said.keys() - set(history.posted.values()):
        yield "foreign", f"a message that nobody posted: {prompt}"


def _lateness_of(history: History, rows: Rows, bounds: Bounds) -> Iterator[tuple[str, str]]:
    for reply in history.replies:
        oldest = max((age for _, age in reply.ages), default=0.0)
        if oldest > bounds.late:
            yield "late", f"a word came after {oldest:.1f} s"
        logged = rows.messages.get(reply.message_id)
        if logged is None or logged.completed_at is None:
            continue
        seconds = (rows.read_at if reply.ended_at is None else reply.ended_at) - logged.completed_at
        if seconds > bounds.late:
            yield "late", f"the end came after {seconds:.1f} s{' or later' if reply.ended_at is None else ''}"


def _is_explained(operation: Operation, faults: Iterable[Fault]) -> bool:
    return operation.outcome is Outcome.OK or any(fault.explains(operation) for fault in faults)


def _shown(operation: Operation) -> str:
    return f"{operation.kind} at port {operation.port}, {operation.outcome}: {operation.detail}"


def _runs_of(rows: Rows, deaths: Mapping[str, float], bounds: Bounds) -> Iterator[tuple[str, str, str]]:
    """``(kind, id, detail)`` of what is wrong with runs and the states of their contexts."""
    for context_id, state in rows.states.items():
        if state not in RESTING_STATES:
            yield "stuck", context_id, state
    for message_id, count in Counter(run.message_id for run in rows.runs.values()).items():
        if count > 1:
            yield "twice", message_id, f"{count} runs"
    for run in rows.runs.values():
        if run.attempt > 1:
            yield "retaken", run.message_id, f"attempt {run.attempt}"
        died = deaths.get(run.node_id or "")
        logged = rows.messages.get(run.message_id)
        if died is None or logged is None or logged.completed_at is None or logged.error_code != "interrupted":
            continue
        if (seconds := logged.completed_at - died) > bounds.orphan:
            yield "orphan", run.message_id, f"interrupted {seconds:.1f} s after its node's death"
