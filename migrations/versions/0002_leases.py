"""Leases: which node runs a run, and until when by the database's clock."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# Rows that every commit updates: with room on their page, an update touches no index (PostgreSQL's HOT updates).
UPDATED_OFTEN = ("contexts", "messages", "runs")


def upgrade() -> None:
    with op.batch_alter_table("runs") as table:
        table.add_column(sa.Column("node_id", sa.String(length=36), nullable=True))
        table.add_column(sa.Column("lease_expires_at", sa.BigInteger(), nullable=True))
        table.create_check_constraint("only_running_is_leased", "status = 'running' OR lease_expires_at IS NULL")
    if op.get_bind().dialect.name == "postgresql":
        for name in UPDATED_OFTEN:
            op.execute(f"ALTER TABLE {name} SET (fillfactor = 70)")


def downgrade() -> None:
    if op.get_bind().dialect.name == "postgresql":
        for name in UPDATED_OFTEN:
            op.execute(f"ALTER TABLE {name} RESET (fillfactor)")
    with op.batch_alter_table("runs") as table:
        table.drop_constraint(op.f("ck_runs_only_running_is_leased"), type_="check")
        table.drop_column("lease_expires_at")
        table.drop_column("node_id")
