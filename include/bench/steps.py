"""The steps that are measured, by name; each is imported only where it runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

from include.bench.measurement import Place, Task


@dataclass(frozen=True)
class Step:
    """One step: the module that holds it, and what its table says.

    `input_of` names the step whose input must be there before; `limit` and `plain` say what the
    two other contenders do, `target` what the product is to reach on the reference machine.
    """

    module: str
    title: str
    limit: str
    plain: str
    target: str
    table: str = "CONTENDERS"
    input_of: str | None = None
    growth: tuple[float, ...] = (0.1, 1, 3)  # times the rows; 1 is what the table has
    rows: int | None = None  # of its own, whatever the size of the run
    share: int = 1  # of so many rows one is used

    def contenders(self) -> Mapping[str, Callable[[Place], Task]]:
        """Return what runs in this step."""
        found: Mapping[str, Callable[[Place], Task]] = getattr(self._imported(), self.table)
        return found

    def prepare(self, place: Place) -> None:
        """Write the step's input."""
        self._imported().prepare(place)

    def _imported(self) -> ModuleType:
        return importlib.import_module(f"include.bench.{self.module}")


STEPS: Mapping[str, Step] = {
    "build": Step(
        "build_step",
        "build: {rows:,} rows become request files of 50,000 requests",
        "the finished request files, copied",
        "json.dumps per row, all lines in a list",
        "≤ 1.6 CPU s, ≤ 200 MB",
    ),
    "collect": Step(
        "collect_step",
        "collect: {rows:,} requests, their output and error files become typed Parquet",
        "orjson.loads per line, thrown away",
        "whole files as text, json.loads, a list of rows",
        "≤ 2.4 CPU s, ≤ 200 MB",
    ),
    "embeddings": Step(
        "embedding_step",
        "collect embeddings: {tenth:,} vectors of 1,536 numbers in base64",
        "the files, copied",
        "json.loads, all vectors in a list",
        "≤ 2.6 CPU s, ≤ 150 MB",
        growth=(0.1, 1),
        share=10,
    ),
    "embeddings_numbers": Step(
        "embedding_step",
        "collect embeddings: the same vectors as lists of numbers",
        "the files, copied",
        "json.loads, all vectors in a list",
        "no target: for servers without base64",
        table="AS_NUMBERS",
        growth=(0.1, 1),
        share=10,
    ),
    "postgres": Step(
        "load_step",
        "load {rows:,} requests into PostgreSQL (client + server)",
        "COPY of a ready CSV into a table with the key",
        "executemany of upserts, 1,000 rows a commit",
        "≤ 3.8 CPU s",
        table="POSTGRES",
        input_of="collect",
    ),
    "sqlite": Step(
        "load_step",
        "load {rows:,} requests into SQLite",
        "executemany of upserts in one transaction",
        "a statement a row, 1,000 rows a commit",
        "near the limit",
        table="SQLITE",
        input_of="collect",
    ),
    "wait": Step(
        "wait_step",
        "wait for {rows:,} batches, 5 polls",
        "the list calls alone",
        "one call per batch and poll",
        "≤ 12 calls a poll, ≤ 100 ms",
        growth=(),
        rows=1_000,
    ),
}
