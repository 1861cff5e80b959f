"""What jobs have cost: exact sums by day, run, round and job, on both databases."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
import sqlalchemy as sa

from include.cost_table import cost_json, cost_table
from include.costs import costs_by_day, costs_by_job, total
from include.errors import ConfigurationError
from include.ledger import Ledger
from include.local_stack.costs import main
from tests.unit.test_budgets import collect, planned, run

CENT = "0.010000000000000000001"  # more digits than a binary fraction has


@pytest.fixture
def ledger(empty_database: sa.Engine) -> Ledger:
    """Three days in two months, two rounds on the first of them."""
    ledger = Ledger(empty_database)
    for day, round_, at in (
        (0, 1, datetime(2026, 11, 1, 23, 59, 59, tzinfo=UTC)),
        (0, 2, datetime(2026, 11, 1, 23, 59, 59, tzinfo=UTC)),
        (1, 1, datetime(2026, 11, 2, tzinfo=UTC)),
        (2, 1, datetime(2026, 12, 1, tzinfo=UTC)),
    ):
        ours = run(ledger, day)
        (*_, batch) = ledger.build_round(ours.run_id, round_, [planned(ours, None, number=round_)])
        collect(
            ledger,
            batch,
            collected_at=at,
            cost_usd=Decimal(CENT),
            realtime_usd=2 * Decimal(CENT),
            used_input_tokens=1_000,
            used_cached_tokens=400,
            used_output_tokens=50,
            used_reasoning_tokens=5,
        )
    return ledger


def test_a_day_is_the_exact_sum_of_its_batches(ledger: Ledger) -> None:
    """Days are those of UTC, a month ends where the next begins, no digit is lost."""
    first, second = costs_by_day(ledger, "job", "2026-11")

    assert (first.what, first.batches, first.requests) == ("2026-11-01", 2, 200)
    assert first.cost_usd == 2 * Decimal(CENT)
    assert first.saved_usd == 2 * Decimal(CENT)
    assert (first.input_tokens, first.cached_tokens) == (2_000, 800)
    assert (first.output_tokens, first.reasoning_tokens) == (100, 10)
    assert (second.what, second.cost_usd) == ("2026-11-02", Decimal(CENT))


def test_days_and_jobs_add_up_to_the_same(ledger: Ledger) -> None:
    """Whatever the batches are grouped by, the sum is theirs."""
    by_day = costs_by_day(ledger, "job", "2026-11")
    (whole,) = costs_by_job(ledger, "2026-11")

    assert total(by_day).cost_usd == whole.cost_usd == 3 * Decimal(CENT)
    assert (whole.what, whole.batches) == ("job", 3)


def test_a_batch_without_price_makes_its_day_unknown(ledger: Ledger) -> None:
    """Unknown is not 0: neither in the line, nor in the sum, nor in the view."""
    (batch,) = ledger.batches(run(ledger, 1).run_id)
    collect(ledger, batch, cost_usd=None, collected_at=datetime(2026, 11, 2, tzinfo=UTC))

    lines = costs_by_day(ledger, "job", "2026-11")

    assert [line.cost_usd for line in lines] == [2 * Decimal(CENT), None]
    assert total(lines).cost_usd is None
    assert "unknown" in cost_table("job", lines)


def test_the_view_is_there_for_other_tools(ledger: Ledger) -> None:
    """One line per job, day, round and model."""
    sql = "SELECT day, round, requests, cost_usd FROM llm_batch_cost ORDER BY day, round"
    with ledger.engine.connect() as connection:
        rows = [tuple(row) for row in connection.execute(sa.text(sql))]

    assert [(str(day), round_, int(n)) for day, round_, n, _ in rows] == [
        ("2026-11-01", 1, 100),
        ("2026-11-01", 2, 100),
        ("2026-11-02", 1, 100),
        ("2026-12-01", 1, 100),
    ]
    assert all(abs(Decimal(str(usd)) - Decimal(CENT)) < Decimal("1e-12") for *_, usd in rows)


def test_a_wrong_month_is_named(ledger: Ledger) -> None:
    """The message shows what a month looks like."""
    with pytest.raises(ConfigurationError, match=r"'November' is no month such as 2026-11"):
        costs_by_day(ledger, "job", "November")


def test_the_json_has_exact_money(ledger: Ledger) -> None:
    """Money is decimal text."""
    (line, _) = json.loads(cost_json(costs_by_day(ledger, "job", "2026-11")))

    assert line["cost_usd"] == str(2 * Decimal(CENT))


def test_the_command_prints_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`make costs` asks the ledger of the environment, and names it, also when it has nothing."""
    connection = {"conn_type": "sqlite", "host": str(tmp_path / "cli.db")}
    monkeypatch.setenv("AIRFLOW_CONN_LLM_BATCH_DB", json.dumps(connection))
    ledger = Ledger(sa.create_engine(f"sqlite:///{tmp_path}/cli.db"))
    ours = run(ledger)
    asked = replace(planned(ours, None), model="gpt-4o-mini")
    (batch,) = ledger.build_round(ours.run_id, 1, [asked])
    moment = datetime(2026, 11, 1, tzinfo=UTC) + timedelta(hours=1)
    collect(ledger, batch, collected_at=moment, cost_usd=Decimal(1), realtime_usd=Decimal(2))

    assert main(["--job", "job", "--month", "2026-11"]) == 0
    told = capsys.readouterr().out
    assert "$1.0000" in told
    assert f"From the ledger sqlite:///{tmp_path}/cli.db." in told
    assert "The price of gpt-4o-mini is not verified." in told
    assert main(["--job", "job", "--month", "2026-10"]) == 0
    assert (
        f"10: no batch was collected in the ledger sqlite:///{tmp_path}" in capsys.readouterr().out
    )
    assert main(["--month", "soon"]) == 1


def test_the_command_makes_no_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Costs of a ledger that nobody has begun are no zero: it is refused, and none is left."""
    path = tmp_path / "none" / "ledger.db"
    connection = {"conn_type": "sqlite", "host": str(path)}
    monkeypatch.setenv("AIRFLOW_CONN_LLM_BATCH_DB", json.dumps(connection))

    assert main(["--month", "2026-11"]) == 1

    assert f"no ledger at {path}" in capsys.readouterr().err
    assert not path.parent.exists()


def test_the_command_migrates_no_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who looks at costs must not upgrade the ledger under workers of an older release."""
    path = tmp_path / "empty.db"
    sa.create_engine(f"sqlite:///{path}").connect().close()
    monkeypatch.setenv("AIRFLOW_CONN_LLM_BATCH_DB", f"sqlite://{path}")

    assert main(["--month", "2026-11"]) == 1

    assert "python -m llm_batch migrate" in capsys.readouterr().err
    assert not sa.inspect(sa.create_engine(f"sqlite:///{path}")).get_table_names()


def test_the_command_reads_a_server_and_hides_its_password(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is exported in the terminal is what is read, SQLite or PostgreSQL."""
    url = ledger.engine.url.set(drivername=ledger.engine.url.get_backend_name())
    monkeypatch.setenv("AIRFLOW_CONN_LLM_BATCH_DB", url.render_as_string(hide_password=False))

    assert main(["--month", "2026-12"]) == 0

    told = capsys.readouterr().out
    assert "$0.0100" in told
    assert str(url.database) in told
    assert url.password is None or f":{url.password}@" not in told
