"""What a run's processes wrote, kept in a file: the beginning and the end, when it is too much.

Source: protocols/suites.md, "A run" ("beyond `limits.output` the middle is cut and the cut told").
"""

import os
from pathlib import Path

_BLOCK = 256 * 1024  # bytes that `close` moves at a time


class Capture:
    """A file of at most `limit` bytes (0: no limit) and one line that tells what was cut out of its middle.

    The first half is written as it comes. Then the file's second half is a ring: the newest bytes over the oldest.
    `close` turns the ring so that the file reads in order.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self.path, self.limit = path, limit
        self._file = open(path, "w+b", buffering=0)  # noqa: SIM115 - closed by `close`
        self._head = limit // 2  # bytes of the first half
        self._ring = limit - self._head
        self._seen = 0

    @property
    def cut(self) -> int:
        """Bytes that are gone."""
        return max(0, self._seen - self.limit) if self.limit else 0

    def write(self, data: bytes) -> None:
        """Take what was read. Raises OSError, as a full disk does; the bytes are then not counted."""
        if not self.limit:
            self._write(data)
            return
        room = self._head - self._seen
        if room > 0:
            self._write(data[:room])
            data = data[room:]
        if len(data) > self._ring:  # only its end can survive
            self._seen += len(data) - self._ring
            data = data[-self._ring :] if self._ring else b""
        while data:
            at = (self._seen - self._head) % self._ring
            part = data[: self._ring - at]
            self._file.seek(self._head + at)
            self._write(part)
            data = data[len(part) :]

    def close(self) -> None:
        """Bring the file into order and onto the disk."""
        with self._file:
            if self.cut:
                self._put_in_order(b"\n[%d bytes cut here]\n" % self.cut)
            os.fsync(self._file.fileno())

    def _put_in_order(self, note: bytes) -> None:
        """Make newest, oldest, note behind the first half into note, oldest, newest: turned as a whole, then each."""
        newest, oldest = self._head, self._head + (self._seen - self._head) % self._ring
        end = self.limit + len(note)
        self._file.seek(self.limit)
        self._write(note)
        self._turn(newest, end)
        after_note, after_oldest = newest + len(note), end - (oldest - newest)
        for start, stop in ((newest, after_note), (after_note, after_oldest), (after_oldest, end)):
            self._turn(start, stop)

    def _turn(self, start: int, end: int) -> None:
        """Reverse the bytes between two places of the file, with two blocks of them in memory."""
        while size := min(_BLOCK, (end - start) // 2):
            self._file.seek(start)
            first = self._file.read(size)
            self._file.seek(end - size)
            last = self._file.read(size)
            self._file.seek(start)
            self._write(last[::-1])
            self._file.seek(end - size)
            self._write(first[::-1])
            start, end = start + size, end - size

    def _write(self, part: bytes) -> None:
        view = memoryview(part)
        while view:
            n = self._file.write(view)
            self._seen += n
            view = view[n:]
