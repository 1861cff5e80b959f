from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from secrets import token_hex

import pytest
import sqlalchemy as sa
from alembic.script import ScriptDirectory

from include import ledger_database, ledger_tables
from include.errors import ConfigurationError, TransientError
from include.health import Level, ledger_checks
from include.ledger import Ledger
from include.ledger_records import (
    EDGES,
    Batch,
    BatchState,
    Claim,
    NewBatch,
    Partition,
    Run,
    RunState,
)

DAY = Partition("job", datetime(2026, 11, 1, tzinfo=UTC), datetime(2026, 11, 2, tzinfo=UTC))
LEASE = timedelta(minutes=2)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Engine]:
    if request.param == "sqlite":
        engine = sa.create_engine(f"sqlite:///{tmp_path}/ledger.db")
    else:
        engine = sa.create_engine(request.getfixturevalue("empty_postgres_url"))
    yield engine
    engine.dispose()


@pytest.fixture
def ledger(engine: sa.Engine) -> Ledger:
    return Ledger(engine)


def open_run(ledger: Ledger, *, mode: str = "normal", dag_run_id: str = "one") -> Run:
    return ledger.open_run(
        DAY, spec_digest="d" * 64, spec="{}", mode=mode, dag_id="job", dag_run_id=dag_run_id
    )


def new_batch(run: Run, shard: int = 0, *, input_tokens: int = 10) -> NewBatch:
    return NewBatch(
        run_id=run.run_id,
        job=run.job,
        round=1,
        shard=shard,
        conn_id="openai_default",
        endpoint="/v1/responses",
        model="gpt",
        request_file=f"{shard}.jsonl",
        index_file=None,
        content_digest=f"{shard}" * 64,
        requests=3,
        bytes=30,
        input_tokens=input_tokens,
    )


def build(ledger: Ledger, shards: int = 1, *, input_tokens: int = 10) -> list[Batch]:
    run = open_run(ledger)
    new = [new_batch(run, shard, input_tokens=input_tokens) for shard in range(shards)]
    return ledger.build_round(run.run_id, 1, new)


def claim(
    ledger: Ledger, batch: Batch, *, lease: timedelta = LEASE, limit: int | None = None
) -> Claim | None:
    return ledger.claim(batch.submission_id, owner="me", lease=lease, enqueued_tokens=limit)


def test_two_airflow_runs_of_a_partition_share_one_run(ledger: Ledger) -> None:
    """While a run is open, whoever opens the same partition and spec joins it."""
    assert open_run(ledger).run_id == open_run(ledger, dag_run_id="two").run_id


def test_a_done_run_is_never_opened_again(ledger: Ledger) -> None:
    """After DONE, the next opening is a new generation with an id of its own."""
    first = open_run(ledger)
    ledger.finish_run(first.run_id)

    second = open_run(ledger)

    assert ledger.run(first.run_id).state == RunState.DONE
    assert (second.generation, second.state) == (2, RunState.OPEN)
    assert second.run_id != first.run_id


def test_modes_are_runs_of_their_own(ledger: Ledger) -> None:
    """A redrive does not join a normal run."""
    assert open_run(ledger).run_id != open_run(ledger, mode="redrive").run_id


def test_only_one_of_many_claims_wins(ledger: Ledger) -> None:
    """Eight workers on one request file: one may create the batch."""
    (batch,) = build(ledger)

    with ThreadPoolExecutor(8) as pool:
        claims = list(pool.map(lambda _: claim(ledger, batch), range(8)))

    assert sum(one is not None for one in claims) == 1


def test_a_silent_claim_is_taken_over(ledger: Ledger) -> None:
    """A claim whose holder has been silent for the lease goes to the next, as a takeover."""
    (batch,) = build(ledger)
    first = claim(ledger, batch)
    assert first is not None

    second = claim(ledger, batch, lease=timedelta(0))

    assert second is not None
    assert second.is_takeover
    assert not ledger.submitted(first.batch, "batch_late", "validating")
    assert ledger.submitted(second.batch, "batch_ours", "validating")
    assert ledger.batch(batch.submission_id).batch_id == "batch_ours"


def test_an_abandoned_claim_keeps_its_doubt(ledger: Ledger) -> None:
    """After `abandon` the next claim comes at once, and has to look for a batch first."""
    (batch,) = build(ledger)
    first = claim(ledger, batch)
    assert first is not None
    ledger.abandon(first.batch)

    second = claim(ledger, batch)

    assert second is not None
    assert second.is_takeover


def test_a_released_claim_leaves_no_doubt(ledger: Ledger) -> None:
    """After `release` nothing was created for certain: the next claim need not look."""
    (batch,) = build(ledger)
    first = claim(ledger, batch)
    assert first is not None
    ledger.release(first.batch, "HTTP 401")

    second = claim(ledger, batch)

    assert second is not None
    assert not second.is_takeover


def test_the_token_limit_admits_in_order(ledger: Ledger) -> None:
    """With room for two batches, the third waits, and the fourth does not overtake it."""
    batches = build(ledger, 4, input_tokens=10)
    for batch in batches[:2]:
        held = claim(ledger, batch, limit=25)
        assert held is not None
        ledger.submitted(held.batch, f"batch_{batch.shard}", "validating")

    refused = claim(ledger, batches[2], limit=25)
    ledger.ended(ledger.batch(batches[0].submission_id), api_status="completed", done=3, failed=0)
    overtaking = claim(ledger, batches[3], limit=25)
    admitted = claim(ledger, batches[2], limit=25)

    assert refused is None
    assert overtaking is None
    assert admitted is not None


def test_a_batch_above_the_limit_goes_alone(ledger: Ledger) -> None:
    """A batch that is larger than the whole limit is sent when nothing else is waiting."""
    (batch,) = build(ledger, input_tokens=1000)

    assert claim(ledger, batch, limit=25) is not None


def test_building_a_round_again_changes_nothing(ledger: Ledger) -> None:
    """The same request files are recorded once."""
    first = build(ledger, 3)

    assert build(ledger, 3) == first
    assert build(ledger, 4) == first


def test_a_round_with_open_batches_cannot_be_settled(ledger: Ledger) -> None:
    """Settling names the batch that is not collected."""
    (batch,) = build(ledger)

    with pytest.raises(ConfigurationError, match=r"shard 0.*PREPARED"):
        ledger.settle_round(batch.run_id, 1)


def test_progress_moves_only_with_the_counts(ledger: Ledger) -> None:
    """`progress_at` tells when something last changed, `polled_at` when we last asked."""
    (batch,) = build(ledger)
    held = claim(ledger, batch)
    assert held is not None
    ledger.submitted(held.batch, "batch_1", "validating")

    ledger.polled("batch_1", api_status="in_progress", done=1, failed=0)
    moved = ledger.batch(batch.submission_id)
    ledger.polled("batch_1", api_status="in_progress", done=1, failed=0)
    stuck = ledger.batch(batch.submission_id)

    assert moved.done_requests == 1
    assert stuck.progress_at == moved.progress_at
    assert stuck.polled_at is not None
    assert moved.polled_at is not None
    assert stuck.polled_at >= moved.polled_at


def test_states_move_only_along_the_edges(ledger: Ledger) -> None:
    """Every recorded change is one of `EDGES`, and an ended batch cannot end again."""
    (batch,) = build(ledger)
    held = claim(ledger, batch)
    assert held is not None
    ledger.submitted(held.batch, "batch_1", "validating")
    row = ledger.batch(batch.submission_id)

    assert ledger.ended(row, api_status="completed", done=3, failed=0)
    assert not ledger.ended(row, api_status="failed", done=0, failed=0)
    assert ledger.collected(row, reasons={}, succeeded=3)
    assert not ledger.collected(row, reasons={}, succeeded=2)

    steps = {(one["was"], one["became"]) for one in ledger.history(batch.run_id)}
    batch_steps = {step for step in steps if step[1] not in set(RunState) and step[0] is not None}
    assert batch_steps <= {(str(was), str(became)) for was, became in EDGES}
    assert ledger.batch(batch.submission_id).state == BatchState.COLLECTED


def test_money_is_exact(ledger: Ledger) -> None:
    """What is stored comes back to the last digit."""
    run = open_run(ledger)
    amount = Decimal("12345678901234.000000000000000001")

    ledger.count_run(run.run_id, estimate_usd=amount)

    assert ledger.run(run.run_id).estimate_usd == amount


def test_naive_times_are_refused(ledger: Ledger) -> None:
    """A time without a zone would mean something else on every machine."""
    run = open_run(ledger)

    with pytest.raises(sa.exc.StatementError, match="must be aware"):
        ledger.count_run(run.run_id, created_at=datetime(2026, 1, 1))  # noqa: DTZ001


def test_two_snapshots_at_once_keep_the_first(ledger: Ledger) -> None:
    """Everybody goes on with the snapshot that was recorded first."""
    run = open_run(ledger)

    first = ledger.keep_snapshot(run.run_id, "first", 1, instead_of=None)
    second = ledger.keep_snapshot(run.run_id, "second", 2, instead_of=None)

    assert (first.snapshot, second.snapshot, second.rows) == ("first", "first", 1)


def test_tasks_may_migrate_at_once(engine: sa.Engine) -> None:
    """Eight tasks that find an empty database all get a working ledger."""
    url = engine.url.render_as_string(hide_password=False)

    with ThreadPoolExecutor(8) as pool:
        ledgers = list(pool.map(lambda _: Ledger(sa.create_engine(url)), range(8)))

    assert len({open_run(one).run_id for one in ledgers}) == 1


def test_the_migrations_make_the_tables(engine: sa.Engine) -> None:
    """After all migrations the database has exactly the tables, columns and indexes of the code."""
    Ledger(engine)
    found = sa.inspect(engine)

    for table in ledger_tables.metadata.sorted_tables:
        columns = {one["name"] for one in found.get_columns(table.name)}
        indexes = {
            one["name"]: one["column_names"]
            for one in found.get_indexes(table.name)
            if "duplicates_constraint" not in one  # PostgreSQL names those of a key as well
        }
        assert columns == {one.name for one in table.columns}, table.name
        assert indexes == {one.name: one.columns.keys() for one in table.indexes}, table.name


def test_head_is_the_newest_migration() -> None:
    """`HEAD` names the last file, or tasks would skip it."""
    scripts = ScriptDirectory(str(ledger_database.MIGRATIONS))

    assert scripts.get_current_head() == ledger_database.HEAD


def test_a_newer_ledger_is_refused(engine: sa.Engine) -> None:
    """A release does not write into a ledger that a newer one has changed."""
    Ledger(engine)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE llm_batch_version SET version_num = '9999'"))

    with pytest.raises(ConfigurationError, match="9999"):
        Ledger(sa.create_engine(engine.url.render_as_string(hide_password=False)))


def test_a_database_that_is_away_is_transient() -> None:
    """Without its database a task is to be tried again; the message has no parameters."""
    with pytest.raises(TransientError, match="did not answer"):
        Ledger(sa.create_engine("postgresql+psycopg2://nobody@127.0.0.1:1/none"))


def test_a_file_on_a_disk_that_is_not_mounted_is_transient(tmp_path: Path) -> None:
    """Its folder is not there: a disk may come back, and a right is not what is missing."""
    with pytest.raises(TransientError, match="did not answer: unable to open database file"):
        Ledger(sa.create_engine(f"sqlite:///{tmp_path}/mount/ledger.db"))


@pytest.fixture
def stranger(empty_postgres_url: str) -> Iterator[sa.Engine]:
    """A user who may connect to the database of a ledger, and nothing else."""
    admin = sa.create_engine(empty_postgres_url, isolation_level="AUTOCOMMIT")
    role, password = f"llm_batch_stranger_{token_hex(4)}", token_hex(8)
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE ROLE {role} LOGIN PASSWORD '{password}'")
    made = sa.create_engine(sa.make_url(empty_postgres_url).set(username=role, password=password))
    yield made
    made.dispose()
    with admin.connect() as connection:
        connection.exec_driver_sql("DROP SCHEMA public CASCADE")
        connection.exec_driver_sql("CREATE SCHEMA public")
        connection.exec_driver_sql(f"DROP ROLE {role}")
    admin.dispose()


@pytest.mark.postgres
def test_a_user_without_rights_is_told_what_to_grant(
    stranger: sa.Engine, postgres_url: str
) -> None:
    """Who may not make the tables, who may not read them, and who may not write them."""
    owner = sa.create_engine(postgres_url)
    told = r"connection llm_batch_db\) refused: permission denied for {}\. Its user needs"

    with pytest.raises(ConfigurationError, match=told.format("schema public")):
        Ledger(stranger)
    Ledger(owner)
    with pytest.raises(ConfigurationError, match=told.format("table llm_batch_version")):
        Ledger(stranger)
    with owner.begin() as connection:
        for table in ("version", "run"):
            connection.exec_driver_sql(
                f"GRANT SELECT ON llm_batch_{table} TO {stranger.url.username}"
            )
    with pytest.raises(ConfigurationError, match=told.format("table llm_batch_run")):
        open_run(Ledger(stranger))
    (check,) = ledger_checks(stranger)
    assert (check.level, check.mend) == (Level.BAD, ledger_database.RIGHTS)
    assert check.found.endswith("refused: permission denied for table llm_batch_event.")
    owner.dispose()


@pytest.mark.postgres
def test_a_login_that_is_refused_is_not_tried_again(postgres_url: str) -> None:
    """No retry makes a role or a database that is not there."""
    url = sa.make_url(postgres_url)
    for wrong in (url.set(username="nobody_knows"), url.set(database="nobody_knows")):
        with pytest.raises(ConfigurationError, match=r"llm_batch_db.*nobody_knows.*not exist"):
            Ledger(sa.create_engine(wrong))


def test_the_first_to_open_a_file_wait_for_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite itself refuses at once whoever sets the journal of a file that another one writes."""
    path = tmp_path / "new.db"
    first = sqlite3.connect(path, isolation_level=None)
    first.execute("CREATE TABLE taken (n INTEGER)")
    first.execute("BEGIN IMMEDIATE")
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if first.in_transaction:
            first.execute("COMMIT")

    monkeypatch.setattr("tenacity.nap.time.sleep", wait)

    with ledger_database.prepare(sa.create_engine(f"sqlite:///{path}")).connect() as second:
        assert second.exec_driver_sql("PRAGMA journal_mode").scalar_one() == "wal"

    assert waited
    first.close()


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """A ledger on SQLite that was mounted read-only."""
    path = tmp_path / "ledger.db"
    Ledger(sa.create_engine(f"sqlite:///{path}"))
    read_only = sa.create_engine(f"sqlite:///file:{path}?mode=ro&uri=true")

    with pytest.raises(ConfigurationError, match=r"readonly database.*Its user needs"):
        open_run(Ledger(read_only))
