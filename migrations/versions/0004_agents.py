"""Real agents: approvals, runs that wait for their turn, messages that steer or share their text, files."""

import hashlib

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

PENDING = sa.text("status = 'pending'")
SHARES_CONTENT = sa.text("content_id IS NOT NULL")
STEERS = sa.text("steers_run_id IS NOT NULL")


def upgrade() -> None:
    op.add_column("contexts", sa.Column("model", sa.String(length=200), nullable=True))
    for column in (
        sa.Column("mode", sa.String(length=8), nullable=True),
        sa.Column("payload", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("content_id", sa.String(length=36), nullable=True),
        sa.Column("steers_run_id", sa.String(length=36), nullable=True),
        sa.Column("steered_at", sa.BigInteger(), nullable=True),
    ):
        op.add_column("messages", column)
    op.create_index(op.f("ix_messages_context_id_parent_id"), "messages", ["context_id", "parent_id"], unique=False)
    op.create_index(
        "ix_messages_content_id",
        "messages",
        ["content_id"],
        unique=False,
        sqlite_where=SHARES_CONTENT,
        postgresql_where=SHARES_CONTENT,
    )
    op.create_index(
        "ix_messages_steering",
        "messages",
        ["steers_run_id"],
        unique=False,
        sqlite_where=STEERS,
        postgresql_where=STEERS,
    )
    op.add_column("runs", sa.Column("start_sequence", sa.BigInteger(), nullable=False, server_default=sa.text("0")))
    op.add_column("runs", sa.Column("tool", sa.String(length=200), nullable=True))
    op.create_table(
        "waiting_runs",
        sa.Column("run_id", sa.String(length=36), nullable=False),
        sa.Column("context_id", sa.String(length=36), nullable=False),
        sa.Column("message_id", sa.String(length=36), nullable=False),
        sa.Column("reply_message_id", sa.String(length=36), nullable=False),
        sa.Column("priority", sa.SmallInteger(), nullable=False),
        sa.Column("follows_head", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["context_id"], ["contexts.id"], name=op.f("fk_waiting_runs_context_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["message_id"], ["messages.id"], name=op.f("fk_waiting_runs_message_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["reply_message_id"], ["messages.id"], name=op.f("fk_waiting_runs_reply_message_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("run_id", name=op.f("pk_waiting_runs")),
    )
    op.create_index(
        op.f("ix_waiting_runs_context_id_priority_created_at_run_id"),
        "waiting_runs",
        ["context_id", "priority", "created_at", "run_id"],
        unique=False,
    )
    op.create_index(op.f("ix_waiting_runs_message_id"), "waiting_runs", ["message_id"], unique=False)
    op.create_index(op.f("ix_waiting_runs_reply_message_id"), "waiting_runs", ["reply_message_id"], unique=False)
    op.create_table(
        "approvals",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("context_id", sa.String(length=36), nullable=False),
        sa.Column("message_id", sa.String(length=36), nullable=False),
        sa.Column("run_id", sa.String(length=36), nullable=False),
        sa.Column("call_id", sa.String(length=200), nullable=False),
        sa.Column("tool", sa.String(length=200), nullable=False),
        sa.Column("arguments", sa.JSON(), nullable=False),
        sa.Column("arguments_sha256", sa.String(length=64), nullable=False),
        sa.Column("editable", sa.Boolean(), nullable=False),
        sa.Column("status", sa.String(length=10), nullable=False),
        sa.Column("edited_arguments", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("note", sa.Text(), nullable=True),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.Column("decided_at", sa.BigInteger(), nullable=True),
        sa.CheckConstraint(
            "status IN ('approved', 'cancelled', 'denied', 'expired', 'pending')",
            name=op.f("ck_approvals_status_known"),
        ),
        sa.CheckConstraint("(status = 'pending') = (decided_at IS NULL)", name=op.f("ck_approvals_decided_has_time")),
        sa.CheckConstraint(
            "edited_arguments IS NULL OR (editable AND status = 'approved')",
            name=op.f("ck_approvals_only_editable_is_edited"),
        ),
        sa.ForeignKeyConstraint(
            ["context_id"], ["contexts.id"], name=op.f("fk_approvals_context_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(
            ["message_id"], ["messages.id"], name=op.f("fk_approvals_message_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_approvals")),
    )
    op.create_index(
        op.f("ix_approvals_context_id_created_at_id"), "approvals", ["context_id", "created_at", "id"], unique=False
    )
    op.create_index(op.f("ix_approvals_message_id"), "approvals", ["message_id"], unique=False)
    op.create_index(op.f("ix_approvals_run_id"), "approvals", ["run_id"], unique=False)
    op.create_index(
        "ix_approvals_to_expire",
        "approvals",
        ["expires_at", "id"],
        unique=False,
        sqlite_where=PENDING,
        postgresql_where=PENDING,
    )
    op.create_table(
        "files",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("owner", sa.String(length=200), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("media_type", sa.String(length=127), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("sha256", sa.String(length=64), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("size_bytes >= 0", name=op.f("ck_files_size_positive")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_files")),
    )
    op.create_index(op.f("ix_files_owner_created_at_id"), "files", ["owner", "created_at", "id"], unique=False)


def downgrade() -> None:
    bind = op.get_bind()
    (shared,) = bind.execute(sa.text("SELECT count(*) FROM messages WHERE content_id IS NOT NULL")).one()
    if shared:
        msg = f"{shared} messages of forks share their text with others; the older schema cannot hold them"
        raise RuntimeError(msg)
    op.execute(
        sa.text(
            # What waits for its turn would wait for ever.
            "UPDATE messages SET status = 'cancelled', final_sequence = 0, digest = :nothing, completed_at = created_at,"
            " ended_version = (SELECT version FROM contexts WHERE contexts.id = messages.context_id)"
            " WHERE id IN (SELECT reply_message_id FROM waiting_runs)"
        ).bindparams(nothing=hashlib.sha256(b"").hexdigest())
    )
    op.drop_table("files")
    op.drop_table("approvals")
    op.drop_table("waiting_runs")
    op.drop_column("runs", "tool")
    op.drop_column("runs", "start_sequence")
    op.drop_index("ix_messages_steering", table_name="messages")
    op.drop_index("ix_messages_content_id", table_name="messages")
    op.drop_index(op.f("ix_messages_context_id_parent_id"), table_name="messages")
    for column in ("steered_at", "steers_run_id", "content_id", "payload", "mode"):
        op.drop_column("messages", column)
    op.drop_column("contexts", "model")
