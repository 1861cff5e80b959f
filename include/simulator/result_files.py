"""The output and error file of one batch, written line by line to scratch files."""

from __future__ import annotations

from pathlib import Path
from random import Random

from include.simulator.faults import FileShape

HELD = 64
BOM = b"\xef\xbb\xbf"


class ResultFile:
    """One file of lines, with the line ends and marks that `shape` asks for.

    With a seed as `shuffled` neighbouring lines change places, for the API promises no order.
    """

    def __init__(self, path: Path, shape: FileShape | None, *, shuffled: int | None = None) -> None:
        self.path = path
        self.lines = 0
        self._shape = shape
        self._end = b"\r\n" if shape is not None and shape.crlf else b"\n"
        self._file = path.open("wb", buffering=1 << 20)
        self._random = None if shuffled is None else Random(shuffled)
        self._held: list[bytes] = []
        if shape is not None and shape.bom:
            self._file.write(BOM)

    def write(self, line: bytes) -> None:
        """Add one line, given without its end."""
        self.lines += 1
        if self._random is not None:
            if len(self._held) < HELD:
                self._held.append(line)
                return
            place = int(self._random.random() * HELD)
            line, self._held[place] = self._held[place], line
        self._put(line)

    def _put(self, line: bytes) -> None:
        self._file.write(line)
        self._file.write(self._end)

    def close(self) -> None:
        """Write what is left; the file is complete afterwards."""
        for line in self._held:
            self._put(line)
        self._held = []
        if self.lines and self._shape is not None and self._shape.no_final_newline:
            self._file.seek(-len(self._end), 2)
            self._file.truncate()
        self._file.close()

    def empty(self) -> None:
        """Throw all bytes away; the file stays, with no line in it."""
        self.path.write_bytes(b"")
