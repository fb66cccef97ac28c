"""The state directory: room, speed, and what is in the store.

Source: protocols/packaging.md 7.
"""

import errno
import os
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.checks.subject import Finding, Status, Subject, date_of
from agent.core.config import is_there
from agent.core.store import SCHEMA

MIB, GIB = 1 << 20, 1 << 30
BACKLOG_S = 3600.0
READ_ONLY = "Remount it (mount -o remount,rw), or set state.dir."
QUICK_S = 2.0  # of an integrity check; a store of 256 MiB on a slow disk takes longer


def disk(subject: Subject) -> Finding:
    """Is there room, and may it be written?"""
    folder = _existing(subject.folder)
    space = os.statvfs(folder)
    free, size = space.f_bavail * space.f_frsize, space.f_blocks * space.f_frsize
    data = {"folder": str(subject.folder), "free": free, "size": size}
    if space.f_flag & os.ST_RDONLY:
        return Finding("fail", f"{folder} is on a file system that is read-only", READ_ONLY, data)
    if not os.access(folder, os.W_OK):
        return Finding("fail", f"{folder} cannot be written", "Run it as the service's user, or set state.dir.", data)
    what = f"{subject.folder}: {free // MIB} MiB of {size // MIB} free"
    if free < 64 * MIB:
        return Finding("fail", what, "Make room.", data)
    if free < GIB or free * 10 < size:
        return Finding("warn", what, "Make room: runs are refused below 1 GiB.", data)
    return Finding("ok", what, data=data)


def fsync(subject: Subject) -> Finding:
    """How long does the disk take to keep something? Measured on a file without a name."""
    folder = _existing(subject.folder)
    took: list[float] = []
    try:
        with _nameless(folder) as fd:
            for _ in range(10):
                os.write(fd, b"x" * 4096)
                began = time.perf_counter()
                os.fsync(fd)
                took.append(1000 * (time.perf_counter() - began))
                if sum(took) > 2000:
                    break
    except OSError as err:
        other = "Make room." if err.errno == errno.ENOSPC else "Run it as the service's user, or set state.dir."
        return Finding("fail", f"{folder}: {err.strerror}", READ_ONLY if err.errno == errno.EROFS else other)
    median = sorted(took)[len(took) // 2]
    data = {"median_ms": round(median, 2), "worst_ms": round(max(took), 2)}
    if median > 50:
        status: Status = "fail" if median > 1000 else "warn"
        return Finding(status, f"median {median:.0f} ms", "Move state.dir to a faster disk.", data)
    return Finding("ok", f"median {median:.1f} ms", data=data)


@contextmanager
def _nameless(folder: Path) -> Iterator[int]:
    """A file descriptor of a file that no folder has."""
    try:
        fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as err:
        if err.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        fd, name = tempfile.mkstemp(dir=folder)  # a file system without such files
        os.unlink(name)
    try:
        yield fd
    finally:
        os.close(fd)


def integrity(subject: Subject) -> Finding:
    """Is the store whole and of a schema that we know, and does what is owed leave?"""
    path = subject.folder / "store.db"
    if not is_there(path):
        return Finding("ok", "no store yet")
    if not os.access(path, os.R_OK):
        return Finding("fail", f"{path} may not be read", "Run it as the service's user, or as root.")
    was_open = _is_open(path)
    found = _integrity(path)
    # An agent that started meanwhile has changed the file below our eyes.
    return _integrity(path) if found.status == "fail" and not was_open and _is_open(path) else found


def _integrity(path: Path) -> Finding:
    remedy = f"Move {path} away to begin with an empty store; keep it for analysis."
    try:
        with _reading(path) as db:
            version = int(db.execute("PRAGMA user_version").fetchone()[0])
            if version > SCHEMA:
                what = f"schema {version} is newer than this agent's {SCHEMA}"
                return Finding("fail", what, "Install the newer release again.")
            if not db.execute("SELECT 1 FROM sqlite_master").fetchone():  # killed as it made it; the next start does
                return Finding("ok", "no store yet")
            backlog = _backlog(db)
            said, is_whole = _quick_check(db)
    except sqlite3.Error as err:
        return Finding("fail", f"{path}: {err}", remedy)
    if said != "ok":
        return Finding("fail", f"{path}: {said}", remedy)
    data = {"size": path.stat().st_size, "complete": is_whole, "backlog": backlog}
    late = {sink: at for sink, (_, at) in backlog.items() if at is not None and time.time() - at > BACKLOG_S}
    if late:
        sinks = ", ".join(f"{sink} since {date_of(at)}" for sink, at in late.items())
        return Finding("warn", f"undelivered: {sinks}", "Look at peer.* and `agent ctl status`.", data)
    return Finding("ok", "whole" if is_whole else f"good as far as was read in {QUICK_S:g} s", data=data)


def _is_open(path: Path) -> bool:
    """By an agent that runs, or one that was killed."""
    return Path(f"{path}-wal").exists()


@contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection]:
    """A store that is only read. A running agent goes on; where none has it open, no file is made beside it."""
    how = "mode=ro" if _is_open(path) else "immutable=1"
    db = sqlite3.connect(f"{path.absolute().as_uri()}?{how}", uri=True, isolation_level=None)
    try:
        yield db
    finally:
        db.close()


def _backlog(db: sqlite3.Connection) -> dict[str, tuple[int, float | None]]:
    """How much each sink is owed, and since when."""
    backlog = {}
    for sink, count, first in db.execute("SELECT sink, count(*), min(n) FROM outbox GROUP BY sink").fetchall():
        at = db.execute("SELECT at FROM journal JOIN outbox USING(seq) WHERE n = ?", (first,)).fetchone()
        backlog[sink] = (count, at[0] if at else None)
    return backlog


def _quick_check(db: sqlite3.Connection) -> tuple[str, bool]:
    """What SQLite says, and whether it came to the end."""
    until = time.monotonic() + QUICK_S
    db.set_progress_handler(lambda: time.monotonic() > until, 100_000)
    try:
        return str(db.execute("PRAGMA quick_check(1)").fetchone()[0]), True
    except sqlite3.OperationalError as err:
        if err.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
            raise
        return "ok", False


def last_event(folder: Path) -> float:
    """When the journal's last event was; 0 when there is none to be read."""
    if not os.access(folder / "store.db", os.R_OK):
        return 0.0
    try:
        with _reading(folder / "store.db") as db:
            row = db.execute("SELECT at FROM journal ORDER BY seq DESC LIMIT 1").fetchone()
    except sqlite3.Error:  # state.integrity says what is wrong with it
        return 0.0
    return float(row[0]) if row else 0.0


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there and may be seen: it is made at the first start."""
    while not os.path.exists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder
