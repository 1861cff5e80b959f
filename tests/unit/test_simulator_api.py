"""The simulator's Files and Batches API, used through the OpenAI client and checked by the spec."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import jsonschema
import openai
import pytest

from include.simulator.process import Simulator, SimulatorError, wait_for_status

SPEC = json.loads((Path(__file__).parents[1] / "spec/openai-batch-api.json").read_text("utf-8"))
ENDPOINT = "/v1/responses"


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    """One simulator for the module, with small limits and a fast clock."""
    with Simulator.start(
        tmp_path_factory.mktemp("simulator"),
        speed=20,
        requests_per_batch=50,
        embedding_inputs=20,
    ) as running:
        yield running


@pytest.fixture
def client(simulator: Simulator) -> openai.OpenAI:
    """An unchanged OpenAI client without retries."""
    return openai.OpenAI(base_url=simulator.base_url, api_key="sk-test", max_retries=0)


def line(custom_id: str, **changes: Any) -> dict[str, Any]:
    """One request line."""
    body = {"model": "gpt-4.1-mini", "input": f"Text of {custom_id}."}
    return {"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": body, **changes}


def jsonl(*lines: dict[str, Any]) -> bytes:
    """An input file."""
    return b"".join(json.dumps(one).encode() + b"\n" for one in lines)


def upload(client: openai.OpenAI, content: bytes) -> str:
    """Upload an input file; its id."""
    return client.files.create(file=("requests.jsonl", io.BytesIO(content)), purpose="batch").id


def create(client: openai.OpenAI, file_id: str, **options: Any) -> Any:
    """Create a batch."""
    wanted = {"endpoint": ENDPOINT, "completion_window": "24h", **options}
    return client.batches.create(input_file_id=file_id, **wanted)


def ended(client: openai.OpenAI, content: bytes, **options: Any) -> Any:
    """Upload, create and wait for the end."""
    batch = create(client, upload(client, content), **options)
    return wait_for_status(client, batch.id, "completed", "failed", "expired", "cancelled")


def call(simulator: Simulator, method: str, path: str, **headers: str) -> tuple[int, Any, Any]:
    """One plain HTTP call: status, headers and body."""
    wanted = {"authorization": "Bearer sk-test", **headers}
    answer = httpx2.request(method, simulator.url + path, headers=wanted)
    return answer.status_code, answer.headers, answer.content


def conforms(name: str, raw: bytes) -> dict[str, Any]:
    """Validate an answer against a published schema."""
    value: dict[str, Any] = json.loads(raw)
    jsonschema.validate(value, {**SPEC, "$ref": f"#/components/schemas/{name}"})
    return value


def test_a_batch_runs_from_upload_to_download(client: openai.OpenAI) -> None:
    """Every request has one line in the output file, found by its custom_id."""
    batch = ended(client, jsonl(*(line(f"row-{n}") for n in range(30))))

    output = client.files.content(batch.output_file_id).content.splitlines()
    assert batch.status == "completed"
    assert batch.request_counts.to_dict() == {"total": 30, "completed": 30, "failed": 0}
    assert batch.error_file_id is None
    assert {json.loads(one)["custom_id"] for one in output} == {f"row-{n}" for n in range(30)}


def test_results_do_not_come_in_the_order_of_the_requests(client: openai.OpenAI) -> None:
    """The API promises no order, so the simulator keeps none."""
    batch = ended(client, jsonl(*(line(f"{n:02}") for n in range(40))))

    output = client.files.content(batch.output_file_id).content.splitlines()
    ids = [json.loads(one)["custom_id"] for one in output]
    assert ids != sorted(ids)


def test_every_answer_conforms_to_the_published_schema(
    simulator: Simulator, client: openai.OpenAI
) -> None:
    """Batch, file, both lists, deletion, error and result lines validate."""
    batch = ended(client, jsonl(line("one")), metadata={"submission_id": "s1"})
    conforms("Batch", call(simulator, "GET", f"/v1/batches/{batch.id}")[2])
    conforms("ListBatchesResponse", call(simulator, "GET", "/v1/batches?limit=5")[2])
    conforms("OpenAIFile", call(simulator, "GET", f"/v1/files/{batch.input_file_id}")[2])
    conforms("ListFilesResponse", call(simulator, "GET", "/v1/files?limit=2")[2])
    conforms("ListFilesResponse", call(simulator, "GET", "/v1/files?purpose=vision")[2])
    content = call(simulator, "GET", f"/v1/files/{batch.output_file_id}/content")[2]

    result = conforms("BatchRequestOutput", content)

    conforms("Response", json.dumps(result["response"]["body"]).encode())
    conforms("DeleteFileResponse", call(simulator, "DELETE", f"/v1/files/{batch.input_file_id}")[2])
    status, headers, raw = call(simulator, "GET", f"/v1/files/{batch.input_file_id}")
    conforms("ErrorResponse", raw)
    assert status == 404
    assert headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("status", ["validating", "in_progress", "finalizing"])
def test_batches_pass_through_their_statuses(
    simulator: Simulator, client: openai.OpenAI, status: str
) -> None:
    """validating, in_progress, finalizing, completed, each with its time; each can be seen."""
    simulator.add_faults({"fault": "stuck", "status": status})
    batch = create(client, upload(client, jsonl(line("one"))))
    simulator.clear_faults()  # the batch keeps it

    held = wait_for_status(client, batch.id, status, "completed").status
    simulator.release()
    batch = wait_for_status(client, batch.id, "completed")

    assert held == status
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at


def test_the_counts_grow_while_a_batch_is_in_progress(tmp_path: Path) -> None:
    """A part of the requests is answered before all are, and no answer is taken back."""
    counts: list[int] = []
    with Simulator.start(tmp_path, seconds_validating=0, seconds_in_progress=0) as simulator:
        client = openai.OpenAI(base_url=simulator.base_url, api_key="sk-test", max_retries=0)
        simulator.add_faults({"fault": "stuck", "seconds": 60})
        batch = create(client, upload(client, jsonl(*(line(f"{n}") for n in range(1_000)))))
        while len(set(counts)) < 5:
            batch = client.batches.retrieve(batch.id)
            counts.append(batch.request_counts.completed)
        simulator.release()
        ended = wait_for_status(client, batch.id, "completed")

    assert batch.status == "in_progress"
    assert counts == sorted(counts)
    assert 0 < counts[-1] < 1_000
    assert ended.request_counts.completed == 1_000


def test_an_instant_simulator_has_ended_when_create_returns(tmp_path: Path) -> None:
    """With no seconds anywhere a small batch is completed at once."""
    with Simulator.start(tmp_path, instant=True) as simulator:
        client = openai.OpenAI(base_url=simulator.base_url, api_key="sk-test", max_retries=0)

        assert create(client, upload(client, jsonl(line("one")))).status == "completed"


def test_listing_pages_newest_first(client: openai.OpenAI) -> None:
    """Pages follow each other through `after` without gap or repetition."""
    file_id = upload(client, jsonl(line("one")))
    made = [create(client, file_id).id for _ in range(5)]

    first = client.batches.list(limit=2)
    second = client.batches.list(limit=3, after=first.data[-1].id)

    assert [batch.id for batch in [*first.data, *second.data]] == made[::-1]
    assert first.has_more


def test_cancelling_keeps_and_bills_what_was_answered(tmp_path: Path) -> None:
    """A cancelled batch has partial output, `batch_cancelled` for the rest, and a partial bill."""
    with Simulator.start(tmp_path, seconds_validating=0, seconds_in_progress=60) as simulator:
        client = openai.OpenAI(base_url=simulator.base_url, api_key="sk-test", max_retries=0)
        batch = create(client, upload(client, jsonl(*(line(f"{n}") for n in range(2_000)))))
        while client.batches.retrieve(batch.id).request_counts.completed < 20:
            time.sleep(0.01)

        assert client.batches.cancel(batch.id).status == "cancelling"
        batch = wait_for_status(client, batch.id, "cancelled")
        output = client.files.content(batch.output_file_id).content.splitlines()
        errors = client.files.content(batch.error_file_id).content.splitlines()
        bill = simulator.bill()

    assert 20 <= len(output) < 2_000
    assert len(output) + len(errors) == 2_000
    assert json.loads(errors[0])["error"]["code"] == "batch_cancelled"
    assert json.loads(errors[0])["response"] is None
    assert (bill["requests"], bill["error_lines"]) == (len(output), len(errors))


def test_a_final_batch_cannot_be_cancelled(client: openai.OpenAI) -> None:
    """Cancelling what has ended is a conflict."""
    batch = ended(client, jsonl(line("one")))

    with pytest.raises(openai.ConflictError):
        client.batches.cancel(batch.id)


@pytest.mark.parametrize(
    ("code", "number", "content"),
    [
        ("invalid_json_line", 2, jsonl(line("a")) + b"{broken\n"),
        ("duplicate_custom_id", 2, jsonl(line("a"), line("a"))),
        ("mismatched_url", 1, jsonl(line("a", url="/v1/embeddings"))),
        ("mismatched_model", 2, jsonl(line("a"), line("b", body={"model": "gpt-5-nano"}))),
        ("missing_required_parameter", 1, jsonl(line("a", body={"input": "x"}))),
        ("model_not_found", 1, jsonl(line("a", body={"model": "no-such-model"}))),
        ("empty_file", None, b""),
        ("too_many_tasks", None, jsonl(*(line(f"{n}") for n in range(51)))),
    ],
)
def test_wrong_input_fails_the_batch_and_names_the_line(
    client: openai.OpenAI, code: str, number: int | None, content: bytes
) -> None:
    """What is wrong inside the file shows as status failed with code and line."""
    batch = ended(client, content)

    assert batch.status == "failed"
    assert (batch.errors.data[0].code, batch.errors.data[0].line) == (code, number)


def test_an_unknown_input_file_fails_the_batch(client: openai.OpenAI) -> None:
    """The batch is created and fails, as with any other wrong input."""
    batch = create(client, "file-unknown")

    assert wait_for_status(client, batch.id, "failed").errors.data[0].code == "invalid_request"


def test_embedding_inputs_are_counted_over_the_whole_batch(client: openai.OpenAI) -> None:
    """Many inputs in few requests are too many all the same."""
    body = {"model": "text-embedding-3-small", "input": ["x"] * 11}
    lines = [line(f"{n}", url="/v1/embeddings", body=body) for n in range(2)]

    assert ended(client, jsonl(*lines), endpoint="/v1/embeddings").status == "failed"
    assert ended(client, jsonl(lines[0]), endpoint="/v1/embeddings").status == "completed"


@pytest.mark.parametrize(
    "wrong",
    [
        {"endpoint": "/v1/unknown"},
        {"completion_window": "1h"},
        {"metadata": {f"key{n}": "x" for n in range(17)}},
        {"metadata": {"k" * 65: "x"}},
        {"metadata": {"key": "x" * 513}},
        {"output_expires_after": {"anchor": "created_at", "seconds": 60}},
    ],
)
def test_wrong_parameters_are_refused_at_once(client: openai.OpenAI, wrong: dict[str, Any]) -> None:
    """Endpoint, window, metadata limits and expiry are checked before a batch is made."""
    with pytest.raises(openai.BadRequestError):
        create(client, upload(client, jsonl(line("one"))), **wrong)


@pytest.mark.parametrize("key", ["", "Bearer wrong-key"])
def test_a_missing_or_wrong_key_is_refused(simulator: Simulator, key: str) -> None:
    """401 in the published error form."""
    status, _, raw = call(simulator, "GET", "/v1/batches", authorization=key)

    conforms("ErrorResponse", raw)
    assert status == 401


def test_downloads_have_a_length_and_serve_ranges(
    simulator: Simulator, client: openai.OpenAI
) -> None:
    """A broken download can be resumed in the middle."""
    content = jsonl(*(line(f"{n}") for n in range(10)))
    path = f"/v1/files/{upload(client, content)}/content"

    whole = call(simulator, "GET", path)
    part = call(simulator, "GET", path, range="bytes=100-")

    assert int(whole[1]["content-length"]) == len(content)
    assert (part[0], part[2]) == (206, content[100:])


def test_uploads_carry_their_expiry(client: openai.OpenAI) -> None:
    """`expires_after` sets `expires_at`; an impossible one is refused."""
    content = ("x.jsonl", jsonl(line("one")))
    policy: Any = {"anchor": "created_at", "seconds": 3600}

    file = client.files.create(file=content, purpose="batch", expires_after=policy)

    assert file.expires_at == file.created_at + 3600
    with pytest.raises(openai.BadRequestError):
        client.files.create(file=content, purpose="batch", expires_after=policy | {"seconds": 1})


def test_uploaded_bytes_come_back_unchanged(client: openai.OpenAI) -> None:
    """Nothing in a file is taken for the multipart boundary or recoded."""
    content = bytes(range(256)) * 5000 + b"\r\n--\r\n" + "\u2028漢字😀".encode()

    assert client.files.content(upload(client, content)).content == content


def test_the_bill_is_the_sum_of_what_the_lines_used(
    simulator: Simulator, client: openai.OpenAI
) -> None:
    """Tokens on the bill are those of the result lines; the price is half of the list price."""
    batch = ended(client, jsonl(*(line(f"{n}") for n in range(20))), metadata={"round": "1"})
    content = client.files.content(batch.output_file_id).content
    usages = [json.loads(one)["response"]["body"]["usage"] for one in content.splitlines()]

    bill = next(one for one in simulator.bill()["by_batch"] if one["batch_id"] == batch.id)

    used = {
        name: sum(usage[name] for usage in usages) for name in ("input_tokens", "output_tokens")
    }
    expected = (used["input_tokens"] * 40 + used["output_tokens"] * 160) // 2
    assert bill.items() >= {"requests": 20, "metadata": {"round": "1"}, **used}.items()
    assert round(float(bill["cost_usd"]) * 1e8) == expected
    assert batch.usage.input_tokens == used["input_tokens"]


def test_the_bill_names_every_request(simulator: Simulator, client: openai.OpenAI) -> None:
    """Each (batch, custom_id) is one line with how often it was paid."""
    batch = ended(client, jsonl(line("a"), line("b")), metadata={"submission_id": "s2"})

    lines = [one for one in simulator.bill_lines() if one["batch_id"] == batch.id]

    assert {one["custom_id"]: (one["billed"], one["errors"]) for one in lines} == {
        "a": (1, 0),
        "b": (1, 0),
    }
    assert all(one["metadata"] == {"submission_id": "s2"} for one in lines)


def test_calls_are_counted_and_logged(simulator: Simulator, client: openai.OpenAI) -> None:
    """Refused creations count as well; the log has no bodies."""
    before = simulator.batches()
    with pytest.raises(openai.BadRequestError):
        create(client, "file-unknown", completion_window="1h")
    upload(client, jsonl(line("one")))

    after = simulator.batches()

    assert after["creates"] - before["creates"] == 1
    assert after["uploads"] - before["uploads"] == 1
    assert simulator.requests()[-1].items() >= {"method": "POST", "status": 200}.items()


def test_a_simulator_that_cannot_start_says_why(simulator: Simulator, tmp_path: Path) -> None:
    """A wrong fault script or option is an error with the server's own words."""
    with pytest.raises(SimulatorError, match="no_such_fault"):
        Simulator.start(tmp_path, faults=[{"fault": "no_such_fault"}])
