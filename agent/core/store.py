"""The event store: SQLite in WAL mode, with the journal, an outbox for each sink, and checkpoints.

What is appended becomes durable in group commits: the first event after a pause at once, the next ones together, at
most `group_commit_s` later. A number (`seq`) is given at commit and never given twice. A sink's outbox holds a row for
each event that is owed to it, from the same transaction as the event, until the sink's role acknowledges it.

Threads: SQL runs in worker threads, one write and one read at a time; everything else belongs to the trio thread.

Source: ARCHITECTURE.md, rule 4; protocols/settings.md, "[state]", "Names that several folders share", "Ends" (disk
full); protocols/emissary.md, "The envelope" (`seq` in a payload, held messages).
"""

import errno
import fcntl
import logging
import os
import sqlite3
import uuid
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import trio

from agent.core.errors import StoreError
from agent.core.events import AnyEvent, Recorded, scope
from agent.core.locks import owner

log = logging.getLogger(__name__)

SCHEMA = 1  # grows within a major version only; the previous release must open it (packaging.md 8)
HELD_RETRY_S = 3600.0  # protocols/emissary.md: a held message is retried hourly
MAX_PENDING = 1024 * 1024  # bytes that wait for the disk before `room()` makes producers wait

_TABLES = """
CREATE TABLE journal(seq INTEGER PRIMARY KEY, at REAL NOT NULL, kind TEXT NOT NULL, run TEXT, test TEXT,
 data BLOB NOT NULL);
CREATE INDEX journal_run ON journal(run, seq) WHERE run IS NOT NULL;
CREATE TABLE outbox(n INTEGER PRIMARY KEY, sink TEXT NOT NULL, seq INTEGER NOT NULL, held_since REAL, reason TEXT);
CREATE INDEX outbox_sink ON outbox(sink, n);
CREATE TABLE checkpoint(key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE kept(run TEXT PRIMARY KEY) WITHOUT ROWID;
"""

_Order = tuple[str, tuple[Any, ...]]  # SQL and its values
_Checkpoints = dict[str, bytes | None]  # by key; None: to be dropped


class Owed(msgspec.Struct, frozen=True):
    """A delivery owed to a sink. `n` is its number in the outbox, the `seq` of the wire."""

    n: int
    event: Recorded


class Depth(msgspec.Struct, frozen=True):
    """How much a sink still has to be told. `oldest` is the epoch time of the oldest, `held` how many were refused."""

    waiting: int
    oldest: float | None
    held: int


class _Row(msgspec.Struct, frozen=True):
    at: float
    kind: str
    run: str | None
    test: str | None
    data: bytes
    sinks: tuple[str, ...]


class Store:
    """The store of one state directory. Made by `open_store`; `run` is its writer and must be running for commits.

    `full` is true while the disk has no room: then nothing new should be begun.
    """

    def __init__(self, folder: Path, *, group_commit_s: float, journal_max: int, reserve: int, lock: int) -> None:
        self.folder, self.full = folder, False
        self._group_commit_s, self._journal_max, self._reserve, self._lock = group_commit_s, journal_max, reserve, lock
        self._wants: dict[str, Callable[[AnyEvent], bool]] = {}
        self._rows: list[_Row] = []
        self._orders: list[_Order] = []
        self._checkpoints: _Checkpoints = {}
        self._states: dict[str, Callable[[], Any]] = {}  # checkpoints that are made when they are written
        self._pending_bytes = 0
        self._asked = self._done = 0  # tickets: appended or ordered so far, and of these on disk
        self._depths_of, self._depths = -1, dict[str, Depth]()
        self._dirty, self._committed, self._on_full = trio.Event(), trio.Event(), trio.Event()
        self._behind_since: float | None = None
        self._one_writer, self._one_reader = trio.CapacityLimiter(1), trio.CapacityLimiter(1)
        self._db = _connect(folder / "store.db")
        self._reader = _connect(folder / "store.db")
        self.instance = self._meta("instance", lambda: str(uuid.uuid4()))
        self.seq = int(self._db.execute("SELECT coalesce(max(seq), 0) FROM journal").fetchone()[0])
        self._told, self._followers = self.seq, list[Callable[[list[Recorded]], None]]()
        highest = self._db.execute("SELECT coalesce(max(n), 0) FROM outbox").fetchone()[0]
        self._n = max(int(self._meta("outbox_n", lambda: "0")), int(highest))

    # ---- appending -------------------------------------------------------------------------------------------------

    def owe(self, sink: str, wants: Callable[[AnyEvent], bool]) -> "Outbox":
        """From now on each event that `wants` says yes to is owed to `sink`. Its outbox, older debts included."""
        self._wants[sink] = wants
        return Outbox(self, sink)

    def owe_only(self, sinks: Collection[str]) -> None:
        """From now on nothing is owed to any other, and what is already keeps no event in the journal."""
        self._wants = {sink: wants for sink, wants in self._wants.items() if sink in sinks}

    def append(self, event: AnyEvent, at: float) -> None:
        """Take an event for the journal and the outboxes. It is durable when `commit()` returns."""
        run, test = scope(event)
        data = msgspec.json.encode(event)
        sinks = tuple(sink for sink, wants in self._wants.items() if wants(event))
        self._rows.append(_Row(at, type(event).__name__, run, test, data, sinks))
        self._touch(len(data))

    def put(self, key: str, value: Any) -> None:
        """Keep a checkpoint (anything msgspec encodes as JSON), in the transaction of what was appended before it."""
        self._states.pop(key, None)
        self._replace(key, msgspec.json.encode(value))

    def keep_up(self, key: str, state: Callable[[], Any]) -> None:
        """Keep a checkpoint as put() does, of what `state` gives when the transaction is written: once for all that
        was appended in between.
        """
        if key not in self._states:
            self._states[key] = state
            self._touch(64)

    def forget(self, key: str) -> None:
        """Drop a checkpoint."""
        self._states.pop(key, None)
        self._replace(key, None)

    def keep(self, run: str) -> None:
        """The run's events stay in the journal, however old, until `release(run)`."""
        self._order("INSERT OR IGNORE INTO kept VALUES(?)", run)

    def release(self, run: str) -> None:
        """The run's events may be pruned like others."""
        self._order("DELETE FROM kept WHERE run = ?", run)

    async def commit(self) -> int:
        """Wait until all that was appended or put so far is on disk; the journal's highest number then."""
        ticket = self._asked
        while self._done < ticket:
            await self._committed.wait()
        return self.seq

    @property
    def has_room(self) -> bool:
        """Would room() return at once?"""
        return self._pending_bytes <= MAX_PENDING

    async def room(self) -> None:
        """Wait while more than MAX_PENDING bytes wait for the disk."""
        while not self.has_room:
            await self._committed.wait()

    def behind_s(self, now: float) -> float:
        """Seconds for which the oldest uncommitted event has been waiting, by trio's clock."""
        return 0.0 if self._behind_since is None else now - self._behind_since

    @property
    def _is_behind(self) -> bool:
        """Is there something to write?"""
        return bool(self._rows or self._orders or self._checkpoints or self._states)

    def _replace(self, key: str, value: bytes | None) -> None:
        """Only the last value of a checkpoint waits for the disk, which may be full for long."""
        before = self._checkpoints.get(key)
        self._checkpoints[key] = value
        self._touch(max(0, len(value or b"") - len(before or b"")))

    def _order(self, sql: str, *values: Any) -> None:
        self._orders.append((sql, values))
        self._touch(64)

    def _touch(self, size: int) -> None:
        self._asked += 1
        self._pending_bytes += size
        if self._behind_since is None:
            self._behind_since = trio.current_time()
        self._dirty.set()

    # ---- writing ---------------------------------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Write what is appended, until cancelled; then write the rest and return."""
        task_status.started()
        last = -self._group_commit_s
        try:
            while True:
                if not self.full:  # else it looks each second whether there is room again, even with nothing to write
                    await self._dirty.wait()
                # Half of it: the commit itself takes time too, and no event shall be later than the whole.
                due = last + self._group_commit_s / 2
                if due > trio.current_time():  # to sleep until then would be a turn of the loop in any case
                    await trio.sleep_until(due)
                else:  # who was told of what is to be written has his turn first
                    await trio.lowlevel.checkpoint()
                last = trio.current_time()
                await self._write_pending()
                if self.full:
                    await trio.sleep(1)
        finally:
            with trio.CancelScope(shield=True):
                if self._is_behind:
                    await self._write_pending()

    async def wait_full(self) -> None:
        """Wait until the disk is full."""
        while not self.full:
            await self._on_full.wait()

    async def wait_room(self) -> None:
        """Wait until the disk is not full."""
        while self.full:
            await self._committed.wait()

    async def _write_pending(self) -> None:
        states, self._states = self._states, {}
        for key, state in states.items():
            self.put(key, state())
        rows, self._rows = self._rows, []
        orders, self._orders = self._orders, []
        checkpoints, self._checkpoints = self._checkpoints, {}
        ticket, size, self._dirty = self._asked, self._pending_bytes, trio.Event()
        try:
            with trio.CancelScope(shield=True):  # a commit under way is never abandoned: its numbers are given
                await trio.to_thread.run_sync(self._write, rows, checkpoints, orders, limiter=self._one_writer)
        except sqlite3.Error as err:
            self._rows, self._orders = rows + self._rows, orders + self._orders
            self._checkpoints = checkpoints | self._checkpoints
            self._dirty.set()
            if not _is_full(err, self.folder):
                raise StoreError(
                    f"{self.folder}: cannot write: {err}", remedy="Look at the disk; nothing is lost."
                ) from err
            await self._give_up_reserve()
            return
        if self.full and await trio.to_thread.run_sync(self._restore_reserve, limiter=self._one_writer):
            self.full, self._on_full = False, trio.Event()
            log.warning("disk has room again folder=%s", self.folder)
        self._tell_followers(rows)
        self._done, self._pending_bytes = ticket, self._pending_bytes - size
        self._behind_since = trio.current_time() if self._is_behind else None
        committed, self._committed = self._committed, trio.Event()
        committed.set()

    def _tell_followers(self, rows: list[_Row]) -> None:
        if self._followers and rows:
            events = [
                _recorded(seq, row.at, row.kind, row.run, row.test, row.data)
                for seq, row in enumerate(rows, self._told + 1)
            ]
            for take in self._followers:
                take(events)
        self._told += len(rows)

    def _write(self, rows: list[_Row], checkpoints: _Checkpoints, orders: list[_Order]) -> None:
        seq, n = self.seq, self._n
        events, owed = list[tuple[Any, ...]](), list[tuple[Any, ...]]()
        for row in rows:
            seq += 1
            events.append((seq, row.at, row.kind, row.run, row.test, row.data))
            for sink in row.sinks:
                n += 1
                owed.append((n, sink, seq))
        db = self._db
        db.execute("BEGIN IMMEDIATE")
        try:
            db.executemany("INSERT INTO journal VALUES(?, ?, ?, ?, ?, ?)", events)
            db.executemany("INSERT INTO outbox(n, sink, seq) VALUES(?, ?, ?)", owed)
            db.executemany("DELETE FROM checkpoint WHERE key = ?", [(key,) for key in checkpoints])
            db.executemany("INSERT INTO checkpoint VALUES(?, ?)", [kept for kept in checkpoints.items() if kept[1]])
            for sql, values in orders:
                if sql is _RENUMBER:
                    n += 1
                    db.execute(sql, (n, *values))
                elif sql is _LIFT:
                    n = self._lift(n, *values)
                else:
                    db.execute(sql, values)
            if n != self._n:
                db.execute("INSERT OR REPLACE INTO checkpoint VALUES('outbox_n', ?)", (str(n).encode(),))
            self._prune(db)
            db.execute("COMMIT")
        except sqlite3.Error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
        self.seq, self._n = seq, n

    def _lift(self, n: int, last: int, sink: str) -> int:
        """Within the transaction: what comes meanwhile waits too. The highest number, which was `n`."""
        rows = self._db.execute("SELECT n FROM outbox WHERE sink = ? AND held_since IS NULL ORDER BY n", (sink,))
        anew = list(enumerate((old for (old,) in rows), max(n, last) + 1))
        self._db.executemany(_RENUMBER, anew)
        return max(n, last) + len(anew)

    def _prune(self, db: sqlite3.Connection) -> None:
        """Oldest first, never the newest row, nothing owed and nothing of a kept run. At most 2,000 rows at a time."""
        pages, free, size = (
            db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
        )
        if (pages - free) * size <= self._journal_max:
            return
        # Who is told no more keeps nothing back; what it was owed goes with the events.
        sinks = tuple(self._wants)
        named = ",".join("?" * len(sinks))
        floor = db.execute(f"SELECT min(seq) FROM outbox WHERE sink IN ({named})", sinks).fetchone()[0]
        db.execute(
            "DELETE FROM journal WHERE seq IN (SELECT seq FROM journal WHERE seq < ? AND (run IS NULL OR run NOT IN"
            " (SELECT run FROM kept)) ORDER BY seq LIMIT 2000)",
            (self.seq if floor is None else min(floor, self.seq),),
        )
        db.execute(f"DELETE FROM outbox WHERE sink NOT IN ({named}) AND seq NOT IN (SELECT seq FROM journal)", sinks)

    async def _give_up_reserve(self) -> None:
        first, self.full = not self.full, True
        (self.folder / "reserve").unlink(missing_ok=True)
        if first:
            log.error("disk full folder=%s reserve=given_up", self.folder)
            self._on_full.set()

    def _restore_reserve(self) -> bool:
        space = os.statvfs(self.folder)
        if space.f_bavail * space.f_frsize < 4 * self._reserve:
            return False
        _make_reserve(self.folder / "reserve", self._reserve)
        return True

    # ---- reading ---------------------------------------------------------------------------------------------------

    async def read(
        self, since: int = 0, *, run: str | None = None, kinds: Iterable[str] = (), limit: int = 500
    ) -> list[Recorded]:
        """Committed events with a number above `since`, in order; those of a run or of some kinds where given."""
        where: list[str] = ["seq > ?"]
        values: list[Any] = [since]
        if run is not None:
            where, values = [*where, "run = ?"], [*values, run]
        if wanted := tuple(kinds):
            where, values = [*where, f"kind IN ({','.join('?' * len(wanted))})"], [*values, *wanted]
        sql = f"SELECT seq, at, kind, run, test, data FROM journal WHERE {' AND '.join(where)} ORDER BY seq LIMIT ?"
        return [_recorded(*row) for row in await self._query(sql, *values, limit)]

    @contextmanager
    def follow(self, take: Callable[[list[Recorded]], None]) -> Generator[int, None, None]:
        """Hand each group of events to `take` right after its commit, in order; `take` neither waits nor raises.

        Gives the journal's number at the beginning: the first event that comes has the next one.
        """
        self._followers.append(take)
        try:
            yield self._told
        finally:
            self._followers.remove(take)

    def scan(self, run: str, kind: str) -> Iterator[bytes]:
        """The `data` of a run's committed events of one kind, in order. For threads: it opens its own connection."""
        db = _connect(self.folder / "store.db")
        try:
            rows = db.execute("SELECT data FROM journal WHERE run = ? AND kind = ? ORDER BY seq", (run, kind))
            for (data,) in rows:
                yield data
        finally:
            db.close()

    async def owed_runs(self) -> set[str]:
        """The runs of which something is still owed to a sink."""
        rows = await self._query("SELECT DISTINCT run FROM outbox JOIN journal USING(seq) WHERE run IS NOT NULL")
        return {run for (run,) in rows}

    async def oldest(self) -> int:
        """The lowest number that the journal still has; 0 when it is empty."""
        return int((await self._query("SELECT coalesce(min(seq), 0) FROM journal"))[0][0])

    async def newest(self, run: str) -> int:
        """The highest number of a run's events; 0 when the journal has none."""
        return int((await self._query("SELECT coalesce(max(seq), 0) FROM journal WHERE run = ?", run))[0][0])

    async def kept(self) -> list[str]:
        """The runs of `keep`, in no order."""
        return [run for (run,) in await self._query("SELECT run FROM kept")]

    async def get(self, key: str, kind: type[Any]) -> Any:
        """A checkpoint as `kind`, or None. What was put but is not yet committed is not seen: `commit()` first."""
        rows = await self._query("SELECT value FROM checkpoint WHERE key = ?", key)
        return msgspec.json.decode(rows[0][0], type=kind) if rows else None

    async def keys(self, prefix: str) -> list[str]:
        """The keys of all committed checkpoints that begin so."""
        rows = await self._query("SELECT key FROM checkpoint WHERE substr(key, 1, ?) = ?", len(prefix), prefix)
        return [key for (key,) in rows]

    async def depths(self) -> dict[str, Depth]:
        """What each sink is owed, by name; sinks that are owed nothing too."""
        if self._depths_of != self._done:  # only a commit changes them, and status is asked for often
            done, depths = self._done, dict[str, Depth]()
            rows = await self._query("SELECT sink, count(*), min(n), count(held_since) FROM outbox GROUP BY sink")
            for sink, waiting, first, held in rows:
                at = await self._query("SELECT at FROM journal JOIN outbox USING(seq) WHERE n = ?", first)
                depths[sink] = Depth(waiting, at[0][0] if at else None, held)
            self._depths_of, self._depths = done, depths
        return {sink: Depth(0, None, 0) for sink in self._wants} | self._depths

    async def _query(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        one = self._one_reader
        return await trio.to_thread.run_sync(lambda: self._reader.execute(sql, values).fetchall(), limiter=one)

    def _meta(self, key: str, make: Callable[[], str]) -> str:
        row = self._db.execute("SELECT value FROM checkpoint WHERE key = ?", (key,)).fetchone()
        if row is not None:
            return bytes(row[0]).decode()
        value = make()
        with self._db:
            self._db.execute("INSERT INTO checkpoint VALUES(?, ?)", (key, value.encode()))
        return value

    def close(self) -> None:
        """Close the files and give the directory free."""
        self._reader.close()
        self._db.close()
        os.close(self._lock)


# Under a new number: a receiver that keeps the highest number would take the old one for a repetition.
_RENUMBER = "UPDATE outbox SET n = ?, held_since = NULL, reason = NULL WHERE n = ?"
_LIFT = "numbers go on above this one, those of what waits for this sink too"  # no SQL: see _lift


class Outbox:
    """What one sink is owed, oldest first. Several deliveries may be under way; acknowledge them in any order."""

    def __init__(self, store: Store, sink: str) -> None:
        self._store, self.sink = store, sink

    async def due(self, after: int = 0, limit: int = 256) -> list[Owed]:
        """The next deliveries with a number above `after`, at most `limit`; waits until there is one."""
        while True:
            committed = self._store._committed
            if rows := await self.peek(after, limit):
                return rows
            await committed.wait()

    async def peek(self, after: int = 0, limit: int = 256) -> list[Owed]:
        """Like `due`, but empty instead of waiting. Held ones are left out."""
        rows = await self._store._query(
            "SELECT n, seq, at, kind, run, test, data FROM outbox JOIN journal USING(seq)"
            " WHERE sink = ? AND n > ? AND held_since IS NULL ORDER BY n LIMIT ?",
            self.sink,
            after,
            limit,
        )
        return [Owed(n, _recorded(*row)) for n, *row in rows]

    def ack(self, n: int) -> None:
        """All up to `n` are delivered, but for the held ones."""
        self._store._order("DELETE FROM outbox WHERE sink = ? AND n <= ? AND held_since IS NULL", self.sink, n)

    async def heard(self, last: int) -> None:
        """The sink says up to which number it has heard: these are delivered.

        It may say a number that was never given. Then this store is an older copy of itself, as on a machine that was
        put back to a snapshot, and its next numbers would be taken for repetitions: what waits gets numbers above.
        """
        await self._store.commit()
        if last <= self._store._n:
            self.ack(last)
            return
        log.warning("older copy of the store sink=%s heard=%d given=%d", self.sink, last, self._store._n)
        self._store._order(_LIFT, last, self.sink)
        await self._store.commit()

    def done(self, n: int) -> None:
        """This one is delivered; others may still be under way."""
        self._store._order("DELETE FROM outbox WHERE sink = ? AND n = ?", self.sink, n)

    def hold(self, n: int, reason: str, at: float) -> None:
        """The sink refused this one at that epoch time. The queue goes on; `retry_held` offers it anew."""
        self._store._order("UPDATE outbox SET held_since = ?, reason = ? WHERE n = ?", at, reason, n)

    async def held(self) -> list[tuple[int, float, str]]:
        """Number, epoch time and reason of each held delivery."""
        sql = "SELECT n, held_since, reason FROM outbox WHERE sink = ? AND held_since IS NOT NULL ORDER BY n"
        return [(n, since, reason) for n, since, reason in await self._store._query(sql, self.sink)]

    async def retry_held(self, held_before: float) -> None:
        """Offer again under new numbers what is held since before that epoch time, or since one still to come."""
        for n, since, _ in await self.held():
            if not held_before < since <= held_before + HELD_RETRY_S:  # beyond it: the clock was put back
                self._store._order(_RENUMBER, n)


def open_store(
    folder: Path, *, group_commit_s: float = 0.010, journal_max: int = 256 * 2**20, reserve: int = 16 * 2**20
) -> Store:
    """Open the store of a state directory, or make it. Blocks: call it before the loop does other work.

    Raises StoreError: the directory cannot be written, another process has it open, the file is damaged or newer.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as err:
        raise StoreError(
            f"{folder}: cannot be used as state directory: {err.strerror}",
            remedy=_OWNER if isinstance(err, PermissionError) else "Set state.dir to a writable directory.",
        ) from err
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        os.close(lock)
        who = f" (pid {pid})" if (pid := owner(folder / "lock")) else ""
        raise StoreError(f"{folder}: another agent{who} uses this state directory", remedy=_TWO) from err
    try:
        os.close(os.open(folder / "store.db", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # suites' passwords
        for path in folder.glob("store.db*"):  # what an earlier version made could be read by all
            if path.stat().st_uid == os.geteuid():
                path.chmod(0o600)
        _make_reserve(folder / "reserve", reserve)
        return Store(folder, group_commit_s=group_commit_s, journal_max=journal_max, reserve=reserve, lock=lock)
    except StoreError:
        os.close(lock)
        raise
    except (sqlite3.Error, OSError) as err:
        os.close(lock)
        raise StoreError(f"{folder / 'store.db'}: {err.args[-1]}", remedy=_remedy(err, folder)) from err


_CLOSED = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM)
_TWO = "Stop it, or give this one its own state.dir."
_OWNER = "Give it, with all that is in it, to the user who runs the agent (chown -R), or set another state.dir."


def _remedy(err: sqlite3.Error | OSError, folder: Path) -> str:
    """What a person can do about a store that does not open."""
    code = getattr(err, "sqlite_errorcode", 0) & 0xFF
    if isinstance(err, PermissionError) or code in _CLOSED:
        return _OWNER
    if isinstance(err, OSError) or _is_full(err, folder):
        return "Make room on the disk, or set state.dir to another one."
    return "Move the file away to begin with an empty store; keep it for analysis."


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=64)
    try:
        db.execute("PRAGMA busy_timeout = 5000")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA:
            what = f"{path}: schema {version} is newer than this agent's {SCHEMA}"
            raise StoreError(what, remedy="Install the newer release again.")
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")  # a commit survives power loss, not only a crash
        db.execute("PRAGMA wal_autocheckpoint = 2000")
        if version == 0:
            db.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {SCHEMA}; COMMIT;")
    except BaseException:
        db.close()
        raise
    return db


def _recorded(seq: int, at: float, kind: str, run: str | None, test: str | None, data: bytes) -> Recorded:
    return Recorded(seq=seq, at=at, kind=kind, run=run, test=test, data=msgspec.Raw(data))


def _make_reserve(path: Path, size: int) -> None:
    """A file of real blocks, given up when the disk is full. On a full disk there is none, which is no error."""
    if path.exists() and path.stat().st_size == size:
        return
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as err:
        path.unlink(missing_ok=True)
        if err.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
    finally:
        os.close(fd)


def _is_full(err: sqlite3.Error, folder: Path) -> bool:
    """SQLite says FULL, or fails to grow its WAL index (IOERR) while the file system has less than a MiB."""
    match getattr(err, "sqlite_errorcode", 0) & 0xFF:
        case sqlite3.SQLITE_FULL:
            return True
        case sqlite3.SQLITE_IOERR:
            space = os.statvfs(folder)
            return space.f_bavail * space.f_frsize < 2**20
        case _:
            return False
