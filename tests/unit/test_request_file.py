"""Build turns open rows into request files: exact, within limits, the same every time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from include.artifacts import Artifacts
from include.endpoints import inputs_of
from include.errors import ConfigurationError
from include.job_code import source_digest
from include.job_spec import JobSpec
from include.request_file import BuildResult, build_requests
from include.shard_file import estimated_tokens
from include.snapshot import Snapshot, SnapshotWriter

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"type": "string"}},
    "required": ["kind"],
    "additionalProperties": False,
}
TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)


def job(**changed: Any) -> JobSpec:
    """Return a job with some parts changed."""
    request = {
        "endpoint": "/v1/responses",
        "model": "m",
        "prompt": "You are 100 % sure.\n---\n{{ body }} ({{ id }})",
        "output_schema": SCHEMA,
        "params": {"max_output_tokens": 300},
        **changed.pop("request", {}),
    }
    data = {
        "name": "sample",
        "source": {"conn_id": "db", "sql": "SELECT", "key": ["id"]},
        "request": request,
        "target": {"conn_id": "db", "table": "labels"},
        **changed,
    }
    return JobSpec.model_validate(data)


class Bench:
    """A folder of artifacts, and what the tests ask of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.artifacts = Artifacts(folder)

    def snapshot(
        self, rows: list[tuple[Any, ...]], *names: str, rejections: list[Any] | None = None
    ) -> Snapshot:
        """Write a snapshot of these rows."""
        names = names or ("id", "body")
        work = self.folder / "work"
        work.mkdir(exist_ok=True)
        writer = SnapshotWriter(work, names, [pa.null()] * len(names))
        for start in range(0, len(rows), 1_000):
            writer.write(list(zip(*rows[start : start + 1_000], strict=True)))
        writer.close()
        writer.path.replace(self.folder / "snapshot.parquet")
        file = None
        if rejections:
            file = "rejections.parquet"
            named = ["_row", "_reason", "_source_rows"]
            columns = [list(column) for column in zip(*rejections, strict=True)]
            pq.write_table(pa.table(dict(zip(named, columns, strict=True))), self.folder / file)
        return Snapshot("snapshot.parquet", len(rows), tuple(names), file)

    def build(self, spec: JobSpec, snapshot: Snapshot, **more: Any) -> BuildResult:
        """Build a round, the first one unless told otherwise."""
        more.setdefault("directory", "run/round-1")
        return build_requests(spec, snapshot=snapshot, artifacts=self.artifacts, **more)

    def lines(self, result: BuildResult) -> list[dict[str, Any]]:
        """Return the parsed lines of all request files."""
        files = [(self.folder / shard.request_file).read_bytes() for shard in result.shards]
        return [json.loads(line) for data in files for line in data.split(b"\n")[:-1]]

    def digests(self, result: BuildResult) -> list[str]:
        """Return the sha256 of each request file."""
        files = [(self.folder / shard.request_file).read_bytes() for shard in result.shards]
        return [hashlib.sha256(data).hexdigest() for data in files]

    def index(self, result: BuildResult) -> list[dict[str, Any]]:
        """Return the rows of all index files."""
        tables = [pq.read_table(self.folder / shard.index_file) for shard in result.shards]
        return [row for table in tables for row in table.to_pylist()]

    def rejected(self, result: BuildResult) -> list[dict[str, Any]]:
        """Return the rows of the rejected file."""
        assert result.rejected_file is not None
        return list(pq.read_table(self.folder / result.rejected_file).to_pylist())


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """An empty folder of artifacts."""
    return Bench(tmp_path)


@given(st.lists(TEXTS, min_size=1, max_size=30))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_text_arrives_as_it_is(bench: Bench, texts: list[str]) -> None:
    """Any Unicode text comes back from the line; only line feeds separate lines."""
    result = bench.build(job(), bench.snapshot(list(enumerate([*texts, "\u2028漢字🙂\x85\n%s"]))))

    lines = bench.lines(result)

    assert [line["body"]["input"] for line in lines] == [
        f"{text} ({number})" for number, text in enumerate([*texts, "\u2028漢字🙂\x85\n%s"])
    ]
    assert {line["body"]["instructions"] for line in lines} == {"You are 100 % sure."}
    raw = (bench.folder / result.shards[0].request_file).read_bytes()
    assert "漢字🙂".encode() in raw


def test_a_line(bench: Bench) -> None:
    """A line is what the API reference shows, and nothing else."""
    (line,) = bench.lines(bench.build(job(), bench.snapshot([(1, "a")])))

    custom_id = line.pop("custom_id")
    assert line == {
        "method": "POST",
        "url": "/v1/responses",
        "body": {
            "model": "m",
            "max_output_tokens": 300,
            "instructions": "You are 100 % sure.",
            "input": "a (1)",
            "text": {
                "format": {
                    "type": "json_schema", "name": "output", "schema": SCHEMA, "strict": True
                }
            },
        },
    }  # fmt: skip
    assert len(custom_id) == 32
    assert int(custom_id, 16) >= 0


def test_custom_id_is_of_the_body_and_the_key(bench: Bench) -> None:
    """The id is the first half of sha256(body, NUL, key): anyone can compute it again."""
    result = bench.build(job(), bench.snapshot([(7, 'say "x"')]))

    line = (bench.folder / result.shards[0].request_file).read_bytes()
    body = line[line.index(b'"body":') + 7 : -2]
    expected = hashlib.sha256(body + b'\0["7"]').hexdigest()[:32]
    assert bench.index(result) == [{"_row": 0, "id": 7, "_custom_id": expected}]


@given(st.lists(st.tuples(TEXTS, TEXTS, TEXTS), min_size=2, max_size=20, unique_by=lambda r: r[:2]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_custom_ids_differ(bench: Bench, rows: list[tuple[str, str, str]]) -> None:
    """Rows with different keys have different ids, even when their texts are alike."""
    spec = job(source={"conn_id": "db", "sql": "SELECT", "key": ["a", "b"]},
               request={"prompt": "{{ body }}"})  # fmt: skip

    lines = bench.lines(bench.build(spec, bench.snapshot(rows, "a", "b", "body")))

    assert len({line["custom_id"] for line in lines}) == len(rows)


@given(
    st.lists(TEXTS, min_size=1, max_size=60),
    st.integers(1, 20),
    st.integers(450, 3_000),
    st.none() | st.integers(100, 2_000),
)
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40
)
def test_shards_stay_within_limits(
    bench: Bench, texts: list[str], requests: int, size: int, tokens: int | None
) -> None:
    """Counts are exact to the byte, no limit is passed, and each shard is as full as can be."""
    limits = {"requests_per_batch": requests, "bytes_per_batch": size, "enqueued_tokens": tokens}
    snapshot = bench.snapshot(list(enumerate(texts)))

    result = bench.build(job(limits=limits), snapshot)

    sizes = []
    for shard in result.shards:
        data = (bench.folder / shard.request_file).read_bytes()
        lines = data.split(b"\n")[:-1]
        bodies = [line[line.index(b'"body":') + 7 : -1] for line in lines]
        counted = (shard.requests, shard.bytes, shard.input_tokens)
        assert counted == (
            len(lines),
            len(data),
            sum(estimated_tokens(len(body)) for body in bodies),
        )
        assert shard.requests <= requests
        assert shard.bytes <= size
        assert tokens is None or shard.input_tokens <= tokens
        sizes.append((len(lines), [(len(a) + 1, estimated_tokens(len(b)))
                                   for a, b in zip(lines, bodies, strict=True)]))  # fmt: skip
    for (count, shard_sizes), (_, following) in pairwise(sizes):
        first_size, first_tokens = following[0]
        assert (
            count == requests
            or sum(item[0] for item in shard_sizes) + first_size > size
            or sum(item[1] for item in shard_sizes) + first_tokens > (tokens or 1 << 60)
        )
    assert sum(shard.requests for shard in result.shards) + result.rejected == len(texts)
    rows = [row["_row"] for row in bench.index(result)]
    assert rows == sorted(set(rows))


def test_same_rows_give_the_same_bytes(bench: Bench) -> None:
    """The same partition and spec give byte-identical request files."""
    snapshot = bench.snapshot([(n, f"text {n}") for n in range(5_000)])
    spec = job(limits={"requests_per_batch": 1_999})

    first = bench.build(spec, snapshot, directory="a")
    second = bench.build(JobSpec.from_json(spec.to_json()), snapshot, directory="b")

    assert [shard.digest for shard in first.shards] == [shard.digest for shard in second.shards]
    assert bench.digests(first) == bench.digests(second)
    assert [shard.requests for shard in first.shards] == [1_999, 1_999, 1_002]


def test_bytes_do_not_change_with_a_release(bench: Bench) -> None:
    """A changed custom_id would make every loaded row new, and be paid again."""
    result = bench.build(job(), bench.snapshot([(1, "é"), (2, "b")]))

    assert bench.digests(result) == [
        "d1ddfbd6d7f6a016c119472fc8d232154e63ee6df7252d4480bb7374a70c452e"
    ]


def test_other_requests_have_another_digest(bench: Bench) -> None:
    """Another row, text or output limit makes another shard digest, and so another batch."""
    few = bench.snapshot([(1, "a"), (2, "b")])
    same = [(0, ""), (1, "")]
    usual = bench.build(job(), few, selection=selection(same))
    larger = selection([(0, ""), (1, "larger_output")])

    others = [
        bench.build(job(), few, selection=larger, round_number=2, directory="larger"),
        bench.build(job(), few, selection=selection(same[:1]), directory="fewer"),
        bench.build(job(), bench.snapshot([(1, "a"), (2, "c")]), directory="text"),
        bench.build(job(), bench.snapshot([(1, "a"), (3, "b")]), directory="key"),
    ]

    digests = [usual.shards[0].digest, *(other.shards[0].digest for other in others)]
    assert len(set(digests)) == len(digests)


def test_rejected_rows(bench: Bench) -> None:
    """Null prompt columns, what extract refused, and too large rows end with a reason."""
    rows = [(1, "a"), (2, None), (3, "b"), (3, "c"), (None, "d"), (4, "x" * 2_000), (5, "e")]
    snapshot = bench.snapshot(
        rows, rejections=[(2, "duplicate_key", 2), (3, "duplicate_key", 0), (4, "null_key", 1)]
    )

    result = bench.build(job(limits={"bytes_per_batch": 1_500}), snapshot)

    found = bench.rejected(result)
    assert [(row["_row"], row["id"], row["_reason"], row["_source_rows"]) for row in found] == [
        (1, 2, "null_column", 1), (2, 3, "duplicate_key", 2),
        (4, None, "null_key", 1), (5, 4, "too_large", 1),
    ]  # fmt: skip
    assert all(len(row["_custom_id"]) == 32 for row in found)
    assert "column body is null" in found[0]["_error_message"]
    assert [row["_row"] for row in bench.index(result)] == [0, 6]
    assert result.rejected == 5


def test_nothing_to_send(bench: Bench) -> None:
    """Without rows, or with rejected rows alone, there is no request file."""
    assert bench.build(job(), bench.snapshot([])) == BuildResult((), None, 0, 0)
    assert bench.build(job(), bench.snapshot([(1, None)])).shards == ()


def test_known_rows_are_left_out(bench: Bench) -> None:
    """What is done already is not sent; the question is asked in chunks."""
    snapshot = bench.snapshot([(n, "text") for n in range(5_000)])
    ids = [row["_custom_id"] for row in bench.index(bench.build(job(), snapshot))]
    done, asked = set(ids[::2]), []

    def known(custom_ids: list[str]) -> set[str]:
        asked.append(len(custom_ids))
        return done.intersection(custom_ids)

    result = bench.build(job(), snapshot, directory="again", known=known)

    assert [row["_custom_id"] for row in bench.index(result)] == ids[1::2]
    assert (result.reused, sum(asked)) == (2_500, 5_000)
    assert max(asked) <= 1_024


def selection(*batches: list[tuple[int, str]]) -> Iterator[pa.RecordBatch]:
    """Yield what a later round is given: (_row, _change) in batches."""
    for batch in batches:
        rows, changes = zip(*batch, strict=True)
        yield pa.RecordBatch.from_pydict({"_row": list(rows), "_change": list(changes)})


def test_later_round_sends_the_selected_rows_only(bench: Bench) -> None:
    """A later round has the same custom_ids; a larger output is 2^(round-1) times the limit."""
    snapshot = bench.snapshot([(n, f"text {n}") for n in range(25_000)])
    first = {row["_row"]: row["_custom_id"] for row in bench.index(bench.build(job(), snapshot))}

    chosen = selection([(3, ""), (9_999, "larger_output")], [(20_000, ""), (24_999, "")])
    result = bench.build(job(), snapshot, directory="r3", round_number=3, selection=chosen)

    lines = bench.lines(result)
    assert [line["body"]["input"] for line in lines] == [
        f"text {n} ({n})" for n in (3, 9_999, 20_000, 24_999)
    ]
    assert [line["body"]["max_output_tokens"] for line in lines] == [300, 1_200, 300, 300]
    assert {row["_row"]: row["_custom_id"] for row in bench.index(result)} == {
        row: first[row] for row in (3, 9_999, 20_000, 24_999)
    }


def test_groups_without_open_rows_are_not_read(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round with a few open rows does not read the whole snapshot."""
    snapshot = bench.snapshot([(n, "text") for n in range(30_000)])
    read, original = [], pq.ParquetFile.read_row_group

    def noted(self: pq.ParquetFile, group: int, **more: Any) -> pa.Table:
        read.append(group)
        return original(self, group, **more)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", noted)
    bench.build(job(), snapshot, round_number=2, selection=selection([(15_000, "")]))

    assert read == [1]


def test_selection_must_ascend(bench: Bench) -> None:
    """Rows out of order would be lost in a merge, so they are refused."""
    snapshot = bench.snapshot([(n, "text") for n in range(10)])

    with pytest.raises(ValueError, match="ascend"):
        bench.build(job(), snapshot, selection=selection([(5, "")], [(4, "")]))
    assert list(bench.folder.glob("run/**/*")) in ([], [bench.folder / "run/round-1"])


def test_system_part_with_columns(bench: Bench) -> None:
    """Both parts may have placeholders, and a value is never taken for one."""
    spec = job(request={"prompt": "For {{ id }}.\n---\n{{ body }} and {{ body }}"})

    (line,) = bench.lines(bench.build(spec, bench.snapshot([("k", '{{ id }} "%s" \\')])))

    assert line["body"]["instructions"] == "For k."
    assert line["body"]["input"] == '{{ id }} "%s" \\ and {{ id }} "%s" \\'


@pytest.mark.parametrize(
    ("endpoint", "fields"),
    [
        ("/v1/embeddings", {"input": "a", "encoding_format": "base64"}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/moderations", {"input": "a"}),
        ("/v1/images/generations", {"prompt": "a"}),
    ],
)
def test_other_endpoints(bench: Bench, endpoint: str, fields: dict[str, str]) -> None:
    """Endpoints without messages get the text alone; vectors are asked for in base64."""
    more: dict[str, Any] = {
        "endpoint": endpoint,
        "prompt": "{{ body }}",
        "output_schema": None,
        "params": {},
    }
    if endpoint == "/v1/embeddings":
        more["vector_size"] = 8

    (line,) = bench.lines(bench.build(job(request=more), bench.snapshot([(1, "a")])))

    assert (line["url"], line["body"]) == (endpoint, {"model": "m", **fields})


BUILDER = """
def build(row):
    if row["id"] == 2:
        raise KeyError(row["body"])
    if row["id"] == 3:
        return [row["body"]]
    if row["id"] == 4:
        return {"input": "\\ud800"}
    if row["id"] == 5:
        return {"input": object()}
    return {"input": [{"role": "user", "content": row["body"]}], "max_output_tokens": row["id"]}
"""


def builder_job(bench: Bench, source: str = BUILDER, **more: Any) -> JobSpec:
    """Return a job whose requests are built by `source`."""
    (bench.folder / "sample").mkdir(exist_ok=True)
    (bench.folder / "sample" / "request.py").write_text(source)
    builder = {"file": "request.py", "digest": source_digest(source)}
    return job(request={"prompt": None, "builder": builder, "params": {}, **more})


def test_request_py(bench: Bench) -> None:
    """`request.py` makes the body; a row it cannot serve is rejected without its text."""
    snapshot = bench.snapshot([(n, f"canary {n}") for n in (1, 2, 3, 4, 5, 600)])

    result = bench.build(builder_job(bench), snapshot, root=bench.folder)

    bodies = [line["body"] for line in bench.lines(result)]
    assert [(body["model"], body["max_output_tokens"]) for body in bodies] == [("m", 1), ("m", 600)]
    assert bodies[0]["input"] == [{"role": "user", "content": "canary 1"}]
    assert bodies[0]["text"]["format"]["strict"] is True
    found = bench.rejected(result)
    assert [(row["id"], row["_reason"]) for row in found] == [
        (2, "bad_request"), (3, "bad_request"), (4, "bad_text"), (5, "bad_request")
    ]  # fmt: skip
    assert "KeyError" in found[0]["_error_message"]
    assert not any("canary" in row["_error_message"] for row in found)


EMBEDDER = """
def build(row):
    return {"input": [row["body"]] * row["id"]}
"""


def test_embedding_inputs_stay_within_a_batch(bench: Bench) -> None:
    """50,000 texts over all requests of a batch, 2,048 in one; each shard is filled up."""
    more: dict[str, Any] = {"endpoint": "/v1/embeddings", "output_schema": None, "output": "raw"}
    rows = [(2_048, f"a{n}") for n in range(25)]
    snapshot = bench.snapshot([*rows, (2_049, "a"), (848, "a"), (1, "a")])

    result = bench.build(builder_job(bench, EMBEDDER, **more), snapshot, root=bench.folder)

    assert [shard.requests for shard in result.shards] == [24, 3]
    (refused,) = bench.rejected(result)
    assert (refused["id"], refused["_reason"]) == (2_049, "too_large")
    assert "2,049 inputs; a request takes at most 2,048" in refused["_error_message"]


def test_a_row_has_one_vector(bench: Bench) -> None:
    """A request with several inputs has no place in one vector column, and is refused by row."""
    more: dict[str, Any] = {"endpoint": "/v1/embeddings", "output_schema": None, "vector_size": 8}
    snapshot = bench.snapshot([(1, "a"), (2, "b")])

    result = bench.build(builder_job(bench, EMBEDDER, **more), snapshot, root=bench.folder)

    assert [shard.requests for shard in result.shards] == [1]
    (refused,) = bench.rejected(result)
    assert (refused["id"], refused["_reason"]) == (2, "bad_request")
    assert "returned 2 inputs, and a row has one result" in refused["_error_message"]


TOKENS = """
def build(row):
    if row["body"] == "tokens":
        return {"input": [[5] * row["id"]]}
    return {"input": ["x" * row["id"]] * 100}
"""


def test_an_embeddings_request_has_at_most_300_000_tokens(bench: Bench) -> None:
    """Token lists are counted, texts estimated; a row over the limit is named and not sent."""
    more: dict[str, Any] = {"endpoint": "/v1/embeddings", "output_schema": None, "output": "raw"}
    rows = [(300_000, "tokens"), (300_001, "tokens"), (12_000, "texts"), (12_001, "texts")]

    result = bench.build(
        builder_job(bench, TOKENS, **more), bench.snapshot(rows), root=bench.folder
    )

    refused = bench.rejected(result)
    assert [(row["id"], row["_reason"]) for row in refused] == [
        (300_001, "too_large"), (12_001, "too_large")
    ]  # fmt: skip
    assert "takes at most 300,000" in refused[0]["_error_message"]


def test_a_prompt_of_over_300_000_tokens_is_not_embedded(bench: Bench) -> None:
    """The same limit holds for a text from a prompt."""
    more = {"endpoint": "/v1/embeddings", "prompt": "{{ body }}", "output_schema": None}
    spec = job(request={**more, "params": {}, "vector_size": 8})

    result = bench.build(spec, bench.snapshot([(1, "x" * 1_199_000), (2, "x" * 1_201_000)]))

    (refused,) = bench.rejected(result)
    assert (refused["id"], refused["_reason"]) == (2, "too_large")
    assert [shard.requests for shard in result.shards] == [1]


@pytest.mark.parametrize(
    ("endpoint", "content"),
    [
        (
            "/v1/responses",
            [
                {"type": "input_text", "text": "See a."},
                {"type": "input_image", "image_url": 'https://i.example/k?a=1&b="2"'},
            ],
        ),
        (
            "/v1/chat/completions",
            [
                {"type": "text", "text": "See a."},
                {"type": "image_url", "image_url": {"url": 'https://i.example/k?a=1&b="2"'}},
            ],
        ),
    ],
)
def test_images_follow_the_text(bench: Bench, endpoint: str, content: Any) -> None:
    """Each column of `images` is a part of the user's message, by its URL."""
    more: dict[str, Any] = {
        "endpoint": endpoint,
        "prompt": "See {{ body }}.",
        "output_schema": None,
        "params": {},
    }
    spec = job(request={**more, "images": ["id"]})

    (line,) = bench.lines(
        bench.build(spec, bench.snapshot([('https://i.example/k?a=1&b="2"', "a")]))
    )

    body = line["body"]
    assert (body.get("input") or body["messages"]) == [{"role": "user", "content": content}]


def test_moderations_take_images(bench: Bench) -> None:
    """Text and image are one input with one result."""
    more = {"endpoint": "/v1/moderations", "prompt": "{{ body }}", "output_schema": None}
    spec = job(request={**more, "params": {}, "images": "id"})

    (line,) = bench.lines(bench.build(spec, bench.snapshot([("https://i.example/k", "a")])))

    assert line["body"]["input"] == [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": "https://i.example/k"}},
    ]


@pytest.mark.parametrize(
    ("found", "count"), [("a", 1), (["a", "b"], 2), ([5, 6, 7], 1), ([[5, 6], [7]], 2)]
)
def test_tokens_of_one_text_are_one_input(found: Any, count: int) -> None:
    """The four forms of `input` in the API reference."""
    assert inputs_of({"input": found}) == count


def test_request_py_larger_output(bench: Bench) -> None:
    """A body of `request.py` gets its larger limit too, under the same custom_id."""
    snapshot, spec = bench.snapshot([(10, "a")]), builder_job(bench)
    first = bench.build(spec, snapshot, root=bench.folder)

    chosen = selection([(0, "larger_output")])
    second = bench.build(spec, snapshot, root=bench.folder, directory="r2", round_number=2,
                         selection=chosen)  # fmt: skip

    assert bench.index(first) == bench.index(second)
    assert bench.lines(second)[0]["body"]["max_output_tokens"] == 20


def test_changed_request_py_is_refused(bench: Bench) -> None:
    """A run is finished with the code that it began with."""
    snapshot, spec = bench.snapshot([(1, "a")]), builder_job(bench)
    (bench.folder / "sample" / "request.py").write_text("def build(row):\n    return {}\n")

    with pytest.raises(ConfigurationError, match="has changed since the run began"):
        bench.build(spec, snapshot, root=bench.folder)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import nothing_like_this\ndef build(row): ...\n", "cannot be imported"),
        ("def build(row):\n    return {'model': 'x'}\n", "sets model"),
    ],
)
def test_unusable_request_py(bench: Bench, source: str, expected: str) -> None:
    """What is wrong for every row is a configuration error, and leaves no file."""
    snapshot, spec = bench.snapshot([(1, "a")]), builder_job(bench, source)

    with pytest.raises(ConfigurationError, match=expected):
        bench.build(spec, snapshot, root=bench.folder)
    assert not list(bench.folder.rglob("*.jsonl*"))


def test_the_canary_is_a_short_first_file(bench: Bench) -> None:
    """The first file of round 1 holds the canary's requests, the others as many as they may."""
    snapshot = bench.snapshot([(f"k{n}", "text") for n in range(25)])
    spec = job(canary={"requests": 5}, limits={"requests_per_batch": 10})

    first = bench.build(spec, snapshot)
    second = bench.build(spec, snapshot, round_number=2, directory="run/round-2")

    assert [shard.requests for shard in first.shards] == [5, 10, 10]
    assert [shard.requests for shard in second.shards] == [10, 10, 5]
