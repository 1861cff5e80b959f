"""The request queue: what applications ask, and what became of it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Create the table of requests."""
    op.create_table(
        "llm_batch_queue",
        sa.Column("request_id", sa.String(200), primary_key=True),
        sa.Column("endpoint", sa.String(64)),
        sa.Column("body", sa.Text),
        sa.Column("job", sa.String(63)),
        sa.Column("job_row", sa.Text),
        sa.Column("priority", sa.Integer, nullable=False, server_default="0"),
        sa.Column(
            "queued_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()
        ),
        sa.Column("state", sa.String(16), nullable=False, server_default="queued"),
        sa.Column("model", sa.String(250)),
        sa.Column("run_id", sa.String(32)),
        sa.Column("claimed_at", sa.DateTime(timezone=True)),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
        sa.Column("answer", sa.Text),
        sa.Column("reason", sa.String(64)),
        sa.Column("error_code", sa.String(100)),
        sa.Column("error_message", sa.Text),
        sa.Column("rounds", sa.Integer),
        sa.Column("batch_id", sa.String(512)),
        sa.Column("custom_id", sa.String(64)),
        sa.Column("input_tokens", sa.BigInteger),
        sa.Column("cached_tokens", sa.BigInteger),
        sa.Column("output_tokens", sa.BigInteger),
        sa.Column("reasoning_tokens", sa.BigInteger),
        sa.Column("cost_usd", sa.String(64)),
        sa.CheckConstraint(
            "state IN ('queued', 'processing', 'completed', 'failed', 'cancelled')",
            name="llm_batch_queue_state",
        ),
    )
    op.create_index("ix_llm_batch_queue_run_id", "llm_batch_queue", ["run_id"])
    op.create_index("ix_llm_batch_queue_state_ended_at", "llm_batch_queue", ["state", "ended_at"])
    op.create_index("ix_llm_batch_queue_state_queued_at", "llm_batch_queue", ["state", "queued_at"])
    op.create_index(
        "ix_llm_batch_queue_new",
        "llm_batch_queue",
        ["request_id"],
        postgresql_where=sa.text("model IS NULL"),
        sqlite_where=sa.text("model IS NULL"),
    )
