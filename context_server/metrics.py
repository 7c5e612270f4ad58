"""What the person on call can count; numbers and names only, never a word of what was said.

A registry of its own for each application, so that several can live in one process. Workers of one supervisor keep
their values in files that all of them read, so that each of them shows the sum.
"""

import os
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_CHUNKS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)


def share_values(directory: Path, worker: int) -> None:
    """Has this process keep its values in files of ``directory``, which ``Metrics(directory)`` of any worker sums up.

    To be called before the first ``Metrics`` is made: a value chooses its place when it is made. The files bear the
    worker's number, not that of its process. So whoever takes the place of a worker goes on with its counts, counters
    never go back, and the files stay few however many workers die. A number must belong to one process at a time.
    """
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)  # The library looks here whenever it opens a file.
    values.ValueClass = values.MultiProcessValue(lambda: worker)  # type: ignore[no-untyped-call]  # as its docs have it


def forget_worker(directory: Path, worker: int) -> None:
    """Takes what a dead worker had open or running out of the sums, and leaves what it has counted."""
    mark_process_dead(worker, str(directory))  # type: ignore[no-untyped-call]  # untyped in the library


class Metrics:
    """Every metric of the server; with ``shared`` it shows those of all workers whose values lie in that directory."""

    def __init__(self, shared: Path | None = None) -> None:
        self.registry = CollectorRegistry()
        self._shown = self.registry
        if shared is not None:
            self._shown = CollectorRegistry()
            MultiProcessCollector(self._shown, str(shared))  # type: ignore[no-untyped-call]  # untyped in the library
        registry = self.registry
        self.open_streams = Gauge(
            "context_server_open_streams", "SSE streams open now.", registry=registry, multiprocess_mode="livesum"
        )
        self.active_runs = Gauge(
            "context_server_active_runs", "Runs driven now.", registry=registry, multiprocess_mode="livesum"
        )
        self.runs_ended = Counter(
            "context_server_runs_ended",
            "Runs ended, by outcome and error code.",
            ["outcome", "code"],
            registry=registry,
        )
        self.chunks_committed = Counter("context_server_chunks_committed", "Chunks made durable.", registry=registry)
        self.bytes_committed = Counter(
            "context_server_bytes_committed", "Bytes of content made durable.", registry=registry
        )
        self.commit_chunks = Histogram(
            "context_server_commit_chunks", "Chunks in one group commit.", buckets=_CHUNKS, registry=registry
        )
        self.commit_seconds = Histogram(
            "context_server_commit_seconds", "Time of one group commit.", buckets=_SECONDS, registry=registry
        )
        self.commit_failures = Counter(
            "context_server_commit_failures",
            "Group commits that failed and were repeated, by code.",
            ["code"],
            registry=registry,
        )
        self.recent_bytes = Gauge(
            "context_server_recent_bytes",
            "Memory held by recently committed chunks.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.pulls = Counter("context_server_pulls", "Pulls answered, by source.", ["source"], registry=registry)
        self.pulls_from_memory = self.pulls.labels("memory")
        self.pulls_from_relay = self.pulls.labels("relay")
        self.pulls_from_database = self.pulls.labels("database")
        self.relay_read_seconds = Histogram(
            "context_server_relay_read_seconds",
            "Time of one read of what other nodes have written.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.relay_read_contexts = Histogram(
            "context_server_relay_read_contexts",
            "Contexts in one read of what other nodes have written.",
            buckets=_CHUNKS,
            registry=registry,
        )
        self.signals_sent = Counter(
            "context_server_signals_sent", "Signals handed to streams, by type.", ["type"], registry=registry
        )
        self.signals_sent_by_type = {
            kind: self.signals_sent.labels(kind)
            for kind in ("state_changed", "content_delta", "message_completed", "context_changed", "context_deleted")
        }
        self.signals_merged = Counter(
            "context_server_signals_merged", "Signals replaced by a newer one before they were sent.", registry=registry
        )
        self.chunks_compacted = Counter(
            "context_server_chunks_compacted", "Chunks of ended messages merged into segments.", registry=registry
        )
        self.contexts_expired = Counter(
            "context_server_contexts_expired", "Contexts deleted for want of activity.", registry=registry
        )
        self.housekeeping_seconds = Counter(
            "context_server_housekeeping_seconds", "Time spent keeping house, by chore.", ["chore"], registry=registry
        )
        self.wake_ups_sent = Counter(
            "context_server_wake_ups_sent", "Wake-ups sent to other nodes, after merging.", ["bus"], registry=registry
        )
        self.wake_ups_received = Counter(
            "context_server_wake_ups_received", "Wake-ups heard from other nodes.", ["bus"], registry=registry
        )
        self.wake_ups_dropped = Counter(
            "context_server_wake_ups_dropped", "Wake-ups not sent or not read.", ["bus", "reason"], registry=registry
        )
        self.bus_reconnects = Counter(
            "context_server_bus_reconnects", "Times that other nodes were heard again.", ["bus"], registry=registry
        )
        self.bus_connected = Gauge(
            "context_server_bus_connected",
            "Whether other nodes are heard now; of several workers, whether all hear them.",
            ["bus"],
            registry=registry,
            multiprocess_mode="livemin",
        )
        self.problems = Counter(
            "context_server_problems", "Problem documents answered, by code.", ["code"], registry=registry
        )

    def exposition(self) -> bytes:
        """Every metric in Prometheus's text format."""
        return generate_latest(self._shown)
