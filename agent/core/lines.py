"""Cuts a byte stream into lines: bytes in, lines out. How the bytes were chunked never changes the lines."""

from agent._native import ffi, lib
from agent.core.engine import ENGINE

_CAPACITY = 4096  # line ends found per native call: a pipe's 64 KiB of short lines in one or two


class CutLine(bytes):
    """The first `limit` bytes of a line that was longer; `dropped` bytes of it are gone."""

    dropped: int

    def __new__(cls, kept: bytes | bytearray, dropped: int) -> "CutLine":
        line = super().__new__(cls, kept)
        line.dropped = dropped
        return line


class Lines:
    """Lines end with LF, which is not part of them; a CR before it is left to the caller.

    Holds at most `limit` bytes of an unfinished line. What a line has beyond is dropped, and the line is delivered as a
    CutLine when its end has come, so that the count is final.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._pending = bytearray()  # of the unfinished line, its first `limit` bytes
        self._dropped = 0  # of the unfinished line, the bytes beyond
        self._ends = ffi.new(f"size_t[{_CAPACITY}]")

    def feed(self, data: bytes | bytearray) -> list[bytes]:
        """Take what was read; return the lines that are now complete, in order."""
        data = bytes(data)
        lines: list[bytes] = []
        start = 0
        if self._pending or self._dropped:
            end = data.find(b"\n")
            if end < 0:
                self._hold(data)
                return lines
            self._hold(data[:end])
            lines.append(self._release())
            start = end + 1
        found = _CAPACITY
        while found == _CAPACITY:
            found = lib.line_ends(ENGINE, data, start, len(data), self._ends, _CAPACITY)
            for end in ffi.unpack(self._ends, found):
                lines.append(data[start:end])
                start = end + 1
        if len(data) > self.limit:
            lines = [self._cut(line) if len(line) > self.limit else line for line in lines]
        self._hold(data[start:])
        return lines

    def eof(self) -> list[bytes]:
        """No more will come; what is left is a line without its LF, or nothing."""
        return [self._release()] if self._pending or self._dropped else []

    def _hold(self, part: bytes) -> None:
        room = self.limit - len(self._pending)
        self._pending += part[:room]
        self._dropped += max(0, len(part) - room)

    def _release(self) -> bytes:
        line = CutLine(self._pending, self._dropped) if self._dropped else bytes(self._pending)
        self._pending, self._dropped = bytearray(), 0
        return line

    def _cut(self, line: bytes) -> CutLine:
        return CutLine(line[: self.limit], len(line) - self.limit)
