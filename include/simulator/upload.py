"""Receives a multipart upload straight onto the disk."""

from __future__ import annotations

from email.message import Message
from pathlib import Path
from typing import BinaryIO

from python_multipart.multipart import MultipartParser
from starlette.requests import Request

from include.simulator.api_error import ApiError

LONGEST_FIELD = 10_000


class Upload:
    """Collects the form fields of one request and writes its file part to `target`."""

    def __init__(self, target: BinaryIO, most_bytes: int) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self._target = target
        self._left = most_bytes
        self._header = b""
        self._headers = Message()
        self._name = ""
        self._is_file = False
        self._value = b""

    async def receive(self, request: Request) -> None:
        """Read the whole request; raises `ApiError` when it is no proper upload."""
        kind = Message()
        kind["content-type"] = request.headers.get("content-type", "")
        boundary = kind.get_boundary()
        if kind.get_content_type() != "multipart/form-data" or boundary is None:
            raise ApiError(400, "The request has to be multipart/form-data with a boundary.")
        parser = MultipartParser(
            boundary.encode(),
            {
                "on_part_begin": self._begin,
                "on_part_data": self._data,
                "on_part_end": self._end,
                "on_header_field": self._header_name,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_done,
            },
        )
        try:
            async for chunk in request.stream():
                parser.write(chunk)
            parser.finalize()
        except ValueError as error:
            raise ApiError(400, "The multipart body could not be read.") from error

    def _begin(self) -> None:
        self._headers = Message()
        self._header = b""
        self._value = b""

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._header.decode("latin-1")] = self._value.decode("utf-8", "replace")
        self._header = self._value = b""

    def _headers_done(self) -> None:
        parameters = dict(self._headers.get_params(header="content-disposition") or [])
        self._name = str(parameters.get("name", ""))
        self._is_file = self._name == "file"
        if self._is_file:
            self.filename = Path(str(parameters.get("filename", ""))).name or "file"

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._left -= end - start
            if self._left < 0:
                raise ApiError(413, "The file is larger than the API accepts.", param="file")
            self._target.write(data[start:end])
        elif len(self._value) < LONGEST_FIELD:
            self._value += data[start:end]

    def _end(self) -> None:
        if not self._is_file:
            self.fields[self._name] = self._value.decode("utf-8", "replace")
