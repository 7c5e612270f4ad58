"""Random lives of a store beside a dictionary: both say the same after every step, and a refusal changes nothing."""

import asyncio
import contextlib
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from context_server.errors import CommandNotAllowed, ContextNotFound, IdempotencyKeyReused, VersionMismatch
from context_server.records import Chunk, ChunkKind, Context, Message, MessageStatus, Outcome, Role
from context_server.store import Store
from context_server.store.exchanges import Post
from context_server.store.execution import BatchRefused, Standing
from context_server.store.idempotency import Once, Replayed
from tests.stateful.crashing import CrashingDatabase, OutlivingDatabase
from tests.stateful.model import ModelContext, ModelMessage
from tests.store.writing import FAILURE, OWNER, Writer, call, reasoning, result

T = TypeVar("T")

MAX_CONTEXTS = 4
numbers = st.integers(0, MAX_CONTEXTS - 1)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=12)
piece = st.one_of(
    texts,
    texts.map(reasoning),
    st.integers(1, 3).map(call),
    st.integers(1, 3).map(result),
    st.just(Chunk(0, ChunkKind.STEP, None, {"number": 1})),
)
pieces = st.lists(piece, min_size=1, max_size=5)
outcomes = st.sampled_from(Outcome)
a_run_is_on = precondition(lambda self: self.writing)


class StoreMachine(RuleBasedStateMachine):
    """Commands against the store and the model; the loop is held by the machine, since its rules are not coroutines."""

    database_kind: type[CrashingDatabase | OutlivingDatabase] = CrashingDatabase

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.database = self.database_kind()
        self.contexts: list[ModelContext] = []
        self.queue: list[ModelContext] = []
        self.answers: dict[str, tuple[str, str]] = {}
        self.gone: list[Writer] = []
        self.steps_of_this_life = 0

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    @initialize()
    def open(self) -> None:
        self.opened = contextlib.AsyncExitStack()
        opening = Store.open(self.database.url, migrate=False, connections=3)
        self.store: Store = self.run(self.opened.enter_async_context(opening))
        self.steps_of_this_life = 0
        for writer in (writer for context in self.contexts for writer in context.stale):
            writer.store = self.store

    def teardown(self) -> None:
        with self.runner, self.database:
            if hasattr(self, "store"):
                try:
                    self.every_chunk_is_there()
                finally:
                    self.run(self.opened.aclose())
                self.database.check_integrity()

    def pick(self, number: int) -> ModelContext:
        return self.contexts[number % len(self.contexts)]

    @property
    def writing(self) -> list[ModelContext]:
        """The contexts with a run that is on."""
        return [context for context in self.contexts if context.writer]

    # Commands of clients

    @precondition(lambda self: len(self.contexts) < MAX_CONTEXTS)
    @rule(title=st.none() | texts)
    def create(self, title):
        context = self.run(self.store.create_context(OWNER, title=title))
        self.contexts.append(ModelContext(context.id, title))

    @precondition(lambda self: self.contexts)
    @rule(number=numbers, text=texts)
    def post(self, number, text):
        context = self.pick(number)
        if not context.takes_messages:
            with pytest.raises(CommandNotAllowed) as refusal:
                self.run(self.store.post_message(OWNER, context.id, Post(text=text)))
            assert refusal.value.state == context.state
            return
        receipt, _ = self.run(self.store.post_message(OWNER, context.id, Post(text=text), if_match=context.version))
        self._posted(context, receipt, text)

    def _posted(self, context, receipt, text):
        user = ModelMessage(receipt.message_id, Role.USER, MessageStatus.COMPLETED, [Chunk(1, ChunkKind.TEXT, text)])
        context.posted(user, receipt.reply_message_id, receipt.run_id)
        self.queue.append(context)
        assert (receipt.state, receipt.version) == (context.state, context.version)

    @precondition(lambda self: self.contexts)
    @rule(number=numbers, text=st.sampled_from(["a", "b"]), key=st.sampled_from(["key-1", "key-2"]))
    def post_once(self, number, text, key):
        context = self.pick(number)
        once = Once(key=key, fingerprint=f"{context.id} {text}", encode=repr, lifetime_ms=3_600_000)
        known = self.answers.get(key)
        attempt = self.store.post_message(OWNER, context.id, Post(text=text), once=once)
        if known is not None and known[0] == once.fingerprint:
            with pytest.raises(Replayed) as replay:
                self.run(attempt)
            assert replay.value.answer == known[1]
        elif known is not None:
            with pytest.raises(IdempotencyKeyReused):
                self.run(attempt)
        elif not context.takes_messages:
            with pytest.raises(CommandNotAllowed):
                self.run(attempt)
        else:
            receipt, _ = self.run(attempt)
            self.answers[key] = (once.fingerprint, repr(receipt))
            self._posted(context, receipt, text)

    @precondition(lambda self: self.contexts)
    @rule(number=numbers)
    def cancel(self, number):
        self._cancel(self.pick(number))

    @a_run_is_on
    @rule(number=numbers)
    def cancel_what_runs(self, number):
        self._cancel(self.writing[number % len(self.writing)])

    def _cancel(self, context):
        before = context.state
        if context in self.queue:
            self.queue.remove(context)
        context.cancelled()
        answer, transition = self.run(self.store.request_cancel(OWNER, context.id))
        assert (answer.state, answer.version) == (context.state, context.version)
        assert (transition is None) == (before == context.state)

    @precondition(lambda self: self.contexts)
    @rule(number=numbers, title=texts, age=st.integers(0, 2))
    def change(self, number, title, age):
        context = self.pick(number)
        attempt = self.store.change_context(OWNER, context.id, {"title": title}, if_match=context.version - age)
        if age:
            with pytest.raises(VersionMismatch) as refusal:
                self.run(attempt)
            assert refusal.value.version == context.version
            return
        self.run(attempt)
        context.title = title
        context.version += 1

    @precondition(lambda self: len(self.contexts) > 1)
    @rule(number=numbers)
    def delete(self, number):
        context = self.pick(number)
        self.run(self.store.delete_context(OWNER, context.id))
        self.contexts.remove(context)
        self.gone += [*context.stale, *([context.writer] if context.writer else [])]
        if context in self.queue:
            self.queue.remove(context)
        with pytest.raises(ContextNotFound):
            self.run(self.store.context(OWNER, context.id))

    # Runs

    @rule(limit=st.integers(1, 3))
    def claim(self, limit):
        claimed = self.run(self.store.claim_runs(limit))
        assert [run.context_id for run, _ in claimed] == [context.id for context in self.queue[:limit]]
        for context, (run, transition) in zip(self.queue, claimed, strict=False):
            assert (run.id, run.attempt) == (context.run_id, 1)
            context.claimed(Writer(self.store, run))
            assert (transition.state, transition.version) == (context.state, context.version)
        del self.queue[:limit]

    @rule(text=texts, chunks=pieces)
    def begin(self, text, chunks):
        """Everything up to the first chunks of a reply, in a context that takes messages."""
        idle = [context for context in self.contexts if context.takes_messages]
        if not idle and len(self.contexts) < MAX_CONTEXTS:
            self.create(None)
            idle = self.contexts[-1:]
        if idle:
            self.post(self.contexts.index(idle[-1]), text)
            self.claim(MAX_CONTEXTS)
            self._append({idle[-1]: (chunks, None)})

    @a_run_is_on
    @rule(number=numbers, chunks=pieces)
    def write(self, number, chunks):
        self._append({self.writing[number % len(self.writing)]: (chunks, None)})

    @a_run_is_on
    @rule(number=numbers, chunks=st.lists(piece, max_size=2), outcome=outcomes)
    def end(self, number, chunks, outcome):
        self._append({self.writing[number % len(self.writing)]: (chunks, outcome)})

    @a_run_is_on
    @rule(batch=st.lists(st.tuples(pieces, st.none() | outcomes), min_size=2, max_size=MAX_CONTEXTS))
    def write_together(self, batch):
        """One group commit of several runs, of which some end."""
        self._append(dict(zip(self.writing, batch, strict=False)))

    def _append(self, wanted):
        appends, tools = [], []
        for context, (chunks, outcome) in wanted.items():
            tools.append(context.writer.open_tools)
            appends.append(context.writer.take(*chunks, outcome=outcome, failure=FAILURE))
        transitions = self.run(self.store.append(appends))
        for context, append, open_tools, transition in zip(wanted, appends, tools, transitions, strict=True):
            self._appended(context, append, open_tools, transition)

    def _appended(self, context, append, open_tools, transition):
        before = context.version
        reply = context.reply
        context.appended(append.chunks, open_tools)
        if append.ending is not None:
            context.ended(append.ending.outcome, FAILURE.code)
        if transition is None:
            assert context.version == before
            return
        assert (transition.state, transition.version) == (context.state, context.version)
        if append.ending is not None:
            ended = transition.ended
            assert (ended.id, ended.status, ended.final_sequence) == (reply.id, reply.status, reply.final_sequence)

    @precondition(lambda self: self.gone or any(context.stale for context in self.contexts))
    @rule(data=st.data(), outcome=st.none() | outcomes)
    def write_to_what_has_ended(self, data, outcome):
        over = self.gone + [writer for context in self.contexts for writer in context.stale]
        self._refuse(data.draw(st.sampled_from(over), label="writer"), outcome)

    @a_run_is_on
    @rule(number=numbers, outcome=st.none() | outcomes, attempts=st.sampled_from([-1, 1]))
    def write_as_another_attempt(self, number, outcome, attempts):
        writer = self.writing[number % len(self.writing)].writer
        self._refuse(replace(writer, run=replace(writer.run, attempt=writer.run.attempt + attempts)), outcome)

    @a_run_is_on
    @rule(number=numbers, outcome=st.none() | outcomes, distance=st.sampled_from([-1, 1, 2]))
    def write_somewhere_else(self, number, outcome, distance):
        writer = self.writing[number % len(self.writing)].writer
        if writer.sequence + distance >= 0:
            self._refuse(replace(writer, sequence=writer.sequence + distance), outcome)

    def _refuse(self, writer: Writer, outcome: Outcome | None) -> None:
        """Nothing of a batch is written in which one run does not own its message, or believes it somewhere else."""
        stale = replace(writer, chunks=list(writer.chunks)).take("stale", outcome=outcome, failure=FAILURE)
        others = [context.writer for context in self.writing if context.writer.run.id != writer.run.id]
        good = [replace(other, chunks=list(other.chunks)).take("good") for other in others]
        with pytest.raises(BatchRefused):
            self.run(self.store.append([*good, stale]))
        standings = [standing for standing, _ in self.run(self.store.standings([*good, stale]))]
        assert standings[:-1] == [Standing.NOT_WRITTEN] * len(good)
        assert standings[-1] is not Standing.NOT_WRITTEN

    # Keeping house

    @precondition(lambda self: self.contexts)
    @rule()
    def compact(self):
        """What has ended is merged; what is read afterwards is what was read before."""
        assert not self.run(self.store.house.compact(-1000, None)).refused

    # Crashes

    @precondition(lambda self: self.contexts and self.steps_of_this_life >= 8)
    @rule()
    def crash(self):
        """The process is killed; the next one ends what was running and finds the rest as it was."""
        self.every_chunk_is_there()
        epoch = self.store.epoch
        self.database.crash()
        self.run(self.opened.aclose())
        running = [context for context in self.contexts if context.writer]
        self.open()
        assert self.store.epoch == epoch
        orphans = self.run(self.store.expired_runs())
        assert {run.context_id for run in orphans} == {context.id for context in running}
        for run in orphans:
            context = next(context for context in running if context.id == run.context_id)
            reply = context.reply
            context.expired()
            transition = self.run(self.store.expire_run(run))
            assert (transition.state, transition.version) == (context.state, context.version)
            assert transition.ended.final_sequence == reply.final_sequence

    # What must be the same

    @invariant()
    def store_and_model_agree(self):
        if not hasattr(self, "store"):
            return
        self.steps_of_this_life += 1
        found = {context.id: context for context in self.run(self.store.contexts(OWNER, limit=200))[0]}
        assert found.keys() == {context.id for context in self.contexts}
        for context in self.contexts:
            self._compare(context, found[context.id])
        running = sum(context.writer is not None for context in self.contexts)
        counted = {"queued": len(self.queue), "running": running}
        assert self.run(self.store.active_runs()) == {status: runs for status, runs in counted.items() if runs}

    def _compare(self, model: ModelContext, found: Context) -> None:
        assert (found.state, found.version, found.title) == (model.state, model.version, model.title)
        assert (found.active_run.id if found.active_run else None) == model.run_id
        assert found.head_message_id == (model.messages[-1].id if model.messages else None)
        messages, following = self.run(self.store.messages(OWNER, model.id, limit=200, include_content=True))
        assert following is None
        assert len(messages) == len(model.messages)
        parent = None
        for message, expected in zip(messages, model.messages, strict=True):
            assert message.parent_id == parent
            parent = message.id
            self._compare_message(expected, message)
        if messages:
            self._compare_chunks(model.id, model.messages[-1])

    def _compare_message(self, expected: ModelMessage, message: Message) -> None:
        assert (message.id, message.role, message.status) == (expected.id, expected.role, expected.status)
        assert message.sequence == message.content_sequence == len(expected.chunks)
        assert (message.final_sequence, message.digest) == (expected.final_sequence, expected.digest)
        assert (message.error.code if message.error else None) == expected.error
        assert message.content == expected.text

    def _compare_chunks(self, context_id: str, expected: ModelMessage) -> None:
        page = self.run(self.store.page(OWNER, context_id, expected.id))
        assert list(page.chunks) == expected.chunks
        assert [chunk.sequence for chunk in page.chunks] == [*range(1, len(expected.chunks) + 1)]

    def every_chunk_is_there(self):
        """Of every message: what was read once reads the same for ever after."""
        for context in self.contexts:
            for message in context.messages:
                self._compare_chunks(context.id, message)


class PostgresStoreMachine(StoreMachine):
    """The same on PostgreSQL."""

    database_kind = OutlivingDatabase


TestStoreMachine = pytest.mark.scenario("content-log", "Log against a model")(StoreMachine.TestCase)
TestPostgresStoreMachine = pytest.mark.scenario("content-log", "Log against a model")(PostgresStoreMachine.TestCase)
TestPostgresStoreMachine.settings = settings(max_examples=max(1, settings().max_examples // 4))
