"""What clients do to contexts: post, cancel, change, delete. Each is durable when it returns, and then told."""

from collections.abc import Mapping
from typing import Any

from context_server.bus import Bus, CancelRequested, RunDeleted, RunQueued
from context_server.errors import ShuttingDown
from context_server.hub import Hub
from context_server.recent import RecentChunks
from context_server.records import Context, ContextChanged, ContextDeleted, Receipt, now
from context_server.store import Store
from context_server.store.conversations import Post
from context_server.store.idempotency import Once


class Commands:
    """Carries out the commands of clients, on whichever node they arrive; who runs the run is told by a wake-up."""

    def __init__(self, store: Store, recent: RecentChunks, hub: Hub, bus: Bus) -> None:
        self._store = store
        self._recent = recent
        self._hub = hub
        self._bus = bus
        self.draining = False
        """Whether messages are refused, because this process is about to end."""

    async def post_message(
        self, owner: str, context_id: str, post: Post, *, if_match: int | None, once: Once[Receipt] | None
    ) -> Receipt:
        """Stores the message and queues its reply; both are durable when this returns.

        Raises:
            ContextNotFound, VersionMismatch, CommandNotAllowed, Replayed, IdempotencyKeyReused.
            ShuttingDown: nothing would run it before the next start; the client had better ask that one. Other nodes,
                where there are some, would run it.
        """
        if self.draining and not self._store.shared:
            raise ShuttingDown
        receipt, transition = await self._store.post_message(owner, context_id, post, if_match=if_match, once=once)
        if not self._store.shared:  # Else another node may run it: the message is opened where that is known.
            self._hub.open_message(owner, context_id, receipt.reply_message_id)
        self._hub.publish_transition(owner, transition)
        self._bus.publish(RunQueued())
        return receipt

    async def cancel(self, owner: str, context_id: str, *, if_match: int | None, once: Once[Context] | None) -> Context:
        """Tells what runs or waits to stop; the context as it is then.

        Raises:
            ContextNotFound, VersionMismatch, Replayed, IdempotencyKeyReused.
        """
        context, transition = await self._store.request_cancel(owner, context_id, if_match=if_match, once=once)
        if transition is None:
            return context
        self._hub.publish_transition(owner, transition)
        if transition.run_id is not None:
            self._bus.publish(CancelRequested(transition.run_id))
        return context

    async def change_context(
        self, owner: str, context_id: str, changes: Mapping[str, Any], *, if_match: int | None
    ) -> Context:
        """The context with ``changes``; subscribers are told that there are some.

        Raises:
            ContextNotFound, VersionMismatch.
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
