from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import openai

from include.simulator.process import Simulator

STORED = {
    "conn_id": "openai_default",
    "batch_id": "batch_1",
    "deadline": "2026-11-02T00:00:00+00:00",
}


def test_a_trigger_stored_by_an_earlier_release_still_loads(airflow_home: Path) -> None:
    """Every argument that is not one of the three ids and times has a default."""
    from llm_batch.triggers import BatchTrigger

    path, arguments = BatchTrigger(**STORED).serialize()

    assert path == "llm_batch.triggers.BatchTrigger"
    assert arguments.items() >= STORED.items()
    assert BatchTrigger(**arguments).serialize() == (path, arguments)


async def test_the_deadline_ends_the_wait_whatever_the_polls_say(
    airflow_home: Path, service: Simulator, tmp_path: Path
) -> None:
    """A batch that never ends, and polls that fail: at the deadline there is one event."""
    from llm_batch.triggers import BatchTrigger

    service.add_faults({"fault": "stuck"})
    (polls,) = service.add_faults(
        {"fault": "fail_before", "method": "GET", "path": "/batches/", "status": 500, "every": 2}
    )
    file = tmp_path / "requests.jsonl"
    file.write_text(
        '{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", '
        '"body": {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "x"}]}}\n'
    )
    client = openai.OpenAI(api_key="sk-test", base_url=service.base_url)
    with file.open("rb") as stream:
        uploaded = client.files.create(file=stream, purpose="batch")
    batch = client.batches.create(
        input_file_id=uploaded.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    trigger = BatchTrigger(
        conn_id="openai_default",
        batch_id=batch.id,
        deadline=(datetime.now(UTC) + timedelta(seconds=2)).isoformat(),
        poll_interval=0.2,
        first_poll=0.0,
    )

    events = [event async for event in trigger.run()]

    assert [event.payload for event in events] == [{"batch_id": batch.id, "status": "deadline"}]
    assert service.fired(polls["id"]) > 0
