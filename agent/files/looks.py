"""What the file monitor asks of the disk, what it gets to know, and what follows from two looks at one thing. Pure.

Source: protocols/emissary.md, "Entitlement and file monitor"; issue 4, item 5; inotify(7), proc(5).
"""

import os
import stat
from typing import Literal, TypeAlias

import msgspec

from agent.core.errors import shown
from agent.core.events import FileChanged, FileGap

MAX_KNOWN = 100_000  # files that are watched at a time

MODIFY, ATTRIB, CLOSE_WRITE, MOVED_FROM, MOVED_TO, CREATE, DELETE = 0x2, 0x4, 0x8, 0x40, 0x80, 0x100, 0x200
Q_OVERFLOW, IGNORED, ONLYDIR, EXCL_UNLINK, MASK_ADD = 0x4000, 0x8000, 0x0100_0000, 0x0400_0000, 0x2000_0000

_REMOTE = {
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "lustre", "gfs2", "ocfs2"),
    *("virtiofs", "vboxsf", "prl_fs", "vmhgfs", "fuse", "fuseblk"),
}

What = Literal["created", "modified", "deleted", "moved", "attributes"]
NoContent = Literal["not_allowed", "private_key", "too_big", "unreadable"]


class Watch(msgspec.Struct, frozen=True, kw_only=True):
    """What is watched: `path` absolute, perhaps a glob. `run`: the run for which it is."""

    id: str
    path: str
    recursive: bool = False
    content: bool = False
    run: str | None = None


class Seen(msgspec.Struct, frozen=True, gc=False):
    """What stat said of an entry. `is_link`: it was asked through a symbolic link."""

    dev: int
    ino: int
    size: int
    mtime_ns: int
    mode: int
    uid: int
    gid: int
    is_link: bool = False

    @property
    def inode(self) -> tuple[int, int]:
        """What tells one file from all others that are there at the time."""
        return self.dev, self.ino


class Survey(msgspec.Struct, frozen=True):
    """Watch a directory with inotify's `mask`, then stat its entries: the names in `follow` through links, and with
    `every` all others without. `fresh`: the watches for which what is found is where they begin.
    """

    path: str
    mask: int
    follow: frozenset[str]
    every: bool
    fresh: frozenset[str]


class Surveyed(msgspec.Struct, frozen=True, kw_only=True):
    """What a survey found. No `entries`: the directory is gone, or cannot be read for the reason in `why`.

    `is_short`: the kernel gives no more watches. `is_deaf`: inotify does not tell all of it, since others may change it
    (NFS) or it may be entered but not read. `is_cut`: there are more entries than MAX_KNOWN.
    """

    survey: Survey
    wd: int | None = None
    entries: dict[str, Seen] | None = None
    why: str = ""
    is_short: bool = False
    is_deaf: bool = False
    is_cut: bool = False


class Look(msgspec.Struct, frozen=True):
    """Stat a path; where it has changed since `known` (see `change`) and `digest` is set, hash it, and read it where
    `content` is set.
    """

    path: str
    known: Seen | None
    hint: int
    came_from: str | None
    follow: bool
    digest: bool
    content: bool


class Digest(msgspec.Struct, frozen=True, kw_only=True):
    """What is in a file; `no_content` says why there is no content though it was asked for."""

    sha256: str | None = None
    content: bytes | None = None
    no_content: NoContent | None = None


class Looked(msgspec.Struct, frozen=True, kw_only=True):
    """What a look found; `seen` is None where there is nothing, and what was known where `why` it could not be seen."""

    look: Look
    seen: Seen | None = None
    why: str = ""
    owner: str | None = None
    digest: Digest = Digest()


class Drop(msgspec.Struct, frozen=True):
    """Remove an inotify watch."""

    wd: int


class Ready(msgspec.Struct, frozen=True):
    """From now on each change of what the watch means is told."""

    watch: str


Act: TypeAlias = Survey | Look | Drop | Ready | FileChanged | FileGap


def change(known: Seen | None, seen: Seen, hint: int) -> What | None:
    """What became of an entry between two stats; `hint` is what inotify said: MODIFY, ATTRIB.

    A write that leaves size and mtime alone (within one tick of the file system's clock) is known from MODIFY only; a
    new mtime with ATTRIB and without MODIFY is a touch.
    """
    if known is None:
        return "created"
    if known.inode != seen.inode or stat.S_IFMT(known.mode) != stat.S_IFMT(seen.mode):
        return "modified"
    touched = not stat.S_ISDIR(seen.mode) and known.mtime_ns != seen.mtime_ns
    written = not stat.S_ISDIR(seen.mode) and (hint & MODIFY or known.size != seen.size)
    if written or (touched and not hint & ATTRIB):
        return "modified"
    if touched or (known.mode, known.uid, known.gid) != (seen.mode, seen.uid, seen.gid):
        return "attributes"
    return None


def remote_devices(mountinfo: str) -> frozenset[int]:
    """The device numbers of the mounted file systems that others may change: /proc/self/mountinfo, proc(5)."""
    devices = set()
    for line in mountinfo.splitlines():
        fields, _, rest = line.partition(" - ")
        kind = rest.split(" ", 1)[0]
        if kind in _REMOTE or kind.startswith("fuse."):
            major, _, minor = fields.split(" ")[2].partition(":")
            devices.add(os.makedev(int(major), int(minor)))
    return frozenset(devices)


def without_answer(act: Survey | Look) -> "Surveyed | Looked":
    """The result where the disk does not answer: as far as is known all is as it was."""
    if isinstance(act, Look):
        return Looked(look=act, seen=act.known)
    return Surveyed(survey=act, why="the disk does not answer")


def described(path: str, what: What, found: Looked | Seen | None, origin: str | None = None) -> FileChanged:
    """The event that tells of a path. `found`: nothing is there any more, or it was not read this time, or it was."""
    seen = found.seen if isinstance(found, Looked) else found
    told = FileChanged(path=shown(path), from_=None if origin is None else shown(origin), what=what)
    if seen is not None:
        told = msgspec.structs.replace(told, size=seen.size, mtime=seen.mtime_ns / 1e9, mode=f"{seen.mode:06o}")
    if isinstance(found, Looked):
        told = msgspec.structs.replace(told, owner=found.owner, **msgspec.structs.asdict(found.digest))
    return told
