"""The fault script: every way in which the simulator can misbehave, as data.

A rule is a JSON object with a `fault` and its own keys; an unknown fault or key is refused.
*Call* rules act on one HTTP call, *batch* rules on a whole batch, *line* rules on chosen lines of
a batch. Batch and line rules are chosen when a batch is created and stay with it.
"""

from __future__ import annotations

import re
from functools import cached_property
from hashlib import blake2b
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


def number_of(text: str) -> int:
    """A well-spread number under 2**64 that depends on the text alone."""
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(data, digest_size=8).digest())


class Rule(BaseModel):
    """What all rules share.

    A rule matches the `nth` match and, with `every`, each so-manieth after it; with `probability`
    a seeded share of the matches; with none of these each match. It fires at most `times`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = ""
    nth: Count | None = None
    every: Count | None = None
    probability: Fraction | None = None
    seed: int = 0
    times: Count | None = None

    def due(self, seen: int, fired: int) -> bool:
        """Whether the match number `seen` (1-based) is one to act on, after `fired` firings."""
        if self.times is not None and fired >= self.times:
            return False
        first = self.nth or self.every or 1
        if self.every is not None:
            return seen >= first and (seen - first) % self.every == 0
        if self.nth is not None:
            return seen == self.nth
        return self.probability is None or self._drawn(seen) < self.probability

    def _drawn(self, seen: int) -> float:
        return number_of(f"{self.seed} {self.id} {seen}") / (1 << 64)


class CallRule(Rule):
    """A rule for HTTP calls, by method and a regular expression searched in the path."""

    method: str | None = None
    path: str = ""

    @field_validator("path")
    @classmethod
    def _compiles(cls, path: str) -> str:
        try:
            re.compile(path)
        except re.error as error:
            raise ValueError(f"path {path!r} is no regular expression: {error}") from error
        return path

    def matches(self, method: str, path: str) -> bool:
        """Whether the rule is about this call."""
        return self.method in (None, method) and re.search(self.path, path) is not None


class Fail(CallRule):
    """Answer with an error status, before or after the call has taken effect."""

    fault: Literal["fail_before", "fail_after"]
    status: int = Field(default=500, ge=400, le=599)
    code: str | None = None
    message: str = "The server had an error while processing your request."
    type: str = "server_error"
    retry_after: Seconds | None = None


class Reset(CallRule):
    """Close the connection without an answer, before or after the call has taken effect."""

    fault: Literal["reset_before", "reset_after"]


class Stall(CallRule):
    """Wait for some seconds before the call takes effect, or after it before the answer.

    A call that is stalled before takes effect late, even when its client has given up.
    """

    fault: Literal["stall_before", "stall_after"]
    seconds: Seconds


class Kill(CallRule):
    """Send SIGKILL to `pid`, or to the process named in the header `x-llm-batch-pid`."""

    fault: Literal["kill_before", "kill_after"]
    pid: Count | None = None


class Truncate(CallRule):
    """Cut the answer's body short, with its true Content-Length or, seemingly whole, without."""

    fault: Literal["truncate"]
    method: str | None = "GET"
    path: str = "/content$"
    at_bytes: int | None = Field(default=None, ge=0)
    fraction: Fraction = 0.5
    content_length: bool = True


class Corrupt(CallRule):
    """Change some bytes in one line (1-based) of the answer's body, never a line end."""

    fault: Literal["corrupt"]
    method: str | None = "GET"
    path: str = "/content$"
    line: Count = 1
    bytes: Count = 4


class RateLimit(Rule):
    """Refuse batch creations with 429 beyond `creates` in any `per_seconds`."""

    fault: Literal["rate_limit"]
    creates: int = Field(ge=0)
    per_seconds: float = Field(gt=0)


class TokenLimit(Rule):
    """Refuse what would put a model's unfinished batches over `enqueued_tokens` input tokens.

    With mode `at_create` the POST answers 400, with `later` the batch ends as failed; both carry
    the code `token_limit_exceeded`.
    """

    fault: Literal["token_limit"]
    enqueued_tokens: int = Field(ge=0)
    model: str | None = None
    mode: Literal["at_create", "later"] = "at_create"


class HideNewBatches(Rule):
    """Leave batches younger than `seconds` out of the listing."""

    fault: Literal["hide_new_batches"]
    seconds: Seconds


class FileNotFound(Rule):
    """Refuse to create a batch from a file younger than `seconds`: not found."""

    fault: Literal["file_not_found"]
    seconds: Seconds


class BatchRule(Rule):
    """A rule for batches, by order of creation, metadata and model-independent endpoint.

    With `share` it concerns a seeded part of them, by their metadata: the same ones in whichever
    order they are created.
    """

    metadata: dict[str, str] = {}
    endpoint: str | None = None
    share: Fraction = 1.0

    def concerns(self, metadata: dict[str, str], endpoint: str) -> bool:
        """Whether a batch with this metadata and endpoint can be chosen."""
        tagged = all(metadata.get(key) == value for key, value in self.metadata.items())
        return tagged and self.endpoint in (None, endpoint) and self._is_drawn(metadata)

    def _is_drawn(self, metadata: dict[str, str]) -> bool:
        return number_of(f"{self.seed} {sorted(metadata.items())}") < self.share * (1 << 64)


class Expire(BatchRule):
    """Let the batch expire when a fraction of its requests has been answered."""

    fault: Literal["expire"]
    fraction: Fraction = 0.5


class FailBatch(BatchRule):
    """Fail the batch at validation, for the given lines (1-based) or as a whole."""

    fault: Literal["fail_batch"]
    code: str = "invalid_request"
    message: str = "The batch could not be validated."
    lines: tuple[Count, ...] = ()


class Stuck(BatchRule):
    """Stay in one status for so many seconds more, for ever without `seconds`."""

    fault: Literal["stuck"]
    status: Literal["validating", "in_progress", "finalizing", "cancelling"] = "in_progress"
    seconds: Seconds | None = None


class UnknownStatus(BatchRule):
    """Show a status that no documentation names while the batch is in progress."""

    fault: Literal["unknown_status"]
    status: str = "paused"


class LongIds(BatchRule):
    """Give the batch and its result files ids of 260 characters."""

    fault: Literal["long_ids"]


class OmitNulls(BatchRule):
    """Leave fields that are null out of the batch object."""

    fault: Literal["omit_nulls"]


class EmptyIds(BatchRule):
    """Write "" where the batch object has null for a file id."""

    fault: Literal["empty_ids"]


class CountsLie(BatchRule):
    """Add `completed`, `failed` and `total` to the true request counts."""

    fault: Literal["counts_lie"]
    completed: int = 0
    failed: int = 0
    total: int = 0


class BatchLost(BatchRule):
    """Answer 404 for the batch, and leave it out of lists, `seconds` after its creation."""

    fault: Literal["batch_lost"]
    seconds: Seconds = 0


class OutputLost(BatchRule):
    """Complete with `output_file_id` null (mode `null`) or a file of zero bytes (mode `empty`)."""

    fault: Literal["output_lost"]
    mode: Literal["null", "empty"] = "null"


class FileShape(BatchRule):
    """Write result files with a BOM, with CRLF line ends or without the last newline."""

    fault: Literal["file_shape"]
    bom: bool = False
    crlf: bool = False
    no_final_newline: bool = False


class LineRule(BatchRule):
    """A rule for lines: a seeded `fraction` of all `custom_ids`, or of those listed.

    With `first_times` it acts on the same custom_id in its first so many batches only, so that
    sending the request again mends it.
    """

    fraction: Fraction = 1.0
    custom_ids: frozenset[str] | None = None
    first_times: Count | None = None

    def selects(self, custom_id: str, number: int) -> bool:
        """Whether the line with this id is chosen; `number` is `number_of(custom_id)`."""
        if self.custom_ids is not None and custom_id not in self.custom_ids:
            return False
        if self.fraction >= 1:
            return True
        mixed = (number ^ self._salt) * 0x9E3779B97F4A7C15 % (1 << 64)
        return (mixed >> 11) < self.fraction * (1 << 53)

    @cached_property
    def _salt(self) -> int:
        return number_of(f"{getattr(self, 'fault', '')} {self.seed}")


class LineError(LineRule):
    """Answer the request with an HTTP error in the error file; it is not billed."""

    fault: Literal["line_error"]
    status: int = Field(default=500, ge=400, le=599)
    code: str | None = None


class LineDrop(LineRule):
    """Bill the request and write no line for it."""

    fault: Literal["drop_line"]


class LineEnding(LineRule):
    """End the answer early: cut off, refused, filtered or against the schema; it is billed."""

    fault: Literal["cut_off", "refusal", "content_filter", "schema_invalid"]


class LineDamage(LineRule):
    """Write the line otherwise than documented; it is billed once.

    `duplicate_line` twice · `foreign_line` one more with an id that was never sent · `torn_line`
    its first half · `body_as_string` the body as JSON text · `line_separator` raw U+2028 in
    strings · `nan` a bare NaN · `nul` an escaped NUL · `lone_surrogate` half a surrogate pair ·
    `long_line` with `size` bytes of filling · `in_error_file` a success in the error file.
    """

    fault: Literal[
        "duplicate_line",
        "foreign_line",
        "torn_line",
        "body_as_string",
        "line_separator",
        "nan",
        "nul",
        "lone_surrogate",
        "long_line",
        "in_error_file",
    ]
    size: Count = 16_000_000


CallFault = Fail | Reset | Stall | Kill | Truncate | Corrupt
ServiceFault = RateLimit | TokenLimit | HideNewBatches | FileNotFound
WholeFault = (
    Expire
    | FailBatch
    | Stuck
    | UnknownStatus
    | LongIds
    | OmitNulls
    | EmptyIds
    | CountsLie
    | BatchLost
    | OutputLost
    | FileShape
)
LineFault = LineError | LineDrop | LineEnding | LineDamage
Fault = CallFault | ServiceFault | WholeFault | LineFault
AnyFault = Annotated[Fault, Field(discriminator="fault")]

RULES: TypeAdapter[list[Fault]] = TypeAdapter(list[AnyFault])
RULE: TypeAdapter[Fault] = TypeAdapter(AnyFault)

DEMO: list[dict[str, Any]] = [
    {"fault": "line_error", "status": 500, "fraction": 0.008, "first_times": 1},
    {"fault": "line_error", "status": 429, "fraction": 0.007, "first_times": 1, "seed": 1},
    {"fault": "line_error", "status": 400, "fraction": 0.004, "seed": 5},
    {"fault": "expire", "fraction": 0.5, "share": 0.11, "seed": 32},
]
