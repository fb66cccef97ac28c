"""The SQLite file of one layer, in Gator's schema: real readers take its columns by position.

A file is made as a copy of an empty one with all tables, in one write. Rows gather in memory and are written by `flush`
in one transaction, off the trio thread. What stands alone is in WAL mode while it runs; a job of an array, of which
there may be thousands, leaves the disk's order to the kernel (`sync_all` orders many at once). If it ends before its
first `flush`, its file is made in memory, where a transaction needs no journal, and written as a whole.

Source: protocols/gator.md, "Layer database".
"""

import ctypes
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import msgspec

from agent.gator.messages import SEVERITIES, STATES, ApiJob, Number, Severity

OWN, GROUP = "_OWN_", "_GROUP_"
MAX_LOGS: Final = 100_000  # rows of LogEntry; further ones are counted only
MAX_READ: Final = 1_000_000  # bytes of messages, as JSON, that are read at once: what a message to a peer takes
EACH_READ: Final = 80  # of them that stand beside a message's text
MAX_INTEGER: Final = 2**63  # SQLite's
MAX_SINGLY: Final = 64  # files that are brought onto the disk one by one
LEFT: Final = ("-wal", "-shm", "-journal")  # files beside one that was not closed
_PAGE: Final = 1024  # bytes: an empty file has a page for each table, and there may be 10,000 files
_SCHEMA: Final = """
CREATE TABLE Attribute (db_uid INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT, value TEXT);
CREATE TABLE Metric (db_uid INTEGER PRIMARY KEY AUTOINCREMENT, scope TEXT, name TEXT, value INTEGER);
CREATE TABLE LogEntry (db_uid INTEGER PRIMARY KEY AUTOINCREMENT, severity TEXT, message TEXT, timestamp INTEGER);
"""
_TIER: Final = """
CREATE TABLE ChildEntry (db_uid INTEGER PRIMARY KEY AUTOINCREMENT, ident TEXT, server_url TEXT, db_file TEXT,
 started TEXT, updated TEXT, stopped TEXT, result TEXT, expected_children INTEGER);
"""
_WRAPPER: Final = """
CREATE TABLE ProcStat (db_uid INTEGER PRIMARY KEY AUTOINCREMENT, nproc INTEGER, cpu INTEGER, mem INTEGER, vmem INTEGER,
 timestamp INTEGER);
"""
_LOG: Final = "INSERT INTO LogEntry VALUES (?, ?, ?, ?)"
_CHILDREN: Final = "SELECT db_uid, ident, db_file, started, updated, stopped, result FROM ChildEntry ORDER BY db_uid"
_PROCSTAT: Final = "INSERT INTO ProcStat(nproc, cpu, mem, vmem, timestamp) VALUES (?, ?, ?, ?, ?)"


class LogRow(msgspec.Struct, frozen=True):
    """One message of a layer."""

    uid: int
    severity: int
    message: str
    timestamp: float


@cache
def _empty(is_tier: bool) -> bytes:
    with closing(sqlite3.connect(":memory:")) as db:
        db.execute(f"PRAGMA page_size={_PAGE}")
        db.executescript(_SCHEMA + (_TIER if is_tier else _WRAPPER))
        return bytes(db.serialize())


@cache
def _memory() -> sqlite3.Connection:
    """For files of arrays' jobs, one after the other, on the trio thread."""
    return sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)


class Batch(msgspec.Struct):
    """Rows that are on their way into a file."""

    rows: list[tuple[str, Iterable[tuple[Any, ...]]]]
    metrics: dict[tuple[str, str], Number]


class LayerDb:
    """One layer's file. Rows are added on the trio thread; `flush`, `read_logs` and `close` may block.

    With `is_many` the file is there from the first of these on.
    """

    def __init__(self, path: Path, *, is_tier: bool, is_many: bool) -> None:
        self.path = path
        self.logs = 0  # rows of LogEntry, those not yet written too
        self._is_tier, self._is_many = is_tier, is_many
        self._rows: list[tuple[str, Iterable[tuple[Any, ...]]]] = []
        self._metrics: dict[tuple[str, str], Number] = {}
        self._known: set[tuple[str, str]] = set()
        self._unwritten = Batch([], {})  # of a flush that failed, but for what there may be much of
        self._lock = threading.Lock()  # of the connection; the lists are the trio thread's
        self._db = None if is_many else self._opened()

    def _opened(self) -> sqlite3.Connection:
        self._begin_with(_empty(self._is_tier))
        db = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None, cached_statements=16)
        db.execute("PRAGMA synchronous=" + ("OFF" if self._is_many else "NORMAL"))
        if not self._is_many:
            db.execute("PRAGMA journal_mode=WAL")
        return db

    def _begin_with(self, content: bytes) -> None:
        if self.path.exists():
            for left in LEFT:  # by a layer that was killed here: SQLite would play it into this one
                self.path.with_name(self.path.name + left).unlink(missing_ok=True)
        self.path.write_bytes(content)

    def attributes(self, values: Mapping[str, object]) -> None:
        """Names and values; once each."""
        self._rows.append(
            ("INSERT INTO Attribute(name, value) VALUES (?, ?)", [(k, str(v)) for k, v in values.items()])
        )

    def metric(self, scope: str, name: str, value: Number) -> None:
        """The last value of a scope and name counts."""
        self._metrics[scope, name] = value if -MAX_INTEGER <= value < MAX_INTEGER else float(value)

    def log(self, severity: Severity, message: str, timestamp: float) -> int:
        """A message; its uid, or 0 when there are too many to keep."""
        if self.logs >= MAX_LOGS:
            return 0
        self.logs += 1
        row = (self.logs, str(SEVERITIES[severity]), message.encode(errors="replace").decode(), timestamp)
        self._rows.append((_LOG, [row]))
        return self.logs

    def children(self, rows: Iterable[tuple[str, str, int]]) -> None:
        """The children of a tier, in order: ident, file, expected children. Their uids are 1, 2, ..."""
        self._rows.append(
            (
                "INSERT INTO ChildEntry(ident, server_url, db_file, started, updated, stopped, result, "
                "expected_children) VALUES (?, '', ?, '', '', '', '0', ?)",
                list(rows),
            )
        )

    def child(
        self, uid: int, server: str, started: float | None, stopped: float | None, updated: float, result: int
    ) -> None:
        """What became of a child."""
        times = [str(at) if at is not None else "" for at in (started, updated, stopped)]
        self._rows.append(
            (
                "UPDATE ChildEntry SET server_url=?, started=?, updated=?, stopped=?, result=? WHERE db_uid=?",
                [(server, *times, str(result), uid)],
            )
        )

    def procstat(self, nproc: int, cpu: float, mem: int, vmem: int, timestamp: float) -> None:
        """The processes of a task: how many, CPU per cent, bytes."""
        row = (nproc, cpu, mem, vmem, timestamp)
        self._rows.append((_PROCSTAT, [row]))

    @property
    def waiting(self) -> int:
        """How much has not been handed to `flush`."""
        return len(self._rows) + len(self._metrics)

    def take(self) -> Batch:
        """What gathered, for `flush`. On the trio thread."""
        batch = Batch(self._rows, self._metrics)
        self._rows, self._metrics = [], {}
        return batch

    def flush(self, batch: Batch) -> None:
        """Write it in one transaction. Raises OSError, sqlite3.Error: then messages are lost, and the rest of it is
        written with the next.
        """
        with self._lock:
            self._write(self._db_there(), batch)

    def _db_there(self) -> sqlite3.Connection:
        if self._db is None:
            self._db = self._opened()
        return self._db

    def _write(self, db: sqlite3.Connection, batch: Batch) -> None:
        batch = Batch([*self._unwritten.rows, *batch.rows], {**self._unwritten.metrics, **batch.metrics})
        if not batch.rows and not batch.metrics:
            return
        try:
            db.execute("BEGIN")
            for sql, rows in batch.rows:
                db.executemany(sql, rows)
            for (scope, name), value in batch.metrics.items():
                if (scope, name) in self._known:
                    db.execute("UPDATE Metric SET value=? WHERE scope=? AND name=?", (value, scope, name))
                else:
                    db.execute("INSERT INTO Metric(scope, name, value) VALUES (?, ?, ?)", (scope, name, value))
            db.execute("COMMIT")
        except sqlite3.Error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            few = [each for each in batch.rows if each[0] not in (_LOG, _PROCSTAT)]
            self._unwritten = Batch(few, batch.metrics)
            raise
        self._unwritten = Batch([], {})
        self._known.update(batch.metrics)

    def read_logs(self, first: int, limit: int) -> list[LogRow]:
        """Messages from that uid on: at most `limit`, and no more than fit into MAX_READ, but one.

        Raises OSError, sqlite3.Error.
        """
        found, size = list[LogRow](), 0
        with self._lock:
            rows = self._db_there().execute(
                "SELECT db_uid, severity, message, timestamp FROM LogEntry WHERE db_uid >= ? ORDER BY db_uid LIMIT ?",
                (first, limit),
            )
            for uid, severity, message, timestamp in rows:
                size += len(msgspec.json.encode(message)) + EACH_READ
                if found and size > MAX_READ:
                    break
                found.append(LogRow(uid, int(severity), message, timestamp))
            rows.close()
        return found

    def close(self, batch: Batch) -> None:
        """Write the rest and close, with the journal gone: the file can be read where nothing can be written.

        Raises OSError, sqlite3.Error.
        """
        with self._lock:
            if self._db is None:
                self._begin_with(self._made_in_memory(batch))
                return
            try:
                self._write(self._db, batch)
                if not self._is_many:
                    self._db.execute("PRAGMA synchronous=FULL")
                    self._db.execute("PRAGMA journal_mode=DELETE")
            finally:
                self._db.close()

    def _made_in_memory(self, batch: Batch) -> bytes:
        db = _memory()
        db.deserialize(_empty(self._is_tier))
        self._write(db, batch)
        return db.serialize()


def read_job(path: Path, depth: int) -> ApiJob:
    """A layer that has ended, from its file, with `depth` levels of children. Raises sqlite3.Error, ValueError.

    Of a child whose file cannot be read (it never began, or was killed) is told what the tier's own file says.
    """
    db = sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)
    try:
        own = dict(db.execute("SELECT name, value FROM Attribute"))
        metrics = dict(db.execute("SELECT name, value FROM Metric WHERE scope IN (?, ?)", (OWN, GROUP)))
        is_tier = db.execute("SELECT 1 FROM sqlite_master WHERE name='ChildEntry'").fetchone() is not None
        rows = db.execute(_CHILDREN).fetchall() if is_tier else []
    finally:
        db.close()
    told = ApiJob(
        uidx=int(own.get("uidx", 0)),
        root=int(own.get("root", 0)),
        path=[part for part in own.get("path", "").split(".") if part],
        ident=own.get("ident", ""),
        status=STATES.index("COMPLETE"),
        metrics=metrics,
        server_url="",
        db_file=str(path),
        started=_time(own.get("started")),
        updated=_time(own.get("stopped")),
        stopped=_time(own.get("stopped")),
        result=int(own.get("result", 0)),
        owner=None,
        children=[],
        expected_children=len(rows),
    )
    return msgspec.structs.replace(
        told, children=[_read_child(told, *row, depth=depth - 1) for row in rows if depth > 0]
    )


def _read_child(
    tier: ApiJob, uid: int, ident: str, file: str, started: str, updated: str, stopped: str, result: str, *, depth: int
) -> ApiJob:
    try:
        return read_job(Path(file), depth)
    except (sqlite3.Error, ValueError):
        return msgspec.structs.replace(
            tier,
            uidx=uid,
            path=[*tier.path, tier.ident],
            ident=ident,
            metrics={},
            db_file=file,
            started=_time(started),
            updated=_time(updated),
            stopped=_time(stopped),
            result=int(result),
            children=[],
            expected_children=0,
        )


def _time(text: str | None) -> float | None:
    return None if text in (None, "", "None") else float(text)


def sync_all(folder: Path, files: Sequence[Path]) -> None:
    """Bring these files, all below `folder`, onto the disk. Blocks. Raises OSError.

    Many at once by their file system: one after the other each would wait for the disk.
    """
    if len(files) <= MAX_SINGLY:
        for file in files:
            _sync(file, os.fsync)
    else:
        _sync(folder, _sync_file_system)


def _sync(path: Path, sync: Callable[[int], None]) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync(fd)
    finally:
        os.close(fd)


def _sync_file_system(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syncfs(fd):
        raise OSError(ctypes.get_errno(), "syncfs")
