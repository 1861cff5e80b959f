"""Request bodies as bytes: what all rows share is encoded once, what varies row by row.

A body is `prefix + varying + suffix`. For a prompt the varying part runs from the first to the
last placeholder; for a job with `request.py` it is the whole body.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import orjson
import pyarrow as pa

from include.column_types import column_texts
from include.endpoints import (
    BYTES_PER_TOKEN,
    EMBEDDINGS,
    MAX_BYTES,
    MAX_REQUEST_INPUTS,
    MAX_REQUEST_TOKENS,
    Endpoint,
    completed_body,
    input_tokens_of,
    inputs_of,
    request_body,
    with_larger_output,
)
from include.errors import ConfigurationError
from include.job_code import pinned_function
from include.job_spec import JOBS_ROOT, JobSpec
from include.output_columns import AnswerShape
from include.prompt import Template

Row = dict[str, Any]
BAD_REQUEST = "bad_request"
BAD_TEXT = "bad_text"
TOO_LARGE = "too_large"


@dataclass(frozen=True)
class Refusal:
    """Why a row got no body: one of the reasons of the failures table, and a message."""

    reason: str
    message: str


class Bodies(Protocol):
    """Makes the varying part of the bodies of one job.

    `columns` are the columns it reads; a null in one of `required` rejects the row beforehand.
    """

    prefix: bytes
    suffix: bytes
    columns: tuple[str, ...]
    required: tuple[str, ...]

    def varying(self, rows: pa.RecordBatch) -> tuple[list[bytes], dict[int, Refusal]]:
        """Return the varying parts, in order, of the rows that are not refused by position."""


def request_bodies(spec: JobSpec, columns: Sequence[str], root: Path = JOBS_ROOT) -> Bodies:
    """Return what makes the bodies of `spec` from rows with `columns`.

    Raises `ConfigurationError` when `request.py` is not the one that the run has pinned.
    """
    if spec.queue is not None:
        from include.queue_source import queue_bodies

        return queue_bodies(spec, root)
    if spec.request.builder is not None:
        return BuiltBodies(spec, tuple(columns), load_builder(spec, root))
    return PromptBodies(spec)


class PromptBodies:
    """Bodies from prompt.md: the varying part runs from the first placeholder to the last."""

    def __init__(self, spec: JobSpec) -> None:
        prompt = spec.compiled_prompt
        self.prefix, *between, self.suffix = _constant_pieces(spec, prompt.system, prompt.user)
        self._holes = (*prompt.columns, *spec.request.images)
        self.columns = tuple(dict.fromkeys(self._holes))
        self.required = self.columns
        # Of a text that is embedded; what the prompt itself adds counts as well.
        self._most = _most_text(spec) - len(self.prefix) - len(self.suffix)
        # Of bytes, % is the fastest way to fill several holes.
        self._pattern = b"%b".join([b"", *(piece.replace(b"%", b"%%") for piece in between), b""])

    def varying(self, rows: pa.RecordBatch) -> tuple[list[bytes], dict[int, Refusal]]:
        """Return the values of the placeholders, encoded as inside of a JSON string."""
        encoded = {name: _escaped(column_texts(rows.column(name))) for name in self.columns}
        if len(self._holes) == 1:
            return self._within(encoded[self._holes[0]])
        pattern, columns = self._pattern, (encoded[name] for name in self._holes)
        return self._within([pattern % values for values in zip(*columns, strict=True)])

    def _within(self, bodies: list[bytes]) -> tuple[list[bytes], dict[int, Refusal]]:
        """Refuse texts that are too long to be embedded."""
        if max(map(len, bodies), default=0) <= self._most:
            return bodies, {}
        refusals = {
            at: too_many_tokens(-(-len(body) // BYTES_PER_TOKEN))
            for at, body in enumerate(bodies)
            if len(body) > self._most
        }
        return [body for at, body in enumerate(bodies) if at not in refusals], refusals


def _most_text(spec: JobSpec) -> int:
    """Return the bytes of a body that the endpoint takes at most."""
    return (
        MAX_REQUEST_TOKENS * BYTES_PER_TOKEN if spec.request.endpoint == EMBEDDINGS else MAX_BYTES
    )


def too_many_tokens(tokens: int) -> Refusal:
    """Return the refusal of an embeddings request of so many tokens."""
    most = f"{MAX_REQUEST_TOKENS:,}"
    message = f"about {tokens:,} tokens; an embeddings request takes at most {most}"
    return Refusal(TOO_LARGE, message)


def _escaped(texts: list[str | None]) -> list[bytes]:
    """Return texts as JSON strings without their quotes.

    The slice is a copy of the right size: what orjson returns sits in a larger piece of memory,
    and a thousand of those cost more than the copies.
    """
    dumps = orjson.dumps
    return [dumps(text)[1:-1] for text in texts]


def _constant_pieces(spec: JobSpec, system: Template | None, user: Template) -> list[bytes]:
    """Return the JSON around the placeholders: one piece more than there are of those."""
    marks: list[str] = []

    def text(part: Template) -> str:
        # No text of the job can hold a digest of itself, so a mark is found once.
        own = [f"hole-{len(marks) + at}-{spec.digest}" for at in range(len(part.placeholders))]
        marks.extend(own)
        constants, *others = part.constants
        return constants + "".join(map("".join, zip(own, others, strict=True)))

    system_text, user_text = text(system) if system else None, text(user)
    images = [f"image-{at}-{spec.digest}" for at in range(len(spec.request.images))]
    marks.extend(images)
    body = request_body(
        spec.request.api,
        model=spec.request.model,
        system=system_text,
        user=user_text,
        schema=spec.request.output_schema,
        params=spec.request.sent_params,
        strict=spec.request.strict,
        images=images,
    )
    rest, pieces = orjson.dumps(body), []
    for mark in marks:
        piece, _, rest = rest.partition(mark.encode())
        pieces.append(piece)
    return [*pieces, rest]


class BuiltBodies:
    """Bodies from the job's `request.py`; the varying part is the whole body."""

    prefix = b""
    suffix = b""
    required: tuple[str, ...] = ()

    def __init__(
        self, spec: JobSpec, columns: tuple[str, ...], build: Callable[[Row], Row]
    ) -> None:
        self.columns = columns
        self._request = spec.request
        self._file = spec.request.builder.file if spec.request.builder else ""
        self._build = build

    def varying(self, rows: pa.RecordBatch) -> tuple[list[bytes], dict[int, Refusal]]:
        """Call `build` for each row; a row for which it raises is refused, the others go on."""
        bodies = [self._body(row) for row in rows.to_pylist()]
        refusals = {at: body for at, body in enumerate(bodies) if isinstance(body, Refusal)}
        return [body for body in bodies if isinstance(body, bytes)], refusals

    def _body(self, row: Row) -> bytes | Refusal:
        request = self._request
        try:
            built = self._build(row)
        except Exception as error:  # noqa: BLE001 (any error of the job's own code is the row's)
            # The text of the error may hold row text, so only its type is told.
            return Refusal(BAD_REQUEST, f"{self._file} raised {type(error).__name__}")
        if not isinstance(built, dict):
            kind = type(built).__name__
            return Refusal(BAD_REQUEST, f"{self._file} returned {kind}; expected a dict")
        try:
            body = completed_body(
                request.api,
                built,
                model=request.model,
                schema=request.output_schema,
                params=request.sent_params,
                strict=request.strict,
            )
        except ValueError as error:
            raise ConfigurationError(f"{self._file}: build() {error}; return it no more.") from None
        return self._input_refusal(body) or _encoded(body, self._file)

    def _input_refusal(self, body: Row) -> Refusal | None:
        """Say what is wrong with the inputs of a request for vectors or a moderation."""
        shape, inputs = self._request.shape, inputs_of(body)
        if shape in (AnswerShape.VECTOR, AnswerShape.MODERATION) and inputs != 1:
            why = f"{self._file} returned {inputs:,} inputs, and a row has one result; return one, "
            return Refusal(BAD_REQUEST, why + "or set request.output: raw")
        return input_refusal(body) if self._request.endpoint == EMBEDDINGS else None


def input_refusal(body: Mapping[str, Any]) -> Refusal | None:
    """Say why an embeddings request has too many inputs or tokens; None when it has not."""
    inputs = inputs_of(body)
    if inputs > MAX_REQUEST_INPUTS:
        most = f"{MAX_REQUEST_INPUTS:,}"
        return Refusal(TOO_LARGE, f"{inputs:,} inputs; a request takes at most {most}")
    tokens = input_tokens_of(body)
    return too_many_tokens(tokens) if tokens > MAX_REQUEST_TOKENS else None


def _encoded(body: Row, file: str) -> bytes | Refusal:
    try:
        return orjson.dumps(body)
    except orjson.JSONEncodeError as error:
        if "surrogates" in str(error):
            return Refusal(BAD_TEXT, f"{file} returned text with a lone surrogate")
        return Refusal(BAD_REQUEST, f"{file} returned something that JSON cannot say")


def load_builder(spec: JobSpec, root: Path = JOBS_ROOT) -> Callable[[Row], Row]:
    """Return `build` of the job's `request.py`.

    Raises `ConfigurationError` when the file is gone, is not the one that the run has pinned, or
    cannot be imported.
    """
    builder = spec.request.builder
    if builder is None:
        raise ValueError(f"job {spec.name} has no request.py")
    build: Callable[[Row], Row] = pinned_function(root / spec.name, builder, "build")
    return build


def enlarged(endpoint: Endpoint, body: bytes, factor: int) -> bytes:
    """Return an encoded body with its output token limit times `factor`."""
    decoded: Mapping[str, Any] = orjson.loads(body)
    return orjson.dumps(with_larger_output(endpoint, decoded, factor))
