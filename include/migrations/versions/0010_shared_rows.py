"""Rows that share the answer of an identical request."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"


def upgrade() -> None:
    """Add how many there are."""
    op.add_column(
        "llm_batch_run",
        sa.Column("shared", sa.BigInteger(), server_default="0", nullable=False),
    )
