"""The requests that a run has claimed, as its snapshot and as request bodies."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
from sqlalchemy.engine import Engine

from include.arrow_columns import text_array
from include.artifacts import Artifacts
from include.column_types import column_texts
from include.endpoints import EMBEDDINGS
from include.errors import RequestRefusedError
from include.job_spec import JOBS_ROOT, JobSpec
from include.queue_request import check_row, model_of_body
from include.queue_spec import RUN_ID
from include.request_body import (
    BAD_REQUEST,
    Bodies,
    BuiltBodies,
    PromptBodies,
    Refusal,
    input_refusal,
    load_builder,
)
from include.row_identity import as_text
from include.rows import extract_sql
from include.snapshot import Snapshot

BODY = "body"
ROW = "job_row"
Varying = tuple[list[bytes], dict[int, Refusal]]


def extract_queue(
    engine: Engine,
    spec: JobSpec,
    run_id: str,
    moment: datetime,
    *,
    artifacts: Artifacts,
    directory: str,
) -> Snapshot:
    """Copy the requests of a run into a snapshot: `request_id` and body, or row as JSON text.

    The first in it goes first: by priority, then by the time it was put. Reading again gives the
    same rows, since nobody changes what a run has claimed.
    """
    sql = spec.source.sql.replace(RUN_ID, run_id)
    plain = spec.model_copy(
        update={
            "source": spec.source.model_copy(update={"sql": sql}),
            # Its columns are inside of the rows' JSON.
            "request": spec.request.model_copy(update={"prompt": None}),
        }
    )
    return extract_sql(engine, plain, moment, moment, artifacts=artifacts, directory=directory)


def queue_bodies(spec: JobSpec, root: Path = JOBS_ROOT) -> Bodies:
    """Return what makes the bodies of a run over requests of the queue.

    Raises `ConfigurationError` when the `request.py` of their job is not the pinned one.
    """
    job = spec.queue.job if spec.queue else ""
    if not job:
        return ReadyBodies(spec)
    named = spec.model_copy(update={"name": job})
    return RowBodies(named, root)


class ReadyBodies:
    """Bodies as applications wrote them; the varying part is the whole body."""

    prefix = b""
    suffix = b""
    columns: tuple[str, ...] = (BODY,)
    required: tuple[str, ...] = ()

    def __init__(self, spec: JobSpec) -> None:
        self._endpoint = spec.request.endpoint
        self._model = spec.request.model

    def varying(self, rows: pa.RecordBatch) -> Varying:
        """Return the bodies; one that was spoilt since it was sorted is refused."""
        return _sorted_out([self._body(text) for text in column_texts(rows.column(BODY))])

    def _body(self, text: str | None) -> bytes | Refusal:
        try:
            body = orjson.loads(text or "")
            model = model_of_body(self._endpoint, body)
        except ValueError:
            return Refusal(BAD_REQUEST, "body is not valid JSON; expected a JSON object")
        except RequestRefusedError as error:
            return Refusal(BAD_REQUEST, str(error))
        if model != self._model:
            return Refusal(BAD_REQUEST, "body.model was changed after the request was put")
        refusal = input_refusal(body) if self._endpoint == EMBEDDINGS else None
        if refusal:
            return refusal
        # JSON has line ends between its tokens only, and a request is one line of the file.
        return str(text).replace("\n", " ").replace("\r", " ").strip().encode()


class RowBodies:
    """Bodies that a job makes of the rows of applications, by its prompt or its request.py."""

    columns: tuple[str, ...] = (ROW,)
    required: tuple[str, ...] = ()

    def __init__(self, spec: JobSpec, root: Path) -> None:
        self._spec = spec
        self._of_rows: PromptBodies | _RowBuilder = (
            PromptBodies(spec)
            if spec.request.builder is None
            else _RowBuilder(spec, (), load_builder(spec, root))
        )
        self.prefix = self._of_rows.prefix
        self.suffix = self._of_rows.suffix

    def varying(self, rows: pa.RecordBatch) -> Varying:
        """Return what differs; a row that lacks what the prompt needs is refused."""
        found = [self._row(text) for text in column_texts(rows.column(ROW))]
        refused = {at: one for at, one in enumerate(found) if isinstance(one, Refusal)}
        good = [one for one in found if not isinstance(one, Refusal)]
        places = [at for at in range(len(found)) if at not in refused]
        encoded, others = self._of_rows.varying(self._batch(good))
        return encoded, refused | {places[at]: why for at, why in others.items()}

    def _row(self, text: str | None) -> Any | Refusal:
        try:
            row = orjson.loads(text or "")
            check_row(self._spec, row)
        except ValueError:
            return Refusal(BAD_REQUEST, "job_row is not valid JSON; expected a JSON object")
        except RequestRefusedError as error:
            return Refusal(BAD_REQUEST, str(error))
        return row

    def _batch(self, rows: list[dict[str, Any]]) -> Any:
        if isinstance(self._of_rows, _RowBuilder):
            return rows
        names = list(self._of_rows.columns)
        texts = [text_array([as_text(row[name]) for row in rows]) for name in names]
        return pa.RecordBatch.from_arrays(texts, names=names)


class _RowBuilder(BuiltBodies):
    """`request.py` over rows that are no Arrow batch."""

    def varying(self, rows: Any) -> Varying:
        """Call `build` for each row; one for which it raises is refused."""
        return _sorted_out([self._body(row) for row in rows])


def _sorted_out(found: list[bytes | Refusal]) -> Varying:
    refused = {at: one for at, one in enumerate(found) if isinstance(one, Refusal)}
    return [one for one in found if isinstance(one, bytes)], refused
