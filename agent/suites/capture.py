"""What a run's processes wrote, kept in a file: the beginning and the end, when it is too much.

Source: protocols/suites.md, "A run" ("beyond `limits.output` the middle is cut and the cut told").
"""

import os
from pathlib import Path


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
                at = (self._seen - self._head) % self._ring
                self._file.seek(self._head)
                ring = self._file.read(self._ring)
                self._file.seek(self._head)
                self._write(b"\n[%d bytes cut here]\n" % self.cut, ring[at:], ring[:at])
            os.fsync(self._file.fileno())

    def _write(self, *parts: bytes) -> None:
        for part in parts:
            view = memoryview(part)
            while view:
                n = self._file.write(view)
                self._seen += n
                view = view[n:]
