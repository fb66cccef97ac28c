"""What the disk says of a log: the path, the files beside it, and whether one is new. All of it blocks.

Source: protocols/logs.md 5.
"""

import errno
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from agent.logs.identity import HEAD, Checkpoint, Reading, Sibling, Stat, fits, is_copy, is_rotation
from agent.logs.paths import COMPRESSED

log = logging.getLogger(__name__)

MAX_SIBLINGS = 100
LISTINGS = 5  # of a folder in which names change meanwhile

FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY | os.O_NOFOLLOW  # to open a log with
_KINDS = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}


def stat_of(found: os.stat_result) -> Stat:
    """What a Tail wants to know of it."""
    kind = _KINDS.get(stat.S_IFMT(found.st_mode), "device")
    return Stat(found.st_dev, found.st_ino, found.st_size, kind, found.st_mtime, found.st_nlink == 0)


def look(path: str) -> Stat | int | None:
    """What stat says of a path. None: nothing is there; int: errno."""
    try:
        return stat_of(os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as err:
        return err.errno or errno.EIO


def siblings(path: str, known: Sequence[Checkpoint]) -> list[Sibling]:
    """The path's own file, and the newest of those beside it that may once have been there by name or inode."""
    found: list[Sibling | None] = []
    for _ in range(LISTINGS):
        names = _names_beside(path, known)
        newest = sorted(names, key=names.__getitem__, reverse=True)[:MAX_SIBLINGS]
        found = [look_into(path, known), *(_beside(other, name, path, known) for other, name, _ in newest)]
        if names.keys() == _names_beside(path, known).keys():  # else files may have been missed: they were renamed
            break
    return [sibling for sibling in found if sibling]


def _names_beside(path: str, known: Sequence[Checkpoint]) -> dict[tuple[str, str, int], float]:
    """When they were written: by path, the name that they may have had, and inode."""
    found: dict[tuple[str, str, int], float] = {}
    inodes = {done.ino for done in known}
    for own in dict.fromkeys((path, os.path.realpath(path))):
        folder, name = os.path.split(own)
        stem = name.split(".")[0] or name
        with suppress(OSError), os.scandir(folder) as entries:  # the folder is gone, or not for us
            for entry in entries:
                if entry.name != name and not entry.name.endswith(COMPRESSED):
                    with suppress(OSError):  # the file is gone
                        if (entry.name.startswith(stem) or entry.inode() in inodes) and entry.is_file(
                            follow_symlinks=False
                        ):
                            found[entry.path, name, entry.inode()] = entry.stat(follow_symlinks=False).st_mtime
    return found


def is_new(path: str, logs: Sequence[tuple[str, Checkpoint]], passed: dict[str, tuple[int, int, int]]) -> bool:
    """Is this file none of the logs that are followed, by their paths: not renamed, not the copy of a rotation? Blocks.

    `passed` keeps device, inode and size of those that are none. Like beginnings are no proof: many logs begin alike.
    """
    sibling = look_into(path, [done for _, done in logs])
    if sibling is None or sibling.stat[:3] == passed.get(path):
        return False
    passed.pop(path, None)
    for number, (of, done) in enumerate(logs):
        is_same = (done.dev, done.ino) == sibling.stat[:2]
        if is_same and (number in sibling.fits or not done.head_size):
            break
        is_named = is_rotation(os.path.basename(path), os.path.basename(of))
        if number in sibling.fits and is_named and _may_be_copy(path, of, done):
            break
    else:
        return True
    passed[path] = sibling.stat[:3]
    return False


def _may_be_copy(path: str, of: str, done: Checkpoint) -> bool:
    """Is it the beginning of a log that was not cut yet? Of a cut one it may have more than the checkpoint."""
    with (
        suppress(OSError),
        _opened(path, FLAGS) as (its, read),
        _opened(of, FLAGS & ~os.O_NOFOLLOW) as (own, read_of),
    ):
        if own[:2] == (done.dev, done.ino) and fits(done, own.size, read_of(0, HEAD), read_of):
            return is_copy(its.size, read, own.size, read_of)
    return True


def look_into(path: str, known: Sequence[Checkpoint]) -> Sibling | None:
    """Which of the known files it is. None: it cannot be read, or is no file. Blocks."""
    try:
        with _opened(path, FLAGS & ~os.O_NOFOLLOW) as (status, read):
            if status.kind != "file":
                return None
            return Sibling(path, status, False, _fitting(known, status, read))
    except OSError as err:
        log.debug("cannot read path=%s error=%s", path, err)
        return None


def _beside(path: str, name: str, own: str, known: Sequence[Checkpoint]) -> Sibling | None:
    """A file beside the path `own`, which perhaps was called `name` once."""
    sibling = None
    try:
        for _ in range(2):  # a copy may have been completed, and the path's file cut, while these were compared
            with _opened(path, FLAGS) as (status, read):
                its, is_rotated = _fitting(known, status, read), is_rotation(os.path.basename(path), name)
                sibling = Sibling(path, status, is_rotated, its)
                if not is_rotated or its:
                    break
                with suppress(OSError), _opened(own, FLAGS & ~os.O_NOFOLLOW) as (its_status, read_own):
                    if is_copy(status.size, read, its_status.size, read_own):
                        return sibling._replace(is_copy=True)
                if not read(status.size, 1):
                    break
    except OSError as err:
        log.debug("cannot read a file beside path=%s error=%s", path, err)
    return sibling


@contextmanager
def _opened(path: str, how: int) -> Iterator[tuple[Stat, Reading]]:
    fd = os.open(path, how)
    try:
        yield stat_of(os.fstat(fd)), lambda at, size: os.pread(fd, size, at)
    finally:
        os.close(fd)


def _fitting(known: Sequence[Checkpoint], status: Stat, read: Reading) -> frozenset[int]:
    head = read(0, HEAD)
    return frozenset(number for number, done in enumerate(known) if fits(done, status.size, head, read))
