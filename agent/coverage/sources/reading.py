"""The product's files as they are read for the catalog. What was made of a text is kept: it is the same next time.

To take a text apart costs a hundred times what it costs to read it. Kept is what was made of a text at a place below
the root, wherever that root is: suites that are fetched have another folder in each run.

A disk may hang for hours: what asks it runs in a thread that is left behind when the wait for it is cancelled.

Source: drill sheet, "Probe sources".
"""

import errno
import os
import stat
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import msgspec
import trio

from agent.coverage.javascript import Script
from agent.coverage.python import Module
from agent.coverage.sources import Asking
from agent.coverage.sources.product import Chosen, files_below

SLICE_S = 0.5  # s of a thread's work, then a cancel is seen
MOST_FILES = 100_000  # of a product
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


def text_of(file: str, most: int) -> tuple[Stamp, bytes]:
    """A file's stamp and text. Raises OSError, also for one of more than `most` bytes, and for a pipe or a device."""
    _check(os.stat(file), most)  # before it is opened, which may do something to a device
    with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as opened:
        status = os.fstat(opened.fileno())
        _check(status, most)
        text = opened.read(most + 1)
    if len(text) > most:
        raise OSError(errno.EFBIG, f"more than {most} bytes")
    return stamp_of(status), text


def _check(status: os.stat_result, most: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "no regular file")
    if status.st_size > most:
        raise OSError(errno.EFBIG, f"more than {most} bytes")


def digest_of(text: bytes) -> bytes:
    """16 bytes that are another text's only by a wonder."""
    return blake2b(text, digest_size=16).digest()


def stamp_if_same(file: str, stamp: Stamp, digest: bytes, most: int) -> Stamp | None:
    """A file's stamp now, if its text is what it was; None of another text, and of what cannot be read any more.

    The text is read again only where the stamp is another: a file that was touched, or written anew, may be the same.
    """
    try:
        if stamp_of(os.stat(file)) == stamp:
            return stamp
        stamp, text = text_of(file, most)
    except OSError:
        return None
    return stamp if digest_of(text) == digest else None


class File(NamedTuple, Generic[S]):
    """A file that had this stamp and text, and what was made of it. `path` is below its root, `file` absolute."""

    path: str
    file: str
    made: S
    stamp: Stamp
    digest: bytes


class Product(msgspec.Struct, Generic[S]):
    """What was read: the roots without links, the files in order, and by the reason those that are left out."""

    roots: list[str] = []
    files: list[File[S]] = []
    left_out: dict[str, list[str]] = {}


class _Kept(msgspec.Struct, Generic[S]):
    made: S
    size: int
    used: int  # in which pass


class Reading(Generic[S]):
    """Reads files of these suffixes (".js") and makes something of each: `make(text, path, file)`, as in File.

    Larger ones than `most_bytes` are left out. A pass is all files of a product; there is one thread at a time.
    """

    def __init__(
        self,
        make: Callable[[bytes, str, str], S],
        suffixes: Collection[str],
        most_bytes: int,
        *,
        most_kept: int = MOST_KEPT,
    ) -> None:
        self._make: Callable[[bytes, str, str], S] = make
        self._suffixes, self._most_bytes = suffixes, most_bytes
        self._one = trio.CapacityLimiter(1)  # a thread that was left behind has it until the disk answers
        self._room = most_kept
        self._kept: OrderedDict[tuple[str, bytes], _Kept[S]] = OrderedDict()  # the one used longest ago comes first
        self._pass = 0

    async def read(self, roots: Sequence[Path], chosen: Chosen, asking: Asking) -> Product[S]:
        """All files below the roots that are chosen; those that cannot be read are left out."""
        product: Product[S] = Product()
        steps = self._steps(roots, chosen, product)
        while True:
            with asking(", ".join(map(str, roots))):
                if await trio.to_thread.run_sync(_for_a_while, steps, abandon_on_cancel=True, limiter=self._one):
                    return product

    # ---- in a thread ----

    def _steps(self, roots: Sequence[Path], chosen: Chosen, product: Product[S]) -> Iterator[None]:
        self._pass += 1
        number = self._pass
        seen: set[str] = set()  # a root may lie in another
        for root in roots:
            real = os.path.realpath(root)
            if real in product.roots:
                continue
            product.roots.append(real)
            for path, file in files_below(Path(real), chosen, self._suffixes):
                if file in seen:
                    continue
                seen.add(file)
                if len(product.files) >= MOST_FILES:
                    product.left_out[f"with all behind it, more than {MOST_FILES} files"] = [file]
                    return
                try:
                    product.files.append(self._read(path, file, number))
                except OSError as error:
                    product.left_out.setdefault(error.strerror or str(error), []).append(file)
                yield

    def _read(self, path: str, file: str, number: int) -> File[S]:
        stamp, text = text_of(file, self._most_bytes)
        digest = digest_of(text)
        kept = self._kept.get((path, digest))
        if kept is None:
            made = self._make(text, path, file)
            self._keep((path, digest), _Kept(made, len(text), number))
            return File(path, file, made, stamp, digest)
        kept.used = number
        self._kept.move_to_end((path, digest))
        made = kept.made
        if made.unit.file != file:
            made = msgspec.structs.replace(made, unit=msgspec.structs.replace(made.unit, file=file))
        return File(path, file, made, stamp, digest)

    def _keep(self, key: tuple[str, bytes], made: _Kept[S]) -> None:
        while self._room < made.size:
            oldest = next(iter(self._kept), None)
            # What was used in this pass or the one before is wanted again: of a product that is too large a part stays.
            if oldest is None or self._kept[oldest].used >= made.used - 1:
                return
            self._room += self._kept.pop(oldest).size
        self._room -= made.size
        self._kept[key] = made


def _for_a_while(steps: Iterator[None]) -> bool:
    """Take steps for SLICE_S; are they over?"""
    until = time.monotonic() + SLICE_S
    return all(time.monotonic() < until for _ in steps)
