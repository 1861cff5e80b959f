"""A request file that somebody else wrote, taken into the ledger.

This is what lets `SubmitBatchOperator(request_file=…)` work in a hand-written DAG with the same
promises: the file is copied, counted and digested, and the same file of the same run is submitted
once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from include.arrow_columns import integer_array, text_array
from include.artifacts import Artifacts
from include.endpoints import endpoint_of
from include.errors import ConfigurationError
from include.job_spec import RAW, JobSpec, Request, Source, Target, with_provider
from include.ledger import Ledger
from include.ledger_records import Batch, NewBatch, Partition
from include.object_storage import remote_path
from include.output_columns import AnswerShape
from include.provider import OPENAI, ProviderProfile
from include.run_mode import OWN_FILE

KEY = "custom_id"  #: the one key column of the outcomes
INDEX_ROWS = 10_000  # written at a time
BYTES_PER_TOKEN = 4


class _Body(msgspec.Struct, gc=False):
    model: str


class _Line(msgspec.Struct, gc=False):
    custom_id: str
    url: str
    body: _Body


@dataclass
class _Scan:
    """What has been learnt of a file while it was copied."""

    uri: str
    endpoint: str = ""
    model: str = ""
    requests: int = 0
    size: int = 0  # bytes

    def add(self, raw: bytes, line: _Line) -> None:
        self.endpoint = self.endpoint or line.url
        self.model = self.model or line.body.model
        self.requests += 1
        self.size += len(raw)
        if (line.url, line.body.model) != (self.endpoint, self.model):
            raise ConfigurationError(
                f"{self.uri}, line {self.requests}: url {line.url} and model {line.body.model}, "
                f"but the first line has {self.endpoint} and {self.model}. One file has one "
                "endpoint and one model; split it."
            )


def register(
    uri: str,
    ledger: Ledger,
    artifacts: Artifacts,
    partition: Partition,
    *,
    conn_id: str,
    dag_id: str,
    dag_run_id: str,
    profile: ProviderProfile = OPENAI,
) -> Batch:
    """Copy the request file at `uri` (any fsspec URI or a path) and record it once.

    Raises `ConfigurationError` that names the line when the file is not a request file.
    """
    digest, scan, folder = _copied(uri, artifacts)
    scan.endpoint = profile.endpoint(scan.endpoint)
    spec = with_provider(_spec(scan, conn_id), profile)
    run = ledger.open_run(
        partition,
        spec_digest=digest,
        spec=spec.to_json(),
        mode=OWN_FILE,
        dag_id=dag_id,
        dag_run_id=dag_run_id,
    )
    new = NewBatch(
        run_id=run.run_id,
        job=partition.job,
        round=1,
        shard=0,
        conn_id=conn_id,
        endpoint=scan.endpoint,
        model=scan.model,
        request_file=f"{folder}/requests.jsonl",
        index_file=f"{folder}/requests.index.parquet",
        content_digest=digest,
        requests=scan.requests,
        bytes=scan.size,
        input_tokens=scan.size // BYTES_PER_TOKEN,
    )
    return ledger.build_round(run.run_id, 1, [new])[0]


def _copied(uri: str, artifacts: Artifacts) -> tuple[str, _Scan, str]:
    scan = _Scan(uri)
    content = hashlib.sha256()
    with artifacts.scratch(".jsonl") as copy, artifacts.scratch(".parquet") as index:
        with _opened(uri) as source, copy.open("wb") as target:
            ids = _ids(source, target, scan, content)
            _write_index(ids, str(index))
        if not scan.requests:
            raise ConfigurationError(f"{uri} has no requests; expected one JSON object per line.")
        folder = f"standalone/{content.hexdigest()[:32]}"
        for local, name in ((copy, "requests.jsonl"), (index, "requests.index.parquet")):
            with artifacts.create(f"{folder}/{name}") as stream, local.open("rb") as source:
                for chunk in iter(lambda: source.read(1 << 20), b""):
                    stream.write(chunk)
    return content.hexdigest(), scan, folder


def _opened(uri: str) -> BinaryIO:
    try:
        stream: BinaryIO = remote_path(uri).open("rb")
    except FileNotFoundError:
        raise ConfigurationError(f"There is no request file at {uri}.") from None
    return stream


def _ids(source: BinaryIO, target: BinaryIO, scan: _Scan, content: Any) -> Iterator[str]:
    decoder = msgspec.json.Decoder(_Line)
    for number, raw in enumerate(source, 1):
        line = raw if raw.endswith(b"\n") else raw + b"\n"
        try:
            parsed = decoder.decode(line)
        except msgspec.MsgspecError as error:
            raise ConfigurationError(
                f"{scan.uri}, line {number} is no request ({type(error).__name__}): expected "
                "custom_id, method, url and a body with model."
            ) from None
        scan.add(line, parsed)
        content.update(line)
        target.write(line)
        yield parsed.custom_id


def _write_index(ids: Iterator[str], path: str) -> None:
    schema = pa.schema([("_row", pa.int64()), (KEY, pa.string()), ("_custom_id", pa.string())])
    row = 0
    with pq.ParquetWriter(path, schema) as writer:
        while chunk := list(islice(ids, INDEX_ROWS)):
            rows = integer_array(np.arange(row, row + len(chunk), dtype=np.int64))
            texts = text_array(chunk)
            writer.write_batch(pa.RecordBatch.from_arrays([rows, texts, texts], schema=schema))
            row += len(chunk)


def _spec(scan: _Scan, conn_id: str) -> JobSpec:
    """Return the spec that collecting needs; nothing is extracted or loaded by it."""
    is_text = endpoint_of(scan.endpoint).answer is AnswerShape.TEXT
    request = Request(
        conn_id=conn_id,
        endpoint=scan.endpoint,
        model=scan.model,
        prompt="{{ custom_id }}",
        output=None if is_text else RAW,
    )
    source = Source(conn_id="none", sql="none", key=(KEY,))
    return JobSpec(
        name="standalone",
        source=source,
        request=request,
        target=Target(conn_id="none", table="none"),
    )
