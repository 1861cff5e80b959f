"""A key that is refused while batches are waited for: whoever corrects it need not clear a task."""

from __future__ import annotations

import asyncio
from pathlib import Path

import openai
import pytest

from include.batch_api import AsyncBatchApi
from include.batch_view import BatchView
from include.batch_watch import BatchWatch
from include.errors import ConfigurationError, LLMBatchError
from include.simulator.process import Simulator

LINE = (
    b'{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":{"model":"gpt-4o-mini",'
    b'"messages":[{"role":"user","content":"hello"}]}}\n'
)
INTERVAL = 0.05  # seconds


def submitted(simulator: Simulator, folder: Path) -> str:
    """The id of a batch at the API."""
    path = folder / "requests.jsonl"
    path.write_bytes(LINE)
    with openai.OpenAI(api_key="sk-good", base_url=simulator.base_url) as client:
        file = client.files.create(file=path, purpose="batch")
        return client.batches.create(
            input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
        ).id


@pytest.mark.parametrize("batches", [1, 3])
async def test_a_corrected_key_is_used_by_the_next_poll(
    simulator: Simulator, tmp_path: Path, batches: int
) -> None:
    """Read one by one or listed: after a 401 the connection is read again."""
    keys = ["wrong-key"]

    async def connect() -> AsyncBatchApi:
        client = openai.AsyncOpenAI(api_key=keys[-1], base_url=simulator.base_url)
        return AsyncBatchApi(client)

    watch = BatchWatch(connect)

    async def final_status(batch_id: str) -> tuple[LLMBatchError, str]:
        refusals: list[LLMBatchError] = []
        async for news in watch.follow(batch_id, interval=INTERVAL):
            if isinstance(news, BatchView):
                if news.is_final:
                    return refusals[0], news.status
                continue
            refusals.append(news)
            keys.append("sk-good")
        raise AssertionError("a watch never ends by itself")

    ids = [submitted(simulator, tmp_path) for _ in range(batches)]
    found = await asyncio.wait_for(asyncio.gather(*map(final_status, ids)), 120)

    for refusal, status in found:
        assert isinstance(refusal, ConfigurationError)
        assert "HTTP 401" in str(refusal)
        assert status == "completed"
