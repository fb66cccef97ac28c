"""Lines into a descriptor whose other end somebody else reads: nothing waits for him but these lines.

They wait here, up to a bound; a line beyond it is dropped, and how many were is told where they would have been.

Source: protocols/gator.md, "Command line"; protocols/monitors.md, "Results".
"""

import logging
import math
import os
import select
from collections.abc import Callable

import trio

log = logging.getLogger(__name__)

MIB = 1024 * 1024
LAST_S = 10.0  # that nothing is read, when all has ended, until the rest is given up


class Outflow:
    """Lines into `fd`, by `keep_writing`; `name` is what the log calls it.

    `dropped` makes the line that stands for so many that were dropped.
    """

    def __init__(self, fd: int, name: str, dropped: Callable[[int], bytes]) -> None:
        self._fd, self._name, self._line_of = fd, name, dropped
        self._waiting = bytearray()
        self._dropped = 0
        self._news = trio.Event()
        self._is_read, self._is_closed = True, False
        self._last_s = math.inf
        self._writing = trio.CancelScope()

    def put(self, line: bytes, room: float) -> None:
        """Have a line written; or drop it, if more than `room` bytes would wait with it, or nobody reads any more."""
        if not self._is_read:
            return
        if len(self._waiting) + len(line) > room:
            if not self._dropped:
                log.warning("%s is read too slowly: lines are dropped", self._name)
            self._dropped += 1
            return
        self._tell_dropped()
        self._waiting += line
        self._news.set()

    def close(self, last_s: float = math.inf) -> None:
        """No more will come. What waits is given up when for `last_s` seconds nothing of it is read."""
        self._tell_dropped()
        self._is_closed, self._last_s = True, last_s
        self._writing.deadline = self._deadline()
        self._news.set()

    async def keep_writing(self) -> None:
        """Write what is put, until it is closed, and all is written or given up. Raises OSError when it cannot be."""
        while self._waiting or not self._is_closed:
            if not self._waiting:
                self._news = trio.Event()
                await self._news.wait()
                continue
            part = bytes(self._waiting[: select.PIPE_BUF])  # a little, to see it go on
            with trio.CancelScope(deadline=self._deadline()) as self._writing:
                try:
                    written = await trio.to_thread.run_sync(_write, self._fd, part, abandon_on_cancel=True)
                except OSError:
                    self._is_read = False
                    raise
                del self._waiting[:written]
            if self._writing.cancelled_caught:
                log.warning("%s is not read: %d lines dropped", self._name, self._waiting.count(b"\n"))
                return

    def _deadline(self) -> float:
        return trio.current_time() + self._last_s if self._is_closed else math.inf

    def _tell_dropped(self) -> None:
        if self._dropped:
            self._waiting += self._line_of(self._dropped)
            self._dropped = 0


def _write(fd: int, part: bytes) -> int:
    """Blocks: the descriptor is the caller's, who would see O_NONBLOCK too; or it may have that from him."""
    while True:
        try:
            return os.write(fd, part)
        except BlockingIOError:
            select.select([], [fd], [])
