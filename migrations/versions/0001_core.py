"""The signal-pull core: contexts, messages, chunks, runs, idempotency keys."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

ACTIVE = sa.text("status IN ('queued', 'running', 'suspended')")


def upgrade() -> None:
    op.create_table(
        "contexts",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("owner", sa.String(length=200), nullable=False),
        sa.Column("title", sa.Text(), nullable=True),
        sa.Column("mode", sa.String(length=8), nullable=False),
        sa.Column("state", sa.String(length=20), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("message_count", sa.BigInteger(), nullable=False),
        sa.Column("head_message_id", sa.String(length=36), nullable=True),
        sa.Column("active_run_id", sa.String(length=36), nullable=True),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("updated_at", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "(state IN ('awaiting_approval', 'calling_tool', 'cancelling', 'queued', 'streaming', 'thinking')) = (active_run_id IS NOT NULL)",
            name=op.f("ck_contexts_busy_has_run"),
        ),
        sa.CheckConstraint("mode IN ('act', 'plan')", name=op.f("ck_contexts_mode_known")),
        sa.CheckConstraint(
            "state IN ('awaiting_approval', 'calling_tool', 'cancelling', 'failed', 'idle', 'queued', 'streaming', 'thinking')",
            name=op.f("ck_contexts_state_known"),
        ),
        sa.CheckConstraint("version >= 1", name=op.f("ck_contexts_version_positive")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_contexts")),
    )
    op.create_index(op.f("ix_contexts_owner_updated_at_id"), "contexts", ["owner", "updated_at", "id"], unique=False)
    op.create_table(
        "idempotency_keys",
        sa.Column("owner", sa.String(length=200), nullable=False),
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("fingerprint", sa.String(length=64), nullable=False),
        sa.Column("answer", sa.Text(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("owner", "key", name=op.f("pk_idempotency_keys")),
    )
    op.create_index(op.f("ix_idempotency_keys_created_at"), "idempotency_keys", ["created_at"], unique=False)
    op.create_table(
        "server_facts",
        sa.Column("name", sa.String(length=40), nullable=False),
        sa.Column("value", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_server_facts")),
    )
    op.create_table(
        "messages",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("context_id", sa.String(length=36), nullable=False),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("parent_id", sa.String(length=36), nullable=True),
        sa.Column("role", sa.String(length=10), nullable=False),
        sa.Column("status", sa.String(length=10), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("content_bytes", sa.BigInteger(), nullable=False),
        sa.Column("final_sequence", sa.BigInteger(), nullable=True),
        sa.Column("ended_version", sa.BigInteger(), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.String(length=36), nullable=True),
        sa.Column("display", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("client_metadata", sa.JSON(), nullable=False),
        sa.Column("error", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("usage", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("digest", sa.String(length=64), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("completed_at", sa.BigInteger(), nullable=True),
        sa.CheckConstraint(
            "(status IN ('cancelled', 'completed', 'failed')) = (digest IS NOT NULL)",
            name=op.f("ck_messages_ended_has_digest"),
        ),
        sa.CheckConstraint(
            "(status IN ('cancelled', 'completed', 'failed')) = (final_sequence IS NOT NULL)",
            name=op.f("ck_messages_ended_has_final_sequence"),
        ),
        sa.CheckConstraint("role IN ('assistant', 'user')", name=op.f("ck_messages_role_known")),
        sa.CheckConstraint("status <> 'pending' OR sequence = 0", name=op.f("ck_messages_pending_is_empty")),
        sa.CheckConstraint(
            "status IN ('cancelled', 'completed', 'failed', 'pending', 'streaming')",
            name=op.f("ck_messages_status_known"),
        ),
        sa.CheckConstraint(
            "final_sequence IS NULL OR final_sequence = sequence", name=op.f("ck_messages_final_is_head")
        ),
        sa.CheckConstraint("sequence >= 0 AND content_bytes >= 0", name=op.f("ck_messages_sequence_positive")),
        sa.ForeignKeyConstraint(
            ["context_id"], ["contexts.id"], name=op.f("fk_messages_context_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_messages")),
        sa.UniqueConstraint("context_id", "position", name=op.f("uq_messages_context_id_position")),
    )
    op.create_index(
        op.f("ix_messages_context_id_ended_version"), "messages", ["context_id", "ended_version"], unique=False
    )
    op.create_table(
        "chunks",
        sa.Column("message_id", sa.String(length=36), nullable=False),
        sa.Column("sequence", sa.BigInteger(), nullable=False),
        sa.Column("kind", sa.String(length=12), nullable=False),
        sa.Column("text", sa.Text(), nullable=True),
        sa.Column("data", sa.JSON(none_as_null=True), nullable=True),
        sa.CheckConstraint(
            "kind IN ('error', 'reasoning', 'step', 'text', 'tool_call', 'tool_result')",
            name=op.f("ck_chunks_kind_known"),
        ),
        sa.CheckConstraint("(text IS NULL) <> (data IS NULL)", name=op.f("ck_chunks_text_or_data")),
        sa.CheckConstraint("sequence >= 1", name=op.f("ck_chunks_sequence_positive")),
        sa.ForeignKeyConstraint(["message_id"], ["messages.id"], name=op.f("fk_chunks_message_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("message_id", "sequence", name=op.f("pk_chunks")),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "runs",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("context_id", sa.String(length=36), nullable=False),
        sa.Column("message_id", sa.String(length=36), nullable=False),
        sa.Column("status", sa.String(length=10), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=True),
        sa.Column("ended_at", sa.BigInteger(), nullable=True),
        sa.CheckConstraint(
            "(status IN ('queued', 'running', 'suspended')) = (ended_at IS NULL)",
            name=op.f("ck_runs_active_has_not_ended"),
        ),
        sa.CheckConstraint(
            "status IN ('cancelled', 'failed', 'queued', 'running', 'succeeded', 'suspended')",
            name=op.f("ck_runs_status_known"),
        ),
        sa.ForeignKeyConstraint(["context_id"], ["contexts.id"], name=op.f("fk_runs_context_id"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["message_id"], ["messages.id"], name=op.f("fk_runs_message_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_runs")),
    )
    op.create_index(op.f("ix_runs_message_id"), "runs", ["message_id"], unique=False)
    op.create_index(
        "ix_runs_queue",
        "runs",
        ["status", "created_at", "id"],
        unique=False,
        sqlite_where=ACTIVE,
        postgresql_where=ACTIVE,
    )
    op.create_index(
        "uq_runs_one_active_per_context",
        "runs",
        ["context_id"],
        unique=True,
        sqlite_where=ACTIVE,
        postgresql_where=ACTIVE,
    )


def downgrade() -> None:
    op.drop_index(
        "uq_runs_one_active_per_context",
        table_name="runs",
        sqlite_where=ACTIVE,
        postgresql_where=ACTIVE,
    )
    op.drop_index(
        "ix_runs_queue",
        table_name="runs",
        sqlite_where=ACTIVE,
        postgresql_where=ACTIVE,
    )
    op.drop_index(op.f("ix_runs_message_id"), table_name="runs")
    op.drop_table("runs")
    op.drop_table("chunks")
    op.drop_index(op.f("ix_messages_context_id_ended_version"), table_name="messages")
    op.drop_table("messages")
    op.drop_table("server_facts")
    op.drop_index(op.f("ix_idempotency_keys_created_at"), table_name="idempotency_keys")
    op.drop_table("idempotency_keys")
    op.drop_index(op.f("ix_contexts_owner_updated_at_id"), table_name="contexts")
    op.drop_table("contexts")
