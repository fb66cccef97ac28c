"""Standard input and output of a command: they may be closed, full, or of those descriptors that never wait.

AgentError
└── OutputFailed        what was found cannot be written
"""

import errno
import io
import os
import select
import sys
from typing import BinaryIO, TextIO

from agent.core.errors import AgentError

STDIN = "-"


class OutputFailed(AgentError):
    """What was found cannot be written: the disk is full, the descriptor is closed."""


class Output:
    """Standard output, or `out`: that it fails is no fault of what is read. Raises OutputFailed and BrokenPipeError."""

    def __init__(self, out: BinaryIO | None) -> None:
        self._out = out or stdout().buffer

    def write(self, lines: bytes | memoryview) -> None:
        try:
            self._out.write(lines)
        except BrokenPipeError:
            raise
        except OSError as err:
            raise self._failed(err) from err

    def flush(self) -> None:
        try:
            self._out.flush()
        except BrokenPipeError:
            raise
        except OSError as err:
            raise self._failed(err) from err

    def _failed(self, err: OSError) -> OutputFailed:
        # Else Python writes the rest once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())
        return OutputFailed(f"standard output: {err.strerror}", remedy="Make room, or write elsewhere.")


def hold_closed() -> None:
    """Let descriptors 0 to 2 that are closed lead nowhere, and logs go there.

    Else the file that is opened next takes such a one's place, and is written to by whoever means standard error.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    if sys.stderr is None:
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)


def stdout() -> TextIO:
    """Standard output. Raises OutputFailed where that is closed."""
    if sys.stdout is None:
        raise OutputFailed("standard output is closed", remedy="Name a place to write to.")
    return sys.stdout


def opened(path: str) -> io.FileIO:
    """The file at a path, or standard input (STDIN), to be read. Raises OSError."""
    if path != STDIN:
        return io.FileIO(path)
    if sys.stdin is None:
        raise OSError(errno.EBADF, "standard input is closed")
    return io.FileIO(sys.stdin.fileno(), closefd=False)


def fill(file: io.RawIOBase | io.BytesIO, room: memoryview) -> int:
    """Read what there is; 0: it is at its end. Waits, also where the descriptor would not. Raises OSError."""
    while (got := file.readinto(room)) is None:
        select.select([file], [], [])
    return got
