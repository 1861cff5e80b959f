"""Files by their id: housekeeping asks of each whether an open run has it as well."""

from __future__ import annotations

from alembic import op

revision = "0011"
down_revision = "0010"


def upgrade() -> None:
    """Create the index."""
    op.create_index("ix_llm_batch_input_file_file_id", "llm_batch_input_file", ["file_id"])
