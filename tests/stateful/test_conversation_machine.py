"""Random conversations with every room open: agents, cancels, lost signals and crashes against what must hold."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from context_server.app import drain, open_rooms
from context_server.errors import CommandNotAllowed
from context_server.metrics import Metrics
from context_server.records import ChunkKind, Delta, MessageStatus, Role, State
from context_server.settings import Settings
from context_server.storable import clean_text
from context_server.store.exchanges import Post
from tests.stateful.crashing import CrashingDatabase
from tests.stateful.reader import OWNER, Reader
from tests.stateful.scripted import ScriptedAgent, Step, Stop
from tests.store.writing import sha256

T = TypeVar("T")

MAX_CONTEXTS = 3
DEADLINE_SECONDS = 10.0
numbers = st.integers(0, 5)
texts = st.text(min_size=1, max_size=8)
steps = st.lists(
    st.one_of(
        texts,
        texts.map(lambda text: Delta(ChunkKind.REASONING, text)),
        st.just(Delta(ChunkKind.TOOL_CALL, data={"id": "1", "name": "look", "arguments": {}})),
        st.just(Delta(ChunkKind.TOOL_RESULT, data={"id": "1", "status": "ok", "result": None})),
    ),
    min_size=1,
    max_size=6,
)
an_old_process = precondition(lambda self: self.conversations and self.steps_of_this_life >= 6)


@dataclass
class Reply:
    """What the test knows of a reply: what its agent was told, and what was done to it."""

    id: str
    script: list[Step] = field(default_factory=list)
    cancelled: bool = False
    interrupted: bool = False

    @property
    def over(self) -> bool:
        return bool(self.script) and isinstance(self.script[-1], Stop)


@dataclass
class Conversation:
    """A context and its replies; its readers are elsewhere, since they outlive it."""

    id: str
    replies: list[Reply] = field(default_factory=list)


class ConversationMachine(RuleBasedStateMachine):
    """What is done does not depend on how far the rooms are, so that an example can be played again."""

    recent_chunk_bytes = 900

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.database = CrashingDatabase()
        self.agent = ScriptedAgent()
        self.conversations: list[Conversation] = []
        self.readers: list[Reader] = []
        self.steps_of_this_life = 0

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    @initialize()
    def open(self) -> None:
        settings = Settings(
            database=self.database.url,
            signal_patience_ms=0,
            recent_chunk_bytes=self.recent_chunk_bytes,
            max_pending_bytes=1024,
            cancel_grace_seconds=5,
        )
        self.steps_of_this_life = 0
        self.opened = contextlib.AsyncExitStack()
        self.rooms = self.run(self.opened.enter_async_context(open_rooms(settings, self.agent, Metrics())))

    def teardown(self) -> None:
        with self.runner, self.database:
            if hasattr(self, "rooms"):
                try:
                    self.everybody_converges()
                finally:
                    self.run(self.opened.aclose())
                self.database.check_integrity()

    async def until(self, reached: Callable[[], Coroutine[Any, Any, bool]]) -> None:
        """Waits for a condition; that it is never reached is a state that is stuck."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not await reached():  # noqa: ASYNC110  # The rooms have no event for it.
                await asyncio.sleep(0.001)

    def pick(self, number: int) -> Conversation:
        return self.conversations[number % len(self.conversations)]

    # Commands

    @precondition(lambda self: len(self.conversations) < MAX_CONTEXTS)
    @rule()
    def create(self):
        context = self.run(self.rooms.store.create_context(OWNER))
        self.conversations.append(Conversation(context.id))
        self.readers.append(Reader(context.id))
        self.run(self.readers[-1].connect(self.rooms))

    @precondition(lambda self: self.conversations)
    @rule(number=numbers, text=texts, script=steps, end=st.sampled_from([None, None, *Stop]))
    def post(self, number, text, script, end):
        """Posts a message, for whose reply the agent is told how to begin; a busy context refuses it."""
        conversation = self.pick(number)
        post = Post(text=clean_text(text))
        with contextlib.suppress(CommandNotAllowed):
            receipt = self.run(self.rooms.commands.post_message(OWNER, conversation.id, post, if_match=None, once=None))
            self._posted(conversation, Reply(receipt.reply_message_id), [*script, *([end] if end else [])])

    def _posted(self, conversation: Conversation, new: Reply, script: list[Step]) -> None:
        assert all(reply.over or reply.cancelled or reply.interrupted for reply in conversation.replies)
        conversation.replies.append(new)
        self._tell(new, *script)

    def _tell(self, reply: Reply, *script: Step) -> None:
        if reply.over:
            return
        for step in script:
            reply.script.append(step)
            self.agent.tell(reply.id, step)

    @precondition(lambda self: self.conversations)
    @rule(number=numbers, script=steps, end=st.sampled_from([None, None, None, *Stop]))
    def write(self, number, script, end):
        """The agent of the newest reply goes on."""
        conversation = self.pick(number)
        if conversation.replies:
            self._tell(conversation.replies[-1], *script, *([end] if end else []))

    @precondition(lambda self: self.conversations)
    @rule(number=numbers)
    def cancel(self, number):
        conversation = self.pick(number)
        if conversation.replies:
            conversation.replies[-1].cancelled = True
        context = self.run(self.rooms.commands.cancel(OWNER, conversation.id, if_match=None, once=None))
        assert context.state in (State.IDLE, State.FAILED, State.CANCELLING)

    @precondition(lambda self: len(self.conversations) > 1)
    @rule(number=numbers)
    def delete(self, number):
        conversation = self.pick(number)
        self.run(self.rooms.commands.delete_context(OWNER, conversation.id, if_match=None))
        self.conversations.remove(conversation)

    @rule(turns=st.integers(1, 40))
    def let_time_pass(self, turns):
        """The event loop goes round, so that commits, agents and signals get somewhere."""

        async def go_round():
            for _ in range(turns):
                await asyncio.sleep(0)

        self.run(go_round())

    @rule()
    def settle(self):
        """Every agent has said what it was told, and all of it is durable."""
        self.run(self.until(self._settled))

    async def _settled(self) -> bool:
        for conversation in self.conversations:
            for reply in conversation.replies[-1:]:
                message = await self.rooms.store.message(OWNER, conversation.id, reply.id)
                told = clean_text("".join(step for step in reply.script if isinstance(step, str)))
                if not message.status.ended and (message.content != told or reply.over or reply.cancelled):
                    return False
        return True

    # Readers

    @precondition(lambda self: self.readers)
    @rule(number=numbers)
    def read(self, number):
        self.run(self.readers[number % len(self.readers)].read(self.rooms))

    @precondition(lambda self: self.readers)
    @rule(number=numbers)
    def lose_signals(self, number):
        self.readers[number % len(self.readers)].lose_signals()

    @precondition(lambda self: self.readers)
    @rule(number=numbers)
    def reconnect(self, number):
        self.run(self.readers[number % len(self.readers)].connect(self.rooms))

    @precondition(lambda self: self.conversations and len(self.readers) < 6)
    @rule(number=numbers)
    def another_reader(self, number):
        reader = Reader(self.pick(number).id)
        self.readers.append(reader)
        self.run(reader.connect(self.rooms))

    @precondition(lambda self: self.readers)
    @rule(number=numbers)
    def heartbeat(self, number):
        self.run(self.readers[number % len(self.readers)].heartbeat(self.rooms))

    # Ends of the process

    @an_old_process
    @rule()
    def crash(self):
        """Killed, with commits under way; the next process begins with what was on disk."""

        async def killed() -> dict[str, str]:
            # In the writer's thread nothing is written or checkpointed meanwhile, so the copy is of one moment.
            await self.rooms.store._write(lambda _: self.database.crash())
            return dict(self.agent.written)

        for reader in self.readers:
            reader.disconnect()
        self._begin_again(self.run(killed()))

    @an_old_process
    @rule(grace=st.sampled_from([0, 0.01]))
    def restart(self, grace):
        """Stopped by a signal: what does not end in time is interrupted."""
        for reader in self.readers:
            reader.disconnect()
        self.run(drain(self.rooms, grace))
        self._begin_again(self.agent.written)

    def _begin_again(self, written: dict[str, str]) -> None:
        self.run(self.opened.aclose())
        for conversation in self.conversations:
            for reply in conversation.replies[-1:]:
                reply.interrupted = True
        scripts = {reply.id: reply.script for conversation in self.conversations for reply in conversation.replies}
        self.agent = ScriptedAgent(scripts)
        self.agent.written |= written
        self.open()
        for reader in self.readers:
            self.run(reader.connect(self.rooms))

    # What holds always

    @invariant()
    def clients_hold_prefixes(self):
        if hasattr(self, "rooms"):
            self.steps_of_this_life += 1
            self.run(self._check_prefixes())

    async def _check_prefixes(self) -> None:
        for conversation in self.conversations:
            for reply in conversation.replies[-2:]:
                held = [reader.held[reply.id] for reader in self.readers if reply.id in reader.held]
                message = await self.rooms.store.message(OWNER, conversation.id, reply.id)
                assert message.content is not None
                assert clean_text(self.agent.written.get(reply.id, "")).startswith(message.content)
                for each in held:
                    assert message.content.startswith(each.text)
                    assert each.sequence <= message.sequence

    def everybody_converges(self) -> None:
        """Agents stop, signals arrive: all readers, old and new, hold the whole log and know how each reply ended."""
        for conversation in self.conversations:
            for reply in conversation.replies:
                self._tell(reply, Stop.RETURN)
        self.run(self.until(self._quiet))
        self.run(self._check_convergence())

    async def _quiet(self) -> bool:
        """No run is left in the database, nor one here whose end is durable and not told of yet."""
        here = self.rooms.metrics.registry.get_sample_value("context_server_active_runs")
        return not here and await self.rooms.store.active_runs() == {}

    async def _check_convergence(self) -> None:
        for conversation in self.conversations:
            context = await self.rooms.store.context(OWNER, conversation.id)
            assert context.state in (State.IDLE, State.FAILED)
            assert self.rooms.hub.heads(OWNER, [conversation.id]) == []
            fresh = Reader(conversation.id)
            await fresh.connect(self.rooms)
            readers = [fresh, *(reader for reader in self.readers if reader.context_id == conversation.id)]
            for reader in readers:
                await reader.read(self.rooms)
                await reader.heartbeat(self.rooms)
                assert (reader.state, reader.version) == (context.state, context.version)
                for reply in conversation.replies[:-1] if reader is fresh else []:
                    await reader.pull(self.rooms, reply.id)
                await self._compare(conversation, reader)
                reader.disconnect()
        for reader in self.readers:
            await reader.read(self.rooms)
            await reader.heartbeat(self.rooms)
            assert reader.deleted == all(conversation.id != reader.context_id for conversation in self.conversations)

    async def _compare(self, conversation: Conversation, reader: Reader) -> None:
        messages, _ = await self.rooms.store.messages(OWNER, conversation.id, limit=200, include_content=True)
        replies = [message for message in messages if message.role is Role.ASSISTANT]
        assert [message.id for message in replies] == [reply.id for reply in conversation.replies]
        for message, reply in zip(replies, conversation.replies, strict=True):
            self._check_ending(message, reply)
            held = reader.held.get(message.id)
            # A reply that came and went while a reader was away is told of by its ending, and pulled then.
            if held is None and message.sequence:
                await reader.pull(self.rooms, message.id)
                held = reader.held[message.id]
            if held is not None:
                assert (held.text, held.sequence) == (message.content, message.sequence)
                assert (held.status, held.digest) == (message.status, sha256(held.text))

    def _check_ending(self, message, reply) -> None:
        """A reply ends as it was ended: by its agent, by a cancel, or by the end of its process."""
        match message.status:
            case MessageStatus.COMPLETED:
                assert reply.script[-1] is Stop.RETURN
                assert message.content == clean_text(self.agent.written[reply.id])
            case MessageStatus.CANCELLED:
                assert reply.cancelled
            case MessageStatus.FAILED if message.error.code == "agent-error":
                assert reply.script[-1] is Stop.RAISE
                assert message.content == clean_text(self.agent.written[reply.id])
            case MessageStatus.FAILED:
                assert message.error.code == "interrupted"
                assert reply.interrupted
            case other:
                pytest.fail(f"a reply is still {other}")


TestConversationMachine = pytest.mark.scenario("resume", "Conversation against a model")(ConversationMachine.TestCase)
