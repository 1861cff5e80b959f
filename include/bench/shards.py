"""The files of ended batches, as the bench makes them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from include.arrow_columns import integer_array, text_array
from include.artifacts import Artifacts
from include.bench.texts import custom_id
from include.job_spec import JobSpec
from include.outcomes import CollectReport, collect_shard

SHARD = 50_000


def shard_starts(rows: int) -> range:
    """Return the first row of each shard."""
    return range(0, rows, SHARD)


def write_shard(
    folder: Path, rows: range, output: Iterable[bytes], errors: Iterable[bytes] = ()
) -> None:
    """Write index, output and error file of the shard that begins with the first of `rows`."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = [
        integer_array(np.arange(rows.start, rows.stop, dtype=np.int64)),
        text_array([f"T{number:08d}" for number in rows]),
        text_array([custom_id(number) for number in rows]),
    ]
    table = pa.Table.from_arrays(columns, names=["_row", "ticket_id", "_custom_id"])
    pq.write_table(table, folder / f"{rows.start}.index.parquet", row_group_size=10_000)
    for name, lines in (("output", output), ("error", errors)):
        with (folder / f"{rows.start}.{name}.jsonl").open("wb") as sink:
            sink.writelines(lines)


def collect(spec: JobSpec, folder: Path, into: str, *, errors: bool = True) -> list[CollectReport]:
    """Collect every shard of a folder, one after the other, as the tasks of a run would."""
    artifacts = Artifacts(folder)
    starts = sorted(int(path.name.partition(".")[0]) for path in folder.glob("*.index.parquet"))
    return [
        collect_shard(
            spec,
            index_file=f"{start}.index.parquet",
            output_file=f"{start}.output.jsonl",
            error_file=f"{start}.error.jsonl" if errors else None,
            artifacts=artifacts,
            outcomes_file=f"{into}/{start}.outcomes.parquet",
            quarantine_file=f"{into}/{start}.quarantine.parquet",
        )
        for start in starts
    ]


def result_files(folder: Path) -> list[Path]:
    """Return the output and error files of all shards."""
    return sorted([*folder.glob("*.output.jsonl"), *folder.glob("*.error.jsonl")])


def file_bytes(folder: Path) -> int:
    """Return the size of all output and error files."""
    return sum(path.stat().st_size for path in result_files(folder))
