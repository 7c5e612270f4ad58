"""Which contexts somebody on this node wants to hear of."""

import asyncio
import zlib
from collections import Counter

SHARDS = 64
"""Few enough to subscribe to all of them, many enough to leave most of the traffic of a large installation out."""


def shard_of(context_id: str) -> int:
    """The shard of a context, 0 to 63: the same on every node and in every version."""
    return zlib.crc32(context_id.encode()) % SHARDS


class Interest:
    """Counted interest, by shard. ``changed`` is set whenever ``shards`` may have changed."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self._all = 0
        self.changed = asyncio.Event()

    def shards(self) -> frozenset[int]:
        """The shards that have to be heard."""
        return frozenset(range(SHARDS) if self._all else self._counts)

    def follow(self, context_id: str) -> None:
        """One more for a context."""
        shard = shard_of(context_id)
        self._counts[shard] += 1
        if self._counts[shard] == 1:
            self.changed.set()

    def unfollow(self, context_id: str) -> None:
        """One less; without any nothing happens."""
        shard = shard_of(context_id)
        if self._counts[shard] > 1:
            self._counts[shard] -= 1
        else:
            del self._counts[shard]
            self.changed.set()

    def follow_all(self) -> None:
        """One more for everything."""
        self._all += 1
        self.changed.set()

    def unfollow_all(self) -> None:
        """One less."""
        self._all = max(0, self._all - 1)
        self.changed.set()
