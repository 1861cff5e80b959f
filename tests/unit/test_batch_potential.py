"""What could be batched: every common form of a usage file, priced, with errors that lead."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest

from include.batch_potential import Line, Potential, Verdict, main
from include.cost import Usage, cost
from include.errors import ConfigurationError
from include.usage_log import read_calls

LOG = """\
timestamp,model,endpoint,prompt_tokens,completion_tokens,category,latency_class
2026-11-01T00:00:00Z,gpt-5-mini,/v1/responses,1000,200,triage,background
2026-11-01T00:00:01Z,gpt-5-mini,/v1/responses,3000,400,triage,background
2026-11-01T00:00:02Z,gpt-5-mini,/v1/responses,9000,900,support chat,interactive
2026-11-01T00:00:03Z,my-model,https://api.openai.com/v1/embeddings,10,0,search,
2026-11-01T00:00:04Z,whisper-1,/v1/audio/transcriptions,10,0,calls,bulk
"""


def lines_of(path: Path, **told: list[str]) -> dict[tuple[str, str], Line]:
    found = Potential(**told)
    for call in read_calls(path):
        found.add(call)
    return {(line.category, line.model): line for line in found.lines()}


def write(folder: Path, text: str, name: str = "usage.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_log_of_requests_is_added_up_and_priced(tmp_path: Path) -> None:
    """The latency class says what can wait; what the Batch API does not take saves nothing."""
    lines = lines_of(write(tmp_path, LOG))

    triage = lines["triage", "gpt-5-mini"]
    used = Usage(input=4_000, output=600)
    assert (triage.verdict, triage.requests, triage.usage) == (Verdict.WAITS, 2, used)
    assert triage.realtime_usd == cost(used, "gpt-5-mini", batch=False)
    assert triage.saving_usd == cost(used, "gpt-5-mini")
    chat = lines["support chat", "gpt-5-mini"]
    assert (chat.verdict, chat.saving_usd) == (Verdict.INTERACTIVE, 0)
    search = lines["search", "my-model"]
    assert (search.verdict, search.saving_usd) == (Verdict.UNKNOWN, None)
    assert lines["calls", "whisper-1"].verdict is Verdict.NOT_OFFERED


def test_categories_can_be_told(tmp_path: Path) -> None:
    """Where the file has no latency class, `--waits` and `--interactive` say it."""
    path = write(tmp_path, LOG.replace("background", "").replace(",interactive", ","))
    lines = lines_of(path, waits=["triage"], interactive=["support chat"])

    assert lines["triage", "gpt-5-mini"].verdict is Verdict.WAITS
    assert lines["support chat", "gpt-5-mini"].verdict is Verdict.INTERACTIVE


def test_a_page_of_the_usage_api(tmp_path: Path) -> None:
    """Cached tokens have their price; what is a batch already saves nothing more."""
    result = {"model": "gpt-4o-mini-2024-07-18", "project_id": "p1", "num_model_requests": 7}
    used = {"input_tokens": 1_000, "input_cached_tokens": 600, "output_tokens": 50}
    results = [{**result, **used, "batch": batch} for batch in (False, True)]
    page = {"object": "page", "data": [{"object": "bucket", "results": results}]}

    found = Potential()
    for call in read_calls(write(tmp_path, json.dumps(page), "usage.json")):
        found.add(call)
    open_, batched = found.lines()

    assert (open_.verdict, open_.requests) == (Verdict.UNKNOWN, 7)
    assert open_.batch_usd == cost(Usage(1_000, 600, 50), "gpt-4o-mini")
    assert (batched.verdict, batched.saving_usd) == (Verdict.BATCHED, 0)


def test_an_export_of_costs(tmp_path: Path) -> None:
    """Its amounts are taken as they are, exactly; JSON lines are one record each."""
    records = [
        {"amount": {"value": "0.30", "currency": "usd"}, "line_item": "gpt-4o-mini, input"},
        {"amount": {"value": "0.12", "currency": "usd"}, "line_item": "gpt-4o-mini, output"},
    ]
    path = write(tmp_path, "".join(f"{json.dumps(one)}\n" for one in records), "costs.jsonl")

    line = lines_of(path)["", "gpt-4o-mini"]

    assert (line.realtime_usd, line.saving_usd) == (Decimal("0.42"), Decimal("0.21"))


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("a,b\n1,2\n", "u.csv", "u.csv, line 1: there is no column for model .*found a, b"),
        ("", "u.csv", "u.csv, line 0: there is no column for model .*found no header"),
        (
            "model,input_tokens,output_tokens\nm,1,2\nm,x,2\n",
            "u.csv",
            "u.csv, line 3: input must be a whole number of 0 or more, found 'x'",
        ),
        (
            "model,input_tokens,output_tokens\nm,1\n",
            "u.csv",
            "u.csv, line 2: has 2 fields, the header has 3",
        ),
        ('{"model": "m"}\n', "u.jsonl", "u.jsonl, line 1: there is no column for input"),
        ('{"model": \n', "u.jsonl", "u.jsonl, line 1: expected one JSON object"),
        ('{"data": 3}', "u.json", "u.json is no page of the usage API"),
        ("line_item,amount\nm,dear\n", "u.csv", "line 2: amount must be a number of dollars"),
    ],
)
def test_a_wrong_file_is_told_with_its_line(
    text: str, name: str, message: str, tmp_path: Path
) -> None:
    """The message names file, line, column, what was expected and what was found."""
    with pytest.raises(ConfigurationError, match=message):
        list(read_calls(write(tmp_path, text, name)))


def test_a_column_of_all_different_values_does_not_fill_the_memory(tmp_path: Path) -> None:
    """After 1,000 categories the rest is one."""
    rows = "".join(f"m,1,1,c{number}\n" for number in range(1_500))
    path = write(tmp_path, "model,input_tokens,output_tokens,category\n" + rows)

    lines = lines_of(path)

    assert len(lines) == 1_001
    assert lines["(other categories)", "m"].requests == 500


def test_the_command_prints_a_table_or_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both have the same lines; a wrong file is one line on standard error."""
    path = str(write(tmp_path, LOG))

    assert main([path]) == 0
    table = capsys.readouterr().out
    assert main([path, "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert main([f"{path}.gone"]) == 1

    assert "Batching what can wait saves $0.0011." in table
    assert {line["category"] for line in plain} == {"triage", "support chat", "search", "calls"}
    assert "cannot be read" in capsys.readouterr().err
