"""A tiny Batch API that only lists and reads batches, all of them in progress for ever."""

from __future__ import annotations

import socket
import sys
from collections import Counter
from typing import Any

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

CREATED = 1_764_000_000


class Batches:
    """`count` batches, newest first, and how often which call came."""

    def __init__(self, count: int) -> None:
        self._ids = [f"batch_{number:06d}" for number in range(count)]
        self._places = {name: place for place, name in enumerate(self._ids)}
        self._bodies = [msgspec.json.encode(_batch(name)) for name in self._ids]
        self._calls: Counter[str] = Counter()

    def app(self) -> Starlette:
        """Return the application."""
        return Starlette(
            routes=[
                Route("/v1/batches", self._listed),
                Route("/v1/batches/{name}", self._read),
                Route("/calls", self._counted),
            ]
        )

    async def _listed(self, request: Request) -> Response:
        self._calls["list"] += 1
        start = self._places.get(request.query_params.get("after", ""), -1) + 1
        end = start + int(request.query_params.get("limit", 20))
        more = b"true" if end < len(self._ids) else b"false"
        body = b'{"object":"list","data":[%b],"has_more":%b}'
        return _json(body % (b",".join(self._bodies[start:end]), more))

    async def _read(self, request: Request) -> Response:
        self._calls["read"] += 1
        return _json(self._bodies[self._places[request.path_params["name"]]])

    async def _counted(self, _request: Request) -> Response:
        return _json(msgspec.json.encode(dict(self._calls)))


def _batch(name: str) -> dict[str, Any]:
    """Return a batch with every field that the API has."""
    return {
        "id": name,
        "object": "batch",
        "endpoint": "/v1/chat/completions",
        "model": "gpt-4o-mini-2024-07-18",
        "errors": None,
        "input_file_id": f"file-{name}",
        "completion_window": "24h",
        "status": "in_progress",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": CREATED,
        "in_progress_at": CREATED + 9,
        "expires_at": CREATED + 86_400,
        "finalizing_at": None,
        "completed_at": None,
        "failed_at": None,
        "expired_at": None,
        "cancelling_at": None,
        "cancelled_at": None,
        "request_counts": {"total": 50_000, "completed": 20_000, "failed": 12},
        "usage": None,
        "metadata": {"submission_id": name * 2, "job": "bench"},
    }


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


def main() -> None:
    """Serve on a free port, which the first line of output names, until stdin closes."""
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(Batches(int(sys.argv[1])).app(), log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main()
