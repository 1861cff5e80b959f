"""The answer of an embeddings request: one vector, as base64 or as a list of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import attrgetter
from typing import Any

import msgspec
import numpy as np

from include.classification import Problem, Reason
from include.output_columns import OutputColumn
from include.vector_arrays import FLOAT_BYTES, packed_numbers

Record = msgspec.Struct
_decode = msgspec.json.Decoder(list[float] | bytes).decode


class VectorReader:
    """Turns vectors into records whose one attribute `f0` is the vector as float32 bytes.

    `quick` takes the vector's bytes; `read` takes its JSON in either form. A vector of another
    length than the job's is a failure for good: asking again would bring the same. Numbers that
    are no finite float32 make an answer invalid.
    """

    def __init__(self, column: OutputColumn) -> None:
        self.columns: tuple[OutputColumn, ...] = (column,)
        self.getters: list[Callable[[Any], Any]] = [attrgetter("f0")]
        self._record = msgspec.defstruct("Output", [("f0", Any)], gc=False)
        self.nothing: Record = self._record(None)
        self._bytes = column.size * FLOAT_BYTES
        # No vector needs a second look for what its bytes hold: this is longer than any of them.
        self.trap = bytes(self._bytes + 1)

    def quick(self, content: bytes) -> Record | Problem:
        """Return the record of a vector given as bytes."""
        if len(content) != self._bytes:
            return self._wrong_size(len(content))
        numbers = np.frombuffer(content, dtype="<f4")
        # A product is quicker, and infinite or NaN whenever a number is.
        if not math.isfinite(numbers.dot(numbers)) and not np.isfinite(numbers).all():
            return Problem(
                Reason.INVALID_ANSWER, message="The vector has a number that is no float32."
            )
        return self._record(content)

    def read(self, content: str) -> Record | Problem:
        """Return the record of a vector given as JSON."""
        try:
            found = _decode(content)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            message = "The answer is not one vector of numbers."
            return Problem(Reason.INVALID_ANSWER, message=message)
        if isinstance(found, bytes):
            return self.quick(found)
        return self.quick(packed_numbers(found))

    def _wrong_size(self, size: int) -> Problem:
        found, expected = size / FLOAT_BYTES, self._bytes // FLOAT_BYTES
        message = f"The vector has {found:g} numbers, expected {expected}."
        return Problem(Reason.WRONG_DIMENSIONS, message=message)
