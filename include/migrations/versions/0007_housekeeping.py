"""What housekeeping has to know: the files of a batch at the provider, and what it has removed."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"

TIMES = {
    "llm_batch_batch": ("files_deleted_at",),
    "llm_batch_run": ("artifacts_compressed_at", "artifacts_deleted_at"),
}


def upgrade() -> None:
    """Add the columns; of batches that are collected already, the result files stay unknown."""
    for name in ("output_file_id", "error_file_id"):
        op.add_column("llm_batch_batch", sa.Column(name, sa.String(length=512), nullable=True))
    for table, names in TIMES.items():
        for name in names:
            column = sa.Column(name, sa.DateTime(timezone=True), nullable=True)
            op.add_column(table, column)
