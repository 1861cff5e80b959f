"""Bounds on the money of several runs together."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "llm_batch_spend_limit",
        sa.Column("name", sa.String(250), primary_key=True),
        sa.Column("max_usd", sa.String(64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "llm_batch_limited_run",
        sa.Column(
            "name", sa.String(250), sa.ForeignKey("llm_batch_spend_limit.name"), nullable=False
        ),
        sa.Column("run_id", sa.String(32), sa.ForeignKey("llm_batch_run.run_id"), nullable=False),
        sa.Column("joined_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", "run_id"),
    )
    op.create_index("ix_llm_batch_limited_run_run_id", "llm_batch_limited_run", ["run_id"])
