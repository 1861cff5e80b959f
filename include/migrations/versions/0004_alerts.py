"""Who has been told about what, so that nobody is told twice."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Create the table of alerts."""
    op.create_table(
        "llm_batch_alert",
        sa.Column("cause", sa.String(32), primary_key=True),
        sa.Column("channel", sa.String(250), primary_key=True),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("job", sa.String(250), nullable=False),
        sa.Column("run_id", sa.String(32), nullable=False),
        sa.Column("subject", sa.Text, nullable=False),
        sa.Column("raised_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("tries", sa.Integer, nullable=False),
        sa.Column("delivered_at", sa.DateTime(timezone=True)),
        sa.Column("error", sa.Text),
    )
    op.create_index("ix_llm_batch_alert_raised_at", "llm_batch_alert", ["raised_at"])
