"""The pages of LLM batches: who may see and do what, hostile input, and errors that help."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from include import actions
from include import ledger_tables as tables
from include.bench.full_ledger import Size, fill
from include.job_spec import load_job
from include.ledger import Ledger
from include.ledger_records import Batch, NewBatch, Partition, Run
from include.ledger_sums import money_sum

if TYPE_CHECKING:
    from starlette.testclient import TestClient

OURS, OTHERS = "ticket_triage", "commit_labels"
START = datetime(2026, 11, 1, tzinfo=UTC)
EVIL = "<script>alert('x')</script>\"'><img src=x onerror=alert(1)>"
FORM = re.compile(r'name="token" value="([^"]+)"')
TEXT_COLUMNS = ("key", "reason", "error_code", "error_message", "batch_id", "run_id")
ORIGIN = {"origin": "http://testserver"}


class Site:
    """The API server with our plugin, on a ledger with one run of each of two DAGs."""

    def __init__(self, ledger: Ledger) -> None:
        from airflow.api_fastapi.main import app

        self.app, self.ledger = app, ledger
        self.runs = {dag: self.open(dag) for dag in (OURS, OTHERS)}

    def open(self, dag_id: str, day: int = 0, dag_run_id: str | None = None) -> Run:
        """Open a run with one batch at the API, over a day of its own."""
        start = START + timedelta(days=day)
        spec = load_job(dag_id)
        run = self.ledger.open_run(
            Partition(dag_id, start, start + timedelta(days=1)),
            spec_digest=spec.digest,
            spec=spec.to_json(),
            mode="normal",
            dag_id=dag_id,
            dag_run_id=dag_run_id or f"manual__{dag_id}",
        )
        new = NewBatch(
            run_id=run.run_id,
            job=dag_id,
            round=1,
            shard=0,
            conn_id="openai_default",
            endpoint="/v1/responses",
            model=EVIL,
            request_file=f"{dag_id}/a.jsonl",
            index_file=None,
            content_digest="0" * 64,
            requests=10,
            bytes=10,
            input_tokens=10,
        )
        self.ledger.keep_snapshot(run.run_id, "{}", 10, instead_of=None)
        self.ledger.count_run(run.run_id, estimate_usd=Decimal("0.5"))
        (batch,) = self.ledger.build_round(run.run_id, 1, [new])
        claim = self.ledger.claim(
            batch.submission_id, owner="me", lease=timedelta(seconds=1), enqueued_tokens=None
        )
        assert claim is not None
        assert self.ledger.submitted(claim.batch, f"batch_{EVIL}{dag_id}{day or ''}", "in_progress")
        return self.ledger.run(run.run_id)

    def batch(self, dag_id: str = OURS) -> Batch:
        return self.ledger.batches(self.runs[dag_id].run_id)[0]

    def client(self, user: str | None = None, role: str = "VIEWER") -> TestClient:
        """Log in as a user (None: nobody), with the cookie that Airflow's login sets."""
        from airflow.api_fastapi.app import get_auth_manager
        from airflow.api_fastapi.auth.managers.base_auth_manager import COOKIE_NAME_JWT_TOKEN
        from airflow.api_fastapi.auth.managers.simple.user import SimpleAuthManagerUser
        from starlette.testclient import TestClient

        client = TestClient(self.app, follow_redirects=False, headers=ORIGIN)
        if user is not None:
            who = SimpleAuthManagerUser(username=user, role=role)
            client.cookies.set(COOKIE_NAME_JWT_TOKEN, get_auth_manager().generate_jwt(who))
        return client

    def query(self, dag_id: str = OURS) -> dict[str, Any]:
        """Arguments that suit every route."""
        run = self.runs[dag_id]
        return {
            "dag_id": dag_id,
            "run_id": run.dag_run_id,
            "ledger_run": run.run_id,
            "submission_id": self.batch(dag_id).submission_id,
            "kind": "requests",
        }


@pytest.fixture(scope="module")
def site(airflow_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("ui")
    settings = {
        "AIRFLOW__CORE__AUTH_MANAGER": "tests.dag_owners.DagOwners",
        "AIRFLOW__API__SECRET_KEY": "s" * 64,
        "AIRFLOW__API_AUTH__JWT_SECRET": "j" * 64,
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE": str(folder / "passwords.json"),
        "AIRFLOW_CONN_LLM_BATCH_DB": json.dumps(
            {"conn_type": "sqlite", "host": str(folder / "ledger.db")}
        ),
        "AIRFLOW_CONN_OPENAI_DEFAULT": json.dumps(
            {"conn_type": "openai", "host": "http://127.0.0.1:9/v1", "password": "sk-x"}
        ),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        _know_dags()
        yield Site(Ledger(sa.create_engine(f"sqlite:///{folder}/ledger.db")))
        from airflow.api_fastapi.app import purge_cached_app

        purge_cached_app()


def _know_dags() -> None:
    from airflow.dag_processing.dagbag import DagBag, sync_bag_to_db
    from airflow.models.dagbundle import DagBundleModel
    from airflow.utils.session import create_session

    with create_session() as session:
        session.merge(DagBundleModel(name="ui-tests"))
        session.flush()
        for dag_id in (OURS, OTHERS):
            bag = DagBag(f"{os.environ['AIRFLOW__CORE__DAGS_FOLDER']}/{dag_id}.py")
            sync_bag_to_db(bag, "ui-tests", None, session=session)


def _routes() -> list[tuple[str, str]]:
    """Every method and path of the app, none left out."""
    from llm_batch.ui import app

    found = []
    for route in app.routes:
        methods = getattr(route, "methods", None)
        assert methods, f"{route} is no plain route: who may use it?"
        path = route.path.replace("{name}", "llm_batch.css")  # type: ignore[attr-defined]
        found += [(method, f"/llm-batch{path}") for method in sorted(methods - {"HEAD"})]
    assert len(found) > 12
    return found


def _ask(client: TestClient, method: str, path: str, query: dict[str, Any]) -> Any:
    return client.request(
        method, path, params=query, data={"token": "t"} if method == "POST" else None
    )


def test_nobody_sees_anything_without_a_login(site: Site) -> None:
    """Every route answers 401 to somebody who is not logged in, the style sheet too."""
    nobody = site.client()

    answers = {
        (method, path): _ask(nobody, method, path, site.query()).status_code
        for method, path in _routes()
    }

    assert set(answers.values()) == {401}, answers


def test_every_route_about_a_dag_is_closed_to_the_users_of_another(site: Site) -> None:
    """403 whatever they ask with the DAG's own ids; only pages about no DAG answer."""
    stranger = site.client(f"sam@{OTHERS}", "ADMIN")
    open_to_all = {"/llm-batch/jobs", "/llm-batch/jobs/live", "/llm-batch/static/llm_batch.css"}

    for method, path in _routes():
        answer = _ask(stranger, method, path, site.query())
        assert answer.status_code == (200 if path in open_to_all else 403), (method, path)
        assert site.runs[OURS].run_id not in answer.text
        assert OURS not in answer.text


def test_a_run_of_another_dag_cannot_be_reached_through_ones_own(site: Site) -> None:
    """The permission is checked for `dag_id`, so the run must be of that DAG."""
    stranger = site.client(f"sam@{OTHERS}", "ADMIN")
    crossed = site.query(OURS) | {"dag_id": OTHERS}

    for method, path in _routes():
        answer = _ask(stranger, method, path, crossed)
        if "jobs" not in path and "static" not in path and not path.startswith("/llm-batch/dag"):
            assert answer.status_code in {403, 404} or "No LLM batches" in answer.text, path
        assert f"batch_{EVIL}{OURS}" not in answer.text
        assert site.runs[OURS].run_id not in answer.text


def test_a_batch_of_another_run_cannot_be_reached_through_ones_own(site: Site) -> None:
    """Neither its files nor its cancel."""
    owner = site.client(f"ann@{OTHERS}", "ADMIN")
    crossed = site.query(OTHERS) | {"submission_id": site.batch(OURS).submission_id}

    assert owner.get("/llm-batch/artifact", params=crossed).status_code == 404
    assert owner.get("/llm-batch/cancel", params=crossed).status_code == 409


def test_a_viewer_reads_and_changes_nothing(site: Site) -> None:
    """Pages answer without buttons; the actions are refused, question and form."""
    viewer = site.client(f"vera@{OURS}", "VIEWER")

    page = viewer.get("/llm-batch/run", params=site.query())
    refused = [
        _ask(viewer, method, path, site.query()).status_code
        for method, path in _routes()
        if path in {"/llm-batch/cancel", "/llm-batch/close", "/llm-batch/redrive"}
    ]

    assert page.status_code == 200
    assert "Cancel" not in page.text
    assert refused == [403] * 6
    assert actions.history(site.ledger, run_id=site.runs[OURS].run_id) == []


def test_the_page_over_all_jobs_has_only_readable_dags(site: Site) -> None:
    """A job of another DAG appears in no table, chart or sum."""
    page = site.client(f"vera@{OURS}").get("/llm-batch/jobs")

    assert page.status_code == 200
    assert OURS in page.text
    assert OTHERS not in page.text


def test_docs_and_schema_are_off(site: Site) -> None:
    """The app describes itself to nobody."""
    admin = site.client(f"ann@{OURS}", "ADMIN")

    for path in ("docs", "redoc", "openapi.json"):
        assert admin.get(f"/llm-batch/{path}").status_code == 404


def test_every_answer_has_the_security_headers(site: Site) -> None:
    """Pages, errors, redirects and files; scripts and frames of our own origin only."""
    viewer = site.client(f"vera@{OURS}")

    for method, path in [*_routes(), ("GET", "/llm-batch/nothing")]:
        headers = _ask(viewer, method, path, site.query()).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy, path
        assert "unsafe" not in policy
        assert "frame-ancestors 'self'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "same-origin"
        assert "no-store" in headers["cache-control"] or "/static/" in path


def test_hostile_names_stay_text(site: Site) -> None:
    """What a model, a provider or a user wrote is never markup."""
    owner = site.client(f"ann@{OURS}", "ADMIN")
    query = site.query()

    pages = [
        owner.get("/llm-batch/run", params=query),
        owner.get("/llm-batch/dag", params=query),
        owner.get("/llm-batch/jobs"),
        owner.get("/llm-batch/cancel", params=query),
        owner.get("/llm-batch/run", params={**query, "run_id": EVIL}),
        owner.get("/llm-batch/failures", params={**query, "ledger_run": EVIL}),
    ]

    assert "&lt;script&gt;" in pages[0].text
    for page in pages:
        assert "<script>alert" not in page.text
        assert "<img" not in page.text


def test_templates_and_scripts_hold_nothing_inline(site: Site) -> None:
    """The policy forbids it, so it would not work; and nothing turns escaping off."""
    from llm_batch import ui_render

    for template in sorted((ui_render.HERE / "templates").glob("*.html")):
        text = template.read_text()
        assert "|safe" not in text.replace(" ", "")
        assert "autoescape" not in text
        assert not re.search(r"\sstyle=|\son[a-z]+=|<script>|<style", text), template.name


@pytest.fixture
def failed_row(site: Site, airflow_home: Path) -> Iterator[None]:
    """One failed row whose key and message are hostile."""
    engine = sa.create_engine(f"sqlite:///{airflow_home}/results_db.db")
    failures = load_job(OURS).target.failures_table
    names = ["ticket_id", *(f"_{one}" for one in TEXT_COLUMNS)]
    table = sa.Table(
        failures,
        sa.MetaData(),
        *(sa.Column(name, sa.Text) for name in names),
        sa.Column("_rounds", sa.Integer),
    )
    with engine.begin() as connection:
        connection.exec_driver_sql(f'DROP TABLE IF EXISTS "{failures}"')
        table.create(connection)
        values = dict.fromkeys(names, EVIL) | {
            "_key": "d" * 64,
            "_run_id": site.runs[OURS].run_id,
            "_rounds": 1,
            "_batch_id": "batch_1",
            "_reason": "invalid_request",
            "ticket_id": f"T-1{EVIL}",
        }
        connection.execute(sa.insert(table).values(values))
    yield
    with engine.begin() as connection:
        table.drop(connection)


@pytest.mark.usefixtures("failed_row")
def test_row_text_is_for_those_who_read_code_and_data(site: Site) -> None:
    """They see keys and messages, escaped; others a digest and the reason."""
    query = site.query()

    seen = site.client(f"vera@{OURS}").get("/llm-batch/failures", params=query).text
    hidden = site.client(f"blind@{OURS}").get("/llm-batch/failures", params=query).text

    assert "T-1&lt;script&gt;" in seen
    assert "<script>alert" not in seen
    assert "T-1" not in hidden
    assert "alert" not in hidden
    assert "d" * 16 in hidden
    assert "invalid_request" in hidden


def test_files_are_for_those_who_read_code_and_data(site: Site) -> None:
    """They hold row text; the page of somebody else offers none."""
    blind = site.client(f"blind@{OURS}", "ADMIN")

    assert blind.get("/llm-batch/artifact", params=site.query()).status_code == 403
    assert "/artifact?" not in blind.get("/llm-batch/run", params=site.query()).text


# Forms


def _token(client: TestClient, path: str, query: dict[str, Any]) -> str:
    answer = client.get(path, params=query)
    assert answer.status_code == 200, answer.text
    found = FORM.search(answer.text)
    assert found
    return found[1]


def _cancel(
    client: TestClient, query: dict[str, Any], token: str, headers: dict[str, str] | None = None
) -> Any:
    return client.post("/llm-batch/cancel", params=query, data={"token": token}, headers=headers)


def test_a_form_of_another_site_is_refused(site: Site) -> None:
    """A foreign, opaque or missing origin, or a cross-site fetch: nothing is done, nor recorded."""
    owner = site.client(f"ann@{OURS}", "ADMIN")
    query = site.query()
    token = _token(owner, "/llm-batch/cancel", query)
    bad: list[dict[str, str]] = [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": ""},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ]

    refused = [_cancel(owner, query, token, headers) for headers in bad]

    assert [one.status_code for one in refused] == [403] * len(bad)
    assert actions.history(site.ledger, run_id=site.runs[OURS].run_id) == []


def test_a_token_is_for_one_user_browser_and_action(site: Site) -> None:
    """Another user's, another browser's, another action's and a made-up token are refused."""
    owner, colleague = (site.client(f"{one}@{OURS}", "ADMIN") for one in ("ann", "bob"))
    other_browser = site.client(f"ann@{OURS}", "ADMIN")
    query = site.query()
    whole_run = {name: value for name, value in query.items() if name != "submission_id"}
    token = _token(owner, "/llm-batch/cancel", query)
    _token(colleague, "/llm-batch/cancel", query)
    _token(other_browser, "/llm-batch/cancel", query)

    refused = [
        _cancel(colleague, query, token),
        _cancel(other_browser, query, token),
        _cancel(owner, whole_run, token),
        _cancel(owner, query, token[:-2] + "xx"),
        _cancel(owner, query, ""),
    ]

    assert [one.status_code for one in refused] == [403, 403, 403, 403, 422]
    assert actions.history(site.ledger, run_id=site.runs[OURS].run_id) == []


def test_the_form_cookie_is_hidden_and_strict(site: Site) -> None:
    """No script reads it, and no other site makes a browser send it."""
    owner = site.client(f"ann@{OURS}", "ADMIN")

    cookie = owner.get("/llm-batch/cancel", params=site.query()).headers["set-cookie"].lower()

    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert "path=/llm-batch" in cookie


def test_the_question_tells_rows_and_money(site: Site) -> None:
    """Of a batch: what is kept, what stops; the sums are the ledger's."""
    site.ledger.polled(str(site.batch().batch_id), api_status="in_progress", done=4, failed=0)

    page = site.client(f"ann@{OURS}", "ADMIN").get("/llm-batch/cancel", params=site.query()).text

    assert re.search(r'id="answered">4<small>about \$0\.2000', page)
    assert re.search(r'id="stopped">6<small>saves up to about \$0\.3000', page)


def test_a_closed_run_is_told_and_offers_nothing_to_cancel(site: Site) -> None:
    """Its page says that a person has ended it, and that what it has collected is kept."""
    spec = load_job(OURS)
    start = datetime(2027, 3, 1, tzinfo=UTC)
    run = site.ledger.open_run(
        Partition(OURS, start, start + timedelta(days=1)),
        spec_digest=spec.digest,
        spec=spec.to_json(),
        mode="normal",
        dag_id=OURS,
        dag_run_id="closed",
    )
    query = {"dag_id": OURS, "run_id": "closed", "ledger_run": run.run_id}
    person = site.client(f"ann@{OURS}", "ADMIN")
    before = person.get("/llm-batch/run", params=query).text

    site.ledger.close_run(run.run_id, cost_usd=Decimal(0))

    page = person.get("/llm-batch/run", params=query).text
    assert ('id="cancel-run"' in before, 'id="cancel-run"' in page) == (True, False)
    assert 'data-final="true"' in page
    assert "Closed by a person" in page


# Closing a run


def _replace(site: Site, run: Run) -> Run:
    """Open the run that a changed prompt makes over the same partition."""
    spec = load_job(OURS)
    request = spec.request.model_copy(update={"prompt": "Sort it.\n---\n{{ subject }}"})
    changed = spec.model_copy(update={"request": request})
    return site.ledger.open_run(
        Partition(OURS, run.interval_start, run.interval_end),
        spec_digest=changed.digest,
        spec=changed.to_json(),
        mode="normal",
        dag_id=OURS,
        dag_run_id=f"{run.dag_run_id}_newer",
    )


def _half_collected(site: Site, day: int, dag_run_id: str) -> Run:
    """Open a run of two batches of ten requests: one has cost $0.25, one was never sent."""
    run = site.open(OURS, day, dag_run_id)
    (first,) = site.ledger.batches(run.run_id)
    site.ledger.ended(first, api_status="completed", done=10, failed=0)
    ended = site.ledger.batch(first.submission_id)
    site.ledger.collected(ended, reasons={}, succeeded=10, cost_usd=Decimal("0.25"))
    same = {one.name: getattr(first, one.name) for one in fields(NewBatch)}
    again = NewBatch(**same | {"round": 2, "content_digest": "1" * 64})
    site.ledger.build_round(run.run_id, 2, [again])
    return run


def _of(run: Run) -> dict[str, Any]:
    return {"dag_id": OURS, "run_id": run.dag_run_id, "ledger_run": run.run_id}


def test_a_run_that_never_ends_is_closed_by_two_clicks(site: Site) -> None:
    """The question tells rows, batches and money; the deed is on record in both logs."""
    owner, viewer = site.client(f"ann@{OURS}", "ADMIN"), site.client(f"vera@{OURS}")
    run = _half_collected(site, 20, "replaced")
    newer = _replace(site, run)
    assert 'id="close-run"' not in viewer.get("/llm-batch/run", params=_of(run)).text
    page = owner.get("/llm-batch/run", params=_of(run)).text
    assert ('id="close-run"' in page, "will not end by itself" in page) == (True, True)
    asked = owner.get("/llm-batch/close", params=_of(run)).text
    for tile in (r'rows">10<', r'batches">0<', r'unsent">10<', r'cost">\$0\.2500<'):
        assert re.search(f'id="close-{tile}', asked), tile
    assert newer.run_id[:12] in asked
    token = _token(owner, "/llm-batch/close", _of(run))

    answer = owner.post("/llm-batch/close", params=_of(run), data={"token": token})

    assert answer.status_code == 303, answer.text
    closed = site.ledger.run(run.run_id)
    assert (closed.state, closed.cost_usd) == ("CLOSED", Decimal("0.25"))
    (line,) = actions.history(site.ledger, run_id=run.run_id)
    assert (line.who, line.via, line.kind, line.outcome) == (f"ann@{OURS}", "ui", "close", "done")
    assert _events(OURS)["llm_batch_close"] == f"ann@{OURS}"
    page = owner.get(answer.headers["location"]).text
    assert ("The run is closed" in page, 'id="close-run"' in page) == (True, False)


def test_a_run_that_may_still_end_is_not_closed(site: Site) -> None:
    """No button and no question for the newest of a partition, nor while Airflow works on one."""
    owner = site.client(f"ann@{OURS}", "ADMIN")
    moment = (START + timedelta(days=21)).isoformat()
    made = owner.post(f"/api/v2/dags/{OURS}/dagRuns", json={"logical_date": moment})
    assert made.status_code == 200, made.text
    newest = site.open(OURS, 22, "newest")
    alive = site.open(OURS, 21, made.json()["dag_run_id"])
    _replace(site, alive)

    pages = [owner.get("/llm-batch/run", params=_of(one)).text for one in (newest, alive)]
    asked = [owner.get("/llm-batch/close", params=_of(one)) for one in (newest, alive)]

    assert ['id="close-run"' in one for one in pages] == [False, False]
    assert [one.status_code for one in asked] == [409, 409]
    assert "is the newest run of its partition" in asked[0].text
    assert f"Airflow run {alive.dag_run_id} of DAG {OURS} works on it" in asked[1].text


def test_a_close_that_cannot_ask_the_api_is_on_record(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run stays open, the line says failed, and the button is still there."""
    owner = site.client(f"ann@{OURS}", "ADMIN")
    run = site.open(OURS, 23, "unreachable")
    _replace(site, run)
    token = _token(owner, "/llm-batch/close", _of(run))
    forged = owner.post("/llm-batch/close", params=_of(run), data={"token": f"{token}x"})
    assert (forged.status_code, actions.history(site.ledger, run_id=run.run_id)) == (403, [])
    monkeypatch.delenv("AIRFLOW_CONN_OPENAI_DEFAULT")

    answer = owner.post("/llm-batch/close", params=_of(run), data={"token": token})

    assert answer.status_code == 409
    (line,) = actions.history(site.ledger, run_id=run.run_id)
    assert (line.kind, line.outcome) == ("close", "failed")
    assert site.ledger.run(run.run_id).state == "OPEN"
    assert 'id="close-run"' in owner.get("/llm-batch/run", params=_of(run)).text


def _events(dag_id: str) -> dict[str, str]:
    """What Airflow's audit log has of a DAG: who did which event."""
    from airflow.models.log import Log
    from airflow.utils.session import create_session

    with create_session() as session:
        query = sa.select(Log.event, Log.owner).where(Log.dag_id == dag_id).order_by(Log.id)
        return dict(session.execute(query).all())


def _airflow_run(run_id: str) -> Any:
    from airflow.models.dagrun import DagRun
    from airflow.utils.session import create_session

    with create_session() as session:
        return session.scalars(sa.select(DagRun).where(DagRun.run_id == run_id)).one()


def test_actions_go_through_airflow_as_the_user(site: Site) -> None:
    """A redrive is an Airflow run over the partition, cancelling it fails that run; both logged."""
    owner = site.client(f"ann@{OURS}", "ADMIN")
    run = site.open(OURS, day=3, dag_run_id="manual__done")
    site.ledger.finish_run(run.run_id, loaded=8, failed=2)
    query = {"dag_id": OURS, "ledger_run": run.run_id}
    token = _token(owner, "/llm-batch/redrive", query)
    assert "The DAG is paused" in owner.get("/llm-batch/redrive", params=query).text

    answer = owner.post("/llm-batch/redrive", params=query, data={"token": token})

    assert answer.status_code == 303, answer.text
    assert "The redrive was started" in owner.get(answer.headers["location"]).text
    (line,) = actions.history(site.ledger, run_id=run.run_id)
    started = _airflow_run(str(line.detail).removeprefix("Airflow run "))
    assert (line.who, line.kind, line.outcome) == (f"ann@{OURS}", "redrive", "done")
    assert started.conf == actions.redrive_params(run)
    assert (started.data_interval_start, started.data_interval_end) == (
        run.interval_start,
        run.interval_end,
    )
    assert started.triggering_user_name == f"ann@{OURS}"

    again = site.open(OURS, day=4, dag_run_id=started.run_id)
    (batch,) = site.ledger.batches(again.run_id)
    site.ledger.ended(batch, api_status="completed", done=10, failed=0)
    query = {"dag_id": OURS, "ledger_run": again.run_id}
    answer = _cancel(owner, query, _token(owner, "/llm-batch/cancel", query))

    assert answer.status_code == 303, answer.text
    assert _airflow_run(started.run_id).state == "failed"
    events = _events(OURS)
    for event in ("llm_batch_redrive", "trigger_dag_run", "llm_batch_cancel", "patch_dag_run"):
        assert events[event] == f"ann@{OURS}"


def test_a_run_that_has_ended_well_stays_as_it_is(site: Site) -> None:
    """Cancelling what it shares with another run does not turn its success into a failure."""
    from airflow.models.dagrun import DagRun
    from airflow.utils.session import create_session

    owner = site.client(f"ann@{OURS}", "ADMIN")
    shared = site.open(OURS, day=5, dag_run_id="manual__shared")
    ended = DagRun(dag_id=OURS, run_id=shared.dag_run_id, run_type="manual", state="success")
    with create_session() as session:
        session.add(ended)
    (batch,) = site.ledger.batches(shared.run_id)
    site.ledger.ended(batch, api_status="completed", done=10, failed=0)
    query = {"dag_id": OURS, "ledger_run": shared.run_id}

    answer = _cancel(owner, query, _token(owner, "/llm-batch/cancel", query))

    assert answer.status_code == 303, answer.text
    assert _airflow_run(shared.dag_run_id).state == "success"


# Errors and the empty ledger


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[sa.Engine]:
    """Another database as the ledger, for one test."""
    path = tmp_path / "other.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "AIRFLOW_CONN_LLM_BATCH_DB", json.dumps({"conn_type": "sqlite", "host": str(path)})
        )
        yield sa.create_engine(f"sqlite:///{path}")


@pytest.mark.usefixtures("elsewhere")
def test_an_empty_ledger_shows_what_to_do_first(site: Site) -> None:
    """No tables yet: how to begin, not an error; and the page creates nothing."""
    for path in ("jobs", "run", "dag"):
        page = site.client(f"vera@{OURS}").get(f"/llm-batch/{path}", params=site.query())
        assert page.status_code == 200
        assert "job.yaml" in page.text


def test_a_ledger_of_another_release_is_told(site: Site, elsewhere: sa.Engine) -> None:
    """Older: the next task migrates it. Newer: the API server is behind."""
    Ledger(elsewhere)
    seen = []
    for version in ("0001", "9999"):
        with elsewhere.begin() as connection:
            statement = sa.text("UPDATE llm_batch_version SET version_num = :version")
            connection.execute(statement, {"version": version})
        page = site.client(f"vera@{OURS}").get("/llm-batch/jobs")
        assert page.status_code == 503
        seen.append(page.text)

    assert "is at migration 0001" in seen[0]
    assert "migrates it" in seen[0]
    assert "newer release" in seen[1]


def test_a_ledger_that_is_away_is_told(site: Site, tmp_path: Path) -> None:
    """503 with what to check, and no trace of SQL or of the connection's address."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path / "a-folder-is-no-database"
        folder.mkdir()
        patch.setenv(
            "AIRFLOW_CONN_LLM_BATCH_DB", json.dumps({"conn_type": "sqlite", "host": str(folder)})
        )

        page = site.client(f"vera@{OURS}").get("/llm-batch/jobs")

    assert page.status_code == 503
    assert "llm_batch_db" in page.text
    assert "SELECT" not in page.text
    assert str(folder) not in page.text


def test_the_page_over_all_jobs_asks_little_of_a_full_ledger(
    site: Site, elsewhere: sa.Engine
) -> None:
    """As many questions for 5,000 batches as for 40, and a bounded number of rows."""
    fill(elsewhere, Size())
    with elsewhere.begin() as connection:
        for table in (tables.run, tables.batch):
            connection.execute(sa.update(table).values(job=OURS).where(table.c.job == "job_00"))
        connection.execute(sa.update(tables.run).values(dag_id=OURS))
    asked: list[tuple[str, Any]] = []

    def note(_conn: Any, _cursor: Any, statement: str, parameters: Any, *_rest: Any) -> None:
        if "llm_batch_" in statement and "sqlite_master" not in statement:
            asked.append((statement, parameters))

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        page = site.client(f"vera@{OURS}").get("/llm-batch/jobs")
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)

    assert page.status_code == 200
    assert "job_09" in page.text
    assert 5 < len(asked) <= 14
    with elsewhere.connect() as connection:
        money_sum(connection, tables.batch.c.cost_usd)  # SQLite is taught to add decimals
        rows = [len(connection.exec_driver_sql(*one).fetchall()) for one in asked]
    assert sum(rows) < 5_000
