"""The lab's Mimir: the graph behind a websocket, with queries and live changes.

Source: protocols/emissary.md, "Mimir", "The envelope".
"""

import logging
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import msgspec
import trio
from trio_websocket import WebSocketConnection

from agent.core.channel import Channel, converse
from agent.core.envelope import Request
from agent.core.errors import ActionError, PeerUnreachable
from agent.core.head import Head
from agent.core.metrics import Metrics
from agent.core.payload import read
from agent.lab.faults import Faults
from agent.lab.graph import Changed, Graph
from agent.lab.transaction import UNKEPT_S
from agent.lab.where import Where, parse
from agent.mimir.messages import (
    Change,
    Edge,
    Gap,
    Live,
    Query,
    Register,
    Registered,
    Unlive,
    Upsert,
    Vertex,
    VertexLabel,
)

log = logging.getLogger(__name__)

LOOK_S = 1.0  # how often lapsed reservations are looked for
MAX_SUBSCRIPTIONS = 32  # on one connection
T = TypeVar("T")


class Mimir:
    """The graph of one lab, in `data`/mimir.db. `run` must be running; `serve` is the websocket route `/mimir`."""

    def __init__(self, data: Path, *, metrics: Metrics, clock: Callable[[], float] = time.time) -> None:
        self.faults = Faults()
        self._graph, self._metrics = Graph(data / "mimir.db"), metrics
        self._ahead_s = clock() - trio.current_time()  # as the lab's Seneschal: agents reckon leases by either's time
        self._one_at_a_time = trio.CapacityLimiter(1)
        self._changed = trio.Event()

    def now(self) -> float:
        """The date at the start, in epoch seconds, and what has passed since."""
        return trio.current_time() + self._ahead_s

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """Write `lost` where a reservation was not renewed in time, until cancelled; then close the file."""
        task_status.started()
        try:
            while True:
                try:
                    lapsed = await self._work(self._graph.lapse, self.now())
                except ActionError as err:
                    log.error("reservations that lapsed are not written: %s", err.what)  # noqa: TRY400
                    await trio.sleep(UNKEPT_S)
                    continue
                if lapsed:
                    log.warning("reservations lost ids=%s", ",".join(lapsed))
                    self._tell_live()
                await trio.sleep(LOOK_S)
        finally:
            with trio.CancelScope(shield=True):  # behind what a worker still does
                await self._work(self._graph.close)

    async def serve(self, head: Head, ws: WebSocketConnection) -> None:
        """One connection, until it ends."""
        session = _Session(self, ws)
        try:
            await converse(ws, session.answer, session.talk, metrics=self._metrics)
        except PeerUnreachable as err:
            log.info("mimir client gone why=%s", err.what)

    async def write(self, *vertices: Vertex, edges: tuple[Edge, ...] = ()) -> int:
        """What the lab itself writes; how much changed. Raises ActionError as `upsert`."""
        return await self._upsert(Upsert(vertices=vertices, edges=edges), None)

    async def query(self, query: Query) -> dict[str, Any]:
        """The answer to `query`: {vertices, edges, next}. Raises ActionError."""
        return await self._work(self._graph.query, query, parse(query.where))

    async def outcomes(self, run: str) -> dict[str, int]:
        """How many TestOutcomes of a run have which result."""
        return await self._work(self._graph.outcomes, run)

    async def rows(self) -> list[tuple[Any, ...]]:
        """Every vertex and edge as it is stored, to compare."""
        return await self._work(self._graph.rows)

    async def _upsert(self, upsert: Upsert, writer: tuple[str, str] | None) -> int:
        changed = await self._work(self._graph.upsert, upsert, writer)
        if changed:
            self._tell_live()
        return changed

    def _tell_live(self) -> None:
        event, self._changed = self._changed, trio.Event()
        event.set()

    async def _work(self, call: Callable[..., T], *args: Any) -> T:
        return await trio.to_thread.run_sync(call, *args, limiter=self._one_at_a_time)


class _Subscription(msgspec.Struct):
    label: VertexLabel
    where: Where
    at: int  # the last change that was looked at


class _Session:
    """One connection: who registered, and its live queries."""

    def __init__(self, mimir: Mimir, ws: WebSocketConnection) -> None:
        self._mimir, self._graph, self._ws = mimir, mimir._graph, ws
        self._register: Register | None = None
        self._subscriptions: dict[int, _Subscription] = {}
        self._next = 1

    async def answer(self, request: Request) -> Mapping[str, Any]:
        """Answer one request, as the faults allow."""
        await self._mimir.faults.before(msgspec.json.encode(request.payload).decode())
        payload = await self._answer(request)
        if await self._mimir.faults.after():
            await self._ws.aclose(1011, "cut on purpose")
        return payload

    async def _answer(self, request: Request) -> Mapping[str, Any]:
        if request.action == "register":
            return await self._registered(read(request.payload, Register))
        if self._register is None:
            raise ActionError("forbidden", f"{request.action} before register")
        match request.action:
            case "upsert":
                return await self._upserted(read(request.payload, Upsert), self._register)
            case "query":
                return await self._mimir.query(read(request.payload, Query))
            case "live":
                return await self._live(read(request.payload, Live))
            case "unlive":
                return self._unlive(read(request.payload, Unlive).sub)
            case _:
                known = "register upsert query live unlive"
                raise ActionError("unknown_action", f"{request.action!r} is none of {known}")

    async def _registered(self, register: Register) -> Mapping[str, Any]:
        self._register, last_seq = register, 0
        if register.instance is not None:
            last_seq = await self._mimir._work(self._graph.last_seq, register.ident, register.instance)
        answer = Registered(session=str(uuid.uuid4()), last_seq=last_seq, time=self._mimir.now())
        payload: Mapping[str, Any] = msgspec.to_builtins(answer)
        return payload

    async def _upserted(self, upsert: Upsert, register: Register) -> Mapping[str, Any]:
        if register.instance is None:
            raise ActionError("forbidden", "a reader does not write; register with `instance`")
        return {"changed": await self._mimir._upsert(upsert, (register.ident, register.instance))}

    async def _live(self, live: Live) -> Mapping[str, Any]:
        if len(self._subscriptions) == MAX_SUBSCRIPTIONS:
            raise ActionError("busy", f"{MAX_SUBSCRIPTIONS} live queries are open on this connection; end one")
        where, since = parse(live.where), live.since
        snapshot: list[dict[str, Any]] = []
        seq = self._graph.seq
        if since is None:
            seq, snapshot = await self._mimir._work(self._look, live.label, where)
        elif since > seq:
            raise ActionError("bad_payload", f"key since: {since} is above the newest change, {seq}")
        sub, self._next = self._next, self._next + 1
        self._subscriptions[sub] = _Subscription(live.label, where, seq if since is None else since)
        self._mimir._changed.set()  # the feeder looks at the new one
        return {"sub": sub, "seq": seq, "snapshot": snapshot}

    def _look(self, label: VertexLabel, where: Where) -> tuple[int, list[dict[str, Any]]]:
        return self._graph.seq, self._graph.snapshot(label, where)

    def _unlive(self, sub: int) -> Mapping[str, Any]:
        if self._subscriptions.pop(sub, None) is None:
            raise ActionError("not_found", f"no live query {sub} on this connection")
        return {}

    async def talk(self, channel: Channel) -> None:
        """Post changes to the live queries, until the connection ends."""
        while True:
            # Taken before looking: what changes while we look wakes us again.
            if self._mimir._changed.is_set():
                self._mimir._changed = trio.Event()
            changed = self._mimir._changed
            for sub in list(self._subscriptions):
                await self._feed(channel, sub)
            await changed.wait()

    async def _feed(self, channel: Channel, sub: int) -> None:
        while (subscription := self._subscriptions.get(sub)) is not None:
            oldest, seq, rows = await self._mimir._work(self._since, subscription)
            if subscription.at + 1 < oldest:
                gap = Gap(sub=sub, seq=oldest - 1, start=subscription.at + 1, end=oldest - 1)
                await channel.post("change", msgspec.to_builtins(gap))
                subscription.at = oldest - 1
                continue
            if not rows:
                subscription.at = max(subscription.at, seq)
                return
            for row in rows:
                if (seen := row.seen(subscription.where)) is not None and sub in self._subscriptions:
                    op, props = seen
                    change = {"sub": sub, "seq": row.seq, "op": op, "label": row.label, "id": row.id, "props": props}
                    await channel.post("change", msgspec.to_builtins(msgspec.convert(change, Change)))
                subscription.at = row.seq

    def _since(self, subscription: _Subscription) -> tuple[int, int, list[Changed]]:
        return self._graph.oldest_change(), self._graph.seq, self._graph.changes(subscription.label, subscription.at)
