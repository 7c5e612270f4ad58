"""Answers pulls: from memory where it holds what is asked for, else from the database.

Where other nodes write too, memory may fall behind. A pull that it cannot answer for sure waits for the relay's next
read, which answers all who wait at once; the first pull of a message that another node writes fills memory, for all who
come meanwhile.
"""

import asyncio

from context_server.metrics import Metrics
from context_server.recent import RecentChunks
from context_server.records import Page
from context_server.relay import Relay
from context_server.store import Store


class Reader:
    """Answers pulls; ``relay`` is None where no other node writes."""

    def __init__(
        self,
        store: Store,
        recent: RecentChunks,
        metrics: Metrics,
        *,
        max_page_bytes: int,
        relay: Relay | None = None,
    ) -> None:
        self._store = store
        self._recent = recent
        self._metrics = metrics
        self._max_page_bytes = max_page_bytes
        self._relay = relay
        self._openings: dict[str, asyncio.Task[Page]] = {}

    def recent_page(
        self,
        owner: str,
        context_id: str,
        message_id: str,
        from_sequence: int,
        to_sequence: int | None,
        *,
        is_watched: bool = False,
    ) -> Page | None:
        """The answer of a pull from memory; None when the database must be asked.

        ``is_watched``: whoever asks will be told when the message grows, and takes nothing new for an answer.
        """
        if self._relay is not None:
            tail = self._recent.find(message_id)
            if tail is None or not self._relay.pulled.trusts(tail, from_sequence, is_watched=is_watched):
                return None
            if tail.followed and tail.final_sequence is None:
                self._relay.pulled.note(tail)
        page = self._recent_page(owner, context_id, message_id, from_sequence, to_sequence)
        if page is not None:
            self._metrics.pulls_from_memory.inc()
        return page

    async def page(
        self,
        owner: str,
        context_id: str,
        message_id: str,
        from_sequence: int,
        to_sequence: int | None = None,
        *,
        is_watched: bool = False,
    ) -> Page:
        """The answer of a pull, from memory where it holds it, else by one keyed range read or by the relay's next.

        Raises:
            ContextNotFound, MessageNotFound, SequenceAhead.
        """
        page = self.recent_page(owner, context_id, message_id, from_sequence, to_sequence, is_watched=is_watched)
        if page is None and self._relay is not None:
            page = await self._relayed_page(self._relay, owner, context_id, message_id, from_sequence, to_sequence)
        if page is not None:
            return page
        self._metrics.pulls_from_database.inc()
        return await self._store.page(
            owner,
            context_id,
            message_id,
            from_sequence=from_sequence,
            to_sequence=to_sequence,
            max_bytes=self._max_page_bytes,
        )

    def _recent_page(
        self, owner: str, context_id: str, message_id: str, from_sequence: int, to_sequence: int | None
    ) -> Page | None:
        return self._recent.page(
            owner,
            context_id,
            message_id,
            from_sequence=from_sequence,
            to_sequence=to_sequence,
            max_bytes=self._max_page_bytes,
        )

    # What other nodes write

    async def _relayed_page(
        self,
        relay: Relay,
        owner: str,
        context_id: str,
        message_id: str,
        from_sequence: int,
        to_sequence: int | None,
    ) -> Page | None:
        """The answer of a pull that memory could not answer for sure; None when it has to be read by itself."""
        if self._recent.find(message_id) is None:
            opening = self._openings.get(message_id)
            if opening is None:
                return await self._open(relay, owner, context_id, message_id, from_sequence, to_sequence)
            await asyncio.wait([opening])
            page = self.recent_page(owner, context_id, message_id, from_sequence, to_sequence)
            if page is not None:
                return page
        tail = self._recent.find(message_id)
        if tail is None or (tail.owner, tail.context_id) != (owner, context_id):
            return None
        if tail.is_written_here or from_sequence + 1 < tail.first:
            return None
        await relay.catch_up(tail)
        page = self._recent_page(owner, context_id, message_id, from_sequence, to_sequence)
        if page is not None:
            self._metrics.pulls_from_relay.inc()
        return page

    async def _open(
        self,
        relay: Relay,
        owner: str,
        context_id: str,
        message_id: str,
        from_sequence: int,
        to_sequence: int | None,
    ) -> Page:
        """The answer of the first pull of a message, which fills memory when another node is writing it."""

        async def work() -> Page:
            started = relay.clock()
            opening = await self._store.following.opening(
                owner,
                context_id,
                message_id,
                from_sequence=from_sequence,
                to_sequence=to_sequence,
                max_bytes=self._max_page_bytes,
            )
            relay.opened(owner, opening, started)
            return opening.page

        self._metrics.pulls_from_database.inc()
        task = asyncio.create_task(work(), name="first pull")
        self._openings[message_id] = task
        task.add_done_callback(lambda _: self._opened(message_id))
        return await asyncio.shield(task)

    def _opened(self, message_id: str) -> None:
        task = self._openings.pop(message_id)
        if not task.cancelled():
            task.exception()  # Marks it as seen: whoever asked may be gone.
