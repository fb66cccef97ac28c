"""The product's files as they are read for the catalog. What was made of a text is kept: it is the same next time.

To take a text apart costs a hundred times what it costs to read it. Kept is what was made of a text at a place below
the root, wherever that root is: suites that are fetched have another folder in each run.

Source: drill sheet, "Probe sources".
"""

import os
from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b
from typing import Generic, NamedTuple, TypeVar

import msgspec
import trio

from agent.coverage.javascript import Script
from agent.coverage.python import Module

MOST_BYTES = 4 * 2**20  # of one file; larger ones were made by a tool, and nobody reads their coverage
MOST_KEPT = 16 * 2**20  # bytes of all texts of which something is kept, which takes up to three times as many

S = TypeVar("S", Script, Module)


class Stamp(NamedTuple):
    """By which a file is known to be as it was."""

    inode: int
    size: int
    modified_ns: int


def stamp_of(status: os.stat_result) -> Stamp:
    """The stamp of a file."""
    return Stamp(status.st_ino, status.st_size, status.st_mtime_ns)


def digest_of(text: bytes) -> bytes:
    """16 bytes that are another text's only by a wonder."""
    return blake2b(text, digest_size=16).digest()


class File(NamedTuple, Generic[S]):
    """What was made of a file that had this stamp, and this text."""

    made: S
    stamp: Stamp
    digest: bytes


class _Kept(msgspec.Struct, Generic[S]):
    made: S
    size: int
    used: int  # in which pass


class Reading(Generic[S]):
    """Reads files and makes something of each: `make(text, path, file)`, `path` below the root, `file` absolute.

    A pass is all files of a product. `one` is for who makes a pass, in a thread: there is one at a time.
    """

    def __init__(self, make: Callable[[bytes, str, str], S], most: int = MOST_KEPT) -> None:
        self.one = trio.Lock()
        self._make: Callable[[bytes, str, str], S] = make
        self._room = most
        self._kept: OrderedDict[tuple[str, bytes], _Kept[S]] = OrderedDict()  # the one used longest ago comes first
        self._pass = 0

    def begin(self) -> None:
        """A pass begins."""
        self._pass += 1

    def read(self, path: str, file: str) -> File[S] | None:
        """What is made of this file; None when it is larger than MOST_BYTES. Raises OSError."""
        with open(file, "rb") as opened:
            stamp = stamp_of(os.fstat(opened.fileno()))
            text = opened.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            return None
        digest = digest_of(text)
        kept = self._kept.get((path, digest))
        if kept is None:
            made = self._make(text, path, file)
            self._keep((path, digest), made, len(text))
            return File(made, stamp, digest)
        kept.used = self._pass
        self._kept.move_to_end((path, digest))
        made = kept.made
        if made.unit.file != file:
            made = msgspec.structs.replace(made, unit=msgspec.structs.replace(made.unit, file=file))
        return File(made, stamp, digest)

    def _keep(self, key: tuple[str, bytes], made: S, size: int) -> None:
        while self._room < size:
            oldest = next(iter(self._kept), None)
            # What was used in this pass or the one before is wanted again: of a product that is too large a part stays.
            if oldest is None or self._kept[oldest].used >= self._pass - 1:
                return
            self._room += self._kept.pop(oldest).size
        self._room -= size
        self._kept[key] = _Kept(made, size, self._pass)
