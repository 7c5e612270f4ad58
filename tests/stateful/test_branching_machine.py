"""Random lives of one conversation: branches, what waits, what steers, approvals, crashes and forks, beside a model.

The model knows messages by their parents and what follows what; it is written from the specs, and not from the store.
"""

import asyncio
import contextlib
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from context_server.approving import approvals_of
from context_server.errors import ApprovalDecided, CommandNotAllowed, MessageOpen
from context_server.records import Approval, ApprovalStatus, ChunkKind, IfBusy, MessageStatus, Outcome, Receipt
from context_server.store import Store
from context_server.store.approvals import Decision
from context_server.store.exchanges import HEAD, Post
from tests.stateful.crashing import CrashingDatabase, OutlivingDatabase
from tests.store.asking import asking, go_on, suspend
from tests.store.writing import FAILURE, OWNER, Writer, result

T = TypeVar("T")
FREE = ("idle", "failed")
words = st.sampled_from(["a", "b ", "ü\n"])
places = st.integers(0, 30)


@dataclass
class Waits:
    """A message that waits for its turn; ``parent`` is HEAD where it follows whatever is there then."""

    receipt: Receipt
    parent: str | None


@dataclass
class Model:
    """What there should be: parents in the order of the messages, the head, and what is on its way."""

    parents: dict[str, str | None] = field(default_factory=dict)
    head: str | None = None
    state: str = "idle"
    run_id: str | None = None
    reply_id: str | None = None
    first: list[Waits] = field(default_factory=list)
    queue: list[Waits] = field(default_factory=list)
    steering: list[str] = field(default_factory=list)
    pending: list[Approval] = field(default_factory=list)

    @property
    def waiting(self) -> list[Waits]:
        return self.first + self.queue

    def line(self, head: str | None) -> list[str]:
        found: list[str] = []
        while head is not None:
            found.insert(0, head)
            head = self.parents[head]
        return found

    def begin(self, message_ids: list[str], parent: str | None, reply_id: str, run_id: str) -> None:
        for message_id in message_ids:
            self.parents.pop(message_id, None)
            self.parents[message_id] = parent
            parent = message_id
        self.parents.pop(reply_id, None)
        self.parents[reply_id] = parent
        self.head = self.reply_id = reply_id
        self.run_id, self.state = run_id, "queued"

    def finish(self, state: str) -> None:
        """The run is over, and the next one has its turn; of an answer to what came too late only the store knows."""
        self.state, self.run_id, self.reply_id, self.pending = state, None, None, []
        if not self.steering and self.waiting:
            waits = (self.first or self.queue).pop(0)
            parent = self.head if waits.parent == HEAD else waits.parent
            receipt = waits.receipt
            self.begin([receipt.message_id], parent, receipt.reply_message_id, receipt.run_id)


class BranchingMachine(RuleBasedStateMachine):
    """One context, and all that may be done to it."""

    database_kind: type[CrashingDatabase | OutlivingDatabase] = CrashingDatabase

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.database = self.database_kind()
        self.model = Model()
        self.writer: Writer | None = None
        self.decided: list[Approval] = []
        self.number = 0

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    @initialize()
    def begin(self) -> None:
        self.open()
        self.id = self.run(self.store.create_context(OWNER)).id

    def open(self) -> None:
        self.opened = contextlib.AsyncExitStack()
        opening = Store.open(self.database.url, migrate=False, connections=3)
        self.store: Store = self.run(self.opened.enter_async_context(opening))

    def teardown(self) -> None:
        with self.runner, self.database:
            if hasattr(self, "store"):
                try:
                    self.no_call_is_left_open()
                finally:
                    self.run(self.opened.aclose())
                self.database.check_integrity()

    # What people do

    @rule(text=words, if_busy=st.sampled_from(IfBusy), place=st.none() | places)
    def post(self, text, if_busy, place):
        model = self.model
        known = list(model.parents)
        parent: str | None = HEAD
        if place is not None:
            parent = known[place % len(known)] if known and place else None
        work = self.store.post_message(
            OWNER, self.id, Post(text=text, if_busy=if_busy, parent_id=parent), max_waiting=50
        )
        waits = {key for each in model.waiting for key in (each.receipt.message_id, each.receipt.reply_message_id)}
        if parent in waits:
            with pytest.raises(MessageOpen):
                self.run(work)
            return
        if model.state in FREE:
            receipt, _ = self.run(work)
            start = model.head if parent == HEAD else parent
            model.begin([receipt.message_id], start, receipt.reply_message_id, receipt.run_id)
            return
        if if_busy is IfBusy.REJECT:
            with pytest.raises(CommandNotAllowed):
                self.run(work)
            return
        receipt, _ = self.run(work)
        if if_busy is IfBusy.STEER and model.state != "cancelling":
            assert (receipt.run_id, receipt.reply_message_id) == (model.run_id, model.reply_id)
            model.parents[receipt.message_id] = model.reply_id
            model.steering.append(receipt.message_id)
            return
        model.parents[receipt.message_id] = model.head if parent == HEAD else parent
        model.parents[receipt.reply_message_id] = receipt.message_id
        line = model.first if if_busy is IfBusy.INTERRUPT else model.queue
        line.append(Waits(receipt, parent))
        if if_busy is IfBusy.INTERRUPT:
            self.stopped()
            assert receipt.state == model.state

    def stopped(self) -> None:
        """The run was told to stop."""
        if self.model.state in ("queued", "awaiting_approval"):
            self.finished("idle")
        else:
            self.model.state = "cancelling"

    def finished(self, state: str) -> None:
        self.writer = None
        self.decided += self.model.pending
        self.model.finish(state)
        if self.model.steering:
            self.answered_late()

    def answered_late(self) -> None:
        """What came too late to steer has a run of its own, whose ids only the store knows."""
        context = self.run(self.store.context(OWNER, self.id))
        assert context.active_run is not None
        taken, self.model.steering = self.model.steering, []
        self.model.begin(taken, self.model.head, context.active_run.message_id, context.active_run.id)

    @precondition(lambda self: self.model.state not in FREE)
    @rule()
    def cancel(self):
        ended = [each.receipt.reply_message_id for each in self.model.waiting]
        _, transition = self.run(self.store.request_cancel(OWNER, self.id))
        if self.model.state == "cancelling" and not ended:
            assert transition is None
        else:
            assert [each.id for each in transition.also_ended] == ended
        self.model.first, self.model.queue, self.model.steering = [], [], []
        self.stopped()

    @precondition(lambda self: self.model.waiting)
    @rule(place=places)
    def take_back(self, place):
        model = self.model
        waits = model.waiting[place % len(model.waiting)]
        self.run(self.store.suspension.remove_waiting(OWNER, self.id, waits.receipt.message_id, if_match=None))
        (model.first if waits in model.first else model.queue).remove(waits)
        del model.parents[waits.receipt.message_id], model.parents[waits.receipt.reply_message_id]

    @precondition(lambda self: self.model.parents)
    @rule(place=places)
    def regenerate(self, place):
        model = self.model
        message_id = list(model.parents)[place % len(model.parents)]
        work = self.store.regenerate(OWNER, self.id, message_id)
        if model.state not in FREE:
            with pytest.raises(CommandNotAllowed):
                self.run(work)
            return
        receipt, _ = self.run(work)
        assert receipt.message_id in (message_id, model.parents[message_id])
        model.begin([], receipt.message_id, receipt.reply_message_id, receipt.run_id)

    @precondition(lambda self: self.model.parents and self.model.state in FREE)
    @rule(place=st.none() | places)
    def move_head(self, place):
        head = None if place is None else list(self.model.parents)[place % len(self.model.parents)]
        self.run(self.store.change_context(OWNER, self.id, {"head_message_id": head}))
        self.model.head = head

    @precondition(lambda self: self.model.state in FREE and self.model.parents)
    @rule(place=places)
    def fork(self, place):
        """A fork reads as the line that it was made of, and its deletion changes nothing."""
        message_id = list(self.model.parents)[place % len(self.model.parents)]
        texts = [self.run(self.store.message(OWNER, self.id, key)).content for key in self.model.line(message_id)]
        forked = self.run(self.store.fork_context(OWNER, self.id, message_id, title=None))
        found, _ = self.run(self.store.messages(OWNER, forked.id, limit=200, include_content=True))
        assert [message.content for message in found] == texts
        self.run(self.store.delete_context(OWNER, forked.id))

    @precondition(lambda self: self.model.pending)
    @rule(place=places, status=st.sampled_from([ApprovalStatus.APPROVED, ApprovalStatus.DENIED]))
    def decide(self, place, status):
        pending = self.model.pending
        approval = pending.pop(place % len(pending))
        decided = self.run(
            self.store.suspension.decide(OWNER, self.id, approval.id, Decision(status=status), if_match=None)
        )
        assert decided.approval.status is status
        assert (decided.transition is None) == bool(pending)
        if not pending:
            self.model.state = "queued"

    @precondition(lambda self: self.decided)
    @rule()
    def decide_too_late(self):
        decision = Decision(status=ApprovalStatus.APPROVED)
        with pytest.raises(ApprovalDecided):
            self.run(self.store.suspension.decide(OWNER, self.id, self.decided[-1].id, decision, if_match=None))

    # What the run does

    @precondition(lambda self: self.model.state == "queued")
    @rule()
    def claim(self):
        self.writer = self.run(go_on(self.store))
        assert (self.writer.run.id, self.writer.run.message_id) == (self.model.run_id, self.model.reply_id)
        self.model.state = "calling_tool" if self.writer.open_tools else "thinking"
        asked_of = self.model.parents[self.model.reply_id]
        history = [turn.message_id for turn in self.run(self.store.history(self.writer.run, max_bytes=10**6))]
        expected = self.model.line(asked_of)
        assert history[: len(expected)] == expected
        if self.writer.open_tools:  # What was decided on gets its results first, as from an agent.
            calls = [chunk.data["id"] for chunk in self.run(self.store.draft(self.writer.run)).reply.chunks
                     if chunk.kind is ChunkKind.TOOL_CALL]  # fmt: skip
            numbers = [int(name.removeprefix("call-")) for name in calls][-self.writer.open_tools :]
            self.run(self.writer.write(*map(result, numbers)))

    @precondition(lambda self: self.writer)
    @rule(text=words)
    def write(self, text):
        self.run(self.writer.write(text))

    @precondition(lambda self: self.writer)
    @rule()
    def look(self):
        taken = self.run(self.store.suspension.look(self.writer.run))
        model = self.model
        assert [turn.message_id for turn in taken.steering] == model.steering
        for message_id in model.steering:
            model.parents[message_id] = model.head
            model.head = message_id
        model.steering = []

    @precondition(lambda self: self.writer)
    @rule(count=st.integers(1, 2))
    def suspend(self, count):
        asked = approvals_of(self.writer.run, [asking(self.number + each) for each in range(1, count + 1)], 3600)
        self.number += count
        transition = self.run(suspend(self.writer, *asked))
        if self.model.state == "cancelling":
            assert transition.state == "cancelling"
            names = [int(each.call_id.removeprefix("call-")) for each in asked]
            self.run(self.writer.write(*map(result, names), outcome=Outcome.STOPPED))
            self.finished("idle")
            return
        self.writer = None
        self.model.state, self.model.pending = "awaiting_approval", list(asked)

    @precondition(lambda self: self.writer)
    @rule(outcome=st.sampled_from([Outcome.SUCCEEDED, Outcome.FAILED]))
    def end(self, outcome):
        was_cancelled = self.model.state == "cancelling"
        self.run(self.writer.write("!", outcome=outcome, failure=FAILURE))
        self.finished("idle" if was_cancelled or outcome is Outcome.SUCCEEDED else "failed")

    @precondition(lambda self: self.model.run_id)
    @rule()
    def crash(self):
        self.database.crash()
        self.run(self.opened.aclose())
        self.open()
        orphans = self.run(self.store.expired_runs())
        assert [run.id for run in orphans] == ([self.model.run_id] if self.writer else [])
        for run in orphans:
            self.run(self.store.expire_run(run))
            self.finished("idle" if self.model.state == "cancelling" else "failed")

    # What must be the same

    @invariant()
    def store_and_model_agree(self):
        if not hasattr(self, "store"):
            return
        model = self.model
        context = self.run(self.store.context(OWNER, self.id))
        if self.writer and model.state != "cancelling":
            assert context.state in ("thinking", "streaming", "calling_tool")
        else:
            assert context.state == model.state
        assert context.head_message_id == model.head
        assert (context.active_run.id if context.active_run else None) == model.run_id
        listed, _ = self.run(self.store.messages(OWNER, self.id, limit=200))
        assert [message.id for message in listed] == model.line(model.head)
        everything, _ = self.run(self.store.messages(OWNER, self.id, limit=200, tree=True))
        waits = {key for each in model.waiting for key in (each.receipt.message_id, each.receipt.reply_message_id)}
        assert {message.id for message in everything} == set(model.parents)
        settled = [message for message in everything if message.id not in {*waits, *model.steering}]
        assert all(message.parent_id == model.parents[message.id] for message in settled)
        waiting = self.run(self.store.suspension.waiting(OWNER, self.id))
        assert [reply_id for _, reply_id in waiting] == [each.receipt.reply_message_id for each in model.waiting]
        pending = self.run(self.store.suspension.approvals(OWNER, self.id, only_pending=True))
        assert [each.id for each in pending] == [each.id for each in model.pending]

    def no_call_is_left_open(self) -> None:
        """Every ended reply has a result for each of its calls."""
        everything, _ = self.run(self.store.messages(OWNER, self.id, limit=200, tree=True))
        for message in everything:
            if message.status in (MessageStatus.PENDING, MessageStatus.STREAMING):
                continue
            page = self.run(self.store.page(OWNER, self.id, message.id))
            calls = [chunk.data["id"] for chunk in page.chunks if chunk.kind is ChunkKind.TOOL_CALL]
            results = [chunk.data["id"] for chunk in page.chunks if chunk.kind is ChunkKind.TOOL_RESULT]
            assert sorted(calls) == sorted(results)
            assert [chunk.sequence for chunk in page.chunks] == [*range(1, message.sequence + 1)]


class PostgresBranchingMachine(BranchingMachine):
    """The same on PostgreSQL."""

    database_kind = OutlivingDatabase


TestBranchingMachine = BranchingMachine.TestCase
TestPostgresBranchingMachine = PostgresBranchingMachine.TestCase
TestPostgresBranchingMachine.settings = settings(max_examples=max(1, settings().max_examples // 4))
