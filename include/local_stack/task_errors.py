"""Why runs have failed: what the logs of their failed tasks say at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from include.figures import counted
from include.local_stack.rest import AirflowClient, DagRun

MOST = 5  # different errors; the rest is counted


def error_lines(
    client: AirflowClient, logs: Path, dag_id: str, runs: Sequence[DagRun]
) -> list[str]:
    """Return one line per different error of the failed tasks of these runs, as they come."""
    found: dict[str, int] = {}
    for run in runs:
        if run.state == "failed":
            for error in _errors(client, logs, dag_id, run):
                found[error] = found.get(error, 0) + 1
    lines = [f"ERROR  {error}{_times(count)}" for error, count in list(found.items())[:MOST]]
    if len(found) > MOST:
        lines.append(f"... and {counted(len(found) - MOST, 'other error')}")
    return lines


def _errors(client: AirflowClient, logs: Path, dag_id: str, run: DagRun) -> Iterator[str]:
    for task in client.task_instances(dag_id, run.run_id):
        if task["state"] == "failed":
            error = last_error(_log(logs, dag_id, run.run_id, task))
            if error:
                yield f"{task['task_id']}: {error}"


def last_error(log: Path) -> str:
    """Return type and message of the last error in a task's log; "" when there is none."""
    if not log.is_file():
        return ""
    found = ""
    for line in log.read_text("utf-8", "replace").splitlines():
        if '"error_detail"' in line:
            error = json.loads(line)["error_detail"][0]
            found = f"{error['exc_type']}: {error['exc_value']}"
    return found


def _log(logs: Path, dag_id: str, run_id: str, task: Mapping[str, Any]) -> Path:
    folder = logs / f"dag_id={dag_id}" / f"run_id={run_id}" / f"task_id={task['task_id']}"
    if task["map_index"] >= 0:
        folder /= f"map_index={task['map_index']}"
    return folder / f"attempt={task['try_number']}.log"


def _times(count: int) -> str:
    return f" ({count} times)" if count > 1 else ""
