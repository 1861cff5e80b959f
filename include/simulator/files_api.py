"""The routes under /v1/files."""

from __future__ import annotations

from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from include.simulator.api_error import ApiError
from include.simulator.dialects import Dialect
from include.simulator.records import FileRecord
from include.simulator.settings import Settings
from include.simulator.store import INPUT_LIFETIME, Store
from include.simulator.upload import Upload

PURPOSES = frozenset({"assistants", "batch", "fine-tune", "vision", "user_data", "evals"})
SHORTEST, LONGEST = 3600, 2_592_000


class FilesApi:
    """Files of one store, over HTTP."""

    def __init__(self, settings: Settings, store: Store) -> None:
        self._settings = settings
        self._store = store

    def routes(self) -> list[Route]:
        """The published paths."""
        return [
            Route("/v1/files", self.create, methods=["POST"]),
            Route("/v1/files", self.browse, methods=["GET"]),
            Route("/v1/files/{file_id}", self.retrieve, methods=["GET"]),
            Route("/v1/files/{file_id}", self.delete, methods=["DELETE"]),
            Route("/v1/files/{file_id}/content", self.content, methods=["GET"]),
        ]

    async def create(self, request: Request) -> Response:
        """Upload a file; the bytes go to the disk as they come."""
        path = self._store.scratch()
        try:
            with path.open("wb", buffering=1 << 20) as target:
                upload = Upload(target, self._settings.limits.bytes_per_file)
                await upload.receive(request)
            lifetime = _lifetime(upload, self._settings.dialect)
            record = await run_in_threadpool(
                self._store.add_file,
                path,
                filename=upload.filename or "file",
                purpose=upload.fields["purpose"],
                lifetime=lifetime,
                long=self._settings.dialect.long_ids,
            )
        finally:
            path.unlink(missing_ok=True)
        return JSONResponse(record.view())

    def browse(self, request: Request) -> Response:
        """List files, newest first."""
        limit = page_size(request, 10_000, 10_000)
        after, purpose = request.query_params.get("after"), request.query_params.get("purpose")
        files = [file for file in self._store.files() if purpose in (None, file.purpose)]
        if request.query_params.get("order") == "asc":
            files.reverse()
        if after is not None:
            ids = [file.id for file in files]
            files = files[ids.index(after) + 1 :] if after in ids else []
        return JSONResponse(page([file.view() for file in files[: limit + 1]], limit))

    def retrieve(self, request: Request) -> Response:
        """Describe one file."""
        return JSONResponse(self._file(request).view())

    def delete(self, request: Request) -> Response:
        """Delete one file."""
        file = self._file(request)
        self._store.delete_file(file)
        return JSONResponse({"id": file.id, "object": "file", "deleted": True})

    def content(self, request: Request) -> Response:
        """Stream one file, or the range of it that was asked for."""
        file = self._file(request)
        return FileResponse(self._store.content(file), media_type="application/octet-stream")

    def _file(self, request: Request) -> FileRecord:
        identity = request.path_params["file_id"]
        file = self._store.file(identity)
        if file is None:
            raise ApiError(404, f"No such File object: {identity}", param="id")
        return file


def page_size(request: Request, usual: int, most: int) -> int:
    """The query parameter `limit`; raises `ApiError` when it is no number in range."""
    text = request.query_params.get("limit", str(usual))
    if not text.isdecimal() or not 1 <= int(text) <= most:
        message = f"Invalid 'limit': expected an integer from 1 to {most}."
        raise ApiError(400, message, code="invalid_value", param="limit")
    return int(text)


def page(items: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """A list answer from up to `limit` + 1 objects."""
    shown = items[:limit]
    ends = {"first_id": shown[0]["id"], "last_id": shown[-1]["id"]} if shown else {}
    return {"object": "list", "data": shown, **ends, "has_more": len(items) > limit}


def _lifetime(upload: Upload, dialect: Dialect) -> int | None:
    purpose = upload.fields.get("purpose")
    if upload.filename is None:
        raise ApiError(400, "'file' is a required property", param="file")
    if purpose not in PURPOSES:
        raise ApiError(400, f"Invalid purpose: {purpose!r}.", param="purpose")
    seconds = upload.fields.get("expires_after[seconds]")
    anchor = upload.fields.get("expires_after[anchor]")
    if seconds is None and anchor is None:
        return INPUT_LIFETIME if purpose == "batch" else None
    if not dialect.takes_expiry:
        raise ApiError(422, "Extra inputs are not permitted: expires_after")
    policy = {"anchor": anchor, "seconds": seconds}
    return expiry_seconds(policy, "expires_after", dialect.shortest_expiry)


def expiry_seconds(value: Any, name: str, shortest: int = SHORTEST) -> int:
    """The seconds of an expiry policy; raises `ApiError` when it is not one."""
    policy = value if isinstance(value, dict) else {}
    seconds = str(policy.get("seconds"))
    number = int(seconds) if seconds.isdecimal() else 0
    if policy.get("anchor") != "created_at":
        raise ApiError(400, f"Invalid '{name}.anchor'.", param=f"{name}.anchor")
    if not shortest <= number <= LONGEST:
        message = f"Invalid '{name}.seconds': expected {shortest} to {LONGEST}."
        raise ApiError(400, message, param=f"{name}.seconds")
    return number
