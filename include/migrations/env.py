"""Runs the ledger's migrations on the connection that `include.ledger` hands over."""

from __future__ import annotations

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    version_table="llm_batch_version",
    transactional_ddl=True,
)
with context.begin_transaction():
    context.run_migrations()
