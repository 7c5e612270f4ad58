"""For the people who run it: is it alive, is it ready, what does it count."""

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from context_server import __version__
from context_server.api import schemas
from context_server.api.contexts import JSON
from context_server.api.problems import NotReady
from context_server.api.requests import rooms_of
from context_server.metrics import CONTENT_TYPE
from context_server.store.transactions import Readiness

_READY_SECONDS = 3.0
"""Time for the database to answer: whoever asks whether we are ready has little patience."""
_FRESH = {"Cache-Control": "no-store"}


async def healthz(_request: Request) -> Response:
    """The process answers."""
    return Response(schemas.dump(schemas.Health(version=__version__)), media_type=JSON, headers=_FRESH)


async def readyz(request: Request) -> Response:
    """The process can do its work: the database answers, nothing is broken, it is not stopping."""
    rooms = rooms_of(request)
    try:
        async with asyncio.timeout(_READY_SECONDS):
            readiness, runs = await rooms.store.readiness(), await rooms.store.active_runs()
    except TimeoutError:
        raise NotReady(f"The database does not answer within {_READY_SECONDS:g} s.") from None
    if readiness.failure is not None:
        raise NotReady(readiness.failure)
    if rooms.commands.draining:
        raise NotReady("The server is shutting down.")
    ready = schemas.Ready(
        database=readiness.database,
        database_version=readiness.version,
        schema_revision=readiness.revision,
        epoch=rooms.store.epoch,
        agent=rooms.agent_name,
        runs=schemas.ActiveRuns.model_validate(runs),
        bus=schemas.BusFacts.model_validate({"kind": rooms.bus.kind, "state": rooms.bus.state.value}),
        node_id=rooms.store.node_id,
        sqlite=_sqlite_facts(readiness),
        worker=rooms.worker,
    )
    return Response(schemas.dump(ready), media_type=JSON, headers=_FRESH)


def _sqlite_facts(readiness: Readiness) -> schemas.SQLiteFacts | None:
    if readiness.sqlite_has_wal_bug is None:
        return None
    return schemas.SQLiteFacts(version=readiness.version, has_wal_bug=readiness.sqlite_has_wal_bug)


async def metrics(request: Request) -> Response:
    """Every metric in Prometheus's text format."""
    body = rooms_of(request).metrics.exposition()
    return Response(body, headers={"Content-Type": CONTENT_TYPE, **_FRESH})
