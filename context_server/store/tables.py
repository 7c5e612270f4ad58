"""The nouns as tables, and the invariants as constraints: what the code promises, the database holds too.

Times are integer milliseconds since the Unix epoch. ``migrations/`` builds the same schema step by step, and a test
compares the two.
"""

from enum import StrEnum

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

from context_server.machine import BUSY
from context_server.records import ApprovalStatus, ChunkKind, MessageStatus, Mode, Role, RunStatus, State

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def one_of(column: str, values: type[StrEnum] | frozenset[State]) -> str:
    """``state IN ('idle', …)``, in a stable order, for a CHECK."""
    return f"{column} IN ({', '.join(sorted(repr(str(value)) for value in values))})"


# Rows that every commit updates: with room on their page, an update touches no index (PostgreSQL's HOT updates).
_ROOM_TO_UPDATE = {"fillfactor": 70}

ACTIVE_RUN = "status IN ('queued', 'running', 'suspended')"
ENDED_MESSAGE = "status IN ('cancelled', 'completed', 'failed')"
WITHOUT_RUN = "active_run_id IS NULL"
PENDING = "status = 'pending'"
SHARES_CONTENT = "content_id IS NOT NULL"
STEERS = "steers_run_id IS NOT NULL"
WORTH_COMPACTING = "final_sequence >= 8 AND compacted_sequence < final_sequence"
"""A segment costs as much as a few chunks. In the index ``sequence`` must not be: it moves with every append."""
NOBODY = ""
"""The owner of a context that has expired: its rows are being deleted, and no request finds them."""

server_facts = Table(
    "server_facts",
    metadata,
    Column("name", String(40), primary_key=True),
    Column("value", Text, nullable=False),
)

contexts = Table(
    "contexts",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("owner", String(200), nullable=False),
    Column("title", Text),
    Column("mode", String(8), nullable=False),
    Column("state", String(20), nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("message_count", BigInteger, nullable=False),
    Column("head_message_id", String(36)),
    Column("active_run_id", String(36)),
    Column("metadata", JSON, nullable=False),
    # The model that writes its replies, where it is not the agent's own.
    Column("model", String(200)),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    CheckConstraint(one_of("state", State), name="state_known"),
    CheckConstraint(one_of("mode", Mode), name="mode_known"),
    CheckConstraint(f"({one_of('state', BUSY)}) = (active_run_id IS NOT NULL)", name="busy_has_run"),
    CheckConstraint("version >= 1", name="version_positive"),
    Index(None, "owner", "updated_at", "id"),
    Index(
        "ix_contexts_inactive",
        "updated_at",
        "id",
        sqlite_where=text(WITHOUT_RUN),
        postgresql_where=text(WITHOUT_RUN),
    ),
    postgresql_with=_ROOM_TO_UPDATE,
)

messages = Table(
    "messages",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("context_id", String(36), ForeignKey("contexts.id", ondelete="CASCADE"), nullable=False),
    Column("position", BigInteger, nullable=False),
    Column("parent_id", String(36)),
    Column("role", String(10), nullable=False),
    Column("status", String(10), nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("content_bytes", BigInteger, nullable=False),
    Column("final_sequence", BigInteger),
    Column("ended_version", BigInteger),
    Column("attempt", Integer, nullable=False),
    Column("run_id", String(36)),
    Column("display", JSON(none_as_null=True)),
    Column("client_metadata", JSON, nullable=False),
    Column("error", JSON(none_as_null=True)),
    Column("usage", JSON(none_as_null=True)),
    Column("digest", String(64)),
    Column("created_at", BigInteger, nullable=False),
    Column("completed_at", BigInteger),
    # How far its segments reach. The check stands beside the column, not among those of the table: so SQLite can add it
    # without making the table anew, which would delete everything that refers to it.
    Column(
        "compacted_sequence",
        BigInteger,
        CheckConstraint(
            "compacted_sequence >= 0 AND compacted_sequence <= coalesce(final_sequence, 0)",
            name="only_ended_is_compacted",
        ),
        nullable=False,
        server_default=text("0"),
    ),
    Column("mode", String(8)),
    # What a user's message holds besides its text: {files, workflow}.
    Column("payload", JSON(none_as_null=True)),
    # The message whose chunks this one shares, in a fork; such a message has none of its own.
    Column("content_id", String(36)),
    # The run that a message was handed to instead of having one of its own, and when that run took it.
    Column("steers_run_id", String(36)),
    Column("steered_at", BigInteger),
    UniqueConstraint("context_id", "position"),
    CheckConstraint(one_of("role", Role), name="role_known"),
    CheckConstraint(one_of("status", MessageStatus), name="status_known"),
    CheckConstraint(f"({ENDED_MESSAGE}) = (final_sequence IS NOT NULL)", name="ended_has_final_sequence"),
    CheckConstraint("final_sequence IS NULL OR final_sequence = sequence", name="final_is_head"),
    CheckConstraint(f"({ENDED_MESSAGE}) = (digest IS NOT NULL)", name="ended_has_digest"),
    CheckConstraint("status <> 'pending' OR sequence = 0", name="pending_is_empty"),
    CheckConstraint("sequence >= 0 AND content_bytes >= 0", name="sequence_positive"),
    Index(None, "context_id", "ended_version"),
    Index(None, "context_id", "parent_id"),
    Index(
        "ix_messages_content_id",
        "content_id",
        sqlite_where=text(SHARES_CONTENT),
        postgresql_where=text(SHARES_CONTENT),
    ),
    Index("ix_messages_steering", "steers_run_id", sqlite_where=text(STEERS), postgresql_where=text(STEERS)),
    Index(
        "ix_messages_to_compact",
        "completed_at",
        "id",
        sqlite_where=text(WORTH_COMPACTING),
        postgresql_where=text(WORTH_COMPACTING),
    ),
    postgresql_with=_ROOM_TO_UPDATE,
)

chunks = Table(
    "chunks",
    metadata,
    Column("message_id", String(36), ForeignKey("messages.id", ondelete="CASCADE"), primary_key=True),
    Column("sequence", BigInteger, primary_key=True),
    Column("kind", String(12), nullable=False),
    Column("text", Text),
    Column("data", JSON(none_as_null=True)),
    CheckConstraint(one_of("kind", ChunkKind), name="kind_known"),
    CheckConstraint("sequence >= 1", name="sequence_positive"),
    CheckConstraint("(text IS NULL) <> (data IS NULL)", name="text_or_data"),
    # The primary key is the table: a pull reads neighbouring rows, and there is no second copy to keep.
    sqlite_with_rowid=False,
)

segments = Table(
    "segments",
    metadata,
    Column("message_id", String(36), ForeignKey("messages.id", ondelete="CASCADE"), primary_key=True),
    Column("last_sequence", BigInteger, primary_key=True),
    Column("first_sequence", BigInteger, nullable=False),
    Column("format", SmallInteger, nullable=False),
    Column("body", LargeBinary, nullable=False),
    UniqueConstraint("message_id", "first_sequence"),
    CheckConstraint("first_sequence >= 1 AND first_sequence <= last_sequence", name="first_before_last"),
    CheckConstraint("format = 1", name="format_known"),
)

runs = Table(
    "runs",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("context_id", String(36), ForeignKey("contexts.id", ondelete="CASCADE"), nullable=False),
    Column("message_id", String(36), ForeignKey("messages.id", ondelete="CASCADE"), nullable=False),
    Column("status", String(10), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("started_at", BigInteger),
    Column("ended_at", BigInteger),
    # Who runs it, and until when by the database's clock. Null on SQLite: the one process holds its runs for its life.
    Column("node_id", String(36)),
    Column("lease_expires_at", BigInteger),
    # How far the reply was when this attempt began: beyond 0 after a suspension.
    Column("start_sequence", BigInteger, nullable=False, server_default=text("0")),
    # The tool that runs, while the context is calling_tool.
    Column("tool", String(200)),
    CheckConstraint(one_of("status", RunStatus), name="status_known"),
    CheckConstraint("status = 'running' OR lease_expires_at IS NULL", name="only_running_is_leased"),
    CheckConstraint(f"({ACTIVE_RUN}) = (ended_at IS NULL)", name="active_has_not_ended"),
    Index(
        "uq_runs_one_active_per_context",
        "context_id",
        unique=True,
        sqlite_where=text(ACTIVE_RUN),
        postgresql_where=text(ACTIVE_RUN),
    ),
    Index(None, "message_id"),
    Index(
        "ix_runs_queue",
        "status",
        "created_at",
        "id",
        sqlite_where=text(ACTIVE_RUN),
        postgresql_where=text(ACTIVE_RUN),
    ),
    postgresql_with=_ROOM_TO_UPDATE,
)

waiting_runs = Table(
    # Runs behind the active one of their context, with their messages; each gets its row in runs when its turn comes.
    "waiting_runs",
    metadata,
    Column("run_id", String(36), primary_key=True),
    Column("context_id", String(36), ForeignKey("contexts.id", ondelete="CASCADE"), nullable=False),
    Column("message_id", String(36), ForeignKey("messages.id", ondelete="CASCADE"), nullable=False),
    Column("reply_message_id", String(36), ForeignKey("messages.id", ondelete="CASCADE"), nullable=False),
    # 0 goes before 1: what interrupts stands before what queues.
    Column("priority", SmallInteger, nullable=False),
    # Whether it is to follow the head as it is when its turn comes, or the parent that it was posted with.
    Column("follows_head", Boolean, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Index(None, "context_id", "priority", "created_at", "run_id"),
    Index(None, "message_id"),
    Index(None, "reply_message_id"),
)

approvals = Table(
    "approvals",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("context_id", String(36), ForeignKey("contexts.id", ondelete="CASCADE"), nullable=False),
    Column("message_id", String(36), ForeignKey("messages.id", ondelete="CASCADE"), nullable=False),
    Column("run_id", String(36), nullable=False),
    Column("call_id", String(200), nullable=False),
    Column("tool", String(200), nullable=False),
    Column("arguments", JSON, nullable=False),
    Column("arguments_sha256", String(64), nullable=False),
    Column("editable", Boolean, nullable=False),
    Column("status", String(10), nullable=False),
    Column("edited_arguments", JSON(none_as_null=True)),
    Column("note", Text),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("decided_at", BigInteger),
    CheckConstraint(one_of("status", ApprovalStatus), name="status_known"),
    CheckConstraint(f"({PENDING}) = (decided_at IS NULL)", name="decided_has_time"),
    CheckConstraint("edited_arguments IS NULL OR (editable AND status = 'approved')", name="only_editable_is_edited"),
    Index(None, "context_id", "created_at", "id"),
    Index(None, "message_id"),
    Index(None, "run_id"),
    Index(
        "ix_approvals_to_expire",
        "expires_at",
        "id",
        sqlite_where=text(PENDING),
        postgresql_where=text(PENDING),
    ),
)

files = Table(
    "files",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("owner", String(200), nullable=False),
    Column("name", String(255), nullable=False),
    Column("media_type", String(127), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    CheckConstraint("size_bytes >= 0", name="size_positive"),
    Index(None, "owner", "created_at", "id"),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("owner", String(200), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("fingerprint", String(64), nullable=False),
    Column("answer", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Index(None, "created_at"),
)
