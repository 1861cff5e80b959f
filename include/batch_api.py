"""The calls of the Files and Batches API that this project makes, as a connection has them.

`BatchApi` wraps `openai.OpenAI`, `AsyncBatchApi` wraps `openai.AsyncOpenAI` for the triggerer.
The SDK's own retries are off: it would repeat `POST /batches` without an idempotency key, and one
call could make three batches. Calls that are safe to repeat are repeated here instead.

Source: https://platform.openai.com/docs/api-reference/batch and /files; `openai` 3.51.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import openai
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt

from include.api_errors import NOT_OFFERED, translate
from include.batch_view import PAGE, BatchProblem, BatchView, StoredFile, lost, moment
from include.errors import (
    LLMBatchError,
    NotOfferedError,
    NotThereError,
    TransientError,
)
from include.provider import OPENAI, TOKEN_LIMIT, ProviderProfile

CHUNK = 1 << 20  # bytes read from a download at a time
TRIES = 5  # of a call that is safe to repeat
FIRST_PAUSE = 0.5  # seconds before the second try; doubles
LONGEST_PAUSE = 20.0  # seconds
FILES_PAGE = 1_000  # files per list call; the API takes up to 10,000
CREATE_TIMEOUT = 60.0  # seconds that one POST /batches may take

if TYPE_CHECKING:
    from datetime import datetime

Result = TypeVar("Result")


def view(batch: Any, profile: ProviderProfile = OPENAI) -> BatchView:
    """Return what matters of an SDK `Batch`."""
    return view_of(batch.to_dict(warnings=False), profile)


def view_of(batch: Mapping[str, Any], profile: ProviderProfile = OPENAI) -> BatchView:
    """Return what matters of a batch; servers in the wild leave out whatever they like."""
    counts, errors = batch.get("request_counts") or {}, batch.get("errors") or {}
    return BatchView(
        batch_id=batch["id"],
        status=profile.status(batch.get("status")),
        created_at=moment(batch.get("created_at")),
        input_file_id=batch.get("input_file_id") or None,
        output_file_id=batch.get("output_file_id") or None,
        error_file_id=batch.get("error_file_id") or None,
        done=counts.get("completed") or 0,
        failed=counts.get("failed") or 0,
        total=counts.get("total") or 0,
        metadata=batch.get("metadata") or {},
        problems=tuple(_problem(one, profile) for one in errors.get("data") or []),
    )


def _problem(error: Mapping[str, Any], profile: ProviderProfile) -> BatchProblem:
    is_quota = profile.is_quota(error.get("code"), error.get("message"))
    return BatchProblem(TOKEN_LIMIT if is_quota else error.get("code"), error.get("line"))


def _pause(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked: float = getattr(error, "retry_after", None) or 0.0
    backoff: float = FIRST_PAUSE * 2.0 ** (state.attempt_number - 1)
    return min(max(asked, backoff), LONGEST_PAUSE)


class BatchApi:
    """The API through one `openai.OpenAI` client; errors name the connection `conn_id`."""

    def __init__(
        self,
        client: openai.OpenAI,
        *,
        conn_id: str = "openai_default",
        create_timeout: float = CREATE_TIMEOUT,
        profile: ProviderProfile = OPENAI,
    ) -> None:
        self.profile = profile
        self._client = client.with_options(max_retries=0)
        self._over = f" over connection {conn_id}"
        self._create_timeout = create_timeout

    def upload(self, path: Path, name: str, *, keep_seconds: int | None) -> str:
        """Upload a request file and return its file id; repeated on passing errors.

        It is kept for ever by a server that takes no expiry.
        """
        expires: dict[str, Any] = {}
        if keep_seconds is not None and self.profile.expires_files:
            expires["expires_after"] = {"anchor": "created_at", "seconds": keep_seconds}

        def send() -> str:
            with path.open("rb") as stream:
                created = self._client.files.create(
                    file=(name, stream, "application/jsonl"), purpose="batch", **expires
                )
            return str(created.id)

        return self._again(f"Uploading {name}", send)

    def create(
        self, *, file_id: str, endpoint: str, metadata: Mapping[str, str], keep_seconds: int | None
    ) -> BatchView:
        """Make exactly one `POST /batches`.

        Raises `UnknownOutcomeError` when a batch may have been made, `TokenLimitError`,
        `InputFileNotReadyError`, `TransientError`, `PermanentError` or `ConfigurationError`
        when certainly none was.
        """
        expires: dict[str, Any] = {}
        if keep_seconds is not None and self.profile.expires_files:
            expires["output_expires_after"] = {"anchor": "created_at", "seconds": keep_seconds}
        client = self._client.with_options(timeout=self._create_timeout)
        try:
            return self._view(
                client.batches.create(
                    input_file_id=file_id,
                    endpoint=self.profile.create_endpoint(endpoint),  # type: ignore[arg-type]  # other servers offer more
                    completion_window="24h",
                    metadata=dict(metadata) if self.profile.takes_metadata else openai.omit,
                    **expires,
                )
            )
        except openai.OpenAIError as error:
            action = f"Creating a batch{self._over}"
            raise translate(error, action, repeatable=False, profile=self.profile) from None

    def retrieve(self, batch_id: str) -> BatchView:
        """Return one batch; raises `NotThereError` on 404."""
        return self._again(
            f"Reading {batch_id}", lambda: self._view(self._client.batches.retrieve(batch_id))
        )

    def newest(self, since: datetime) -> Iterator[BatchView]:
        """Yield the batches created at `since` or later, each once.

        Raises `NotOfferedError` for a server that does not list batches.
        """
        if not self.profile.lists_batches:
            raise NotOfferedError(f"Listing batches{self._over}: the server does not offer it.")
        seen = set[str]()
        after: str | None = None
        while True:
            page, has_more = self._page(after)
            fresh = [batch for batch in page if batch.batch_id not in seen]
            for batch in fresh:
                if batch.created_at >= since:
                    yield batch
                elif self.profile.newest_first:
                    return
            if not (fresh and has_more):  # nothing fresh: `after` is ignored
                return
            seen.update(batch.batch_id for batch in fresh)
            after = page[-1].batch_id

    def _page(self, after: str | None) -> tuple[list[BatchView], bool]:
        def ask() -> tuple[list[BatchView], bool]:
            answer = self._client.batches.list(limit=PAGE, after=after or openai.omit)
            # Only an explicit no ends the list: a server may ignore `limit` and not say.
            has_more = getattr(answer, "has_more", None) is not False
            return [self._view(one) for one in answer.data or []], has_more

        return self._again("Listing batches", ask)

    def cancel(self, batch_id: str) -> BatchView:
        """Ask for the batch to be cancelled; one that is final already is returned as it is.

        So is one on a server that cannot cancel.
        """

        def ask() -> BatchView:
            try:
                return self._view(self._client.batches.cancel(batch_id))
            except openai.APIStatusError as error:
                if error.status_code not in {400, 409, *NOT_OFFERED}:
                    raise
                return self._view(self._client.batches.retrieve(batch_id))

        return self._again(f"Cancelling {batch_id}", ask)

    def files(self) -> Iterator[StoredFile]:
        """Yield every file of the key's project, whoever has made it."""
        after: str | None = None
        while True:
            page = self._files_page(after)
            yield from page
            if len(page) < FILES_PAGE:
                return
            after = page[-1].file_id

    def _files_page(self, after: str | None) -> list[StoredFile]:
        def ask() -> list[StoredFile]:
            answer = self._client.files.list(limit=FILES_PAGE, after=after or openai.omit)
            return [StoredFile(one.id, one.bytes or 0) for one in answer.data]

        return self._again("Listing files", ask)

    def delete_file(self, file_id: str) -> None:
        """Delete a file; one that is gone already is fine, and so is a server that deletes none."""
        try:
            self._again(f"Deleting {file_id}", lambda: self._client.files.delete(file_id))
        except (NotThereError, NotOfferedError):
            return

    def download(self, file_id: str, path: Path) -> int:
        """Write a file's bytes to `path` and return how many; a short download is repeated.

        Raises `NotThereError` on 404 and `TransientError` when it stays short.
        """

        def fetch() -> int:
            expected = self._size(file_id)
            with self._client.files.with_streaming_response.content(
                file_id, extra_headers={"Accept-Encoding": "identity"}
            ) as response:
                announced = response.headers.get("content-length")
                size = _write(response.iter_bytes(CHUNK), path)
            for promise in (expected, int(announced) if announced else None):
                if promise is not None and size < promise:
                    raise TransientError(
                        f"Download of {file_id} was cut off at {size} of {promise} bytes."
                    )
            return size

        return self._again(f"Downloading {file_id}", fetch)

    def _size(self, file_id: str) -> int | None:
        """Return the bytes of a file; None when the server does not say."""
        try:
            return getattr(self._client.files.retrieve(file_id), "bytes", None) or None
        except openai.APIStatusError as error:
            if error.status_code not in {404, *NOT_OFFERED}:
                raise
            return None  # whether the file is there, the download itself will tell

    def _view(self, batch: Any) -> BatchView:
        return view(batch, self.profile)

    def _again(self, action: str, call: Callable[[], Result]) -> Result:
        """Call, and call again on passing errors: only for what is safe to repeat."""

        def attempt() -> Result:
            try:
                return call()
            except openai.OpenAIError as error:
                raise translate(
                    error, action + self._over, repeatable=True, profile=self.profile
                ) from None
            except Exception as error:
                # The transport's own errors reach us raw while a download is being streamed.
                if type(error).__module__.split(".")[0] not in {"httpx2", "httpcore2"}:
                    raise
                raise TransientError(
                    f"{action}: the connection broke ({type(error).__name__})."
                ) from None

        return Retrying(
            retry=retry_if_exception_type(TransientError),
            stop=stop_after_attempt(TRIES),
            wait=_pause,
            reraise=True,
        )(attempt)


def _write(chunks: Iterator[bytes], path: Path) -> int:
    size = 0
    with path.open("wb") as stream:
        for chunk in chunks:
            size += stream.write(chunk)
        stream.flush()
        os.fsync(stream.fileno())
    return size


class AsyncBatchApi:
    """What the triggerer needs of the API, through one `openai.AsyncOpenAI` client.

    One try per call: whoever waits polls again anyway.
    """

    def __init__(self, client: openai.AsyncOpenAI, profile: ProviderProfile = OPENAI) -> None:
        self._client = client.with_options(max_retries=0)
        self.profile = profile

    async def retrieve(self, batch_id: str) -> BatchView:
        """Return one batch; on 404 the view of a lost one."""
        try:
            return view(await self._client.batches.retrieve(batch_id), self.profile)
        except openai.NotFoundError:
            return lost(batch_id)
        except openai.OpenAIError as error:
            raise self._translated(error, f"Reading {batch_id}") from None

    async def pages(self) -> AsyncIterator[list[BatchView]]:
        """Yield pages of batches, newest first where the server does so; never one twice.

        The SDK's own models of a hundred batches would hold the event loop up for 50 ms.
        """
        seen = set[str]()
        after: str | None = None
        while True:
            try:
                answer = await self._client.batches.with_raw_response.list(
                    limit=PAGE, after=after or openai.omit
                )
            except openai.OpenAIError as error:
                raise self._translated(error, "Listing batches") from None
            found = msgspec.json.decode(answer.content)
            page = [view_of(one, self.profile) for one in found.get("data") or []]
            fresh = [one for one in page if one.batch_id not in seen]
            yield fresh
            if not fresh or found.get("has_more") is False:
                return
            seen.update(one.batch_id for one in fresh)
            after = page[-1].batch_id

    async def cancel(self, batch_id: str) -> None:
        """Ask for the batch to be cancelled; one that is final already is fine."""
        try:
            await self._client.batches.cancel(batch_id)
        except openai.APIStatusError as error:
            if error.status_code not in {400, 404, 409, *NOT_OFFERED}:
                raise self._translated(error, f"Cancelling {batch_id}") from None
        except openai.OpenAIError as error:
            raise self._translated(error, f"Cancelling {batch_id}") from None

    async def close(self) -> None:
        """Close the client's connections."""
        await self._client.close()

    def _translated(self, error: openai.OpenAIError, action: str) -> LLMBatchError:
        return translate(error, action, repeatable=True, profile=self.profile)
