"""Metrics of a whole run, as a real OpenTelemetry collector gets them over HTTP."""

from __future__ import annotations

import atexit
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)

from include.job_spec import JOBS_ROOT
from include.simulator.process import Simulator
from tests.airflow.workshop import Job

FLUSH_TIMEOUT = 60_000  # milliseconds
Points = dict[tuple[str, frozenset[tuple[str, str]]], Any]


class _Session(BaseHTTPRequestHandler):
    def do_POST(self) -> None:  # the base class names it
        body = self.rfile.read(int(self.headers["Content-Length"]))
        cast("Collector", self.server).requests.append(ExportMetricsServiceRequest.FromString(body))
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # same
        """Say nothing."""


class Collector(ThreadingHTTPServer):
    """An OTLP receiver on a free port."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Session)
        self.requests: list[ExportMetricsServiceRequest] = []

    def points(self) -> Points:
        """The newest value of each metric and its tags; of a histogram how often it was told."""
        found: Points = {}
        for request in self.requests:
            for metric in (
                metric
                for resource in request.resource_metrics
                for scope in resource.scope_metrics
                for metric in scope.metrics
            ):
                data = getattr(metric, metric.WhichOneof("data"))
                for point in data.data_points:
                    tags = frozenset((one.key, one.value.string_value) for one in point.attributes)
                    found[metric.name, tags] = (
                        point.count if hasattr(point, "count") else point.as_double or point.as_int
                    )
        return found


@contextmanager
def collecting() -> Iterator[Collector]:
    """Point Airflow's metrics at a collector until the block ends, and flush them."""
    from airflow.sdk._shared.observability.metrics import stats
    from airflow.sdk._shared.observability.metrics.otel_logger import (
        flush_otel_metrics,
        get_otel_logger,
    )
    from opentelemetry import metrics

    before = stats._factory, stats._backend
    with Collector() as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        host, port = collector.server_address[:2]
        logger = get_otel_logger(host=str(host), port=int(port), conf_interval=60_000)
        stats.initialize(factory=lambda: logger, export_legacy_names=False)
        provider = cast("Any", metrics.get_meter_provider())
        try:
            yield collector
            assert provider.force_flush(FLUSH_TIMEOUT)
        finally:
            provider.shutdown()
            stats._factory, stats._backend = before
            atexit.unregister(flush_otel_metrics)
            collector.shutdown()


def test_a_run_tells_its_metrics_by_name_and_tag(
    airflow_home: Path, service: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counters, gauges and times of a run whose first round lost a request, and of its retry."""
    shutil.copytree(JOBS_ROOT, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("AIRFLOW__LLM_BATCH__JOBS", str(tmp_path))
    job = Job("measured", tmp_path, airflow_home / "dags", airflow_home)
    job.write(job_yaml=("rounds: 1", "rounds: 2"))
    job.fill([(f"n{number}", "text") for number in range(10)])
    service.add_faults({"fault": "line_error", "status": 500, "fraction": 0.5, "first_times": 1})

    with collecting() as collector:
        job.run()
        job.dag_file.unlink()
    found = {
        (name, tuple(sorted(dict(tags).values()))): value
        for (name, tags), value in collector.points().items()
        if name.startswith("airflow.llm_batch.")
    }

    def value(name: str, *tags: str) -> Any:
        return found[f"airflow.llm_batch.{name}", tuple(sorted(("measured", *tags)))]

    model = "gpt-5-mini"
    retried = value("requests.outcomes", model, "retry")
    assert 0 < retried < 10
    assert value("requests.submitted", model, "1") == 10
    assert value("requests.submitted", model, "2") == retried
    assert value("requests.outcomes", model, "succeeded") == 10
    assert value("batches.submitted", model, "1") == value("batches.submitted", model, "2") == 1
    assert value("batches.collected", model, "completed") == 2
    assert value("tokens", model, "input") > 0
    assert value("batch.duration", model) == 2
    assert value("run.duration") == 1
    assert value("in_flight.batches", "openai_default") == 0
    assert value("run.loaded") == 10
    dollars = value("run.cost_usd")  # each of the two batches was rounded to a millionth
    assert value("cost_microusd", model) == pytest.approx(dollars * 1_000_000, abs=1)
