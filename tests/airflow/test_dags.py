from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from airflow.dag_processing.dagbag import DagBag

PROJECT = Path(__file__).resolve().parents[2]
DAG_FILES = sorted((PROJECT / "dags").glob("*.py"))
HEAVY = ("openai", "pandas", "pyarrow", "alembic")
LIMIT = 0.3  # CPU seconds over `import airflow.sdk`, where that takes up to two
SHARE = 0.15  # of what `import airflow.sdk` takes, on a slower machine

MEASURE = """
import json, sys, time
began = time.process_time()
import airflow.sdk
from airflow.sdk import DAG, Asset, BaseOperator, BaseSensorOperator, Param, TaskGroup, task_group
before = time.process_time()
sys.path.insert(0, sys.argv[1])
__import__(sys.argv[2])
took = time.process_time() - before
heavy = [m for m in sys.argv[3:] if m in sys.modules]
print(json.dumps({"sdk": before - began, "took": took, "heavy": heavy}))
"""

PRELOAD = """
import json, sys
from types import SimpleNamespace
from llm_batch import listener

class Job: pass

listener.on_starting(SimpleNamespace())
early = [m for m in sys.argv[1:] if m in sys.modules]
listener.on_starting(Job())
before = {m for m in sys.modules}
from include import alerts, batch_api, collecting, loading, outcomes, pipeline, request_file
import openai
client = openai.OpenAI(api_key="sk-test")
client.batches, client.files
new = {m for m in sys.modules} - before
print(json.dumps({
    "early": early,
    "ours": [m for m in before if m.split(".")[0] == "include"],
    "late": sorted(m for m in new if m.split(".")[0] in sys.argv[1:]),
}))
"""


@pytest.fixture(scope="module")
def bag(airflow_home: Path) -> DagBag:
    from airflow.dag_processing.dagbag import DagBag

    return DagBag(str(PROJECT / "dags"))


def test_every_dag_file_imports(bag: DagBag) -> None:
    """No DAG file has an import error, and each holds one DAG named after it."""
    assert bag.import_errors == {}
    assert sorted(bag.dags) == [path.stem for path in DAG_FILES]


@pytest.mark.parametrize("path", DAG_FILES, ids=lambda path: path.stem)
def test_a_dag_file_has_no_logic(path: Path) -> None:
    """A DAG file imports, names its job and its schedule, and defines nothing."""
    statements = ast.parse(path.read_text()).body

    kinds = {type(one) for one in statements}
    assert kinds <= {ast.Expr, ast.ImportFrom, ast.Import, ast.Assign}
    assert len(path.read_text().splitlines()) <= 30


@pytest.mark.parametrize("path", DAG_FILES, ids=lambda path: path.stem)
def test_a_dag_file_parses_fast(path: Path) -> None:
    """Parsing costs at most 0.3 s of CPU over `airflow.sdk`, and imports nothing heavy.

    The best of three counts: a busy machine makes any single one slower.
    """
    found = [parse_cost(path)]
    while is_slow(found[-1]) and len(found) < 3:
        found.append(parse_cost(path))

    assert found[-1]["heavy"] == []
    assert not is_slow(found[-1]), found


def is_slow(found: dict[str, Any]) -> bool:
    return bool(found["took"] > max(LIMIT, SHARE * found["sdk"]))


def parse_cost(path: Path) -> dict[str, Any]:
    return told(MEASURE, str(path.parent), path.stem, *HEAVY)


def told(program: str, *arguments: str) -> dict[str, Any]:
    """Run a program in a process of its own, and return the JSON object that it prints last."""
    answer = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": f"{PROJECT}:{PROJECT / 'plugins'}"},
    )
    found: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
    return found


def test_a_scheduler_imports_what_its_tasks_need_before_it_forks_them() -> None:
    """A task then imports no package that takes long; code of the project it imports itself."""
    assert told(PRELOAD, *HEAVY) == {"early": [], "ours": [], "late": []}


def test_the_graph_is_unrolled_rounds_of_mapped_shards(bag: DagBag) -> None:
    """Each round builds, sends every shard its own way, and settles; then load and report."""
    dag = bag.dags["ticket_triage"]

    assert dag.task_dict["round_1.build"].upstream_task_ids == {"extract"}
    assert dag.task_dict["round_1.shard.submit"].upstream_task_ids == {"round_1.build"}
    assert dag.task_dict["round_1.shard.wait"].upstream_task_ids == {"round_1.shard.submit"}
    assert "round_1.shard.collect" in dag.task_dict["round_1.settle"].upstream_task_ids
    assert dag.task_dict["round_2.build"].upstream_task_ids >= {"round_1.settle"}
    assert dag.task_dict["load"].trigger_rule == "none_failed"
    assert dag.task_dict["report"].upstream_task_ids >= {"load"}
    assert dag.task_dict["round_1.shard.wait"].get_closest_mapped_task_group() is not None


def test_errors_decide_about_retries(bag: DagBag) -> None:
    """What a person must mend fails at once; what passes is tried again."""
    from include.errors import ConfigurationError, NotThereError, TransientError

    policy = bag.dags["ticket_triage"].task_dict["extract"].retry_policy

    def decided(error: Exception) -> str:
        return policy.evaluate(error, 1, 6).action.value

    assert decided(ConfigurationError("x")) == "fail"
    assert decided(NotThereError("x")) == "fail"
    assert decided(TransientError("x")) == "retry"


def test_dags_survive_serialization(bag: DagBag) -> None:
    """The scheduler works with the serialized form: nothing of ours may get lost in it."""
    from airflow.serialization.serialized_objects import DagSerialization

    for dag in bag.dags.values():
        again = DagSerialization.from_dict(DagSerialization.to_dict(dag))
        assert set(again.task_dict) == set(dag.task_dict)


def test_a_broken_job_is_an_import_error_of_its_own(airflow_home: Path, tmp_path: Path) -> None:
    """A job folder that is wrong shows as that DAG's import error; other DAGs go on."""
    from airflow.dag_processing.dagbag import DagBag

    (tmp_path / "no_such_job.py").write_text(
        '"""Airflow dag of a job that is not there."""\n'
        "from datetime import UTC, datetime\n"
        "from llm_batch.dag import batch_dag\n"
        "dag = batch_dag('no_such_job', schedule='@daily', "
        "start_date=datetime(2026, 1, 1, tzinfo=UTC))\n"
    )
    (tmp_path / "ticket_triage.py").write_text(DAG_FILES[-1].read_text())

    bag = DagBag(str(tmp_path))

    assert list(bag.dags) == [DAG_FILES[-1].stem]
    (message,) = bag.import_errors.values()
    assert "JobSpecError" in message
    assert "no_such_job" in message


def test_the_plugin_is_registered_once(airflow_home: Path) -> None:
    """Airflow loads the plugin and does not execute the package's modules by their bare names."""
    code = (
        "import sys\n"
        "from airflow import plugins_manager\n"
        "plugins_manager.ensure_plugins_loaded() if hasattr(plugins_manager, "
        "'ensure_plugins_loaded') else plugins_manager.get_plugin_info()\n"
        "print([m for m in ('operators', 'sensors', 'triggers', 'dag') if m in sys.modules])\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": f"{PROJECT}:{PROJECT / 'plugins'}"},
    )

    assert answer.stdout.splitlines()[-1] == "[]"


def test_a_pool_caps_what_is_in_flight(airflow_home: Path) -> None:
    """With `[llm_batch] pool`, submit and wait take slots of it, and waiting goes first."""
    code = (
        "import sys; sys.path.insert(0, 'dags')\n"
        "from ticket_triage import dag\n"
        "tasks = [dag.task_dict[f'round_1.shard.{name}'] for name in ('submit', 'wait')]\n"
        "print([(one.pool, one.priority_weight) for one in tasks])\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=PROJECT,
        env={
            **os.environ,
            "PYTHONPATH": f"{PROJECT}:{PROJECT / 'plugins'}",
            "AIRFLOW__LLM_BATCH__POOL": "batches",
        },
    )

    assert answer.stdout.splitlines()[-1] == "[('batches', 1), ('batches', 2)]"
