"""Who works on a run."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

OPENERS = (
    "INSERT INTO llm_batch_participant (run_id, dag_id, dag_run_id) "
    "SELECT run_id, dag_id, dag_run_id FROM llm_batch_run WHERE state = 'OPEN'"
)


def upgrade() -> None:
    """Create the table; whoever opened a run that is open works on it."""
    op.create_table(
        "llm_batch_participant",
        sa.Column("run_id", sa.String(32), sa.ForeignKey("llm_batch_run.run_id"), nullable=False),
        sa.Column("dag_id", sa.String(250), nullable=False),
        sa.Column("dag_run_id", sa.String(250), nullable=False),
        sa.Column("has_left", sa.Boolean(), server_default=sa.false(), nullable=False),
        sa.PrimaryKeyConstraint("run_id", "dag_id", "dag_run_id"),
    )
    op.create_index(
        "ix_llm_batch_participant_dag_run", "llm_batch_participant", ["dag_id", "dag_run_id"]
    )
    op.execute(OPENERS)
