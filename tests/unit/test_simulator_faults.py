"""Every fault of the script: it does what it says, and it is counted as fired."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from include.local_stack.rest import wait_until
from include.simulator.faults import RULE, Fault
from include.simulator.process import Simulator, SimulatorError, wait_for_status

ENDPOINT = "/v1/responses"
ROWS = 20
PATIENCE = 60.0  # seconds
LOST = (openai.APIConnectionError, openai.APITimeoutError)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    """One simulator for the module, with a fast clock."""
    with Simulator.start(tmp_path_factory.mktemp("simulator"), speed=20) as running:
        yield running


@pytest.fixture
def simulator(shared: Simulator) -> Simulator:
    """The shared simulator without fault rules."""
    shared.clear_faults()
    return shared


@pytest.fixture
def client(simulator: Simulator) -> openai.OpenAI:
    """An unchanged OpenAI client without retries."""
    return openai.OpenAI(base_url=simulator.base_url, api_key="sk-test", max_retries=0)


def fault(simulator: Simulator, kind: str, **keys: Any) -> str:
    """Add one rule; its id."""
    return str(simulator.add_faults({"fault": kind, **keys})[0]["id"])


def jsonl(rows: int = ROWS, text: str = "Some words to answer.") -> bytes:
    """An input file of equal requests."""
    body = {"model": "gpt-4.1-mini", "input": text}
    lines = [
        {"custom_id": f"row-{n}", "method": "POST", "url": ENDPOINT, "body": body}
        for n in range(rows)
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def upload(client: openai.OpenAI, content: bytes | None = None) -> str:
    """Upload an input file; its id."""
    file = ("requests.jsonl", io.BytesIO(jsonl() if content is None else content))
    return client.files.create(file=file, purpose="batch").id


def create(client: openai.OpenAI, file_id: str | None = None, **options: Any) -> Any:
    """Create a batch."""
    return client.batches.create(
        input_file_id=file_id or upload(client),
        endpoint=ENDPOINT,  # type: ignore[arg-type]
        completion_window="24h",
        **options,
    )


def ended(client: openai.OpenAI, **options: Any) -> Any:
    """Create a batch and wait for its end."""
    final = ("completed", "failed", "expired", "cancelled")
    return wait_for_status(client, create(client, **options).id, *final)


def output(client: openai.OpenAI, batch: Any) -> bytes:
    """The content of the output file."""
    return client.files.content(batch.output_file_id).content


def errors(client: openai.OpenAI, batch: Any) -> list[dict[str, Any]]:
    """The lines of the error file."""
    content = client.files.content(batch.error_file_id).content
    return [json.loads(line) for line in content.splitlines()]


def creates(simulator: Simulator) -> int:
    """How many batches there are."""
    return len(simulator.batches()["batches"])


# --- the script itself


@pytest.mark.parametrize(
    "rule",
    [
        {"fault": "no_such_fault"},
        {"fault": "stall_before"},
        {"fault": "reset_before", "unknown_key": 1},
        {"fault": "fail_before", "status": 200},
        {"fault": "reset_before", "path": "("},
    ],
)
def test_a_wrong_rule_is_refused_and_none_is_added(
    simulator: Simulator, rule: dict[str, Any]
) -> None:
    """422 names the mistake; the good rules beside it are not taken."""
    with pytest.raises(SimulatorError, match="unknown_fault"):
        simulator.add_faults({"fault": "reset_before"}, rule)

    assert simulator.faults() == []


def test_one_rule_needs_no_list(simulator: Simulator) -> None:
    """Somebody with curl may send a rule as docs/rehearsal.md shows it."""
    simulator.admin("POST", "/_sim/faults", {"fault": "reset_before"})

    assert [one["fault"] for one in simulator.faults()] == ["reset_before"]


def test_every_rule_explains_itself() -> None:
    """Each rule model has a docstring of its own."""
    kinds = Fault.__args__

    assert all(kind.__doc__ and kind.__doc__.strip().endswith(".") for kind in kinds)
    assert len({kind.__doc__ for kind in kinds}) == len(kinds)


def test_the_server_describes_its_faults(simulator: Simulator) -> None:
    """The schema of the script names every fault."""
    schema = simulator.admin("GET", "/_sim/faults/kinds")

    assert {"Expire", "Truncate", "LineDamage"} <= schema["$defs"].keys()


@pytest.mark.parametrize(
    ("keys", "due"),
    [
        ({}, [1, 2, 3, 4, 5, 6]),
        ({"nth": 3}, [3]),
        ({"every": 2}, [2, 4, 6]),
        ({"nth": 1, "every": 4}, [1, 5]),
        ({"times": 2}, [1, 2]),
        ({"probability": 0.0}, []),
    ],
)
def test_rules_choose_their_matches(keys: dict[str, Any], due: list[int]) -> None:
    """nth, every, probability and times decide which matches fire."""
    rule = RULE.validate_python({"fault": "reset_before", **keys})
    fired: list[int] = []

    for seen in range(1, 7):
        if rule.due(seen, len(fired)):
            fired.append(seen)

    assert fired == due


def test_rules_and_counts_survive_a_kill(tmp_path: Path) -> None:
    """A restarted simulator knows its rules and what has fired."""
    with Simulator.start(tmp_path, faults=[{"fault": "fail_before", "nth": 1}]) as simulator:
        client = openai.OpenAI(base_url=simulator.base_url, api_key="sk-test", max_retries=0)
        with pytest.raises(openai.InternalServerError):
            client.batches.list()

        simulator.kill()
        simulator.restart()
        client.batches.list()

        assert [(rule["seen"], rule["fired"]) for rule in simulator.faults()] == [(2, 1)]


# --- calls


def test_a_failure_before_has_no_effect(simulator: Simulator, client: openai.OpenAI) -> None:
    """The status, code and Retry-After are the asked ones and no batch is made."""
    file_id = upload(client)
    rule = fault(
        simulator,
        "fail_before",
        method="POST",
        path="/batches$",
        status=429,
        code="rate_limit_exceeded",
        retry_after=7,
        nth=1,
    )
    before = creates(simulator)

    with pytest.raises(openai.RateLimitError) as refusal:
        create(client, file_id)

    assert refusal.value.code == "rate_limit_exceeded"
    assert refusal.value.response.headers["retry-after"] == "7"
    assert creates(simulator) == before
    assert simulator.fired(rule) == 1


@pytest.mark.parametrize("kind", ["fail_after", "reset_after"])
def test_an_answer_lost_afterwards_leaves_its_effect(
    simulator: Simulator, client: openai.OpenAI, kind: str
) -> None:
    """The client sees an error, yet there is a batch."""
    file_id = upload(client)
    rule = fault(simulator, kind, method="POST", path="/batches$")
    before = creates(simulator)

    with pytest.raises((openai.InternalServerError, *LOST)):
        create(client, file_id)

    assert creates(simulator) == before + 1
    assert simulator.fired(rule) == 1


def test_a_reset_before_has_no_effect(simulator: Simulator, client: openai.OpenAI) -> None:
    """The connection breaks and no batch is made."""
    file_id = upload(client)
    rule = fault(simulator, "reset_before", method="POST", path="/batches$", nth=1)
    before = creates(simulator)

    with pytest.raises(openai.APIConnectionError):
        create(client, file_id)

    assert creates(simulator) == before
    assert simulator.fired(rule) == 1
    assert create(client, file_id).status == "validating"


@pytest.mark.parametrize(("kind", "made"), [("stall_before", False), ("stall_after", True)])
def test_a_stalled_call_times_out(
    simulator: Simulator, client: openai.OpenAI, kind: str, *, made: bool
) -> None:
    """The client gives up while the call has not, or has, taken effect; it does so in the end."""
    file_id = upload(client)
    seconds = 2.0
    rule = fault(simulator, kind, method="POST", path="/batches$", seconds=seconds)
    before = creates(simulator)

    with pytest.raises(openai.APITimeoutError):
        create(client.with_options(timeout=0.2), file_id)
    wait_until("the end of the call", PATIENCE, lambda: last_create(simulator)["seconds"])

    batch, call = simulator.batches()["batches"][-1], last_create(simulator)
    assert creates(simulator) == before + 1
    assert call["seconds"] >= seconds
    assert (batch["created_at"] - call["at"] < seconds) == made
    assert simulator.fired(rule) == 1


def last_create(simulator: Simulator) -> dict[str, Any]:
    """The latest call that creates a batch; its `seconds` are 0 until it has ended."""
    calls = [one for one in simulator.requests() if one["method"] == "POST"]
    return [one for one in calls if one["path"].endswith("/batches")][-1]


def test_a_truncated_download_with_its_length_shows_as_broken(
    simulator: Simulator, client: openai.OpenAI
) -> None:
    """Content-Length is that of the whole file, the body ends early."""
    file_id = upload(client)
    rule = fault(simulator, "truncate", fraction=0.5, nth=1)

    with pytest.raises((httpx2.RemoteProtocolError, openai.APIConnectionError)):
        client.files.content(file_id)

    assert simulator.fired(rule) == 1
    assert client.files.content(file_id).content == jsonl()


def test_a_truncated_download_without_length_looks_whole(
    simulator: Simulator, client: openai.OpenAI
) -> None:
    """Nothing in HTTP tells the client that bytes are missing."""
    file_id = upload(client)
    rule = fault(simulator, "truncate", at_bytes=100, content_length=False)

    answer = client.files.content(file_id)

    assert answer.content == jsonl()[:100]
    assert "content-length" not in answer.response.headers
    assert simulator.fired(rule) == 1


def test_a_corrupted_line_is_the_only_one(simulator: Simulator, client: openai.OpenAI) -> None:
    """Bytes change in the chosen line; no line end moves."""
    file_id = upload(client)
    rule = fault(simulator, "corrupt", line=3, bytes=2)

    got = client.files.content(file_id).content.split(b"\n")

    wanted = jsonl().split(b"\n")
    assert [n for n, (a, b) in enumerate(zip(got, wanted, strict=True), 1) if a != b] == [3]
    assert simulator.fired(rule) == 1


@pytest.mark.parametrize(("kind", "made"), [("kill_before", 0), ("kill_after", 1)])
def test_the_calling_process_is_killed(simulator: Simulator, kind: str, made: int) -> None:
    """The process named in the header dies before, or after, its call takes effect."""
    program = (
        "import os, urllib.request as u\n"
        f"u.urlopen(u.Request('{simulator.base_url}/batches', method='POST', data="
        'b\'{"input_file_id":"file-x","endpoint":"/v1/responses","completion_window":"24h"}\','
        "headers={'authorization': 'Bearer k', 'x-llm-batch-pid': str(os.getpid())}))"
    )
    rule = fault(simulator, kind, method="POST", path="/batches$")
    before = creates(simulator)

    ended_with = subprocess.run([sys.executable, "-c", program], check=False).returncode

    assert ended_with == -9
    assert creates(simulator) == before + made
    assert simulator.fired(rule) == 1


# --- the service as a whole


def test_creations_over_the_rate_are_refused(simulator: Simulator, client: openai.OpenAI) -> None:
    """429 with Retry-After beyond so many creations in a window."""
    file_id = upload(client)
    rule = fault(simulator, "rate_limit", creates=creates(simulator) + 1, per_seconds=3600)
    create(client, file_id)

    with pytest.raises(openai.RateLimitError) as refusal:
        create(client, file_id)

    assert float(refusal.value.response.headers["retry-after"]) > 0
    assert simulator.fired(rule) == 1


def test_enqueued_tokens_are_limited_at_create(tmp_path: Path) -> None:
    """A batch over the limit of unfinished tokens is refused until others have ended."""
    with Simulator.start(tmp_path, speed=20) as simulator:
        client = openai.OpenAI(base_url=simulator.base_url, api_key="sk-test", max_retries=0)
        file_id = upload(client)
        fault(simulator, "stuck", nth=1)
        rule = fault(simulator, "token_limit", model="gpt-4.1-mini", enqueued_tokens=ROWS * 8)
        first = create(client, file_id)

        with pytest.raises(openai.BadRequestError) as refusal:
            create(client, file_id)
        assert simulator.release() == 1
        wait_for_status(client, first.id, "completed")
        second = create(client, file_id)

        assert refusal.value.code == "token_limit_exceeded"
        assert second.status == "validating"
        assert simulator.fired(rule) == 1


def test_enqueued_tokens_may_be_limited_later(simulator: Simulator, client: openai.OpenAI) -> None:
    """The batch is made and then fails with `token_limit_exceeded`, unbilled."""
    rule = fault(simulator, "token_limit", enqueued_tokens=10, mode="later")

    batch = ended(client)

    assert batch.status == "failed"
    assert batch.errors.data[0].code == "token_limit_exceeded"
    assert simulator.fired(rule) == 1


def test_new_batches_are_listed_late(simulator: Simulator, client: openai.OpenAI) -> None:
    """The listing lags while retrieve knows the batch."""
    batch = create(client)
    rule = fault(simulator, "hide_new_batches", seconds=60)

    listed = [one.id for one in client.batches.list(limit=100)]

    assert batch.id not in listed
    assert client.batches.retrieve(batch.id).id == batch.id
    assert simulator.fired(rule) == 1


def test_a_new_file_is_not_found_for_a_while(simulator: Simulator, client: openai.OpenAI) -> None:
    """Creation from a file that is younger is refused, from one that is older it is not."""
    file_id = upload(client)
    rule = fault(simulator, "file_not_found", seconds=3_600)

    with pytest.raises(openai.BadRequestError) as refusal:
        create(client, file_id)
    fired = simulator.fired(rule)
    simulator.clear_faults()
    time.sleep(0.1)
    passed = fault(simulator, "file_not_found", seconds=0.1)

    assert refusal.value.code == "file_not_found"
    assert create(client, file_id).status == "validating"
    assert (fired, simulator.fired(passed)) == (1, 0)


# --- batches


def test_an_expired_batch_has_partial_results(simulator: Simulator, client: openai.OpenAI) -> None:
    """A part is answered and billed; the rest are `batch_expired` lines of the error file."""
    rule = fault(simulator, "expire", fraction=0.25)

    batch = ended(client)

    unanswered = errors(client, batch)
    bill = simulator.bill()["by_batch"][-1]
    assert batch.status == "expired"
    assert len(output(client, batch).splitlines()) == bill["requests"] == ROWS // 4
    assert {one["error"]["code"] for one in unanswered} == {"batch_expired"}
    assert len(unanswered) == ROWS - ROWS // 4
    assert simulator.fired(rule) == 1


def test_a_batch_fails_at_chosen_lines(simulator: Simulator, client: openai.OpenAI) -> None:
    """`errors.data` names the lines; nothing is billed."""
    rule = fault(simulator, "fail_batch", code="invalid_request", lines=[2, 5], nth=1)

    batch = ended(client)

    assert [(one.code, one.line) for one in batch.errors.data] == [
        ("invalid_request", 2),
        ("invalid_request", 5),
    ]
    assert simulator.bill()["by_batch"][-1]["requests"] == 0
    assert simulator.fired(rule) == 1
    assert ended(client).status == "completed"


def test_a_stuck_batch_stays_and_can_be_cancelled(
    simulator: Simulator, client: openai.OpenAI
) -> None:
    """It makes no progress for ever; a cancellation ends it."""
    rule = fault(simulator, "stuck", status="in_progress")
    batch = create(client)
    wait_for_status(client, batch.id, "in_progress")
    time.sleep(0.3)

    stuck = client.batches.retrieve(batch.id)
    client.batches.cancel(batch.id)

    assert (stuck.status, stuck.request_counts.completed) == ("in_progress", 0)
    assert wait_for_status(client, batch.id, "cancelled").request_counts.completed == 0
    assert simulator.fired(rule) == 1


@pytest.mark.parametrize("status", ["validating", "in_progress", "finalizing"])
def test_a_stuck_batch_goes_on_when_it_is_released(
    simulator: Simulator, client: openai.OpenAI, status: str
) -> None:
    """Held as long as somebody needs it, and whole afterwards."""
    fault(simulator, "stuck", status=status)
    batch = create(client)
    wait_for_status(client, batch.id, status)

    released = simulator.release()

    assert released == 1
    assert wait_for_status(client, batch.id, "completed").request_counts.completed == ROWS
    assert simulator.release() == 0


def test_an_unknown_status_passes(simulator: Simulator, client: openai.OpenAI) -> None:
    """The batch shows a status of no documentation, and completes all the same."""
    rule = fault(simulator, "unknown_status", status="paused")
    fault(simulator, "stuck", status="in_progress")
    batch = create(client)

    wait_for_status(client, batch.id, "paused")
    simulator.release()

    assert wait_for_status(client, batch.id, "completed").request_counts.completed == ROWS
    assert simulator.fired(rule) >= 1


def test_ids_may_be_very_long(simulator: Simulator, client: openai.OpenAI) -> None:
    """Ids of 260 characters work everywhere."""
    rule = fault(simulator, "long_ids")

    batch = ended(client)

    assert len(batch.id) == len(batch.output_file_id) == 260
    assert len(output(client, batch).splitlines()) == ROWS
    assert simulator.fired(rule) == 1


def test_null_fields_may_be_missing_or_empty(simulator: Simulator, client: openai.OpenAI) -> None:
    """Null fields are left out; with the other rule null file ids are ""."""
    omit = fault(simulator, "omit_nulls", nth=1)
    empty = fault(simulator, "empty_ids", nth=2)

    first, second = ended(client), ended(client)

    assert "error_file_id" not in first.to_dict()
    assert second.error_file_id == ""
    assert simulator.fired(omit) >= 1
    assert simulator.fired(empty) >= 1


def test_request_counts_may_lie(simulator: Simulator, client: openai.OpenAI) -> None:
    """The counts are off by what the rule says, the files are whole."""
    rule = fault(simulator, "counts_lie", completed=-3, failed=3)

    batch = ended(client)

    assert batch.request_counts.to_dict() == {"total": ROWS, "completed": ROWS - 3, "failed": 3}
    assert len(output(client, batch).splitlines()) == ROWS
    assert simulator.fired(rule) >= 1


def test_a_batch_may_be_lost(simulator: Simulator, client: openai.OpenAI) -> None:
    """After a while it answers 404 and is listed no more."""
    rule = fault(simulator, "batch_lost", seconds=0.3)
    batch = create(client)
    time.sleep(0.4)

    with pytest.raises(openai.NotFoundError):
        client.batches.retrieve(batch.id)

    assert batch.id not in [one.id for one in client.batches.list(limit=100)]
    assert simulator.fired(rule) >= 1


def test_the_output_may_be_lost(simulator: Simulator, client: openai.OpenAI) -> None:
    """Completed with no output file, or with one of zero bytes; paid all the same."""
    null = fault(simulator, "output_lost", mode="null", nth=1)
    empty = fault(simulator, "output_lost", mode="empty", nth=2)

    first, second = ended(client), ended(client)

    assert (first.status, first.output_file_id) == ("completed", None)
    assert output(client, second) == b""
    assert [one["requests"] for one in simulator.bill()["by_batch"][-2:]] == [ROWS, ROWS]
    assert (simulator.fired(null), simulator.fired(empty)) == (1, 1)


def test_result_files_may_have_odd_ends(simulator: Simulator, client: openai.OpenAI) -> None:
    """BOM, CRLF and a missing last newline, as asked."""
    rule = fault(simulator, "file_shape", bom=True, crlf=True, no_final_newline=True)

    content = output(client, ended(client))

    assert content.startswith(b"\xef\xbb\xbf{")
    assert content.count(b"\r\n") == content.count(b"\n") == ROWS - 1
    assert content.endswith(b"}")
    assert simulator.fired(rule) == 1


def test_batch_rules_follow_the_metadata(simulator: Simulator, client: openai.OpenAI) -> None:
    """A rule with metadata is about batches that carry it."""
    fault(simulator, "fail_batch", metadata={"round": "1"})

    assert ended(client, metadata={"round": "2"}).status == "completed"
    assert ended(client, metadata={"round": "1"}).status == "failed"


# --- lines


@pytest.mark.parametrize(("status", "kind"), [(429, "rate_limit_error"), (500, "server_error")])
def test_error_lines_look_as_the_api_writes_them(
    simulator: Simulator, client: openai.OpenAI, status: int, kind: str
) -> None:
    """The error is inside the body, `error` at the top is null, and nothing is billed for it."""
    rule = fault(simulator, "line_error", status=status, custom_ids=["row-1", "row-7"])

    batch = ended(client)

    failed = errors(client, batch)
    assert {one["custom_id"] for one in failed} == {"row-1", "row-7"}
    assert {one["response"]["status_code"] for one in failed} == {status}
    assert {one["response"]["body"]["error"]["type"] for one in failed} == {kind}
    assert {one["error"] for one in failed} == {None}
    assert batch.request_counts.to_dict() == {"total": ROWS, "completed": ROWS - 2, "failed": 2}
    assert (
        simulator.bill()["by_batch"][-1].items() >= {"requests": ROWS - 2, "error_lines": 2}.items()
    )
    assert simulator.fired(rule) == 2


def test_when_every_line_fails_there_is_no_output_file(
    simulator: Simulator, client: openai.OpenAI
) -> None:
    """Completed with `output_file_id` null, as the real API does."""
    fault(simulator, "line_error", status=400)

    batch = ended(client)

    assert (batch.status, batch.output_file_id) == ("completed", None)
    assert len(errors(client, batch)) == ROWS


def test_a_second_batch_mends_first_time_errors(
    simulator: Simulator, client: openai.OpenAI
) -> None:
    """With `first_times` the same rows fail once and succeed when sent again."""
    rule = fault(simulator, "line_error", fraction=0.3, first_times=1, seed=5)
    file_id = upload(client)

    first, second = ended(client, file_id=file_id), ended(client, file_id=file_id)

    assert 0 < first.request_counts.failed < ROWS
    assert second.request_counts.failed == 0
    assert simulator.fired(rule) == first.request_counts.failed


def test_chosen_lines_depend_on_id_and_seed_alone(
    simulator: Simulator, client: openai.OpenAI
) -> None:
    """The same rows fail in every batch; another seed chooses other rows."""
    fault(simulator, "line_error", fraction=0.4, times=2)
    first, second = ({one["custom_id"] for one in errors(client, ended(client))} for _ in "ab")
    fault(simulator, "line_error", fraction=0.4, seed=9)

    third = {one["custom_id"] for one in errors(client, ended(client))}

    assert first == second != third


def test_a_share_of_the_batches_depends_on_their_metadata(
    simulator: Simulator, client: openai.OpenAI
) -> None:
    """The same ones are hit, in whichever order they are created."""
    rule = fault(simulator, "fail_batch", share=0.5)

    def failed(names: str) -> set[str]:
        found = {name: ended(client, metadata={"name": name}) for name in names}
        return {name for name, batch in found.items() if batch.status == "failed"}

    first = failed("abcdef")

    assert 0 < len(first) < 6
    assert failed("fedcba") == first
    assert simulator.fired(rule) == 2 * len(first)


def test_what_an_expired_batch_has_answered_depends_on_its_metadata(
    simulator: Simulator, client: openai.OpenAI
) -> None:
    """The same requests come first, whichever batch was created before."""
    fault(simulator, "expire", fraction=0.5)

    def answered(name: str) -> frozenset[str]:
        batch = ended(client, metadata={"name": name})
        return frozenset(json.loads(one)["custom_id"] for one in output(client, batch).splitlines())

    first = answered("a")

    assert len({answered(name) for name in "bcd"} | {first}) > 1
    assert answered("a") == first


@pytest.mark.parametrize(
    ("kind", "status", "part"),
    [
        ("cut_off", "incomplete", "output_text"),
        ("refusal", "completed", "refusal"),
        ("content_filter", "incomplete", None),
        ("schema_invalid", "completed", "output_text"),
    ],
)
def test_answers_may_end_badly(
    simulator: Simulator, client: openai.OpenAI, kind: str, status: str, part: str | None
) -> None:
    """Cut off, refused, filtered or against the schema: status 200, and billed."""
    rule = fault(simulator, kind, custom_ids=["row-0"])

    lines = [json.loads(line) for line in output(client, ended(client)).splitlines()]

    body = next(line["response"]["body"] for line in lines if line["custom_id"] == "row-0")
    parts = [one["type"] for item in body["output"] for one in item.get("content", [])]
    assert (body["status"], parts) == (status, [part] if part else [])
    assert simulator.bill()["by_batch"][-1]["requests"] == ROWS
    assert simulator.fired(rule) == 1


def damaged_output(
    simulator: Simulator, client: openai.OpenAI, kind: str, **keys: Any
) -> list[bytes]:
    """The output lines of a batch whose row-0 is damaged; checks that it was billed once."""
    rule = fault(simulator, kind, custom_ids=["row-0"], **keys)
    batch = ended(client)
    content = output(client, batch)
    billed = Counter(
        one["custom_id"] for one in simulator.bill_lines() if one["batch_id"] == batch.id
    )

    assert simulator.fired(rule) == 1
    assert len(billed) == ROWS
    assert set(billed.values()) == {1}
    return content.removesuffix(b"\n").split(b"\n")


def ids(lines: list[bytes]) -> Counter[str]:
    """How often each custom_id is met."""
    return Counter(json.loads(line)["custom_id"] for line in lines)


def test_a_line_may_be_missing(simulator: Simulator, client: openai.OpenAI) -> None:
    """`drop_line`: billed, and in no file."""
    assert "row-0" not in ids(damaged_output(simulator, client, "drop_line"))


def test_a_line_may_come_twice(simulator: Simulator, client: openai.OpenAI) -> None:
    """`duplicate_line`: two lines, one payment."""
    assert ids(damaged_output(simulator, client, "duplicate_line"))["row-0"] == 2


def test_a_line_may_be_foreign(simulator: Simulator, client: openai.OpenAI) -> None:
    """`foreign_line`: one more line with an id that nobody sent."""
    found = ids(damaged_output(simulator, client, "foreign_line"))

    assert len(found) == ROWS + 1
    assert sum(name.startswith("foreign-") for name in found) == 1


def test_a_line_may_be_torn(simulator: Simulator, client: openai.OpenAI) -> None:
    """`torn_line`: one line is no JSON."""
    lines = damaged_output(simulator, client, "torn_line")

    assert sum(not line.endswith(b"}") for line in lines) == 1
    assert len(lines) == ROWS


def test_a_body_may_be_a_string(simulator: Simulator, client: openai.OpenAI) -> None:
    """`body_as_string`: the body is JSON inside a JSON string."""
    lines = [json.loads(line) for line in damaged_output(simulator, client, "body_as_string")]

    body = next(one["response"]["body"] for one in lines if one["custom_id"] == "row-0")
    assert json.loads(body)["object"] == "response"


@pytest.mark.parametrize(
    ("kind", "trace"),
    [
        ("line_separator", "\u2028".encode()),
        ("nan", b":NaN"),
        ("nul", b"\\u0000"),
        ("lone_surrogate", b"\\ud83d"),
    ],
)
def test_lines_may_carry_odd_characters(
    simulator: Simulator, client: openai.OpenAI, kind: str, trace: bytes
) -> None:
    """Raw U+2028, bare NaN, escaped NUL or half a surrogate pair in exactly one line."""
    lines = damaged_output(simulator, client, kind)

    assert sum(trace in line for line in lines) == 1
    assert len(lines) == ROWS


def test_a_line_may_be_huge(simulator: Simulator, client: openai.OpenAI) -> None:
    """`long_line`: one line of so many bytes and more."""
    lines = damaged_output(simulator, client, "long_line", size=3_000_000)

    assert sum(len(line) > 3_000_000 for line in lines) == 1


def test_a_success_may_be_in_the_error_file(simulator: Simulator, client: openai.OpenAI) -> None:
    """`in_error_file`: status 200 where only failures are expected."""
    fault(simulator, "in_error_file", custom_ids=["row-0"])

    batch = ended(client)

    assert [one["response"]["status_code"] for one in errors(client, batch)] == [200]
    assert "row-0" not in ids(output(client, batch).splitlines())
