"""The control server on trio: one port for clients, their event streams, the status page, health and metrics.

    listen.serve -> /            websocket: the envelope, a Session and its streams; else the page
                    /healthz     200, or 503 with what fails
                    /metrics     Prometheus text
                    /runs/R/A    an artifact of a run
                    /ws/...      the older services' endpoints (older.py)

Source: protocols/emissary.md, "Control server", "Auth, limits"; protocols/settings.md, "Names that several folders
share".
"""

import importlib.resources
import logging
import os
import socket
import ssl
import stat
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import msgspec
import trio
from trio_websocket import WebSocketConnection

import agent
from agent.control.board import Board
from agent.control.exposition import CONTENT_TYPE, Sample, exposition, numbers
from agent.control.messages import Log, RoleShown, RunShown, SinkShown, Status
from agent.control.older import Older
from agent.control.session import AUTH_S, Admitted, Ask, Closed, Opened, Session
from agent.control.settings import ControlSettings
from agent.control.streams import Feed, Subscription, message, replayed
from agent.core import listen
from agent.core.bus import Bus
from agent.core.channel import Channel, converse
from agent.core.envelope import MAX_MESSAGE, Request
from agent.core.errors import ActionError, AgentError
from agent.core.events import Logged, SuiteFinished
from agent.core.guard import RANK, Guard
from agent.core.head import Head, HttpError, Scope
from agent.core.listen import Body, Response, Route
from agent.core.metrics import Metrics
from agent.core.payload import read
from agent.core.store import Store
from agent.core.supervise import Health, Supervisor

log = logging.getLogger(__name__)

PING_S, DEADLINE_S = 20.0, 40.0  # a ping every 20 s, and 20 s to answer it
MAX_FIRST = 16 * 1024  # bytes of a message before a token was shown: it may be anybody's, and is decoded
PAGE = 500  # events that are read at once in a replay
START_S = 30.0  # s that a request waits for the role that answers it, while the agent starts
ASK_S = 120.0  # s for a hang of one action; a role says itself when it gives up
# What these do outlives the agent; run_suite sees to that itself.
KEPT = ("log", "watch_log", "unwatch_log", "label_log", "watch_file", "unwatch_file", "drain", "undrain")
PIECE = 64 * 1024  # bytes of an artifact that are read at once
TYPES = {
    ".xml": "application/xml", ".json": "application/json",
    ".log": "text/plain; charset=utf-8", ".info": "text/plain; charset=utf-8",
}  # fmt: skip
PAGE_TYPES = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'"
)


class PortUnusable(AgentError):
    """An address of control.listen cannot be bound."""

    def __init__(self, listen: Sequence[str], err: OSError) -> None:
        super().__init__(
            f"control.listen: {', '.join(listen)}: {err.strerror or err}",
            remedy="End what uses the port, or set another one; it is tried again.",
        )


async def run(
    bus: Bus,
    store: Store,
    settings: ControlSettings,
    ident: str,
    health: Health,
    *,
    tokens: Sequence[tuple[str, Scope]],
    tls: "ssl.SSLContext | None",
    board: Board,
    supervisor: Supervisor,
    up: trio.Event,
    metrics: Metrics,
    tell_url: Callable[[str], None],
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until cancelled. Answers the actions status, log and metrics to other roles too.

    `up` is set once every role had its start; until then the actions of others wait. `tell_url` takes the server's
    URL when the port is bound. Raises PortUnusable when an address cannot be bound.
    """
    house = _House(bus, store, settings, ident, health, board, supervisor, up, metrics)
    guard = Guard(tokens, settings.tls.names, settings.insecure_loopback, settings.origins, trio.current_time)
    answers = {"status": house.status, "log": house.log, "metrics": house.metrics_action}
    with ExitStack() as stack:
        for action, handler in answers.items():
            stack.enter_context(bus.answer(action, handler))
        house.feed.seq = stack.enter_context(store.follow(house.feed.publish))
        async with trio.open_nursery() as nursery:
            serve = partial(
                listen.serve,
                settings.listen,
                house.routes(guard),
                guard,
                metrics=metrics,
                tls=tls,
                max_connections=settings.max_connections,
            )
            try:
                bound = await nursery.start(serve)
            except OSError as err:
                raise PortUnusable(settings.listen, err) from err
            tell_url(url_of(bound[0], has_tls=tls is not None))
            log.info("control listens addresses=%s tls=%s", ",".join(bound), "yes" if tls else "no")
            task_status.started()


def url_of(address: str, *, has_tls: bool) -> str:
    """The server's URL for others: where it listens, or by the host's name when that is every address."""
    host, number = listen.split_address(address)
    try:
        everywhere = ip_address(host).is_unspecified
    except ValueError:
        everywhere = False
    name = socket.gethostname() if everywhere else f"[{host}]" if ":" in host else host
    return f"{'wss' if has_tls else 'ws'}://{name}:{number}/"


class _House:
    """What all connections share: the feed, and the answers about the agent as a whole."""

    def __init__(
        self,
        bus: Bus,
        store: Store,
        settings: ControlSettings,
        ident: str,
        health: Health,
        board: Board,
        supervisor: Supervisor,
        up: trio.Event,
        metrics: Metrics,
    ) -> None:
        self.store, self.metrics, self.feed = store, metrics, Feed(0)
        self.clients = 0
        self.older = Older(bus, self.feed, ident, self.ask) if settings.compat else None
        self._bus, self._ident, self._health, self._board = bus, ident, health, board
        self._supervisor, self._up = supervisor, up
        self._began = trio.current_time()
        self._own = {"status", "log", "metrics", "config"}
        self._files = {name: _resource(name) for name in PAGE_TYPES}
        metrics.gauge("control_clients", lambda: self.clients)
        metrics.gauge("control_subscriptions", lambda: len(self.feed))
        metrics.gauge("journal_seq", lambda: self.feed.seq)

    async def ask(self, action: str, given: dict[str, Any]) -> Mapping[str, Any]:
        """Let the action be done by whoever answers it. Raises ActionError."""
        if action not in self._own:
            with trio.move_on_after(START_S):
                await self._up.wait()
        with self._health.busy(limit=ASK_S):
            try:
                return await self._bus.ask(action, given)
            except ActionError as err:
                if err.code == "unknown_action" and not self._up.is_set():  # as on a full disk
                    raise ActionError("busy", f"the agent is starting, nothing answers {action!r} yet") from err
                raise

    async def keep(self, action: str) -> None:
        """Returns when what an action did is on disk: who is answered need not say it again. Raises ActionError."""
        kept = False
        async with trio.open_nursery() as nursery:

            async def until_full() -> None:
                await self.store.wait_full()
                nursery.cancel_scope.cancel()

            nursery.start_soon(until_full)
            await self.store.commit()
            kept = True
            nursery.cancel_scope.cancel()
        if not kept:
            raise ActionError(
                "busy", f"the disk is full: {action} was carried out, and would be forgotten if the agent ended now"
            )

    # ---- actions ---------------------------------------------------------------------------------------------------

    async def status(self, given: dict[str, Any]) -> dict[str, Any]:
        """{} -> `Status`."""
        runs = await self._asked("runs")
        depths = await self.store.depths()
        shown = Status(
            ident=self._ident,
            version=agent.__version__,
            uptime=trio.current_time() - self._began,
            roles=self._roles(),
            runs=tuple(msgspec.convert(run, RunShown) for run in runs.get("runs", ())),
            outbox={
                sink: SinkShown(waiting=depth.waiting, oldest=depth.oldest, held=depth.held)
                for sink, depth in depths.items()
            },
            links=self._board.links,
            seq=self.feed.seq,
            entitlement=dict(await self._asked("entitlement")) or None,
            reservation=tuple((await self._asked("reservations")).get("reservations", ())),
            draining=bool(runs.get("draining", False)),
            alerts=tuple(self._board.alerts.values()),
            full=self.store.full,
        )
        return msgspec.structs.asdict(shown)

    async def log(self, given: dict[str, Any]) -> dict[str, Any]:
        """`Log` -> {}: a Logged event."""
        message = read(given, Log)
        run, test = self._board.active()
        self._bus.publish(
            Logged(severity=message.severity, message=message.message, timestamp=message.timestamp, run=run, test=test)
        )
        await self.store.room()  # who logs faster than the disk takes it is not read meanwhile
        return {}

    async def metrics_action(self, given: dict[str, Any]) -> dict[str, Any]:
        """{} -> every number by its name."""
        return dict(numbers(await self._samples()))

    async def _asked(self, action: str) -> Mapping[str, Any]:
        """What a role says; nothing where none answers, or not now."""
        try:
            return await self._bus.ask(action, {})
        except ActionError as err:
            log.debug("not in the status action=%s error=%s", action, err)
            return {}

    def _roles(self) -> dict[str, RoleShown]:
        overdue = self._supervisor.overdue()
        return {
            name: RoleShown(
                state=status.state, restarts=status.restarts, error=status.error, overdue=overdue.get(name, 0.0)
            )
            for name, status in self._supervisor.status.items()
        }

    async def _samples(self) -> list[Sample]:
        samples: list[Sample] = [*self.metrics, ("uptime_seconds", (), trio.current_time() - self._began)]
        for sink, depth in (await self.store.depths()).items():
            labels = (("sink", sink),)
            samples += [("outbox_waiting", labels, depth.waiting), ("outbox_held", labels, depth.held)]
            if depth.oldest is not None:
                samples.append(("outbox_oldest_seconds", labels, max(0.0, time.time() - depth.oldest)))
        for name, role in self._roles().items():
            samples.append(("role_up", (("role", name),), float(_is_well(role))))
            samples.append(("role_restarts_total", (("role", name),), role.restarts))
        samples.append(("alerts", (), len(self._board.alerts)))
        samples.append(("disk_full", (), float(self.store.full)))
        return samples

    # ---- HTTP ------------------------------------------------------------------------------------------------------

    def routes(self, guard: Guard) -> list[Route]:
        """All that the port answers."""
        return [
            *(self.older.routes() if self.older else ()),
            Route("/", partial(self._page, "page.html"), partial(self._talk, guard), scope="open"),
            Route("/page.css", partial(self._page, "page.css"), scope="open"),
            Route("/page.js", partial(self._page, "page.js"), scope="open"),
            Route("/healthz", self._healthz, scope="open"),
            Route("/metrics", self._metrics, scope="read"),
            Route("/runs/*", self._artifact, scope="read"),
        ]

    async def _talk(self, guard: Guard, head: Head, ws: WebSocketConnection) -> None:
        client = _Client(self, guard, head, ws)
        self.clients += 1
        try:
            await converse(
                ws,
                client.answer,
                client.talk,
                metrics=self.metrics,
                ping_s=PING_S,
                deadline_s=DEADLINE_S,
                elder=client.answer_older if self.older else None,
            )
        finally:
            self.clients -= 1

    async def _page(self, name: str, head: Head, body: Body) -> Response:
        headers = (
            ("Content-Type", f"{PAGE_TYPES[name]}; charset=utf-8"),
            ("Content-Security-Policy", POLICY),
            ("Cache-Control", "no-cache"),
            ("Referrer-Policy", "no-referrer"),
        )
        return Response(200, headers, self._files[name])

    async def _healthz(self, head: Head, body: Body) -> Response:
        """Who may read hears the errors too; everybody else names alone."""
        roles = {name: role for name, role in self._roles().items() if not _is_well(role)}
        alerts = self._board.alerts.values()
        is_well = self._up.is_set() and not roles and not alerts and not self.store.full
        shown: dict[str, Any] = {"ok": is_well, "starting": not self._up.is_set()}
        if RANK[head.scope] >= RANK["read"]:
            shown |= {"roles": roles, "alerts": list(alerts)}
        else:
            shown |= {"roles": sorted(roles), "alerts": sorted(alert.code for alert in alerts)}
        shown |= {"disk_full": self.store.full}
        headers = (("Content-Type", "application/json"), ("Cache-Control", "no-store"))
        return Response(200 if is_well else 503, headers, msgspec.json.encode(shown) + b"\n")

    async def _metrics(self, head: Head, body: Body) -> Response:
        return Response(200, (("Content-Type", CONTENT_TYPE),), exposition(await self._samples()).encode())

    async def _artifact(self, head: Head, body: Body) -> Response:
        """GET /runs/<run>/<artifact>: the run's result document, a file that it names, and nothing else."""
        run, slash, name = head.path.removeprefix("/runs/").partition("/")
        rows = await self.store.read(run=run, kinds=["SuiteFinished"]) if slash else []
        known = msgspec.json.decode(rows[-1].data, type=SuiteFinished).artifacts.get(name) if rows else None
        path = self.store.folder / "runs" / run / name
        is_result = bool(rows) and name == "result.json"
        if not is_result and (known is None or Path(known.path) != path):
            raise HttpError(404, "no run here has such an artifact")
        found = await trio.to_thread.run_sync(_regular_size, path)
        if found is None:
            raise HttpError(404, "the file is not there any more")
        headers = (
            ("Content-Type", TYPES.get(path.suffix, "application/octet-stream")),
            ("Content-Length", str(found)),
            ("Content-Security-Policy", "sandbox"),
            *((("ETag", f'"{known.sha256}"'),) if known else ()),
        )
        return Response(200, headers, _pieces(path, found))


class _Client:
    """One websocket: its session, and a task for each of its streams."""

    def __init__(self, house: _House, guard: Guard, head: Head, ws: WebSocketConnection) -> None:
        self._house, self._guard, self._peer = house, guard, head.peer
        self._ws = ws
        if head.scope == "open":
            ws._max_message_size = MAX_FIRST
        self._live: set[int] = set()  # subscriptions whose replay is over: the channel takes from them by itself
        self._replays: dict[int, trio.CancelScope] = {}
        self._session = Session(head.scope, self._authenticate, self._wake_for)
        self._admitted = trio.Event()
        self._talking: tuple[trio.Nursery, Channel] | None = None
        self._logged: set[str] = set()

    async def answer(self, request: Request) -> Mapping[str, Any]:
        """Answer one request. Raises ActionError."""
        try:
            return await self._answer(request)
        except ActionError as err:
            self._house.metrics.count("control_refused_total", code=err.code)
            if err.code in ("unauthorized", "forbidden", "rate") and err.code not in self._logged:
                self._logged.add(err.code)  # once for each connection; after that the counter has it
                log.warning("refused peer=%s action=%r reason=%s", self._peer, request.action, err.reason)
            raise

    async def _answer(self, request: Request) -> Mapping[str, Any]:
        match self._session.take(request):
            case Admitted():
                self._ws._max_message_size = MAX_MESSAGE
                self._admitted.set()
                return {}
            case Opened() as opened:
                return await self._open(opened)
            case Closed(subscription):
                self._end(subscription)
                return {}
            case Ask(action, given):
                answer = await self._house.ask(action, given)
                if action in KEPT and not request.posted:
                    await self._house.keep(action)
                return answer

    async def answer_older(self, message: Mapping[str, Any]) -> str | None:
        """Answer a frame of the older service. Raises ActionError."""
        if self._session.scope == "open":
            raise ActionError("unauthorized", "a token is missing; it goes into the head of the request")
        assert self._house.older is not None
        return await self._house.older.answer(message)

    async def talk(self, channel: Channel) -> None:
        """The connection's own task: let the client in, then run its streams until it leaves."""
        try:
            async with trio.open_nursery() as nursery:
                self._talking = nursery, channel
                if self._session.scope == "open":
                    with trio.move_on_after(AUTH_S):
                        await self._admitted.wait()
                    if not self._admitted.is_set():
                        await channel.close(1008, f"no token within {AUTH_S:g} s")
                        return
                await trio.sleep_forever()
        finally:
            self._talking = None
            for subscription in self._session.subscriptions.values():
                self._end(subscription)

    def _authenticate(self, token: str) -> Scope:
        return self._guard.check(token, self._peer)

    def _wake_for(self, number: int) -> Callable[[], None]:
        def wake() -> None:
            if self._talking is not None and number in self._live:
                self._offer(number, *self._talking)

        return wake

    def _offer(self, number: int, nursery: trio.Nursery, channel: Channel) -> None:
        subscription = self._session.subscriptions[number]
        if not subscription.overflowed:
            channel.offer(subscription)
            return
        self._end(subscription)
        self._house.metrics.count("control_disconnected_total")
        log.warning("client did not keep up peer=%s sub=%d", self._peer, number)
        nursery.start_soon(channel.close, 1013, f"subscription {number} does not keep up")

    def _end(self, subscription: Subscription) -> None:
        subscription.close()
        self._house.feed.detach(subscription)
        self._live.discard(subscription.number)
        if replay := self._replays.get(subscription.number):
            replay.cancel()

    async def _open(self, opened: Opened) -> dict[str, Any]:
        house, subscription = self._house, opened.subscription
        oldest = await house.store.oldest()
        seq = house.feed.seq
        since = seq if opened.since is None else opened.since
        if since > seq or self._talking is None:
            del self._session.subscriptions[subscription.number]
            what = f"since: {since} is above {seq}, the highest number here; it is of another journal"
            raise ActionError("bad_payload", what if self._talking else "the connection is closed")
        nursery, channel = self._talking
        # It begins when this task waits next: behind the answer.
        nursery.start_soon(self._begin, nursery, channel, subscription, since)
        return {"sub": subscription.number, "seq": seq, "oldest": oldest}

    async def _begin(self, nursery: trio.Nursery, channel: Channel, subscription: Subscription, since: int) -> None:
        """Replay, then let the channel take what comes, unless the client ends it meanwhile."""
        number = subscription.number
        if number not in self._session.subscriptions:  # even before this task had its first turn
            return
        with trio.CancelScope() as scope:
            self._replays[number] = scope
            try:
                await self._replay(channel, subscription, since)
            finally:
                del self._replays[number]
        if number not in self._session.subscriptions:
            self._house.feed.detach(subscription)
        else:
            self._live.add(number)
            self._offer(number, nursery, channel)

    async def _replay(self, channel: Channel, subscription: Subscription, at: int) -> None:
        """Send what the journal has from there on, and attach to the feed: without a gap and without a double."""
        feed, is_attached = self._house.feed, False
        while not is_attached:
            upto = feed.seq
            if upto - at <= PAGE:  # what is published while the last page is read and sent waits in the queue
                feed.attach(subscription)
                is_attached = True
            while at < upto:
                rows = [row for row in await self._house.store.read(at, limit=PAGE) if row.seq <= upto]
                reached = rows[-1].seq if len(rows) == PAGE else upto
                for piece in replayed(subscription.topic, rows, at, reached):
                    await channel.send(message(subscription.number, [piece.text]))
                at = reached


def _is_well(role: RoleShown) -> bool:
    return role.state in ("running", "ended", "stopped") and not role.overdue


def _resource(name: str) -> bytes:
    return (importlib.resources.files("agent.control") / name).read_bytes()


def _regular_size(path: Path) -> int | None:
    try:
        found = path.lstat()
    except OSError:
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


async def _pieces(path: Path, size: int) -> AsyncGenerator[bytes, None]:
    """As much of a file as its length was; what a link points to is never sent."""
    file = await trio.to_thread.run_sync(os.open, path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        while size and (data := await trio.to_thread.run_sync(os.read, file, min(PIECE, size))):
            size -= len(data)
            yield data
    finally:
        os.close(file)
