"""Recent chunks of contexts that are deleted: what they leave behind is bounded, and in nobody's way."""

from collections import deque

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from context_server.metrics import Metrics
from context_server.recent import RecentChunks, cost_of
from context_server.records import Chunk, ChunkKind
from tests.unit.rooms import OWNER

MESSAGES = "abcd"
COST = cost_of(Chunk(1, ChunkKind.TEXT, "x" * 10))


def add(recent: RecentChunks, message_id: str, head: int, count: int) -> int:
    """Adds ``count`` chunks of ``COST`` bytes after ``head``; the new head."""
    chunks = tuple(Chunk(head + number, ChunkKind.TEXT, "x" * 10) for number in range(1, count + 1))
    recent.add(message_id, chunks)
    return head + count


def is_held(recent: RecentChunks, message_id: str, head: int, count: int) -> bool:
    """Whether exactly the newest ``count`` chunks of a message can be pulled from memory."""
    context_id = f"context of {message_id}"

    def page(start: int) -> bool:
        return (
            recent.page(OWNER, context_id, message_id, from_sequence=start, to_sequence=None, max_bytes=0) is not None
        )

    return page(head - count) and (count == head or not page(head - count - 1))


@pytest.mark.scenario("content-log", "Recent chunks are bounded")
def test_what_deleted_contexts_leave_behind_does_not_pile_up() -> None:
    metrics = Metrics()
    recent = RecentChunks(1_000 * COST, metrics)
    recent.open(OWNER, "context of kept", "kept", 0)
    head = add(recent, "kept", 0, 10)
    for number in range(500):
        recent.open(OWNER, f"context of {number}", str(number), 0)
        add(recent, str(number), 0, 3)
        recent.forget_context(f"context of {number}")
        assert len(recent._order) <= 2 * head
    assert metrics.registry.get_sample_value("context_server_recent_bytes") == head * COST
    assert is_held(recent, "kept", head, head)


@pytest.mark.scenario("content-log", "Recent chunks are bounded")
@given(
    room=st.integers(0, 12),
    steps=st.lists(st.tuples(st.sampled_from(MESSAGES), st.integers(1, 5) | st.none()), max_size=40),
)
@example(room=12, steps=[("a", 3), ("b", 5), ("a", None), ("c", 5), ("b", 4), ("d", 5)])
def test_memory_after_deletions_is_as_if_what_was_deleted_had_never_been(
    room: int, steps: list[tuple[str, int | None]]
) -> None:
    """``steps`` add some chunks to a message, or (None) delete its context, after which it begins anew."""
    metrics = Metrics()
    recent = RecentChunks(room * COST, metrics)
    heads = dict.fromkeys(MESSAGES, 0)
    held: deque[str] = deque()
    for message_id in MESSAGES:
        recent.open(OWNER, f"context of {message_id}", message_id, 0)
    for message_id, count in steps:
        if count is None:
            recent.forget_context(f"context of {message_id}")
            recent.open(OWNER, f"context of {message_id}", message_id, 0)
            heads[message_id] = 0
            held = deque(other for other in held if other != message_id)
        else:
            heads[message_id] = add(recent, message_id, heads[message_id], count)
            held.extend([message_id] * count)
            while len(held) > room:
                held.popleft()
        assert (metrics.registry.get_sample_value("context_server_recent_bytes") or 0) == len(held) * COST
        assert all(is_held(recent, other, head, held.count(other)) for other, head in heads.items())
        assert len(recent._order) <= 2 * len(held) + 1
        assert recent._forgotten == sum(tail.forgotten for tail in recent._order)
