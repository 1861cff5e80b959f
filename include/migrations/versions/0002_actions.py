"""What people did from outside, and the indexes that pages over all jobs need."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Create the table of actions and three indexes."""
    op.create_table(
        "llm_batch_action",
        sa.Column(
            "action_id",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=True,
            nullable=False,
        ),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("who", sa.String(length=250), nullable=False),
        sa.Column("via", sa.String(length=16), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("dag_id", sa.String(length=250), nullable=False),
        sa.Column("run_id", sa.String(length=32), nullable=False),
        sa.Column("submission_id", sa.String(length=32), nullable=True),
        sa.Column("outcome", sa.String(length=16), nullable=False),
        sa.Column("detail", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("action_id"),
    )
    op.create_index("ix_llm_batch_action_dag_id", "llm_batch_action", ["dag_id"])
    op.create_index("ix_llm_batch_action_run_id", "llm_batch_action", ["run_id"])
    op.create_index("ix_llm_batch_run_dag", "llm_batch_run", ["dag_id", "dag_run_id", "job"])
    op.create_index("ix_llm_batch_run_interval", "llm_batch_run", ["job", "interval_start"])
    op.create_index("ix_llm_batch_batch_collected", "llm_batch_batch", ["collected_at", "job"])
