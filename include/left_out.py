"""Rows that a later round did not send: they have failed, for the reason that kept them from it.

Their last outcome says that they may be tried again. What a build refuses (a body that has grown
too large, a `request.py` that raises), or a budget, takes its place when the run is loaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from include.arrow_columns import boolean_array, integer_array, text_array
from include.artifacts import COPY_BYTES, Artifacts
from include.budgets import OVER_BUDGET
from include.classification import State
from include.outcome_columns import text_scalar
from include.row_stream import row_numbers

COLUMNS = ("_row", "_state", "_reason", "_error_code", "_error_message")  #: that are looked at


def kept_path(directory: str, number: int) -> str:
    """Return where a run keeps what the build of a round refused that was never recorded."""
    return f"{directory}/round-{number}-left-out.parquet"


def keep(rejected_file: str | None, path: str, artifacts: Artifacts) -> None:
    """Put the rejected rows of a build where they are found without a batch to look beside.

    The last build of the round counts: what an earlier one has left there goes.
    """
    if rejected_file is None:
        artifacts.delete(path)
        return
    with artifacts.open(rejected_file) as source, artifacts.create(path) as sink:
        shutil.copyfileobj(source, sink, COPY_BYTES)


class LeftOut:
    """What became of the rows that a round should have sent.

    `rejected` are the entries of its build, by ascending `_row`. `over_budget` says why the rest
    was not sent either; None when it was.
    """

    def __init__(self, rejected: Iterable[pa.RecordBatch], over_budget: str | None = None) -> None:
        found = list(rejected)
        self._rows = np.concatenate([np.empty(0, np.int64), *map(row_numbers, found)])
        self._reasons, self._messages = (
            pa.concat_arrays([text_array([]), *(batch.column(name) for batch in found)])
            for name in ("_reason", "_error_message")
        )
        self._over_budget = over_budget

    def judged(self, outcomes: pa.RecordBatch) -> pa.RecordBatch:
        """Return `outcomes` (with `COLUMNS`); those that were to be tried again have failed."""
        if len(self._rows):
            outcomes = self._rejected(outcomes)
        return outcomes if self._over_budget is None else self._refused(outcomes, self._over_budget)

    def _rejected(self, outcomes: pa.RecordBatch) -> pa.RecordBatch:
        rows = row_numbers(outcomes)
        at = np.minimum(np.searchsorted(self._rows, rows), len(self._rows) - 1)
        is_known = boolean_array(self._rows[at] == rows)
        where = integer_array(at)
        return _failed(
            outcomes,
            pc.and_(_is_open(outcomes), is_known),
            self._reasons.take(where),
            self._messages.take(where),
        )

    def _refused(self, outcomes: pa.RecordBatch, why: str) -> pa.RecordBatch:
        message = pc.binary_join_element_wise(
            text_scalar(f"{why}; its last try"), outcomes.column("_reason"), text_scalar(": "),
            null_handling="replace", null_replacement="unknown",
        )  # fmt: skip
        return _failed(outcomes, _is_open(outcomes), text_scalar(OVER_BUDGET), message)


def _is_open(outcomes: pa.RecordBatch) -> pa.Array:
    return pc.equal(outcomes.column("_state"), text_scalar(State.RETRY))


def _failed(outcomes: pa.RecordBatch, which: pa.Array, reason: Any, message: Any) -> pa.RecordBatch:
    nothing = pa.nulls(outcomes.num_rows, pa.string())
    values = (text_scalar(State.FAILED), reason, nothing, message)
    for name, value in zip(COLUMNS[1:], values, strict=True):
        changed = pc.if_else(which, value, outcomes.column(name))
        outcomes = outcomes.set_column(outcomes.schema.get_field_index(name), name, changed)
    return outcomes
