"""What reads the answers of a job, chosen by what its endpoint answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from include.answer_schema import AnswerReader
from include.classification import Problem
from include.moderation_answer import ModerationReader
from include.output_columns import AnswerShape, OutputColumn, request_columns
from include.vector_answer import VectorReader

if TYPE_CHECKING:
    from include.job_spec import Request


class Reader(Protocol):
    """Turns answers into records, whose values `getters` return in the order of `columns`.

    `read` takes what `classify` returns; `quick` what the usual line of the endpoint has, unless
    `trap` is in it, and may raise where it would have to look twice. `nothing` holds nulls.
    """

    columns: tuple[OutputColumn, ...]
    trap: Any

    @property
    def getters(self) -> Sequence[Callable[[Any], Any]]:
        """One for each column."""

    @property
    def nothing(self) -> msgspec.Struct:
        """The record of a request without an answer."""

    @property
    def read(self) -> Callable[[str], msgspec.Struct | Problem]:
        """Any answer."""

    @property
    def quick(self) -> Callable[[Any], msgspec.Struct | Problem]:
        """The usual answer."""


def answer_reader(request: Request) -> Reader:
    """Return the reader of a job's answers."""
    if request.shape is AnswerShape.VECTOR:
        return VectorReader(request_columns(request)[0])
    if request.shape is AnswerShape.MODERATION:
        return ModerationReader()
    if request.shape is AnswerShape.RAW:
        return AnswerReader({})  # any JSON, kept as its text
    return AnswerReader(request.output_schema)
