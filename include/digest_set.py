"""Sets of digests that take 16 bytes of memory each: ten million of them fit a small worker."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

DIGEST_BYTES = 16
_KIND = np.dtype(f"S{DIGEST_BYTES}")  # all have the same length, so its padding means nothing

Digests = npt.NDArray[np.bytes_]
Mask = npt.NDArray[np.bool_]


def digests_of_hex(texts: Iterable[str]) -> Digests:
    """Return the digests of texts of 32 hex characters."""
    return digests_of(bytes.fromhex("".join(texts)))


def digests_of(joined: bytes | bytearray) -> Digests:
    """Return digests that are given end to end."""
    if not joined:
        return np.empty(0, dtype=_KIND)
    return np.frombuffer(joined, dtype=_KIND)


class DigestSet:
    """Digests that are added first, and looked up later."""

    def __init__(self, parts: Iterable[Digests] = ()) -> None:
        self._joined = bytearray()
        self._sorted: Digests | None = None
        for part in parts:
            self.add(part)

    def __len__(self) -> int:
        return len(self._joined) // DIGEST_BYTES

    def add(self, digests: Digests) -> None:
        """Put digests in, until the first look-up."""
        if self._sorted is not None:
            raise AssertionError("a digest was added after a look-up")
        self._joined += digests.tobytes()

    def has(self, digests: Digests) -> Mask:
        """Tell for each of `digests` whether it is in the set."""
        if not self._joined:
            return np.zeros(len(digests), dtype=np.bool_)
        if self._sorted is None:
            self._sorted = digests_of(self._joined)
            self._sorted.sort()
        at = np.searchsorted(self._sorted, digests)
        found: Mask = self._sorted[np.minimum(at, len(self._sorted) - 1)] == digests
        return found
