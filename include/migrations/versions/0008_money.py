"""Estimates per run and batch, and the view `llm_batch_cost` for whoever asks what jobs cost."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

DAYS = {
    "postgresql": "CAST(timezone('UTC', collected_at) AS date)",
    "sqlite": "date(collected_at)",
}
NUMBERS = {"postgresql": "numeric", "sqlite": "real"}
VIEW = """\
CREATE VIEW llm_batch_cost AS
SELECT job, {day} AS day, round, model,
       count(*) AS batches, sum(requests) AS requests,
       sum(used_input_tokens) AS input_tokens, sum(used_cached_tokens) AS cached_tokens,
       sum(used_output_tokens) AS output_tokens, sum(used_reasoning_tokens) AS reasoning_tokens,
       {cost} AS cost_usd, {realtime} AS realtime_usd
FROM llm_batch_batch
WHERE state = 'COLLECTED'
GROUP BY job, {day}, round, model
"""
# A sum over a batch without a price would be too small: it is unknown.
SUM = "CASE WHEN count({name}) = count(*) THEN sum(CAST({name} AS {number})) END"


def upgrade() -> None:
    """Add the columns, the index of a job's month, and the view."""
    for name in ("estimate_low_usd", "estimate_upper_usd"):
        op.add_column("llm_batch_run", sa.Column(name, sa.String(64), nullable=True))
    op.add_column("llm_batch_batch", sa.Column("estimate_usd", sa.String(64), nullable=True))
    op.create_index(
        "ix_llm_batch_batch_job_collected_at", "llm_batch_batch", ["job", "collected_at"]
    )
    dialect = op.get_bind().dialect.name
    cost, realtime = (
        SUM.format(name=name, number=NUMBERS[dialect]) for name in ("cost_usd", "realtime_usd")
    )
    op.execute(VIEW.format(day=DAYS[dialect], cost=cost, realtime=realtime))
