"""A small client of Airflow's public REST API (`/api/v2`), for people who wait and for tests."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from http.client import HTTPException
from typing import Any, TypeVar

from include.errors import ConfigurationError, PermanentError, TransientError

REQUEST_TIMEOUT = 30.0  # seconds
SERVER_ERROR_PATIENCE = 30.0  # seconds; SQLite answers 500 while another process writes
POLL_INTERVAL = 0.5  # seconds
FINAL_RUN_STATES = frozenset({"success", "failed"})

T = TypeVar("T")


class AirflowApiError(PermanentError):
    """Airflow refused a request; `status` is the HTTP status code."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class WaitTimeoutError(TransientError):
    """Something did not happen in time; the message says what was waited for."""


@dataclass(frozen=True)
class Backfill:
    """A backfill and the first and last logical date that it covers."""

    id: int
    first: datetime
    last: datetime
    is_paused: bool = False


@dataclass(frozen=True)
class DagRun:
    """One Airflow run, as far as a waiting person needs it."""

    run_id: str
    state: str
    logical_date: str | None
    interval_start: str | None
    is_backfill: bool = False
    ended_at: datetime | None = None

    @property
    def date(self) -> datetime | None:
        """The logical date, aware."""
        return datetime.fromisoformat(self.logical_date) if self.logical_date else None


def wait_until(
    what: str, seconds: float, probe: Callable[[], T | None], *, interval: float = POLL_INTERVAL
) -> T:
    """Call `probe` until it returns something true and return that.

    Raises `WaitTimeoutError`, naming `what`, after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while True:
        found = probe()
        if found:
            return found
        if time.monotonic() > deadline:
            msg = f"waited {seconds:.0f} s in vain for {what}"
            raise WaitTimeoutError(msg)
        time.sleep(interval)


class AirflowClient:
    """The calls that the local stack and its tests make.

    Raises `AirflowApiError` for 4xx answers and `TransientError` when the server cannot be
    reached or keeps answering 5xx.
    """

    def __init__(self, url: str, login: tuple[str, str] | None = None) -> None:
        self.url = url.rstrip("/")
        self._user = login  # name and password; None where everybody is an admin
        self._token = ""
        # 127.0.0.1 must not go through a proxy of the environment.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def health(self) -> dict[str, str]:
        """Status per component, e.g. {"scheduler": "healthy", ...}; needs no login."""
        report = self._once("GET", "/api/v2/monitor/health", None)
        return {name: part["status"] for name, part in report.items() if part}

    def has_dag(self, dag_id: str, *, since: datetime) -> bool:
        """Whether the DAG's file has been found and parsed since that moment."""
        try:
            found = self.call("GET", f"/dags/{dag_id}")
        except AirflowApiError as error:
            if error.status == 404:
                return False
            raise
        parsed = found["last_parsed_time"]
        return bool(parsed) and not found["is_stale"] and datetime.fromisoformat(parsed) >= since

    def import_errors(self, *, since: datetime) -> list[str]:
        """File and message of every DAG file that could not be imported since that moment."""
        found = self.call("GET", "/importErrors?limit=100")["import_errors"]
        return [
            f"{one['filename']}: {one['stack_trace']}"
            for one in found
            if datetime.fromisoformat(one["timestamp"]) >= since
        ]

    def set_paused(self, dag_id: str, *, paused: bool) -> None:
        """Pause or unpause a DAG."""
        self.call("PATCH", f"/dags/{dag_id}?update_mask=is_paused", {"is_paused": paused})

    def trigger(
        self,
        dag_id: str,
        *,
        run_id: str | None = None,
        logical_date: datetime | None = None,
        interval: tuple[datetime, datetime] | None = None,
        conf: Mapping[str, Any] | None = None,
    ) -> str:
        """Create a run and return its id."""
        start, end = interval or (None, None)
        body = {
            "dag_run_id": run_id,
            "logical_date": _iso(logical_date),
            "data_interval_start": _iso(start),
            "data_interval_end": _iso(end),
            "conf": dict(conf or {}),
        }
        created = self.call("POST", f"/dags/{dag_id}/dagRuns", body)
        return str(created["dag_run_id"])

    def run(self, dag_id: str, run_id: str) -> DagRun:
        """One run."""
        return _dag_run(self.call("GET", f"/dags/{dag_id}/dagRuns/{_quote(run_id)}"))

    def runs(self, dag_id: str, first: datetime, last: datetime) -> list[DagRun]:
        """Runs whose logical date lies between `first` and `last`, both included, oldest first."""
        within = {
            "logical_date_gte": _iso(first),
            "logical_date_lte": _iso(last),
            "order_by": "logical_date",
        }
        path = f"/dags/{dag_id}/dagRuns?{urllib.parse.urlencode(within)}"
        return [_dag_run(one) for one in self._pages(path, "dag_runs")]

    def task_instances(self, dag_id: str, run_id: str) -> list[dict[str, Any]]:
        """All task instances of a run: `task_id`, `map_index`, `state`, `try_number`, ..."""
        path = f"/dags/{dag_id}/dagRuns/{_quote(run_id)}/taskInstances?"
        return self._pages(path, "task_instances")

    def _pages(self, path: str, name: str) -> list[dict[str, Any]]:
        """Every entry of a list that Airflow gives out in pages of 100 at most."""
        found: list[dict[str, Any]] = []
        while True:
            page = self.call("GET", f"{path}&limit=100&offset={len(found)}")
            found += page[name]
            if len(found) >= page["total_entries"] or not page[name]:
                return found

    def timezone(self, dag_id: str) -> str:
        """Airflow's default time zone: its API does not tell that of a schedule."""
        try:
            found = self.call("GET", f"/dags/{dag_id}/details")
        except AirflowApiError as error:
            if error.status != 404:
                raise
            raise ConfigurationError(
                f"Airflow knows no DAG {dag_id}. It needs a file in the folder dags, found "
                "within a minute; a mistake in that file is an import error in the UI."
            ) from None
        return str(found["timezone"] or "UTC")

    def backfill_dates(
        self, dag_id: str, first: datetime, last: datetime, *, reprocess: str = "completed"
    ) -> list[datetime]:
        """The logical dates that a backfill of this range would run now, oldest first."""
        body = {
            "dag_id": dag_id,
            "from_date": _iso(first),
            "to_date": _iso(last),
            "reprocess_behavior": reprocess,
        }
        found = self.call("POST", "/backfills/dry_run", body)["backfills"]
        return sorted(datetime.fromisoformat(one["logical_date"]) for one in found)

    def task_states(self, dag_id: str, run_id: str) -> dict[str, str | None]:
        """State by task id; a mapped instance is named `task_id[map_index]`."""
        return {_instance_name(one): one["state"] for one in self.task_instances(dag_id, run_id)}

    def xcom(
        self, dag_id: str, run_id: str, task_id: str, *, key: str = "return_value", index: int = -1
    ) -> Any:
        """The value of one XCom entry."""
        path = f"/dags/{dag_id}/dagRuns/{_quote(run_id)}/taskInstances/{_quote(task_id)}"
        query = f"map_index={index}&deserialize=true"
        return self.call("GET", f"{path}/xcomEntries/{_quote(key)}?{query}")["value"]

    def clear(
        self,
        dag_id: str,
        run_id: str,
        tasks: Sequence[str | tuple[str, int]] | None = None,
        *,
        downstream: bool = True,
    ) -> None:
        """Clear tasks of a run (all when `tasks` is None), whatever their state."""
        body = {
            "dry_run": False,
            "dag_run_id": run_id,
            "task_ids": None if tasks is None else list(tasks),
            "only_failed": False,
            "include_downstream": downstream,
        }
        self.call("POST", f"/dags/{dag_id}/clearTaskInstances", body)

    def mark_task(
        self, dag_id: str, run_id: str, task_id: str, state: str, *, index: int = -1
    ) -> None:
        """Set the state of one task instance by hand ("success", "failed", "skipped")."""
        path = f"/dags/{dag_id}/dagRuns/{_quote(run_id)}/taskInstances/{_quote(task_id)}"
        suffix = "" if index < 0 else f"/{index}"
        self.call("PATCH", f"{path}{suffix}", {"new_state": state})

    def mark_run(self, dag_id: str, run_id: str, state: str) -> None:
        """Set the state of a run by hand ("success", "failed", "queued")."""
        self.call("PATCH", f"/dags/{dag_id}/dagRuns/{_quote(run_id)}", {"state": state})

    def active_backfills(self, dag_id: str) -> list[Backfill]:
        """The backfills of a DAG that Airflow has not yet marked complete."""
        found = self.call("GET", f"/backfills?dag_id={dag_id}&limit=100&order_by=-id")["backfills"]
        return [_backfill(one) for one in found if one["completed_at"] is None]

    def pause_backfill(self, backfill_id: int, *, paused: bool) -> None:
        """Let a backfill begin no more runs (its running ones go on), or let it go on."""
        self.call("PUT", f"/backfills/{backfill_id}/{'pause' if paused else 'unpause'}")

    def cancel_backfill(self, backfill_id: int) -> None:
        """End a backfill now: its queued runs fail, its running ones go on."""
        try:
            self.call("PUT", f"/backfills/{backfill_id}/cancel")
        except AirflowApiError as error:
            if error.status not in (404, 409):  # rolled back or completed in the meantime
                raise

    def create_backfill(
        self,
        dag_id: str,
        first: datetime,
        last: datetime,
        *,
        reprocess: str = "completed",
        max_active_runs: int = 10,
        backwards: bool = False,
        conf: Mapping[str, Any] | None = None,
    ) -> int:
        """Backfill the intervals that begin from `first` to `last`, and return the backfill's id.

        Airflow allows one active backfill per DAG and answers 409 to a second one. Not tried again
        when the answer is 5xx: a backfill may have been left behind.
        """
        body = {
            "dag_id": dag_id,
            "from_date": _iso(first),
            "to_date": _iso(last),
            "reprocess_behavior": reprocess,
            "max_active_runs": max_active_runs,
            "run_backwards": backwards,
            "dag_run_conf": dict(conf or {}),
        }
        return int(self.call("POST", "/backfills", body, patience=0.0)["id"])

    def wait_for_run(self, dag_id: str, run_id: str, *, seconds: float) -> DagRun:
        """Wait until a run is final."""

        def final() -> DagRun | None:
            found = self.run(dag_id, run_id)
            return found if found.state in FINAL_RUN_STATES else None

        return wait_until(f"run {run_id} of {dag_id}", seconds, final)

    def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        patience: float = SERVER_ERROR_PATIENCE,
    ) -> Any:
        """One call below `/api/v2`, again for `patience` seconds when the server answers 5xx."""
        deadline = time.monotonic() + patience
        while True:
            try:
                return self._once(method, f"/api/v2{path}", body, token=self._login())
            except TransientError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL_INTERVAL)
            except AirflowApiError as error:
                if error.status != 401 or time.monotonic() > deadline:
                    raise
                self._token = ""  # expired: log in again

    def _login(self) -> str:
        if not self._token:
            body = None
            if self._user is not None:
                body = {"username": self._user[0], "password": self._user[1]}
            method = "GET" if body is None else "POST"
            self._token = str(self._once(method, "/auth/token", body)["access_token"])
        return self._token

    def _once(
        self, method: str, path: str, body: Mapping[str, Any] | None, *, token: str = ""
    ) -> Any:
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if token:
            headers["Authorization"] = f"Bearer {token}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(  # noqa: S310 - the URL is our own stack's
            f"{self.url}{path}", data=data, headers=headers, method=method
        )
        try:
            with self._opener.open(request, timeout=REQUEST_TIMEOUT) as response:
                return json.loads(response.read() or b"null")
        except urllib.error.HTTPError as error:
            raise _api_error(method, path, error) from None
        except (OSError, HTTPException) as error:
            msg = f"{method} {path}: Airflow at {self.url} does not answer ({error})"
            raise TransientError(msg) from None


def _api_error(method: str, path: str, error: urllib.error.HTTPError) -> Exception:
    text = error.read().decode("utf-8", "replace")[:500]
    message = f"{method} {path}: HTTP {error.code} from Airflow: {text}"
    return TransientError(message) if error.code >= 500 else AirflowApiError(message, error.code)


def _backfill(found: Mapping[str, Any]) -> Backfill:
    first, last = (datetime.fromisoformat(found[name]) for name in ("from_date", "to_date"))
    return Backfill(int(found["id"]), first, last, is_paused=bool(found["is_paused"]))


def _dag_run(found: Mapping[str, Any]) -> DagRun:
    return DagRun(
        found["dag_run_id"],
        found["state"],
        found["logical_date"],
        found["data_interval_start"],
        is_backfill=found["run_type"] == "backfill",
        ended_at=datetime.fromisoformat(found["end_date"]) if found["end_date"] else None,
    )


def _instance_name(instance: Mapping[str, Any]) -> str:
    index = instance["map_index"]
    return instance["task_id"] if index < 0 else f"{instance['task_id']}[{index}]"


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()


def _quote(part: str) -> str:
    return urllib.parse.quote(part, safe="")
