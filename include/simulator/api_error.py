"""Errors in the form of the published API."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response


class ApiError(Exception):
    """An answer with an error status; `retry_after` seconds become the header of that name."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        kind: str = "invalid_request_error",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.kind = kind
        self.retry_after = retry_after

    def response(self) -> JSONResponse:
        """The schema `ErrorResponse`."""
        error = {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        headers = {} if self.retry_after is None else {"retry-after": f"{self.retry_after:g}"}
        return JSONResponse({"error": error}, self.status, headers)


def show_error(_request: Request, error: Exception) -> JSONResponse:
    """The exception handler for `ApiError`."""
    if not isinstance(error, ApiError):
        raise error
    return error.response()


def show_nothing(_request: Request, _error: Exception) -> Response:
    """The exception handler for clients that went away; nobody reads this."""
    return Response(status_code=499)


def show_http_error(request: Request, error: Exception) -> JSONResponse:
    """The exception handler for what the router refuses: unknown paths and methods."""
    status = int(getattr(error, "status_code", 500))
    message = f"Invalid URL ({request.method} {request.url.path})"
    return ApiError(status, message).response()
