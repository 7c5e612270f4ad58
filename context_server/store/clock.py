"""The database's clock, by which leases are judged: the clocks of nodes differ, and a paused node's stands still."""

from typing import Any

from sqlalchemy import BigInteger
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement


class database_now_ms(FunctionElement[int]):  # noqa: N801  # It is written as a function in statements.
    """Milliseconds since the Unix epoch, now, and not when the transaction began."""

    type = BigInteger()
    inherit_cache = True


@compiles(database_now_ms, "postgresql")
def _postgresql(_element: database_now_ms, _compiler: SQLCompiler, **_options: Any) -> str:
    return "(extract(epoch FROM clock_timestamp()) * 1000)::bigint"


@compiles(database_now_ms, "sqlite")
def _sqlite(_element: database_now_ms, _compiler: SQLCompiler, **_options: Any) -> str:
    return "CAST((julianday('now') - 2440587.5) * 86400000 AS INTEGER)"
