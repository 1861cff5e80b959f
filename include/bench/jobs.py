"""The jobs that the bench runs, in the shape that its input has."""

from __future__ import annotations

from typing import Any

from include.job_spec import JobSpec

ENDPOINT_CHAT = "/v1/chat/completions"
SCHEMA = {
    "type": "object",
    "properties": {
        "category": {
            "type": "string",
            "enum": ["billing", "bug", "feature", "account", "shipping", "other"],
        },
        "priority": {"type": "integer", "minimum": 1, "maximum": 5},
        "confidence": {"type": "number"},
        "urgent": {"type": "boolean"},
        "summary": {"type": "string"},
    },
    "required": ["category", "priority", "confidence", "urgent", "summary"],
    "additionalProperties": False,
}
SYSTEM = (
    "You sort support tickets of a web shop. Read the ticket, choose the category that fits best, "
    "say how urgent it is from 1 (can wait) to 5 (drop everything), how sure you are, and sum it "
    "up in one sentence in English, whatever its language. Never repeat names or numbers."
)


def chat_job(rows_per_batch: int = 50_000) -> JobSpec:
    """Return a job with a schema: a request line is about 1.4 KB with 400 bytes of row text."""
    request = {
        "endpoint": ENDPOINT_CHAT,
        "model": "gpt-4o-mini",
        "prompt": f"{SYSTEM}\n---\nTicket: {{{{ body }}}}",
        "output_schema": SCHEMA,
        "params": {"temperature": 0, "max_completion_tokens": 300},
    }
    return _job(request, rows_per_batch)


def embedding_job(rows_per_batch: int = 50_000) -> JobSpec:
    """Return a job for vectors."""
    request = {
        "endpoint": "/v1/embeddings",
        "model": "text-embedding-3-small",
        "prompt": "{{ body }}",
    }
    return _job(request, rows_per_batch)


def _job(request: dict[str, Any], rows_per_batch: int) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "bench",
            "source": {"conn_id": "bench", "sql": "SELECT 1", "key": ["ticket_id"]},
            "request": request,
            "target": {"conn_id": "bench", "table": "bench_results"},
            "limits": {"requests_per_batch": rows_per_batch},
        }
    )
