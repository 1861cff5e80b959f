"""One batch per request file: the protocol that keeps a retry from paying twice.

1. The intent is committed to the ledger before anything is asked of the API (`Ledger.claim`).
2. The file is uploaded, as often as it takes: uploads cost nothing.
3. `POST /batches` is made once, with the `submission_id` in the batch's metadata; the ledger has
   the id of the file by then, for servers that keep no metadata.
4. The answer is committed (`Ledger.submitted`).
5. Whoever finds an intent without an answer looks for the batch before making another: it lists
   the API's batches back to the intent, adopts the one that is its own, and only when none
   has appeared after a grace period deletes the former file, so that a late POST is refused,
   looks once more for one that came before that, uploads a new file and posts.

What remains: a POST that is still on its way when the listing says "none" for longer than the
grace period, and whose deleted input the API accepts all the same. `docs/promises.md` has more.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING
from uuid import uuid4

from include.artifacts import Artifacts
from include.batch_ownership import Ownership
from include.batch_status import BatchStatus
from include.batch_view import BatchView
from include.errors import (
    ConfigurationError,
    InputFileNotReadyError,
    LLMBatchError,
    NotOfferedError,
    NotThereError,
    RateLimitedError,
    TokenLimitError,
    TransientError,
    UnknownOutcomeError,
)
from include.figures import counted
from include.ledger import Ledger
from include.ledger_records import Batch, BatchState, Claim

if TYPE_CHECKING:
    from include.batch_api import BatchApi

log = logging.getLogger(__name__)

SHORTEST_STEP = 0.05  # seconds


class SubmitLaterError(TransientError):
    """The batch has to wait for its turn; neither a retry nor a round is used up."""


@dataclass(frozen=True)
class SubmissionPolicy:
    """How long the protocol waits, in seconds, and how long files stay at the API."""

    grace: float = 30.0  #: between two looks for a batch whose answer was lost
    lease: float = 120.0  #: of silence after which a claim is taken over
    skew: float = 600.0  #: by which the API's clock may differ from ours
    busy_pause: float = 60.0  #: before asking again when a limit is reached
    longest_busy_pause: float = 600.0
    posts: int = 5  #: in one go, each after a look that found nothing
    file_tries: int = 8  #: while the API does not know the uploaded file yet
    file_pause: float = 1.0
    keep_seconds: int | None = 2_592_000  #: files expire at the API after 30 days


@dataclass
class Submission:
    """Creates the batch of one request file, or finds the one that exists."""

    ledger: Ledger
    api: BatchApi
    artifacts: Artifacts
    policy: SubmissionPolicy
    sleep: Callable[[float], None] = time.sleep

    def submit(self, submission_id: str, *, enqueued_tokens: int | None = None) -> Batch:
        """Return the ledger's row with the one batch of this request file.

        Safe to call any number of times, from several processes at once. Raises
        `SubmitLaterError` when a limit is reached or another process is at it: call again after
        `retry_after` seconds.
        """
        batch = self.ledger.batch(submission_id)
        if batch.batch_id is not None:
            log.info("%s exists already; nothing to submit.", batch)
            return batch
        claim = self._claim(submission_id, enqueued_tokens)
        if claim is None:
            return self._wait_for_turn(submission_id)
        return self._create(claim)

    def withdraw(self, submission_id: str) -> Batch:
        """Return the ledger's row without a doubt: with its batch, or PREPARED when none was made.

        Nothing is sent. Raises `SubmitLaterError` while another process is submitting it.
        """
        batch = self.ledger.batch(submission_id)
        if batch.state != BatchState.SUBMITTING:
            return batch
        claim = self._claim(submission_id, None)
        if claim is None:
            return self._wait_for_turn(submission_id)
        try:
            batch, found = self._reconciled(claim.batch)
        except LLMBatchError:
            self.ledger.abandon(claim.batch)
            raise
        if found is not None:
            return self._record(batch, found)
        self.ledger.release(batch, "withdrawn: no batch was made")
        return self.ledger.batch(submission_id)

    def _claim(self, submission_id: str, enqueued_tokens: int | None) -> Claim | None:
        return self.ledger.claim(
            submission_id,
            owner=uuid4().hex,
            lease=timedelta(seconds=self.policy.lease),
            enqueued_tokens=enqueued_tokens,
        )

    def _wait_for_turn(self, submission_id: str) -> Batch:
        batch = self.ledger.batch(submission_id)
        if batch.batch_id is not None:
            return batch
        is_claimed = batch.state == BatchState.SUBMITTING
        reason = "another process is submitting it" if is_claimed else "the token limit is full"
        raise SubmitLaterError(
            f"{batch}: {reason}; it is tried again.",
            retry_after=self._lease_left(batch) if is_claimed else self.policy.busy_pause,
        )

    def _lease_left(self, batch: Batch) -> float:
        if batch.intent_at is None:
            return 1.0
        until = batch.intent_at + timedelta(seconds=self.policy.lease)
        return max((until - datetime.now(UTC)).total_seconds(), 0.0) + 1.0

    def _create(self, claim: Claim) -> Batch:
        batch = claim.batch
        in_doubt = claim.is_takeover
        try:
            for _ in range(self.policy.posts):
                if in_doubt:
                    batch, found = self._reconciled(batch)
                    if found is not None:
                        return self._record(batch, found)
                    in_doubt = False
                batch = self._uploaded(batch)
                made = self._post(batch)
                # From here on a batch may exist: no error may give the claim back as if none did.
                in_doubt = True
                if made is not None:
                    return self._record(batch, made)
        except LLMBatchError as error:
            self._give_back(batch, error, in_doubt=in_doubt)
            raise
        self.ledger.abandon(batch)
        raise UnknownOutcomeError(
            f"{batch}: {counted(self.policy.posts, 'answer')} in a row got lost and no batch is "
            "listed. The doubt is kept: the task's next try looks again before it creates one."
        )

    def _reconciled(self, batch: Batch) -> tuple[Batch, BatchView | None]:
        """Return the batch that was made, if any; without one, no earlier POST can make one now.

        A new batch may be listed late, so the second look comes a grace period after the first. A
        POST may have arrived during the second look, so the third one comes after the fence.
        """
        found = self._listed(batch)
        if found is None:
            self._pause(batch, self.policy.grace)
            found = self._listed(batch)
        if found is None and batch.file_id is not None:
            self.api.delete_file(batch.file_id)
            found = self._listed(batch)
            if found is not None and found.status == BatchStatus.FAILED:
                found = None  # refused for the deleted file: nothing was processed
            batch = self._keep(batch, file_id=None)
        return batch, found

    def _listed(self, batch: Batch) -> BatchView | None:
        intent_at = batch.first_intent_at or datetime.now(UTC)
        since = intent_at - timedelta(seconds=self.policy.skew)
        spent = {one["batch_id"] for one in self.ledger.duplicates([batch.submission_id])}
        ownership = Ownership(self.ledger, [batch.submission_id])
        try:
            matches = [
                one
                for one in self.api.newest(since)
                if ownership.of(one) is not None
                and one.batch_id not in spent
                and not _is_fenced(one, batch)
            ]
        except NotOfferedError as error:
            raise ConfigurationError(_unknowable(batch, error)) from None
        # A failed one may be a late POST that the fence has refused, beside one that works.
        return min(matches, key=_preference) if matches else None

    def _uploaded(self, batch: Batch) -> Batch:
        if batch.file_id is not None:
            return batch
        with self.artifacts.local(batch.request_file) as path:
            if path.stat().st_size != batch.bytes:
                raise TransientError(
                    f"{batch}: request file {batch.request_file} has {path.stat().st_size} bytes, "
                    f"{batch.bytes} were recorded. Clear this round's build task to write it again."
                )
            file_id = self.api.upload(
                path, f"{batch.submission_id}.jsonl", keep_seconds=self.policy.keep_seconds
            )
        if not self.ledger.uploaded(batch, file_id):
            raise self._taken_over(batch)
        return self.ledger.batch(batch.submission_id)

    def _post(self, batch: Batch) -> BatchView | None:
        """Create the batch; None when the answer was lost."""
        for remaining in range(self.policy.file_tries, 0, -1):
            batch = self._keep(batch)
            try:
                return self.api.create(
                    file_id=str(batch.file_id),
                    endpoint=batch.endpoint,
                    metadata=self._metadata(batch),
                    keep_seconds=self.policy.keep_seconds,
                )
            except InputFileNotReadyError:
                if remaining == 1:
                    raise
                self.sleep(self.policy.file_pause)
            except UnknownOutcomeError as error:
                log.warning("%s: %s Looking for it before trying again.", batch, error)
                return None
        raise AssertionError("file_tries must be at least 1")

    def _metadata(self, batch: Batch) -> dict[str, str]:
        return {
            "submission_id": batch.submission_id,
            "run_id": batch.run_id,
            "job": batch.job,
            "round": str(batch.round),
            "shard": str(batch.shard),
        }

    def _record(self, batch: Batch, made: BatchView) -> Batch:
        """Commit the batch; when the claim was taken over meanwhile, one of the two has to go."""
        if self.ledger.submitted(batch, made.batch_id, made.status):
            recorded = self.ledger.batch(batch.submission_id)
            log.info(
                "%s: %s, %s bytes are submitted over %s. Next: it is waited for.",
                recorded,
                counted(recorded.requests, "request"),
                recorded.bytes,
                recorded.conn_id,
            )
            return recorded
        kept = self.ledger.batch(batch.submission_id)
        if kept.batch_id is None:
            raise SubmitLaterError(
                f"{kept}: another process took this submission over and will find {made.batch_id}.",
                retry_after=self._lease_left(kept),
            )
        if kept.batch_id != made.batch_id:
            drop_duplicate(self.ledger, self.api, kept, made)
        return kept

    def _give_back(self, batch: Batch, error: LLMBatchError, *, in_doubt: bool) -> None:
        """Let the next try begin at once; it has to look first when this one is `in_doubt`."""
        if in_doubt:
            self.ledger.abandon(batch)
            return
        if isinstance(error, InputFileNotReadyError | NotThereError):
            self.ledger.still_ours(batch, file_id=None)
        self.ledger.release(batch, str(error))
        if isinstance(error, TokenLimitError | RateLimitedError):
            raise SubmitLaterError(
                f"{batch}: {error} Tried again from the same uploaded file.",
                retry_after=self._busy_pause(error.retry_after),
            ) from None

    def _busy_pause(self, asked: float | None) -> float:
        pause = max(asked or 0.0, self.policy.busy_pause)
        return min(pause, self.policy.longest_busy_pause) * random.uniform(1.0, 1.25)  # noqa: S311

    def _pause(self, batch: Batch, seconds: float) -> None:
        """Sleep in short steps and keep the claim alive meanwhile."""
        step = max(self.policy.lease / 4, SHORTEST_STEP)
        while seconds > 0:
            self.sleep(min(seconds, step))
            seconds -= step
            self._keep(batch)

    def _keep(self, batch: Batch, **values: str | None) -> Batch:
        if not self.ledger.still_ours(batch, **values):
            raise self._taken_over(batch)
        return self.ledger.batch(batch.submission_id) if values else batch

    def _taken_over(self, batch: Batch) -> SubmitLaterError:
        return SubmitLaterError(
            f"{batch}: another process took this submission over.", retry_after=self.policy.lease
        )


def _unknowable(batch: Batch, error: LLMBatchError) -> str:
    return (
        f"{batch}: the answer to its creation was lost, and nobody can tell whether it was made: "
        f"{error} Nothing is sent until somebody has looked there for a batch of the input file "
        f"{batch.file_id}. docs/providers.md, `A server that lists no batches`, says how to go on."
    )


def _is_fenced(found: BatchView, batch: Batch) -> bool:
    """Tell whether it is an earlier, late POST that was refused because its file is deleted.

    It must not stand for a later POST that was accepted and is not listed yet.
    """
    is_of_another_file = found.input_file_id not in {None, batch.file_id}
    return found.status == BatchStatus.FAILED and is_of_another_file


def _preference(found: BatchView) -> tuple[bool, datetime, str]:
    return found.status == BatchStatus.FAILED, found.created_at, found.batch_id


def drop_duplicate(ledger: Ledger, api: BatchApi, kept: Batch, extra: BatchView) -> None:
    """Cancel a second batch of one request file and record what it may have cost."""
    is_new = ledger.record_duplicate(
        extra.batch_id, kept=kept, api_status=extra.status, done=extra.done, cost=None
    )
    if is_new and extra.status == BatchStatus.FAILED:
        log.warning("%s: a late %s was refused; nothing was processed.", kept, extra.batch_id)
    elif is_new:
        log.error(
            "%s has a duplicate, %s (%s, %s done). It is being cancelled; what it did is "
            "paid for and recorded in llm_batch_duplicate.",
            kept,
            extra.batch_id,
            extra.status,
            counted(extra.done, "request"),
        )
    if not extra.is_final:
        extra = api.cancel(extra.batch_id)
        ledger.record_duplicate(
            extra.batch_id, kept=kept, api_status=extra.status, done=extra.done, cost=None
        )
