"""The lab's Seneschal: a queue of suites behind a websocket, kept on disk.

Source: protocols/emissary.md, "Seneschal", "The envelope".
"""

import logging
import sqlite3
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeAlias, TypeVar

import msgspec
import trio
from trio_websocket import WebSocketConnection

from agent.core.channel import Channel, Refused, converse
from agent.core.envelope import Request
from agent.core.errors import ActionError, PeerUnreachable
from agent.core.head import Head
from agent.core.metrics import Metrics
from agent.core.payload import read
from agent.lab.faults import Faults
from agent.lab.mimir import Mimir
from agent.lab.queue import Act, Cancel, LabRun, Mark, Order, Owed, Queue, Writer
from agent.lab.transaction import UNKEPT_S, transaction
from agent.mimir.messages import RESERVATION_REV, Vertex
from agent.seneschal.messages import (
    RUN_LEASE_S,
    Accepted,
    Available,
    Complete,
    Log,
    Register,
    Registered,
    Update,
    Updated,
)
from agent.seneschal.messages import Refused as RunRefused

log = logging.getLogger(__name__)

TICK_S = 1.0
SUPERSEDED = 4001
OWED: dict[str, type[Owed]] = {"accepted": Accepted, "refused": RunRefused, "complete": Complete}
T = TypeVar("T")


class Seneschal:
    """One lab's queue, in `data`/seneschal.db. `run` must be running; `serve` is the websocket route `/seneschal`.

    `mimir` gets the states of reservations that a Seneschal writes; `lease_s` is how long a run is an agent's.
    """

    def __init__(
        self,
        data: Path,
        mimir: Mimir | None,
        *,
        metrics: Metrics,
        lease_s: float = RUN_LEASE_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.faults = Faults()
        self._disk, self._mimir, self._metrics = _Disk(data / "seneschal.db"), mimir, metrics
        runs, writers = self._disk.load()
        self._queue = Queue(_new_id, runs, writers, lease_s=lease_s)
        self._lines: dict[str, _Line] = {}
        self._one_at_a_time = trio.CapacityLimiter(1)
        self._changed, self._queued = trio.Event(), trio.Event()
        # The date at the start and a clock that never steps: leases must not lapse because the date was set.
        self._ahead_s = clock() - trio.current_time()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Look at leases and unanswered runs, until cancelled; then close the file."""
        task_status.started()
        try:
            while True:
                self._queued = trio.Event()
                # Runs are not given up, nor leases, while nothing can be kept of it.
                is_kept = await self._do_unasked([]) and await self._do_unasked(self._queue.tick(self._now()))
                with trio.move_on_after(TICK_S if is_kept else UNKEPT_S):
                    await self._queued.wait()
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._disk.close, limiter=self._one_at_a_time)

    async def serve(self, head: Head, ws: WebSocketConnection) -> None:
        """One agent's connection, until it ends."""
        line = _Line(self, ws)
        try:
            await converse(ws, line.answer, line.talk, metrics=self._metrics)
        except PeerUnreachable as err:
            log.info("agent gone why=%s", err.what)
        finally:
            self._left(line)

    def enqueue(self, suite: Mapping[str, Any], *, deadline: float | None = None) -> str:
        """Queue a suite document; the id of its run. It is on disk before it is sent. `deadline` is epoch seconds."""
        run = self._queue.enqueue(dict(suite), deadline=deadline)
        self._queued.set()
        return run

    async def cancel(self, run: str, reason: str) -> None:
        """End a run, wherever it is. Raises ActionError `no_such_run`."""
        await self._do(self._queue.cancel(run, reason))

    def runs(self) -> list[LabRun]:
        """Every run, oldest first."""
        return list(self._queue.runs.values())

    def agents(self) -> dict[str, Register]:
        """The agents that are connected, by ident."""
        return self._queue.agents()

    async def changed(self) -> None:
        """Wait until a run changes."""
        await self._changed.wait()

    async def ended(self, run: str) -> LabRun:
        """Wait until a run is done, refused or dropped, or its last successor is; that one."""
        while True:
            row = self._queue.runs[run]
            if row.state in ("done", "dropped") or (row.state == "refused" and row.again is None):
                return row
            if row.state in ("lost", "refused") and row.again is not None:
                successor = self._queue.runs[row.again]
                if successor.state != "dropped":
                    run = successor.run
                    continue
            await self._changed.wait()

    def _now(self) -> float:
        return trio.current_time() + self._ahead_s

    async def _do(self, acts: list[Act]) -> None:
        """Keep what changed, then carry out the acts. Raises ActionError when the disk takes nothing: then none is."""
        if changes := self._queue.take_changes():
            rows = {key: None if row is None else msgspec.json.encode(row) for key, row in changes.items()}
            try:
                await trio.to_thread.run_sync(self._disk.write, rows, limiter=self._one_at_a_time)
            except ActionError:
                self._queue.not_kept(changes)
                raise
            event, self._changed = self._changed, trio.Event()
            event.set()
        for act in acts:
            match act:
                case Mark() if self._mimir is not None:
                    await self._mark(self._mimir, act)
                case Order() | Cancel() if act.ident in self._lines:
                    self._lines[act.ident].tell(act)

    async def _do_unasked(self, acts: list[Act]) -> bool:
        """The same where nobody waits for an answer; False when the disk takes nothing, which is tried again."""
        try:
            await self._do(acts)
        except ActionError as err:
            log.error("the queue is not on the disk, tried again in %g s: %s", UNKEPT_S, err.what)  # noqa: TRY400
            return False
        return True

    async def _mark(self, mimir: Mimir, mark: Mark) -> None:
        rev = RESERVATION_REV[mark.props["state"]]
        try:
            await mimir.write(Vertex(id=mark.reservation, label="Reservation", rev=rev, props=mark.props))
        except ActionError as err:  # the agent was faster: the reservation is past that state
            log.info("reservation not marked id=%s why=%s", mark.reservation, err.what)

    def _joined(self, line: "_Line", register: Register) -> "_Line | None":
        """Take the line as the agent's; the older one that it supersedes. Raises ActionError `ident_taken`."""
        other = self._lines.get(register.ident)
        if other is not None and other is not line:
            if other.instance != register.instance:
                raise ActionError("ident_taken", f"{register.ident} is connected from another machine or state")
        else:
            other = None
        self._lines[register.ident] = line
        return other

    def _left(self, line: "_Line") -> None:
        for ident in [ident for ident, other in self._lines.items() if other is line]:
            del self._lines[ident]
            self._queue.gone(ident)


class _Line:
    """One connection: who registered on it, and what is to be sent."""

    def __init__(self, seneschal: Seneschal, ws: WebSocketConnection) -> None:
        self._seneschal, self._ws = seneschal, ws
        self.ident = self.instance = ""
        self._acts, self._to_send = trio.open_memory_channel[Order | Cancel](1000)
        self._channel: Channel | None = None

    def tell(self, act: Order | Cancel) -> None:
        """Send this; what a peer that takes nothing does not get, it gets again by the queue's own clock."""
        try:
            self._acts.send_nowait(act)
        except trio.WouldBlock:
            log.warning("agent takes nothing ident=%s", self.ident)

    async def talk(self, channel: Channel) -> None:
        """Send runs and cancels, each without waiting for the others."""
        self._channel = channel
        async with trio.open_nursery() as nursery:
            async for act in self._to_send:
                nursery.start_soon(self._send, channel, act)
                if self._seneschal.faults.duplicate:
                    nursery.start_soon(self._send, channel, act)

    async def _send(self, channel: Channel, act: Order | Cancel) -> None:
        try:
            match act:
                case Order():
                    await channel.ask("run", msgspec.to_builtins(act.order))
                case Cancel():
                    await channel.ask("cancel", {"run": act.run, "reason": act.reason})
        except Refused as err:
            log.warning("refused ident=%s act=%s reason=%s", self.ident, type(act).__name__, err.reason)
            if isinstance(act, Order):
                self._seneschal._queue.not_ordered(act.order.run, err.reason)
                await self._seneschal._do_unasked([])
        except PeerUnreachable as err:  # sent again when its time comes
            log.info("not sent ident=%s why=%s", self.ident, err.what)

    async def answer(self, request: Request) -> Mapping[str, Any]:
        """Answer one request, as the faults allow."""
        await self._seneschal.faults.before(msgspec.json.encode(request.payload).decode())
        payload = await self._answer(request)
        if await self._seneschal.faults.after():
            await self._ws.aclose(1011, "cut on purpose")
        return payload

    async def _answer(self, request: Request) -> Mapping[str, Any]:
        queue, now = self._seneschal._queue, self._seneschal._now()
        if request.action == "register":
            return await self._registered(read(request.payload, Register))
        if not self.ident:
            raise ActionError("forbidden", f"{request.action} before register")
        if self._seneschal._lines.get(self.ident) is not self:
            raise ActionError("forbidden", f"another connection of {self.ident} took over")
        match request.action:
            case "available":
                await self._seneschal._do(queue.available(self.ident, read(request.payload, Available), now))
                return {}
            case "update":
                leases, acts = queue.update(self.ident, self._own(read(request.payload, Update)), now)
                await self._seneschal._do(acts)
                return _payload(Updated(time=now, leases=leases))
            case "accepted" | "refused" | "complete":
                message = read(request.payload, OWED[request.action])
                await self._seneschal._do(queue.owed(self.ident, self.instance, message, now))
                return {}
            case "log":
                entry = read(request.payload, Log)
                log.info("ident=%s run=%s test=%s %s", self.ident, entry.run, entry.test, entry.message)
                return {}
            case _:
                known = "register available update accepted refused complete log"
                raise ActionError("unknown_action", f"{request.action!r} is none of {known}")

    async def _registered(self, register: Register) -> Mapping[str, Any]:
        if self.ident:
            raise ActionError("forbidden", f"registered already, as {self.ident}")
        superseded = self._seneschal._joined(self, register)
        self.ident, self.instance = register.ident, register.instance
        if superseded is not None and superseded._channel is not None:
            await superseded._channel.close(SUPERSEDED, "superseded by a newer connection")
        now = self._seneschal._now()
        last_seq, runs, acts = self._seneschal._queue.register(register, now)
        await self._seneschal._do(acts)
        return _payload(Registered(session=str(uuid.uuid4()), time=now, last_seq=last_seq, runs=runs))

    def _own(self, update: Update) -> Update:
        if update.ident != self.ident:
            raise ActionError("bad_payload", f"key ident: {update.ident}, but {self.ident} registered")
        return update


Row: TypeAlias = LabRun | Writer


class _Disk:
    """Runs and writers in SQLite, each as one JSON row. Calls block."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")  # what is answered is on disk
        self._db.execute("CREATE TABLE IF NOT EXISTS kept(n INTEGER PRIMARY KEY, key TEXT UNIQUE, value BLOB NOT NULL)")

    def load(self) -> tuple[list[LabRun], list[Writer]]:
        rows = self._db.execute("SELECT key, value FROM kept ORDER BY n").fetchall()
        runs = [msgspec.json.decode(value, type=LabRun) for key, value in rows if key.startswith("run ")]
        writers = [msgspec.json.decode(value, type=Writer) for key, value in rows if key.startswith("writer ")]
        return runs, writers

    def write(self, rows: Mapping[str, bytes | None]) -> None:
        put = "INSERT INTO kept(key, value) VALUES(?, ?) ON CONFLICT(key) DO UPDATE SET value = excluded.value"
        with transaction(self._db):
            self._db.executemany(put, [row for row in rows.items() if row[1] is not None])
            gone = [(key,) for key, value in rows.items() if value is None]
            self._db.executemany("DELETE FROM kept WHERE key = ?", gone)

    def close(self) -> None:
        self._db.close()


def _new_id() -> str:
    return f"r-{uuid.uuid4().hex[:12]}"


def _payload(message: msgspec.Struct) -> dict[str, Any]:
    payload: dict[str, Any] = msgspec.to_builtins(message)
    return payload
