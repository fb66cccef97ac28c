"""A log file: what it is known by, and how far it is matched.

It is known by device and inode, a hash of its first bytes, and one of those before an offset: names change, and inodes
come again. Pure: what is to be read comes as a function.

Source: protocols/logs.md 5.
"""

import hashlib
import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import msgspec

HEAD = 1024  # bytes at a file's beginning that it is known by; fewer while it is shorter
LAST = 64  # bytes before the offset that are read again
_PACKED = r"\.(gz|xz|bz2|zst|lz4|Z)"
UNKNOWN = ""  # a hash that is not compared

Reading = Callable[[int, int], bytes]  # from an offset, at most so many bytes


class Stat(NamedTuple):
    """What stat says of a file. `kind` is "file", or a word for what cannot be followed: "directory", "FIFO".

    `written` is the time of its last write, `is_deleted` that it has no name any more (known of open ones only).
    """

    dev: int
    ino: int
    size: int
    kind: str = "file"
    written: float = 0.0
    is_deleted: bool = False


class Came:
    """Files that came to a path, as inotify tells. `missed` were not taken up; -1: one was, and is not told yet.

    Of the file that is there at the first look, `first`, nobody knows whether inotify is still to tell.
    """

    def __init__(self) -> None:
        self.missed = 0
        self.first: tuple[int, int] | None = None
        self._is_first = False  # it never left the path, and was not told

    def look(self, found: Stat | int | None, came: int, *, is_first: bool) -> None:
        """What is at the path, and how many came since the last look."""
        place = found[:2] if isinstance(found, Stat) else None
        if is_first:
            self.first, self._is_first = place, place is not None
            self.missed = int(isinstance(found, Stat) and found.kind == "file")
            return
        is_own = came > 0 and self._is_first and place == self.first  # it came last: it is still there, or again
        self._is_first = self._is_first and place == self.first and not is_own
        self.missed += came - is_own

    def take_up(self) -> None:
        """One is seen. Perhaps before inotify told of it; but one event may never come."""
        self.missed = max(self.missed - 1, -1)


class Sibling(NamedTuple):
    """The path's own file, or one beside it. `fits` are the checkpoints of FindSiblings that fits() says yes to.

    `is_rotation`: by its name it once was at the path. `is_copy`: it is the beginning of what is there now.
    """

    path: str
    stat: Stat
    is_rotation: bool
    fits: frozenset[int]
    is_copy: bool = False


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """How far a file was matched: to `offset`, the start of a line. Hashes are of its head, and of what is before.

    `written` is when that content was written last, `is_copied` that it is read from a copy, and the gap told.
    `is_gone`: after a restart nothing was found of it, which is told.
    """

    dev: int
    ino: int
    generation: int
    offset: int
    head_size: int
    head_hash: str
    last_hash: str
    written: float
    is_copied: bool = False
    is_gone: bool = False


class Opening(NamedTuple):
    """A file that is being opened: the path's own, or a sibling of an origin; `done` says where to go on in it.

    `is_old`: it came before the start, so that it is none of those that inotify tells of.
    """

    origin: tuple[int, int] | None = None
    done: Checkpoint | None = None
    is_old: bool = False


def digest(data: bytes | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def fits(done: Checkpoint, size: int, head: bytes, read: Reading) -> bool:
    """Does a file of that size, with those first HEAD bytes, have what was matched by then? `read(at, size)` reads it.

    False too where nothing is known of the content.
    """
    if not done.head_size or size < done.offset or not begins(head, done):
        return False
    overlap = min(LAST, done.offset)
    return done.last_hash == UNKNOWN or done.last_hash == digest(read(done.offset - overlap, overlap))


def is_copy(size: int, read: Reading, of_size: int, read_of: Reading) -> bool:
    """Is a file of that size the beginning of another: a copy of it, perhaps still in the making?"""
    if not 0 < size <= of_size:
        return False
    last = max(0, size - LAST)
    return read(0, HEAD) == read_of(0, min(HEAD, size)) and read(last, LAST) == read_of(last, size - last)


def is_rotation(name: str, of: str) -> bool:
    """Is that the name of a file that once was called `of`: x.1, x-20260105, x.2026-01-05.gz, x.old, y-1.log?"""
    stem, dot, ending = of.rpartition(".")
    names = [(of, "")] + ([(stem, f".{ending}")] if dot and stem else [])
    return any(
        re.fullmatch(rf"{re.escape(own)}([.-]\d[\dTZ:._-]*|[.-]old){re.escape(last)}({_PACKED})?", name)
        for own, last in names
    )


def rotated_from(name: str) -> list[str]:
    """What a file of that name may have been called, if it is_rotation()."""
    stem, dot, ending = re.sub(rf"{_PACKED}$", "", name).rpartition(".")
    starts = [name[:at] for at, mark in enumerate(name) if mark in ".-"]
    names = starts + [f"{start}.{ending}" for start in starts if dot and len(start) < len(stem)]
    return [of for of in names if of and is_rotation(name, of)]


def begins(head: bytes, checkpoint: Checkpoint) -> bool:
    """Does a file with that head begin as the checkpoint's did?"""
    return digest(head[: checkpoint.head_size]) == checkpoint.head_hash


def is_it(sibling: Sibling, done: Checkpoint, asked: tuple[Checkpoint, ...]) -> bool:
    """Is it the very file of a checkpoint, under whatever name?"""
    if (sibling.stat.dev, sibling.stat.ino) != (done.dev, done.ino):
        return False
    return asked.index(done) in sibling.fits or (not done.head_size and sibling.stat.size >= done.offset)


def unseen(siblings: Sequence[Sibling], since: float, held: Collection[tuple[int, int]]) -> list[Sibling]:
    """Those that came and went at the path unseen, oldest first: rotations written after a time, of unknown content.

    `held` are device and inode of files that are open, and tell by themselves what they are.
    """
    found = [
        sibling
        for sibling in siblings
        if sibling.is_rotation and sibling.stat.size and sibling.stat.written > since
        if not sibling.fits and not sibling.is_copy and sibling.stat[:2] not in held
    ]
    return sorted(found, key=lambda sibling: sibling.stat.written)


def leading_zeros(view: memoryview) -> int:
    """How many NULs it begins with."""
    if not view or view[0]:
        return 0
    return len(view) - len(bytes(view).lstrip(b"\0"))


class File:
    """One open file: the path's own, or one that is drained."""

    def __init__(self, number: int, stat: Stat, generation: int, now: float) -> None:
        self.number, self.stat, self.generation = number, stat, generation
        self.written = stat.written  # when it was still the same content
        self.origin = (stat.dev, stat.ino)  # where the lines were written: a copy keeps that
        self.offset = self.before = 0  # `before` bytes of the line at the offset are done, by windows
        self.head = b""  # as last read; known by it is what was matched, since the rest may change
        self.head_size, self.head_hash = 0, digest(b"")
        self._known = b""  # a head that was found to be the same: mostly it is read again
        self._last: bytes | str = b""  # what stands before the offset, or its hash
        self.is_at_end = self.is_copied = False
        self.seeks_line = False  # begin with the line that the offset is in
        self.changed_at = now
        self.read_at = -math.inf
        self.wants_partial = False
        self.partial_size = -1  # the size at which its unfinished last line was matched
        self.zeros_at = -1  # where zeros were read once
        self.reported: dict[int, set[str]] = {}  # by line: the rules told of it, while it may be matched again

    @property
    def overlap(self) -> int:
        """Bytes before the offset that are read again."""
        return min(LAST, self.offset)

    @property
    def unread(self) -> int:
        return max(0, self.stat.size - self.offset)

    @property
    def has_partial(self) -> bool:
        """Is there a last line without its end that was not matched yet?"""
        size = self.stat.size
        return size > self.offset and size != self.partial_size and self.zeros_at != self.offset

    def grow(self, found: Stat, now: float, *, seen: bool = False) -> None:
        """Its size is known again; `seen`: by reading to its end."""
        if found.size != self.stat.size:
            self.changed_at = now
            self.is_at_end = seen
        elif found.written != self.stat.written:
            self.is_at_end = False  # perhaps cut, and grown to the same size
        self.stat = found

    def is_as_known(self, head: bytes, last: bytes) -> bool:
        """Does this stand there as it did when it was found to be the same file? The head may have grown."""
        if last != self._last or not self._known or not head.startswith(self._known):
            return False
        self.head = self._known = head
        return True

    def knows(self, head: bytes, last: memoryview) -> bool:
        """Is it the same file? What stands there now: its first HEAD bytes, and `overlap` of them before the offset."""
        is_same = last == self._last if isinstance(self._last, bytes) else self._last in (UNKNOWN, digest(last))
        return is_same and (head == self._known or self._knows_head(head))

    def _knows_head(self, head: bytes) -> bool:
        was, self.head = self.head, head
        if not self.head_size and b"\0" not in was:  # nothing was matched yet, but it was looked at
            is_same = head.startswith(was)
        else:
            is_same = digest(head[: self.head_size]) == self.head_hash
        if is_same:
            self._known = head
        return is_same

    def begin(self, to: int) -> None:
        """Begin at an offset; what stands before it is not known."""
        self.offset, self._last = to, UNKNOWN

    def seek(self, last: memoryview) -> None:
        """Begin with the line that the offset is in: `last` is what stands before it."""
        self.seeks_line = False
        text = bytes(last)
        is_whole = len(text) == self.offset
        start = text.rfind(b"\n", 0 if is_whole else LAST - 1) + 1  # LAST bytes before it are to be known again
        if start or is_whole:
            self.go_on(self.offset - len(text) + start, 0, last[max(0, start - LAST) : start])

    def go_on(self, to: int, before: int, last: memoryview) -> None:
        """The offset moves; `last` is what is read before it, LAST bytes if there are so many."""
        self.offset, self.before, self._last = to, before, bytes(last[-LAST:])
        if self.head_size < len(self.head):
            self.head_size = min(len(self.head), to)
            self.head_hash = digest(self.head[: self.head_size])
        if self.reported:
            self.reported = {line: rules for line, rules in self.reported.items() if line >= to - before}

    def resume(self, done: Checkpoint) -> None:
        """Go on where a checkpoint says."""
        self.offset, self._last, self.written = done.offset, done.last_hash, done.written
        self.is_copied = done.is_copied
        if done.offset:
            self.head_size, self.head_hash = done.head_size, done.head_hash

    def rewind(self, to: int) -> None:
        """Read again from an offset where a line begins, if that lies behind."""
        if to < self.offset:
            self.offset, self.before, self._last, self.is_at_end = to, 0, UNKNOWN if to else b"", False

    def checkpoint(self) -> Checkpoint:
        head_size, head_hash, last = self.head_size, self.head_hash, self._last
        if not head_size and b"\0" not in self.head:  # zeros may become data
            head_size, head_hash = len(self.head), digest(self.head)
        return Checkpoint(
            dev=self.origin[0],
            ino=self.origin[1],
            generation=self.generation,
            offset=self.offset - self.before,
            head_size=head_size,
            head_hash=head_hash,
            last_hash=UNKNOWN if self.before else digest(last) if isinstance(last, bytes) else last,
            written=self.written,
            is_copied=self.is_copied,
        )
