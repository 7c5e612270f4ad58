"""What clients do to contexts: post, cancel, decide, change, delete. Each is durable when it returns, and then told."""

from collections.abc import Mapping
from typing import Any

from context_server.bus import Bus, CancelRequested, RunDeleted, RunQueued
from context_server.errors import ShuttingDown
from context_server.hub import Hub
from context_server.recent import RecentChunks
from context_server.records import (
    Approval,
    Context,
    ContextChanged,
    ContextDeleted,
    IfBusy,
    Receipt,
    State,
    Transition,
    now,
)
from context_server.store import Store
from context_server.store.approvals import Decision
from context_server.store.exchanges import Post
from context_server.store.idempotency import Once


class Commands:
    """Carries out the commands of clients, on whichever node they arrive; who runs the run is told by a wake-up."""

    def __init__(self, store: Store, recent: RecentChunks, hub: Hub, bus: Bus, *, max_waiting: int) -> None:
        self._store = store
        self._max_waiting = max_waiting
        self._recent = recent
        self._hub = hub
        self._bus = bus
        self.draining = False
        """Whether messages are refused, because this process is about to end."""

    async def post_message(
        self, owner: str, context_id: str, post: Post, *, if_match: int | None, once: Once[Receipt] | None
    ) -> Receipt:
        """Stores the message and queues its reply, or does what the post says for a busy context; durable on return.

        Raises:
            ContextNotFound, VersionMismatch, MessageNotFound, CommandNotAllowed, QueueFull, Replayed,
            IdempotencyKeyReused.
            ShuttingDown: nothing would run it before the next start; the client had better ask that one. Other nodes,
                where there are some, would run it.
        """
        self._refuse_when_stopping()
        receipt, transition = await self._store.post_message(
            owner, context_id, post, if_match=if_match, once=once, max_waiting=self._max_waiting
        )
        if receipt.disposition is not IfBusy.STEER:
            self._open(owner, context_id, receipt.reply_message_id)
        if transition is None:
            self._tell_changed(owner, context_id, receipt.version)
        else:
            self._tell_moved(owner, transition)
        return receipt

    async def regenerate(
        self, owner: str, context_id: str, message_id: str, *, if_match: int | None, once: Once[Receipt] | None
    ) -> Receipt:
        """Queues another reply beside one that is there, or to a user's message.

        Raises:
            ContextNotFound, VersionMismatch, MessageNotFound, CommandNotAllowed, Replayed, IdempotencyKeyReused,
            ShuttingDown.
        """
        self._refuse_when_stopping()
        receipt, transition = await self._store.regenerate(owner, context_id, message_id, if_match=if_match, once=once)
        self._open(owner, context_id, receipt.reply_message_id)
        self._tell_moved(owner, transition)
        return receipt

    async def cancel(self, owner: str, context_id: str, *, if_match: int | None, once: Once[Context] | None) -> Context:
        """Tells what runs or waits to stop; the context as it is then.

        Raises:
            ContextNotFound, VersionMismatch, Replayed, IdempotencyKeyReused.
        """
        context, transition = await self._store.request_cancel(owner, context_id, if_match=if_match, once=once)
        if transition is not None:
            self._tell_moved(owner, transition)
        return context

    async def decide(
        self, owner: str, context_id: str, approval_id: str, decision: Decision, *, if_match: int | None
    ) -> Approval:
        """Approves or denies a call; the run goes on once nothing of it is pending.

        Raises:
            ContextNotFound, VersionMismatch, ApprovalNotFound, ApprovalDecided, ArgumentsNotEditable.
        """
        decided = await self._store.suspension.decide(owner, context_id, approval_id, decision, if_match=if_match)
        if decided.transition is not None:
            self._tell_moved(owner, decided.transition)
        elif decided.version is not None:
            self._tell_changed(owner, context_id, decided.version)
        return decided.approval

    async def remove_waiting(self, owner: str, context_id: str, message_id: str, *, if_match: int | None) -> None:
        """Takes back a message that waits for its turn.

        Raises:
            ContextNotFound, VersionMismatch, WaitingNotFound.
        """
        version, reply_message_id = await self._store.suspension.remove_waiting(
            owner, context_id, message_id, if_match=if_match
        )
        self._hub.release_message(context_id, reply_message_id)
        self._tell_changed(owner, context_id, version)

    def _refuse_when_stopping(self) -> None:
        if self.draining and not self._store.shared:
            raise ShuttingDown

    def _open(self, owner: str, context_id: str, reply_message_id: str) -> None:
        """Has heartbeats carry the head of a reply; where other nodes may run it, it is opened where that is known."""
        if not self._store.shared:
            self._hub.open_message(owner, context_id, reply_message_id)

    def _tell_changed(self, owner: str, context_id: str, version: int) -> None:
        self._hub.publish(owner, ContextChanged(context_id=context_id, version=version, timestamp=now()))

    def _tell_moved(self, owner: str, transition: Transition) -> None:
        """Tells subscribers and runners what a command has moved."""
        self._hub.publish_transition(owner, transition)
        for moved in (transition, transition.promoted):
            if moved is None or moved.run_id is None:
                continue
            if moved.state is State.QUEUED:
                self._bus.publish(RunQueued())
            else:
                self._bus.publish(CancelRequested(moved.run_id))

    async def change_context(
        self, owner: str, context_id: str, changes: Mapping[str, Any], *, if_match: int | None
    ) -> Context:
        """The context with ``changes``; subscribers are told that there are some.

        Raises:
            ContextNotFound, VersionMismatch, MessageNotFound, CommandNotAllowed.
        """
        context = await self._store.change_context(owner, context_id, changes, if_match=if_match)
        if changes:
            signal = ContextChanged(context_id=context_id, version=context.version, timestamp=context.updated_at)
            self._hub.publish(owner, signal)
        return context

    async def delete_context(self, owner: str, context_id: str, *, if_match: int | None) -> None:
        """Deletes the context with its messages, stopping what runs and ending its streams.

        Raises:
            ContextNotFound, VersionMismatch.
        """
        context = await self._store.delete_context(owner, context_id, if_match=if_match)
        self.context_is_gone(owner, context_id, context.version + 1)
        if context.active_run is not None:
            self._bus.publish(RunDeleted(context.active_run.id))

    def context_is_gone(self, owner: str, context_id: str, version: int) -> None:
        """Forgets a context that was deleted at a version, and ends its streams."""
        self._recent.forget_context(context_id)
        self._hub.publish(owner, ContextDeleted(context_id=context_id, version=version, timestamp=now()))
