"""The ledger's tables as SQLAlchemy Core sees them; `migrations/` creates them.

Times are stored as UTC, money as exact decimal text.
"""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

import sqlalchemy as sa
from sqlalchemy.engine import Dialect
from sqlalchemy.types import TypeDecorator


class UtcTime(TypeDecorator[datetime]):
    """An aware UTC time on every database (SQLite itself has no time zones)."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuse naive times: they would mean something else on every machine."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"A ledger time must be aware, got the naive {value!r}.")
        moment = value.astimezone(UTC)
        return moment.replace(tzinfo=None) if dialect.name == "sqlite" else moment

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return an aware UTC time."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Money(TypeDecorator[Decimal]):
    """US dollars, exact."""

    impl = sa.String(64)
    cache_ok = True

    def process_bind_param(self, value: Decimal | None, dialect: Dialect) -> str | None:
        """Store the decimal's own digits."""
        return None if value is None else format(value, "f")

    def process_result_value(self, value: str | None, dialect: Dialect) -> Decimal | None:
        """Return the digits as they were stored."""
        return None if value is None else Decimal(value)


metadata = sa.MetaData()


def _count(name: str) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger, nullable=False, server_default="0")


def _serial(name: str) -> sa.Column[int]:
    # SQLite counts on by itself only where the type is exactly INTEGER.
    counting = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    return sa.Column(name, counting, primary_key=True, autoincrement=True)


run = sa.Table(
    "llm_batch_run",
    metadata,
    sa.Column("run_id", sa.String(32), primary_key=True),
    sa.Column("job", sa.String(250), nullable=False),
    sa.Column("interval_start", UtcTime, nullable=False),
    sa.Column("interval_end", UtcTime, nullable=False),
    sa.Column("spec_digest", sa.String(64), nullable=False),
    sa.Column("mode", sa.String(16), nullable=False),
    sa.Column("generation", sa.Integer, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("spec", sa.Text, nullable=False),
    sa.Column("dag_id", sa.String(250), nullable=False),
    sa.Column("dag_run_id", sa.String(250), nullable=False),
    sa.Column("snapshot", sa.Text),
    _count("rows"),
    _count("reused"),
    _count("rejected"),
    _count("loaded"),
    _count("failed"),
    sa.Column("rejected_file", sa.Text),
    _count("shared"),
    sa.Column("estimate_usd", Money),
    sa.Column("estimate_low_usd", Money),
    sa.Column("estimate_upper_usd", Money),
    sa.Column("cost_usd", Money),
    sa.Column("realtime_usd", Money),
    sa.Column("created_at", UtcTime, nullable=False),
    sa.Column("done_at", UtcTime),
    sa.Column("artifacts_compressed_at", UtcTime),
    sa.Column("artifacts_deleted_at", UtcTime),
    sa.UniqueConstraint(
        "job", "interval_start", "interval_end", "spec_digest", "mode", "generation"
    ),
)

# The Airflow runs that work on a run; see `include.participants`.
participant = sa.Table(
    "llm_batch_participant",
    metadata,
    sa.Column("run_id", sa.String(32), sa.ForeignKey(run.c.run_id), primary_key=True),
    sa.Column("dag_id", sa.String(250), primary_key=True),
    sa.Column("dag_run_id", sa.String(250), primary_key=True),
    sa.Column("has_left", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Index("ix_llm_batch_participant_dag_run", "dag_id", "dag_run_id"),
)

# A bound on the money of several runs together; see `include.spend_limits`.
spend_limit = sa.Table(
    "llm_batch_spend_limit",
    metadata,
    sa.Column("name", sa.String(250), primary_key=True),
    sa.Column("max_usd", Money, nullable=False),
    sa.Column("created_at", UtcTime, nullable=False),
)

limited_run = sa.Table(
    "llm_batch_limited_run",
    metadata,
    sa.Column("name", sa.String(250), sa.ForeignKey(spend_limit.c.name), primary_key=True),
    sa.Column("run_id", sa.String(32), sa.ForeignKey(run.c.run_id), primary_key=True, index=True),
    sa.Column("joined_at", UtcTime, nullable=False),
)

round_ = sa.Table(
    "llm_batch_round",
    metadata,
    sa.Column("run_id", sa.String(32), sa.ForeignKey(run.c.run_id), primary_key=True),
    sa.Column("round", sa.Integer, primary_key=True),
    sa.Column("state", sa.String(16), nullable=False),
    _count("requests"),
    _count("succeeded"),
    _count("retry"),
    _count("failed"),
    _count("missing"),
    sa.Column("built_at", UtcTime, nullable=False),
    sa.Column("settled_at", UtcTime),
)

batch = sa.Table(
    "llm_batch_batch",
    metadata,
    sa.Column("submission_id", sa.String(32), primary_key=True),
    sa.Column("run_id", sa.String(32), sa.ForeignKey(run.c.run_id), nullable=False, index=True),
    sa.Column("job", sa.String(250), nullable=False),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("shard", sa.Integer, nullable=False),
    sa.Column("state", sa.String(16), nullable=False, index=True),
    sa.Column("conn_id", sa.String(250), nullable=False),
    sa.Column("endpoint", sa.String(64), nullable=False),
    sa.Column("model", sa.String(250), nullable=False),
    sa.Column("request_file", sa.Text, nullable=False),
    sa.Column("index_file", sa.Text),
    sa.Column("content_digest", sa.String(64), nullable=False),
    _count("requests"),
    _count("bytes"),
    _count("input_tokens"),
    sa.Column("estimate_usd", Money),
    _count("epoch"),
    sa.Column("owner", sa.String(64)),
    sa.Column("first_intent_at", UtcTime),
    sa.Column("intent_at", UtcTime),
    sa.Column("file_id", sa.String(512)),
    sa.Column("batch_id", sa.String(512), unique=True),
    sa.Column("submitted_at", UtcTime),
    sa.Column("api_status", sa.String(64)),
    _count("done_requests"),
    _count("failed_requests"),
    sa.Column("polled_at", UtcTime),
    sa.Column("progress_at", UtcTime),
    sa.Column("ended_at", UtcTime),
    sa.Column("collected_at", UtcTime),
    sa.Column("outcomes_file", sa.Text),
    _count("succeeded"),
    _count("retry"),
    _count("failed"),
    _count("missing"),
    _count("quarantined"),
    _count("duplicates"),
    sa.Column("reasons", sa.Text),
    _count("used_input_tokens"),
    _count("used_cached_tokens"),
    _count("used_output_tokens"),
    _count("used_reasoning_tokens"),
    sa.Column("cost_usd", Money),
    sa.Column("realtime_usd", Money),
    sa.Column("error", sa.Text),
    sa.Column("output_file_id", sa.String(512)),
    sa.Column("error_file_id", sa.String(512)),
    sa.Column("files_deleted_at", UtcTime),
    sa.UniqueConstraint("run_id", "round", "shard", "content_digest"),
    sa.Index("ix_llm_batch_batch_job_collected_at", "job", "collected_at"),
)

duplicate = sa.Table(
    "llm_batch_duplicate",
    metadata,
    sa.Column("batch_id", sa.String(512), primary_key=True),
    sa.Column("submission_id", sa.String(32), nullable=False, index=True),
    sa.Column("kept_batch_id", sa.String(512), nullable=False),
    sa.Column("found_at", UtcTime, nullable=False),
    sa.Column("api_status", sa.String(64), nullable=False),
    _count("done_requests"),
    sa.Column("cost_usd", Money),
)

input_file = sa.Table(
    "llm_batch_input_file",
    metadata,
    sa.Column("submission_id", sa.String(32), primary_key=True),
    sa.Column("file_id", sa.String(512), primary_key=True, index=True),
    sa.Column("uploaded_at", UtcTime, nullable=False),
)

event = sa.Table(
    "llm_batch_event",
    metadata,
    _serial("event_id"),
    sa.Column("run_id", sa.String(32), nullable=False, index=True),
    sa.Column("submission_id", sa.String(32)),
    sa.Column("at", UtcTime, nullable=False),
    sa.Column("was", sa.String(16)),
    sa.Column("became", sa.String(16), nullable=False),
    sa.Column("detail", sa.Text),
)

action = sa.Table(
    "llm_batch_action",
    metadata,
    _serial("action_id"),
    sa.Column("at", UtcTime, nullable=False),
    sa.Column("ended_at", UtcTime),
    sa.Column("who", sa.String(250), nullable=False),
    sa.Column("via", sa.String(16), nullable=False),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("dag_id", sa.String(250), nullable=False, index=True),
    sa.Column("run_id", sa.String(32), nullable=False, index=True),
    sa.Column("submission_id", sa.String(32)),
    sa.Column("outcome", sa.String(16), nullable=False),
    sa.Column("detail", sa.Text),
)

alert = sa.Table(
    "llm_batch_alert",
    metadata,
    sa.Column("cause", sa.String(32), primary_key=True),
    sa.Column("channel", sa.String(250), primary_key=True),
    sa.Column("kind", sa.String(32), nullable=False),
    sa.Column("job", sa.String(250), nullable=False),
    sa.Column("run_id", sa.String(32), nullable=False),
    sa.Column("subject", sa.Text, nullable=False),
    sa.Column("raised_at", UtcTime, nullable=False, index=True),
    sa.Column("tries", sa.Integer, nullable=False),
    sa.Column("delivered_at", UtcTime),
    sa.Column("error", sa.Text),
)

# What pages and reports ask for.
sa.Index("ix_llm_batch_run_dag", run.c.dag_id, run.c.dag_run_id, run.c.job)
sa.Index("ix_llm_batch_run_interval", run.c.job, run.c.interval_start)
sa.Index("ix_llm_batch_batch_collected", batch.c.collected_at, batch.c.job)

# Applications insert the first columns, by `include.request_queue` or by plain SQL; see
# docs/request-queue.md. The rest is ours.
queue = sa.Table(
    "llm_batch_queue",
    metadata,
    sa.Column("request_id", sa.String(200), primary_key=True),
    sa.Column("endpoint", sa.String(64)),
    sa.Column("body", sa.Text),
    sa.Column("job", sa.String(63)),
    sa.Column("job_row", sa.Text),
    sa.Column("priority", sa.Integer, nullable=False, server_default="0"),
    sa.Column("queued_at", UtcTime, nullable=False, server_default=sa.func.now()),
    sa.Column("state", sa.String(16), nullable=False, server_default="queued"),
    sa.Column("model", sa.String(250)),
    sa.Column("run_id", sa.String(32), index=True),
    sa.Column("claimed_at", UtcTime),
    sa.Column("ended_at", UtcTime),
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
    sa.Column("cost_usd", Money),
    sa.CheckConstraint(
        "state IN ('queued', 'processing', 'completed', 'failed', 'cancelled')",
        name="llm_batch_queue_state",
    ),
    sa.Index("ix_llm_batch_queue_state_ended_at", "state", "ended_at"),
    sa.Index("ix_llm_batch_queue_state_queued_at", "state", "queued_at"),
)
# What no drain has looked at yet: the check for it must not read what has long ended.
sa.Index(
    "ix_llm_batch_queue_new",
    queue.c.request_id,
    postgresql_where=queue.c.model.is_(None),
    sqlite_where=queue.c.model.is_(None),
)
