"""Which file was uploaded for which batch: what is left to go by where metadata is not kept."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Create the table, with the files that the ledger still names."""
    op.create_table(
        "llm_batch_input_file",
        sa.Column("submission_id", sa.String(length=32), nullable=False),
        sa.Column("file_id", sa.String(length=512), nullable=False),
        sa.Column("uploaded_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("submission_id", "file_id"),
    )
    op.execute(
        "INSERT INTO llm_batch_input_file (submission_id, file_id, uploaded_at) "
        "SELECT submission_id, file_id, COALESCE(intent_at, first_intent_at) "
        "FROM llm_batch_batch WHERE file_id IS NOT NULL AND first_intent_at IS NOT NULL"
    )
