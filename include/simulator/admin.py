"""The routes under /_sim: the books and the fault script.

GET /_sim/bill · GET /_sim/bill/lines[?batch_id=] (NDJSON) · GET /_sim/batches ·
GET /_sim/requests (the last calls) · GET, POST, DELETE /_sim/faults ·
POST /_sim/release (the batches that `stuck` holds go on) ·
GET /_sim/faults/kinds (what there is, with the keys of each) · GET /_sim/health
"""

from __future__ import annotations

from collections.abc import Mapping

import orjson
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from include.simulator.api_error import ApiError
from include.simulator.bill import Bill
from include.simulator.fault_book import FaultBook
from include.simulator.faults import RULES
from include.simulator.journal import Journal
from include.simulator.records import BatchRecord
from include.simulator.store import Store


class Admin:
    """What tests and people ask the simulator about itself."""

    def __init__(
        self, store: Store, faults: FaultBook, deployments: Mapping[str, str] | None = None
    ) -> None:
        self.journal: Journal | None = None
        self._store = store
        self._faults = faults
        self._bill = Bill(store, deployments or {})

    def routes(self) -> list[Route]:
        """All paths under /_sim."""
        return [
            Route("/_sim/health", lambda _request: Response("ok")),
            Route("/_sim/bill", self.bill),
            Route("/_sim/bill/lines", self.bill_lines),
            Route("/_sim/batches", self.batches),
            Route("/_sim/requests", self.requests),
            Route("/_sim/faults", self.show_faults, methods=["GET"]),
            Route("/_sim/faults/kinds", self.fault_kinds, methods=["GET"]),
            Route("/_sim/faults", self.add_faults, methods=["POST"]),
            Route("/_sim/faults", self.clear_faults, methods=["DELETE"]),
            Route("/_sim/release", self.release, methods=["POST"]),
        ]

    def bill(self, _request: Request) -> Response:
        """Totals and bill by batch."""
        return JSONResponse(self._bill.total())

    def bill_lines(self, request: Request) -> Response:
        """Every (batch, custom_id) as one line of NDJSON."""
        lines = self._bill.lines(request.query_params.get("batch_id"))
        return StreamingResponse(lines, media_type="application/x-ndjson")

    def batches(self, _request: Request) -> Response:
        """All batches, oldest first, and how often each call came in."""
        calls = self.journal.counts() if self.journal else {}
        body = {
            "creates": calls.get("POST /v1/batches", 0),
            "uploads": calls.get("POST /v1/files", 0),
            "lists": calls.get("GET /v1/batches", 0),
            "retrieves": calls.get("GET /v1/batches/{id}", 0),
            "calls": calls,
            "batches": [_inside(batch) for batch in reversed(self._store.batches())],
        }
        return JSONResponse(body)

    def requests(self, _request: Request) -> Response:
        """The last calls."""
        return JSONResponse(self.journal.calls() if self.journal else [])

    def show_faults(self, _request: Request) -> Response:
        """All rules with how often they fired."""
        return JSONResponse(self._faults.show())

    def fault_kinds(self, _request: Request) -> Response:
        """The JSON Schema of a fault script, each rule with its description."""
        return JSONResponse(RULES.json_schema())

    async def add_faults(self, request: Request) -> Response:
        """Add a rule or a JSON list of them, all or none."""
        try:
            rules = orjson.loads(await request.body())
            return JSONResponse(self._faults.add([rules] if isinstance(rules, dict) else rules))
        except ValidationError as error:
            raise ApiError(422, wrong_rules(error), code="unknown_fault") from error
        except ValueError as error:
            raise ApiError(422, f"The fault script is no JSON: {error}") from error

    def clear_faults(self, _request: Request) -> Response:
        """Forget all rules."""
        self._faults.clear()
        return JSONResponse([])

    def release(self, _request: Request) -> Response:
        """Let the batches go on that a fault holds, and say how many there were."""
        return JSONResponse(self._faults.release())


def wrong_rules(error: ValidationError) -> str:
    """What is wrong with a fault script, one clause for each mistake."""
    return "; ".join(
        f"rule {'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()
    )


def _inside(batch: BatchRecord) -> dict[str, object]:
    return {
        "id": batch.id,
        "status": batch.status,
        "created_at": batch.created_at,
        "endpoint": batch.endpoint,
        "model": batch.model,
        "input_file_id": batch.input_file_id,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "metadata": batch.tags,
        "total": batch.total,
        "completed": batch.completed,
        "failed": batch.failed,
        "cancelling_at": batch.cancelling_at,
    }
