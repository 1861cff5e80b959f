"""Collecting a batch: one outcome per request, every line accounted for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from include.artifacts import Artifacts
from include.cost import Usage, cost
from include.job_spec import JobSpec
from include.outcomes import CollectReport, collect_shard, open_rows

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"type": "string", "enum": ["a", "b"]}, "score": {"type": "number"}},
    "required": ["kind", "score"],
    "additionalProperties": False,
}
GOOD = '{"kind":"a","score":1}'
USAGE = {"prompt_tokens": 10, "completion_tokens": 2}


def job(**request: Any) -> JobSpec:
    """Return a job with a chat request."""
    fields = {
        "endpoint": "/v1/chat/completions",
        "model": "gpt-4o-mini",
        "prompt": "{{ text }}",
        "output_schema": SCHEMA,
    } | request
    return JobSpec.model_validate(
        {
            "name": "j",
            "source": {"conn_id": "s", "sql": "select 1", "key": ["id"]},
            "request": fields,
            "target": {"conn_id": "t", "table": "results"},
        }
    )


def ok(custom_id: str, content: str = GOOD, finish: str = "stop") -> bytes:
    """Return a line with an answer."""
    choice = {"message": {"content": content}, "finish_reason": finish}
    body = {"choices": [choice], "usage": USAGE}
    line = {"custom_id": custom_id, "response": {"status_code": 200, "body": body}, "error": None}
    return json.dumps(line).encode() + b"\n"


def bad(custom_id: str, status: int = 429) -> bytes:
    """Return a line with an HTTP error."""
    response = {"status_code": status, "body": {"error": {"message": "no", "code": "c"}}}
    return json.dumps({"custom_id": custom_id, "response": response}).encode() + b"\n"


class Shard:
    """A shard on disk, to be collected."""

    def __init__(self, folder: Path, ids: list[str]) -> None:
        self.artifacts = Artifacts(folder)
        table = {"_row": range(7, 7 + len(ids)), "id": range(len(ids)), "_custom_id": ids}
        columns = [pa.array(list(values)) for values in table.values()]
        types = {"_custom_id": pa.string()}
        columns = [c.cast(types.get(n, pa.int64())) for n, c in zip(table, columns, strict=True)]
        with self.artifacts.create("index.parquet") as sink:
            pq.write_table(pa.Table.from_arrays(columns, names=list(table)), sink)

    def collect(
        self, output: bytes | None = b"", error: bytes | None = None, **options: Any
    ) -> CollectReport:
        """Collect these files."""
        spec = options.pop("spec", None) or job()
        files = {"output.jsonl": output, "error.jsonl": error}
        for name, data in files.items():
            if data is not None:
                with self.artifacts.create(name) as sink:
                    sink.write(data)
        given_files = [name if data is not None else None for name, data in files.items()]
        return collect_shard(
            spec,
            index_file="index.parquet",
            output_file=given_files[0],
            error_file=given_files[1],
            artifacts=self.artifacts,
            outcomes_file="outcomes.parquet",
            quarantine_file="quarantine.parquet",
            **options,
        )

    def table(self, name: str = "outcomes.parquet") -> list[Mapping[str, Any]]:
        """Return the rows of a file."""
        with self.artifacts.open(name) as stream:
            rows: list[Mapping[str, Any]] = pq.read_table(stream).to_pylist()
            return rows

    def column(self, name: str) -> list[Any]:
        """Return a column of the outcomes."""
        return [row[name] for row in self.table()]


def check(report: CollectReport) -> None:
    """Check that every request and every line is accounted for."""
    assert report.requests == report.succeeded + report.retry + report.failed
    answered = report.requests - report.missing
    assert report.lines == answered + report.quarantined + report.duplicates + report.blank
    assert sum(report.by_reason.values()) == report.retry + report.failed


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    """A shard of three requests."""
    return Shard(tmp_path, ["a", "b", "c"])


def test_outcomes_are_in_index_order(shard: Shard) -> None:
    """The order of the files is of no account."""
    report = shard.collect(ok("c", '{"kind":"b","score":0.5}') + ok("a"), bad("b"))

    check(report)
    assert shard.column("_row") == [7, 8, 9]
    assert shard.column("_custom_id") == ["a", "b", "c"]
    assert shard.column("kind") == ["a", None, "b"]
    assert shard.column("score") == [1.0, None, 0.5]
    assert shard.column("_state") == ["succeeded", "retry", "succeeded"]
    assert shard.column("_reason") == ["", "rate_limited", ""]
    assert shard.column("_error_code") == [None, "c", None]
    assert shard.column("_input_tokens") == [10, 0, 10]


def test_columns_have_the_types_of_the_schema(shard: Shard) -> None:
    """Also when no value is there to tell."""
    shard.collect(None)

    with shard.artifacts.open("outcomes.parquet") as stream:
        schema = pq.read_schema(stream)
    assert schema.field("kind").type == pa.string()
    assert schema.field("score").type == pa.float64()
    assert schema.field("id").type == pa.int64()
    assert schema.names[:4] == ["_row", "id", "_custom_id", "_state"]


def test_missing_lines_go_round_again(shard: Shard) -> None:
    """Without a line the batch's end is the reason."""
    report = shard.collect(ok("b"), batch_status="completed")

    check(report)
    assert report.missing == 2
    assert shard.column("_reason") == ["missing", "", "missing"]


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        ("expired", "batch_expired"),
        ("cancelled", "batch_cancelled"),
        ("failed", "batch_failed"),
        ("lost", "lost"),
        (None, "missing"),
        ("unheard_of", "missing"),
    ],
)
def test_batch_status_names_the_reason(shard: Shard, status: str | None, reason: str) -> None:
    """A batch without any file, whatever its end, sends all of its rows round again."""
    report = shard.collect(None, None, batch_status=status)

    check(report)
    assert report.by_reason == {reason: 3}
    assert report.retry == 3


def test_lines_named_at_validation_fail(shard: Shard) -> None:
    """The others of the batch are sent again."""
    bad_lines = {2: ("invalid_json_line", "not valid")}

    report = shard.collect(None, None, batch_status="failed", bad_lines=bad_lines)

    check(report)
    assert shard.column("_state") == ["retry", "failed", "retry"]
    assert shard.column("_reason") == ["batch_failed", "invalid_request", "batch_failed"]
    assert shard.column("_error_code")[1] == "invalid_json_line"


def test_first_success_wins(shard: Shard) -> None:
    """Over an error before it, an error after it and a second success."""
    output = bad("a") + ok("a") + ok("a", '{"kind":"b","score":2}')

    report = shard.collect(output, bad("a", 400) + bad("b") + bad("b", 400))

    check(report)
    assert shard.column("kind") == ["a", None, None]
    assert shard.column("_reason") == ["", "rate_limited", "missing"]
    assert report.duplicates == 4
    assert report.usage == Usage(10, 0, 2, 0)
    found = [(row["_file"], row["_line"]) for row in shard.table("quarantine.parquet")]
    assert found == [("output", 1), ("output", 3), ("error", 1), ("error", 3)]


def test_unusable_lines_are_quarantined_with_their_place(shard: Shard) -> None:
    """File, line and bytes lead to the line in the raw file."""
    torn = ok("a")[:40]
    output = ok("b") + torn + b"\r\n\n" + ok("stranger")

    report = shard.collect(output)

    check(report)
    assert (report.quarantined, report.foreign, report.blank) == (2, 1, 1)
    first, second = shard.table("quarantine.parquet")
    assert output[first["_offset"] :][: first["_length"]] == torn
    assert (first["_line"], first["_reason"], first["_custom_id"]) == (2, "not_json", "a")
    assert (second["_reason"], second["_custom_id"]) == ("foreign_custom_id", "stranger")


def test_without_unusable_lines_there_is_no_quarantine(shard: Shard) -> None:
    """The report says so."""
    assert shard.collect(ok("a")).quarantine_file is None
    assert not shard.artifacts.exists("quarantine.parquet")


def test_answer_against_the_schema_goes_round_again(shard: Shard) -> None:
    """It is paid for all the same."""
    report = shard.collect(ok("a", '{"kind":"z","score":1}') + ok("b", "Sure! {}"))

    assert shard.column("_reason") == ["invalid_answer", "invalid_answer", "missing"]
    assert shard.column("_state")[:2] == ["retry", "retry"]
    assert report.usage == Usage(20, 0, 4, 0)


def test_cut_off_answer_asks_for_more_room(shard: Shard) -> None:
    """The next request has a larger token limit; the others are unchanged."""
    shard.collect(ok("a", '{"ki', "length") + bad("b"))

    assert shard.column("_change") == ["larger_output", "", ""]
    assert shard.column("_reason")[0] == "cut_off"


def test_money_is_that_of_all_answered_lines(shard: Shard) -> None:
    """Batch and real-time price of the same usage."""
    report = shard.collect(ok("a") + ok("b", "", "length"))

    assert report.usage == Usage(input=20, output=4)
    assert report.cost_usd == cost(Usage(input=20, output=4), "gpt-4o-mini")
    assert report.cost_usd is not None
    assert report.realtime_usd == report.cost_usd * 2


def test_unknown_model_has_no_cost(shard: Shard) -> None:
    """None, not 0."""
    report = shard.collect(ok("a"), spec=job(model="mine"))

    assert (report.cost_usd, report.realtime_usd) == (None, None)


def test_job_without_schema_keeps_the_text(shard: Shard) -> None:
    """In the column `content`, with NUL and lone surrogates replaced."""
    shard.collect(ok("a", "x\x00\ud83d\u2028y"), spec=job(output_schema=None))

    assert shard.column("content") == ["x\ufffd\ufffd\u2028y", None, None]


def test_collecting_again_gives_the_same_bytes(shard: Shard) -> None:
    """A retried task leaves what the first one left."""
    found = []
    for _ in range(2):
        shard.collect(ok("b") + b"junk\n", bad("a"))
        for name in ("outcomes.parquet", "quarantine.parquet"):
            with shard.artifacts.open(name) as stream:
                found.append(stream.read())

    assert found[:2] == found[2:]


def test_more_requests_than_a_chunk(tmp_path: Path) -> None:
    """Values stay with their request across chunk borders."""
    ids = [f"id{number}" for number in range(20_005)]
    shard = Shard(tmp_path, ids)
    answers = [ok(one, f'{{"kind":"a","score":{i}}}') for i, one in enumerate(ids) if i % 5]

    report = shard.collect(b"".join(reversed(answers)))

    check(report)
    assert shard.column("score") == [float(i) if i % 5 else None for i in range(20_005)]


def test_more_answers_than_are_held(tmp_path: Path) -> None:
    """Those beyond the limit are read again, each for its own row, whatever came between."""
    ids = [f"id{number}" for number in range(120)]
    shard = Shard(tmp_path, ids)
    answers = [ok(one, json.dumps([number] * 100_000)) for number, one in enumerate(ids)]
    order = [*range(1, 120, 2), *range(0, 100, 2)]
    lines = [answers[at] for at in order]
    lines.insert(90, bad("id20"))  # overruled by a success that is read again
    lines.insert(91, ok("id30", ""))  # as well
    lines.insert(92, bad("id104"))
    lines.append(answers[3])

    report = shard.collect(b"\n".join(lines), spec=job(output_schema=None))

    check(report)
    assert (report.succeeded, report.missing, report.duplicates) == (110, 9, 3)
    found = [None if text is None else json.loads(text)[:2] for text in shard.column("content")]
    assert found == [[n, n] if n in order else None for n in range(120)]
    assert shard.column("_reason")[104] == "rate_limited"
    assert shard.column("_input_tokens") == [10 if n in order else 0 for n in range(120)]


def test_open_rows_are_those_to_be_tried_again(shard: Shard) -> None:
    """Row and change, in order."""
    shard.collect(ok("a", "x", "length") + ok("b") + bad("c"))

    found = list(open_rows(["outcomes.parquet", "outcomes.parquet"], shard.artifacts))

    assert [batch.to_pydict() for batch in found] == [
        {"_row": [7, 9], "_change": ["larger_output", ""]}
    ] * 2


LINES = st.sampled_from(
    [ok("a"), ok("b"), ok("b", "{}"), ok("zz"), bad("a"), bad("c", 400), b"\n", b" \r\n", b"x\n",
     ok("c")[:50] + b"\n", b"\xff\n", b'{"custom_id":"a"}\n', b"null\n"]
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.lists(LINES, max_size=12), st.lists(LINES, max_size=6), st.binary(max_size=20))
def test_no_line_and_no_request_is_lost(
    tmp_path_factory: pytest.TempPathFactory,
    output: list[bytes],
    error: list[bytes],
    tail: bytes,
) -> None:
    """Whatever the files hold, lines and requests add up, and successes are found."""
    shard = Shard(tmp_path_factory.mktemp("shard"), ["a", "b", "c"])
    files = [b"".join(output) + tail, b"".join(error)]

    report = shard.collect(*files)

    check(report)
    assert len(shard.table()) == 3
    good = {one for one in ("a", "b") if ok(one) in output + error}
    assert {row["_custom_id"] for row in shard.table() if row["_state"] == "succeeded"} == good
    noted = report.quarantined + report.duplicates
    assert len(shard.table("quarantine.parquet") if report.quarantine_file else []) == noted


def silent(custom_id: str) -> bytes:
    """A line with an answer that does not say what it used."""
    return ok(custom_id).replace(json.dumps({"usage": USAGE})[1:-1].encode(), b'"usage": null')


def test_an_answer_without_usage_has_no_known_cost(tmp_path: Path) -> None:
    """Some servers leave it out: what the batch has cost is unknown then, never 0."""
    shard = Shard(tmp_path, ["a", "b", "c"])

    report = shard.collect(ok("a") + silent("b"), bad("c"))

    assert (report.succeeded, report.untold) == (2, 1)
    assert (report.cost_usd, report.realtime_usd) == (None, None)


def test_what_never_ran_has_cost_nothing(tmp_path: Path) -> None:
    """A refused request has no usage because there is none."""
    report = Shard(tmp_path, ["a"]).collect(None, bad("a"))

    assert (report.untold, report.cost_usd) == (0, 0)
