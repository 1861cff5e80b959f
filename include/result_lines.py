r"""The lines of an output or error file, without ever holding more than a few of them.

Lines end at `\n` and nowhere else. A byte-order mark, `\r\n`, blank lines and a missing final
newline are accepted.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import BinaryIO

import msgspec

MAX_LINE_BYTES = 64 << 20  # a longer line is quarantined without being held in memory
BLOCK_BYTES = 1 << 18
KEPT_BYTES = 4096  # of an overlong line
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Line(msgspec.Struct, gc=False):
    """One line of a file: number from 1, offset in bytes, data and size with the line end.

    Of an overlong line `data` holds only the beginning, and is shorter than `size`.
    """

    number: int
    offset: int
    data: bytes
    size: int

    @property
    def length(self) -> int:
        """The bytes of the line without its line end."""
        ends = (b"\r\n", b"\n")
        return self.size - next((len(end) for end in ends if self.data.endswith(end)), 0)

    def without_data(self) -> Line:
        """Return the line's position alone, so that many can be held."""
        return Line(self.number, self.offset, self.data[-2:], self.size)


class Block:
    r"""Some lines that follow each other in a file; `lines` are their bytes without the `\n`.

    An overlong line is alone in its block, which holds only its beginning.
    """

    def __init__(
        self, number: int, offset: int, lines: list[bytes], size: int, *, overlong: bool = False
    ) -> None:
        self.lines = lines
        self._number = number
        self._offset = offset
        self.size = size
        self._overlong = overlong
        self._starts: list[int] | None = None

    def line(self, at: int) -> Line:
        """Return the line at a position of the block, with its place in the file."""
        data, start = self.lines[at], self.start(at)
        if self._overlong:
            return Line(self._number, start, data + b"\n", self.size)
        if start + len(data) < self._offset + self.size:
            data += b"\n"  # only the last line of a file may have none
        return Line(self._number + at, start, data, len(data))

    def start(self, at: int) -> int:
        """Return the offset in the file of the line at a position of the block."""
        if self._starts is None:
            sizes = (len(line) + 1 for line in self.lines)
            self._starts = list(accumulate(sizes, initial=self._offset))
        return self._starts[at]


class ResultLines:
    """The lines of a stream, one at a time, or some at a time by `blocks`.

    `lines` and `blank` count what has been read so far; iterating counts blank lines and leaves
    them out, `blocks` has them among the others.
    """

    def __init__(self, stream: BinaryIO, max_bytes: int = MAX_LINE_BYTES) -> None:
        self.lines = 0
        self.blank = 0
        self._stream = stream
        self._max_bytes = max_bytes
        self._offset = 0

    def __iter__(self) -> Iterator[Line]:
        for block in self.blocks():
            for at, data in enumerate(block.lines):
                if not data or data.isspace():
                    self.blank += 1
                else:
                    yield block.line(at)

    def blocks(self) -> Iterator[Block]:
        """Yield all lines, those of some 256 KB at a time."""
        limit = self._max_bytes
        while data := self._stream.read(min(BLOCK_BYTES, limit)):
            lines = data.split(b"\n")
            begun = lines.pop()
            rest = self._stream.readline(limit) if begun else b""
            size = len(data) - len(begun)
            if len(begun) + len(rest) > limit:
                if lines:
                    yield self._block(lines, size)
                yield self._overlong_block(begun + rest)
                continue
            if begun:
                lines.append(begun + rest.removesuffix(b"\n"))
                size += len(begun) + len(rest)
            yield self._block(lines, size)

    def _block(self, lines: list[bytes], size: int) -> Block:
        if not self._offset and lines[0].startswith(BYTE_ORDER_MARK):
            lines[0] = lines[0].removeprefix(BYTE_ORDER_MARK)
            self._offset = len(BYTE_ORDER_MARK)  # no part of the line
            size -= self._offset
        return self._counted(Block(self.lines + 1, self._offset, lines, size), size)

    def _overlong_block(self, head: bytes) -> Block:
        """Skip the rest of an overlong line."""
        size, piece = len(head), head
        while not piece.endswith(b"\n") and (piece := self._stream.readline(1 << 20)):
            size += len(piece)
        lines = [head[:KEPT_BYTES]]
        return self._counted(Block(self.lines + 1, self._offset, lines, size, overlong=True), size)

    def _counted(self, block: Block, size: int) -> Block:
        self.lines += len(block.lines)
        self._offset += size
        return block


def read_lines(stream: BinaryIO) -> ResultLines:
    """Return the lines of `stream`; memory holds a few of them at a time."""
    return ResultLines(stream)
