"""The routes under /v1/batches."""

from __future__ import annotations

import secrets
import threading
import time
from typing import Any

import orjson
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from include.simulator.api_error import ApiError
from include.simulator.batch_runner import BatchRunner, limit_message
from include.simulator.dialects import Dialect
from include.simulator.fault_book import FaultBook, trait, traits_text
from include.simulator.faults import (
    BatchLost,
    CountsLie,
    EmptyIds,
    Expire,
    Fault,
    FileNotFound,
    HideNewBatches,
    LongIds,
    OmitNulls,
    RateLimit,
    TokenLimit,
    UnknownStatus,
)
from include.simulator.files_api import expiry_seconds, page, page_size
from include.simulator.records import FINAL, BatchRecord, FileRecord
from include.simulator.request_check import ENDPOINTS, check_requests, first_model
from include.simulator.settings import Settings
from include.simulator.store import Store, long_id

PAIRS, KEY_LENGTH, VALUE_LENGTH = 16, 64, 512
INSTANT_WAIT = 10.0  # seconds: a small batch has ended long before, on a busy machine too


class BatchesApi:
    """Batches of one store, over HTTP."""

    def __init__(
        self, settings: Settings, store: Store, faults: FaultBook, runner: BatchRunner
    ) -> None:
        self._settings = settings
        self._store = store
        self._faults = faults
        self._runner = runner
        self._creating = threading.Lock()

    def routes(self) -> list[Route]:
        """The published paths."""
        return [
            Route("/v1/batches", self.create, methods=["POST"]),
            Route("/v1/batches", self.browse, methods=["GET"]),
            Route("/v1/batches/{batch_id}", self.retrieve, methods=["GET"]),
            Route("/v1/batches/{batch_id}/cancel", self.cancel, methods=["POST"]),
        ]

    async def create(self, request: Request) -> Response:
        """Create a batch; what is wrong inside its input file shows later, as status failed."""
        wanted = _parsed(await request.body())
        return await run_in_threadpool(self._create, wanted)

    def browse(self, request: Request) -> Response:
        """List batches, newest first."""
        if self._settings.dialect.page is not None:
            return self._whole_list(request, self._settings.dialect.page)
        limit = page_size(request, 20, 100)
        after = request.query_params.get("after")
        below = self._find(after).no if after else None
        shown: list[dict[str, Any]] = []
        hidden = self._hidden_after()
        while len(shown) <= limit:
            found = self._store.batches(below=below, limit=limit + 1)
            shown += [self._view(b) for b in found if b.created_at <= hidden and not self._lost(b)]
            if len(found) <= limit:
                break
            below = found[-1].no
        return JSONResponse(page(shown, limit))

    def _whole_list(self, request: Request, size: int) -> Response:
        """List batches as servers do that have no limit, no end mark and an order of their own."""
        hidden = self._hidden_after()
        found = [b for b in self._store.batches() if b.created_at <= hidden and not self._lost(b)]
        if self._settings.dialect.oldest_first:
            found.reverse()
        after = request.query_params.get("after")
        ids = [batch.id for batch in found]
        start = ids.index(after) + 1 if after in ids else 0
        return JSONResponse({"data": [self._view(b) for b in found[start : start + size]]})

    def retrieve(self, request: Request) -> Response:
        """Describe one batch."""
        return JSONResponse(self._view(self._find(request.path_params["batch_id"])))

    def cancel(self, request: Request) -> Response:
        """Cancel a batch that has not ended; what is answered by now is kept and paid."""
        batch = self._find(request.path_params["batch_id"])
        if batch.status in FINAL:
            raise ApiError(409, f"Cannot cancel a batch with status '{batch.status}'.")
        if batch.status != "cancelling":
            self._runner.cancel(batch)
        return JSONResponse(self._view(self._store.batch_no(batch.no)))

    def _create(self, wanted: dict[str, Any]) -> Response:
        columns = _columns(wanted, self._settings.dialect)
        with self._creating:
            self._check_rate()
            file = self._input_file(columns["input_file_id"])
            metadata = wanted.get("metadata") or {}
            traits = self._faults.for_batch(metadata, columns["endpoint"])
            traits += self._token_limit(file, columns["endpoint"])
            batch = self._add(columns, traits)
        if self._settings.timing.instant:
            self._runner.wait_for(batch.no, INSTANT_WAIT)
        else:
            self._runner.wake()
        return JSONResponse(self._view(self._store.batch_no(batch.no)))

    def _add(self, columns: dict[str, Any], traits: list[Fault]) -> BatchRecord:
        identity = "batch_" + secrets.token_hex(16)
        if self._settings.dialect.long_ids:
            identity = long_id("batch_")
        for rule in traits:
            if isinstance(rule, LongIds):
                self._faults.fired(rule.id)
                identity = long_id("batch_")
        file = self._store.file(columns["input_file_id"])
        return self._store.add_batch(
            **columns,
            **self._runner.first_status(traits),
            id=identity,
            created_at=time.time(),
            traits=traits_text(traits),
            model=file.model if file else None,
            enqueued_tokens=(file.input_tokens or 0) if file else 0,
        )

    def _input_file(self, identity: str) -> FileRecord | None:
        """The input file; an unknown one makes a batch that fails, as it does at the API."""
        file = self._store.file(identity)
        if file is None:
            return None
        for rule in self._faults.of(FileNotFound):
            if time.time() - file.created_at < rule.seconds and self._faults.strikes(rule):
                message = f"Cannot find file {identity}, or you do not have access to it."
                raise ApiError(400, message, code="file_not_found", param="input_file_id")
        if file.purpose != "batch":
            raise ApiError(400, "The input file has to have the purpose 'batch'.")
        return file

    def _check_rate(self) -> None:
        for rule in self._faults.of(RateLimit):
            since = time.time() - rule.per_seconds
            recent = self._store.batches_since(since)
            if len(recent) >= rule.creates and self._faults.strikes(rule):
                wait = max(0.0, recent[0] - since) if recent else rule.per_seconds
                raise ApiError(
                    429,
                    "Rate limit reached for batch creations.",
                    code="rate_limit_exceeded",
                    kind="requests",
                    retry_after=round(wait, 2),
                )

    def _token_limit(self, file: FileRecord | None, endpoint: str) -> list[Fault]:
        rules = self._faults.of(TokenLimit)
        if not rules or file is None:
            return []
        path = self._store.content(file)
        model = first_model(path)
        tokens = file.input_tokens
        if tokens is None:
            tokens = check_requests(path, endpoint, self._settings).input_tokens
            self._store.remember_size(file, tokens=tokens, model=model)
        for rule in rules:
            over = self._store.enqueued(model) + tokens > rule.enqueued_tokens
            if rule.model in (None, model) and over and self._faults.strikes(rule):
                if rule.mode == "later":
                    return [rule]
                raise ApiError(400, limit_message(rule, model), code="token_limit_exceeded")
        return []

    def _find(self, identity: str) -> BatchRecord:
        batch = self._store.batch(identity)
        if batch is None or self._lost(batch):
            raise ApiError(404, f"No batch found with id '{identity}'.", param="batch_id")
        return batch

    def _lost(self, batch: BatchRecord) -> bool:
        rule = trait(batch, BatchLost)
        if rule is None or time.time() - batch.created_at < rule.seconds:
            return False
        self._faults.fired(rule.id)
        return True

    def _hidden_after(self) -> float:
        """Batches created after this moment are not listed yet."""
        moment = now = time.time()
        for rule in self._faults.of(HideNewBatches):
            if self._store.batches_since(now - rule.seconds) and self._faults.strikes(rule):
                moment = min(moment, now - rule.seconds)
        return moment

    def _view(self, batch: BatchRecord) -> dict[str, Any]:
        view = batch.view(time.time(), self._runner.seconds_of_work(batch))
        if len(batch.traits) > 2:
            self._distort(batch, view)
        return self._settings.dialect.shown(view)

    def _distort(self, batch: BatchRecord, view: dict[str, Any]) -> None:
        lie = trait(batch, CountsLie)
        if lie is not None and batch.answered:
            self._faults.fired(lie.id)
            for name in ("completed", "failed", "total"):
                view["request_counts"][name] += getattr(lie, name)
        expire = trait(batch, Expire)
        if expire is not None and not batch.answered:
            counts = view["request_counts"]
            counts["completed"] = min(counts["completed"], int(batch.total * expire.fraction))
        unknown = trait(batch, UnknownStatus)
        if unknown is not None and batch.status == "in_progress":
            self._faults.fired(unknown.id)
            view["status"] = unknown.status
        empty = trait(batch, EmptyIds)
        if empty is not None:
            self._faults.fired(empty.id)
            for name in ("output_file_id", "error_file_id"):
                view[name] = view[name] or ""
        omit = trait(batch, OmitNulls)
        if omit is not None:
            self._faults.fired(omit.id)
            for name in [name for name, value in view.items() if value is None]:
                del view[name]


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        wanted = orjson.loads(raw)
    except ValueError:
        wanted = None
    if not isinstance(wanted, dict):
        raise ApiError(400, "We could not parse the JSON body of your request.")
    return wanted


def _columns(wanted: dict[str, Any], dialect: Dialect) -> dict[str, Any]:
    for name in ("input_file_id", "endpoint", "completion_window"):
        if not isinstance(wanted.get(name), str):
            message = f"Missing required parameter: '{name}'."
            raise ApiError(400, message, code="missing_required_parameter", param=name)
    endpoint = dialect.endpoint(wanted["endpoint"])
    if endpoint not in ENDPOINTS:
        raise _invalid("endpoint", f"one of {', '.join(sorted(ENDPOINTS))}")
    if wanted["completion_window"] != "24h":
        raise _invalid("completion_window", "'24h'")
    _check_metadata(wanted.get("metadata"))
    policy = wanted.get("output_expires_after")
    if policy and not dialect.takes_expiry:
        raise ApiError(422, "Extra inputs are not permitted: output_expires_after")
    return {
        "input_file_id": wanted["input_file_id"],
        "endpoint": endpoint,
        "completion_window": "24h",
        "metadata": orjson.dumps(wanted["metadata"]).decode() if wanted.get("metadata") else None,
        "output_seconds": _lifetime(policy, dialect) if policy else None,
    }


def _lifetime(policy: Any, dialect: Dialect) -> int:
    return expiry_seconds(policy, "output_expires_after", dialect.shortest_expiry)


def _invalid(name: str, expected: str) -> ApiError:
    message = f"Invalid value for '{name}'. Expected {expected}."
    return ApiError(400, message, code="invalid_value", param=name)


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or len(metadata) > PAIRS:
        raise _invalid("metadata", f"an object with at most {PAIRS} pairs")
    for key, value in metadata.items():
        if len(key) > KEY_LENGTH or not isinstance(value, str) or len(value) > VALUE_LENGTH:
            expected = f"keys up to {KEY_LENGTH} and text values up to {VALUE_LENGTH} characters"
            raise _invalid("metadata", expected)
