"""Compaction and retention: segments, how far they reach, and the indexes by which the keeper finds what to do."""

import sqlalchemy as sa
from alembic import op

# The format of a segment is data, and whoever can read it can read every segment that was ever written.
from context_server.store.segments import decode_segment

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

WITHOUT_RUN = sa.text("active_run_id IS NULL")
WORTH_COMPACTING = sa.text("final_sequence >= 8 AND compacted_sequence < final_sequence")

SEGMENTS = sa.table(
    "segments", *map(sa.column, ("message_id", "first_sequence", "last_sequence")), sa.column("body", sa.LargeBinary)
)
CHUNKS = sa.table(
    "chunks",
    *map(sa.column, ("message_id", "sequence", "kind", "text")),
    sa.column("data", sa.JSON(none_as_null=True)),
)


def upgrade() -> None:
    # Never with batch_alter_table: on SQLite it drops the table, and with it every chunk, by foreign key.
    op.execute(
        "ALTER TABLE messages ADD COLUMN compacted_sequence BIGINT DEFAULT 0 NOT NULL "
        "CONSTRAINT ck_messages_only_ended_is_compacted "
        "CHECK (compacted_sequence >= 0 AND compacted_sequence <= coalesce(final_sequence, 0))"
    )
    op.create_table(
        "segments",
        sa.Column("message_id", sa.String(length=36), nullable=False),
        sa.Column("last_sequence", sa.BigInteger(), nullable=False),
        sa.Column("first_sequence", sa.BigInteger(), nullable=False),
        sa.Column("format", sa.SmallInteger(), nullable=False),
        sa.Column("body", sa.LargeBinary(), nullable=False),
        sa.CheckConstraint(
            "first_sequence >= 1 AND first_sequence <= last_sequence", name=op.f("ck_segments_first_before_last")
        ),
        sa.CheckConstraint("format = 1", name=op.f("ck_segments_format_known")),
        sa.ForeignKeyConstraint(
            ["message_id"], ["messages.id"], name=op.f("fk_segments_message_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("message_id", "last_sequence", name=op.f("pk_segments")),
        sa.UniqueConstraint("message_id", "first_sequence", name=op.f("uq_segments_message_id_first_sequence")),
    )
    if op.get_bind().dialect.name == "postgresql":
        # Compressed already: without this, PostgreSQL tries it again for every segment.
        op.execute("ALTER TABLE segments ALTER COLUMN body SET STORAGE EXTERNAL")
    op.create_index(
        "ix_messages_to_compact",
        "messages",
        ["completed_at", "id"],
        unique=False,
        sqlite_where=WORTH_COMPACTING,
        postgresql_where=WORTH_COMPACTING,
    )
    op.create_index(
        "ix_contexts_inactive",
        "contexts",
        ["updated_at", "id"],
        unique=False,
        sqlite_where=WITHOUT_RUN,
        postgresql_where=WITHOUT_RUN,
    )


def downgrade() -> None:
    op.execute("DELETE FROM contexts WHERE owner = ''")  # They have expired, and only their rows are left.
    _expand_segments(op.get_bind())
    op.drop_index("ix_contexts_inactive", table_name="contexts")
    op.drop_index("ix_messages_to_compact", table_name="messages")
    op.drop_table("segments")
    op.execute("ALTER TABLE messages DROP COLUMN compacted_sequence")


def _expand_segments(connection: sa.Connection) -> None:
    """Gives every chunk a row of its own again, one segment at a time."""
    key = (SEGMENTS.c.message_id, SEGMENTS.c.last_sequence)
    following = sa.select(SEGMENTS).order_by(*key).limit(1)
    row = connection.execute(following).one_or_none()
    while row is not None:
        chunks = decode_segment(row.body, row.first_sequence, row.last_sequence, 0, row.last_sequence)
        connection.execute(
            sa.insert(CHUNKS),
            [
                {
                    "message_id": row.message_id,
                    "sequence": chunk.sequence,
                    "kind": chunk.kind.value,
                    "text": chunk.text,
                    "data": chunk.data,
                }
                for chunk in chunks
            ],
        )
        after = sa.tuple_(*key) > sa.tuple_(row.message_id, row.last_sequence)
        row = connection.execute(following.where(after)).one_or_none()
