"""What a Tail (tail.py) wants done with the files of its path, and told of them.

Source: protocols/logs.md 2.3 and 5.
"""

from typing import Literal, NamedTuple

from agent.logs.identity import Checkpoint
from agent.logs.scanner import End

What = Literal["found", "rotated", "truncated", "replaced", "removed", "unreadable", "recovered", "lagging"]


class Open(NamedTuple):
    """Open the path for reading as number `file`; answer with opened() or failed()."""

    file: int
    path: str


class Close(NamedTuple):
    file: int


class Read(NamedTuple):
    """Read from an offset, at most `size` bytes, and the first HEAD bytes; answer with read()."""

    file: int
    at: int
    size: int


class Scan(NamedTuple):
    """Match the lines of `data`, which stands at `offset`, until no more is consumed; answer with scanned().

    `before` and `end`: scanner.Worker.scan. `origin`, device and inode, and `generation` are what ids are made of.
    """

    file: int
    origin: tuple[int, int]
    generation: int
    offset: int
    data: memoryview
    before: int
    end: End


class FindSiblings(NamedTuple):
    """Look at the path's own file and those beside it (x.1, x-DATE; no compressed ones); answer with siblings()."""

    known: tuple[Checkpoint, ...]


class Report(NamedTuple):
    """A `LogSource` event."""

    what: What
    generation: int
    detail: str = ""


class Gap(NamedTuple):
    """A `LogGap` event: bytes lost, or with `to` None possibly lost."""

    generation: int
    start: int
    to: int | None
    why: str


Act = Open | Close | Read | Scan | FindSiblings | Report | Gap
