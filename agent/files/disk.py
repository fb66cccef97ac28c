"""The looks of the file monitor, taken: stat, list, hash and read, bounded in size and time. Blocks: for a thread.

Source: protocols/emissary.md, "Entitlement and file monitor" (content, private keys, filesystems without inotify).
"""

import errno
import grp
import hashlib
import os
import pwd
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from inotify_simple import INotify

from agent.core.mounts import MOUNTS
from agent.files.looks import (
    MAX_KNOWN,
    Digest,
    Look,
    Looked,
    NoContent,
    Seen,
    Survey,
    Surveyed,
    change,
    remote_devices,
)
from agent.files.private_keys import is_private_key

MAX_HASHED = 64 * 1024 * 1024  # bytes; larger files have no sha256
MAX_CONTENT = 704 * 1024  # bytes: in base64, and with two paths of the longest, they fit a message of 1 MiB
HASH_S = 2.0
_CHUNK = 256 * 1024
_GONE = (errno.ENOENT, errno.ENOTDIR)
_SHORT = (errno.ENOSPC, errno.ENOMEM)


def carry_out(
    acts: Sequence[Survey | Look],
    notify: INotify | None,
    allow: Sequence[str],
    step: Callable[[], None] = lambda: None,
) -> Iterator[Surveyed | Looked]:
    """Do what the monitor asks for, in order. Without `notify` every directory is polled.

    `allow`: the directories of which content may be told. `step` is called as a large directory is read: that it
    takes long is no hang.
    """
    remote: frozenset[int] | None = None
    for act in acts:
        if isinstance(act, Look):
            yield look(act, allow)
        else:
            if remote is None:
                remote = remote_devices(MOUNTS.read_text(errors="surrogateescape"))
            yield survey(act, notify, remote, step)


def survey(
    act: Survey, notify: INotify | None, remote: frozenset[int], step: Callable[[], None] = lambda: None
) -> Surveyed:
    """Watch a directory, then list it: in this order nothing falls between."""
    wd, is_short = None, notify is None
    entries: dict[str, Seen] = {}
    is_cut = False
    try:
        if notify is not None:
            try:
                wd = notify.add_watch(act.path, act.mask)  # type: ignore[no-untyped-call]  # it has no annotations
            except OSError as err:
                is_short = err.errno in _SHORT
                if not is_short and err.errno != errno.EACCES:  # what is in it can perhaps be asked for by name
                    raise
        is_deaf = os.stat(act.path).st_dev in remote or (wd is None and not is_short)
        for name in act.follow:
            if seen := _seen(os.path.join(act.path, name), follow=True):
                entries[name] = seen
        if act.every:
            with os.scandir(act.path) as found:
                for entry in found:
                    step()
                    if len(entries) >= MAX_KNOWN:
                        is_cut = True
                        break
                    if entry.name not in act.follow and (seen := _seen(entry.path, follow=False)):
                        entries[entry.name] = seen
    except OSError as err:
        why = "" if err.errno in _GONE else f"cannot be read: {os.strerror(err.errno or 0)}"
        return Surveyed(survey=act, wd=wd, why=why)
    return Surveyed(survey=act, wd=wd, entries=entries, is_short=is_short, is_deaf=is_deaf, is_cut=is_cut)


def look(act: Look, allow: Sequence[str]) -> Looked:
    """How a path is now; hashed and read only where it is not as it was."""
    try:
        seen = _seen(act.path, follow=act.follow)
    except OSError as err:  # the directory cannot be entered any more, or the disk fails: its survey tells
        return Looked(look=act, seen=act.known, why=os.strerror(err.errno or 0))
    if seen is None or not act.digest or (act.came_from is None and change(act.known, seen, act.hint) is None):
        return Looked(look=act, seen=seen)
    found = digest(act.path, allow if act.content else None) if stat.S_ISREG(seen.mode) else Digest()
    return Looked(look=act, seen=seen, owner=f"{_user(seen.uid)}:{_group(seen.gid)}", digest=found)


def digest(path: str, allow: Sequence[str] | None) -> Digest:
    """The file's sha256, where it is not too large; its content where it is below `allow`, small, and no private key.

    `allow`: None where the content is not asked for. What counts is where the file really is: a link in an allowed
    directory to a file elsewhere gives no content.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return _without(allow, "unreadable")
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            return Digest()
        if found.st_size > MAX_HASHED:
            return _without(allow, "too_big")
        real = os.readlink(f"/proc/self/fd/{fd}")
        kept = b"" if allow is not None and _is_below(real, allow) else None
        why: NoContent = "not_allowed" if kept is None else "too_big"
        sha256, size, until = hashlib.sha256(), 0, time.monotonic() + HASH_S
        while chunk := os.read(fd, _CHUNK):
            size += len(chunk)
            if size > MAX_HASHED or time.monotonic() > until:
                return _without(allow, "too_big")
            sha256.update(chunk)
            if kept is not None:
                kept = kept + chunk if size <= MAX_CONTENT else None
    except OSError:
        return _without(allow, "unreadable")
    finally:
        os.close(fd)
    if kept is not None and any(is_private_key(os.path.basename(name), kept) for name in (real, path)):
        kept, why = None, "private_key"
    if kept is None:
        return _without(allow, why, sha256.hexdigest())
    return Digest(sha256=sha256.hexdigest(), content=kept)


def _without(allow: Sequence[str] | None, why: NoContent, sha256: str | None = None) -> Digest:
    return Digest(sha256=sha256, no_content=None if allow is None else why)


def _is_below(path: str, folders: Sequence[str]) -> bool:
    return any(Path(path).is_relative_to(os.path.realpath(folder)) for folder in folders)


def _seen(path: str, *, follow: bool) -> Seen | None:
    """None: there is nothing. Raises OSError where that cannot be known."""
    try:
        found = os.lstat(path)
        is_link = follow and stat.S_ISLNK(found.st_mode)
        if is_link:
            with suppress(OSError):  # a link that leads nowhere is itself what is there
                found = os.stat(path)
    except OSError as err:
        if err.errno in _GONE:
            return None
        raise
    return Seen(
        found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode, found.st_uid, found.st_gid, is_link
    )


@lru_cache(maxsize=1024)
def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


@lru_cache(maxsize=1024)
def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
