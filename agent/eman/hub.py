"""The hub on trio: Engine.IO by websocket and long-polling on one port, and what `shake.Hub` decides on it.

| path | what |
|---|---|
| `/socket.io/` | Engine.IO 3 and 4: websocket, long-polling, the upgrade from one to the other |
| `/` | `{"result": {"id": "eman"}}` |
| `/services` | who is online and listens to what, by `services_page` |

Source: protocols/eman.md, "The wire", "Long-polling", "Failure behaviour", "Limits and security".
"""

import logging
import math
import resource
import secrets
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn, assert_never

import msgspec
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from agent.core import listen
from agent.core.errors import AgentError
from agent.core.guard import Guard, is_loopback, must_name_loopback
from agent.core.head import Head, HttpError
from agent.core.listen import Body, Response, Route
from agent.core.metrics import Metrics
from agent.core.token import read_token
from agent.eman import engineio, messages, socketio
from agent.eman.connection import MAX_FIRST, MAX_MESSAGE, PING_S, Session, line_of
from agent.eman.engineio import Eio, Packet, PacketBroken
from agent.eman.messages import IAm
from agent.eman.settings import HubSettings
from agent.eman.shake import Act, Emit, Hub, Leave, by_keys, by_salt

log = logging.getLogger(__name__)

LOOK_S = 1.0
EACH_CONNECTIONS = 2  # of the port for a service that polls: what it fetches is held while it sends
MORE_CONNECTIONS = 100  # beside those of services: who asks for a page
PACKETS_AT_ONCE = 200  # of a POST, before others have their turn
OWN_DESCRIPTORS = 64  # of the process, beside connections
JSON = (("Content-Type", "application/json"),)
TEXT = (("Content-Type", "text/plain; charset=utf-8"),)
ERRORS = {
    0: "Transport unknown",
    1: "Session ID unknown",
    2: "Bad handshake method",
    3: "Bad request",
    4: "Forbidden",
    5: "Unsupported protocol version",
}


class HubUnsafe(AgentError):
    """The settings would let everybody in, or nobody."""

    exit_code = 2


class HubServer:
    """The hub's connections. `run` keeps its time and must be running; `routes` are what the port answers."""

    def __init__(
        self,
        settings: HubSettings,
        is_right: Callable[[IAm], bool],
        *,
        metrics: Metrics,
        page: Callable[[Head, Body], Awaitable[Response]] | None = None,
    ) -> None:
        self._settings, self._metrics, self._page = settings, metrics, page
        self.hub = Hub(
            is_right,
            lambda name: f"{name}.{time.time_ns() // 10**6}.{secrets.token_hex(8)}",
            handshake_s=settings.handshake_s,
            broadcast=settings.broadcast,
        )
        self._sessions: dict[str, Session] = {}
        self._numbers: dict[int, Session] = {}
        self._next = 0
        self._sooner, self._wakes_at = trio.Event(), math.inf
        self._gathered: list[Session] | None = None
        metrics.gauge("eman_hub_connections", lambda: len(self._sessions))

    @property
    def routes(self) -> list[Route]:
        """All that the port answers."""
        engine = Route(
            "/socket.io/",
            self._poll,
            self._websocket,
            scope="open",
            methods=("GET", "POST", "OPTIONS"),
            max_body=MAX_MESSAGE,
            refuse=self._refuse,
            reword=lambda err: _error(4, 403) if err.status == 403 else None,
            is_diverted=True,
        )
        return [engine, Route("/", self._root, scope="open"), Route("/services", self._services, scope="open")]

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> NoReturn:
        """End what takes too long, until cancelled."""
        task_status.started()
        while True:
            now = trio.current_time()
            self._sooner = trio.Event()
            # Sessions are looked at each second, all together: an event changes when each of them is due.
            self._wakes_at = min(self.hub.due(), now + LOOK_S if self._sessions else math.inf)
            with trio.move_on_at(self._wakes_at):
                await self._sooner.wait()
            now = trio.current_time()
            self.act(self.hub.tick(now))
            for session in list(self._sessions.values()):
                session.tick(now)

    # ---- HTTP ------------------------------------------------------------------------------------------------------

    async def _root(self, head: Head, body: Body) -> Response:
        if self._page is not None and "text/html" in (head.headers.get("accept") or ""):
            return await self._page(head, body)
        return Response(200, JSON, msgspec.json.encode({"result": {"id": messages.HUB}}))

    async def _services(self, head: Head, body: Body) -> Response:
        page = self._settings.services_page
        if page == "off" or (page == "loopback" and not is_loopback(head.peer)):
            raise HttpError(403, "the list of services is not shown here")
        return Response(200, JSON, msgspec.json.encode({"result": self.hub.online()}))

    def _turn_away(self, head: Head) -> None:
        """Raises HttpError for a page of another site whose own name leads here for a moment.

        Its Origin is its Host, as that of Python's websocket-client is, and a GET has none. Without a key it gets
        nowhere; where none is wanted, which is on loopback alone, its name gives it away.
        """
        if self._settings.auth == "any":
            must_name_loopback(head)

    def _cross_origin(self, head: Head) -> tuple[tuple[str, str], ...]:
        """Headers for a page of another site. The guard has turned away all but the listed ones and our own."""
        origin = head.headers.get("origin")
        if origin is None:
            return ()
        return (
            ("Access-Control-Allow-Origin", origin),
            ("Access-Control-Allow-Credentials", "true"),
            ("Access-Control-Allow-Headers", "Content-Type"),
            ("Access-Control-Allow-Methods", "GET, POST"),
        )

    async def _poll(self, head: Head, body: Body) -> Response:
        """One request of long-polling."""
        self._turn_away(head)
        allowed = self._cross_origin(head)
        if head.method == "OPTIONS":
            return Response(204, allowed)
        query = head.query
        eio = {"3": 3, "4": 4}.get(query.get("EIO", ""))
        if query.get("transport") != "polling":
            return _error(0)
        if eio is None:
            return _error(5)
        if "j" in query:
            return _error(3)
        sid = query.get("sid")
        if sid is None:
            if head.method != "GET":
                return _error(2)
            if len(self._sessions) >= self._settings.max_connections:
                raise HttpError(503, "too many connections")
            session = self._open(3 if eio == 3 else 4, head.peer)
        else:
            found = self._sessions.get(sid)
            if found is None:
                return _error(1)
            session = found
            if session.is_websocket:
                return _error(3)
        if head.method == "POST":
            return await self._take(session, head, body, allowed)
        if session.is_held:
            session.close("a second GET while one is held")
            return _error(3)
        text = await session.give()
        return Response(200, (("Content-Type", "text/plain; charset=UTF-8"), *allowed), text.encode())

    async def _take(self, session: "Session", head: Head, body: Body, allowed: tuple[tuple[str, str], ...]) -> Response:
        if session.is_posting:
            session.close("a POST while another is under way")
            return _error(3)
        session.is_posting = True
        try:
            body.limit = session.max_message
            raw = await body.read()
            if (head.headers.get("content-type") or "").startswith("application/octet-stream"):
                raise PacketBroken("a binary POST")
            for n, packet in enumerate(engineio.decode_payload(raw.decode(), session.eio), 1):
                if session.is_closed:
                    break
                session.receive(packet, is_poll=True)
                if n % PACKETS_AT_ONCE == 0:
                    await trio.lowlevel.checkpoint()
            await session.rest()
        except (PacketBroken, UnicodeDecodeError) as err:
            session.close(str(err))
            return _error(3)
        finally:
            session.is_posting = False
        return Response(200, (("Content-Type", "text/html"), *allowed), b"ok")

    # ---- websocket -------------------------------------------------------------------------------------------------

    def _refuse(self, head: Head) -> Response | None:
        """Why this request gets no websocket. By HTTP: a client tells the text of its error, of a close it does not."""
        self._turn_away(head)
        query = head.query
        sid, eio = query.get("sid"), query.get("EIO")
        if eio not in ("3", "4"):
            log.info("eman hub refuses a websocket peer=%s eio=%s why=%s", head.peer, eio, ERRORS[5])
            return _error(5)
        if sid is None:
            is_full = len(self._sessions) >= self._settings.max_connections
            return Response(503, TEXT, b"too many connections\n") if is_full else None
        session = self._sessions.get(sid)
        return _error(1) if session is None else _error(3) if session.is_websocket else None

    async def _websocket(self, head: Head, ws: WebSocketConnection) -> None:
        ws._max_message_size = MAX_FIRST  # until it is attached to a session
        sid = head.query.get("sid")
        if sid is None:
            session = self._open(4 if head.query["EIO"] == "4" else 3, head.peer, is_websocket=True)
        else:
            found = self._sessions.get(sid)
            if found is None or not await self._upgrade(found, ws):
                return
            session = found
        async with trio.open_nursery() as nursery:
            session.attach(ws, nursery)
            try:
                while not session.is_closed:  # what is not simple comes this way, and the end
                    session.receive(engineio.decode(await ws.get_message(), session.eio))
                    await session.rest()
            except ConnectionClosed as err:
                session.close(f"closed by the service: {err.reason}")
            except PacketBroken as err:
                session.close(str(err))
            finally:
                session.close("the hub ends")

    async def _upgrade(self, session: "Session", ws: WebSocketConnection) -> bool:
        """From long-polling to this websocket: probe, and from `upgrade` on only the websocket carries packets."""
        probed, upgraded = trio.Event(), trio.Event()

        def take(texts: list[str]) -> None:
            for text in texts:
                if upgraded.is_set():
                    session.take([text])
                elif text == "2probe" and not probed.is_set():
                    probed.set()
                elif text == "5" and probed.is_set() and not session.is_closed and not session.is_websocket:
                    session.is_websocket = True
                    upgraded.set()
                else:
                    nursery.cancel_scope.cancel()

        async def end_with_it() -> None:
            try:
                await ws.get_message()
            except ConnectionClosed:
                log.debug("eman hub: a probe was given up sid=%s", session.sid)
            nursery.cancel_scope.cancel()

        with trio.move_on_after(PING_S):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(end_with_it)
                line_of(ws).divert(take)
                await probed.wait()
                session.is_probed = True
                await ws.send_message("3probe")
                session.release()
                await upgraded.wait()
                session.release()
                nursery.cancel_scope.cancel()
        session.is_probed = False
        return upgraded.is_set()

    # ---- sessions --------------------------------------------------------------------------------------------------

    def _open(self, eio: Eio, peer: str, *, is_websocket: bool = False) -> "Session":
        self._next += 1
        session = Session(self, self._next, eio, peer, rate=self._settings.rate, is_websocket=is_websocket)
        self._sessions[session.sid] = self._numbers[session.number] = session
        self.act(self.hub.opened(session.number, peer, trio.current_time()))
        log.debug("eman hub: opened sid=%s peer=%s eio=%d", session.sid, peer, eio)
        return session

    def forget(self, session: "Session", why: str) -> None:
        """The session is over."""
        if self._sessions.pop(session.sid, None) is None:
            return
        del self._numbers[session.number]
        log.info("eman hub: gone service=%s peer=%s why=%s", self.hub.name(session.number), session.peer, why)
        self.act(self.hub.gone(session.number))

    def act(self, acts: list[Act]) -> None:
        """Carry out what the hub decided. What many listeners get is written once."""
        written: tuple[object, Packet] = (None, Packet("noop"))
        for act in acts:
            session = self._numbers.get(act.to)
            if session is None:
                continue
            match act:
                case Emit(_, event, payload):
                    if payload is not written[0] or payload is msgspec.UNSET:
                        said = socketio.Packet("event", messages.NAMESPACE, socketio.event(event, payload))
                        written = (payload, Packet("message", socketio.encode(said)))
                    if event == messages.ID:
                        session.identified()
                    session.emit(written[1])
                    if event == messages.ONLINE:
                        log.info("eman hub: online service=%s peer=%s", self.hub.name(act.to), session.peer)
                case Leave(_, name, code):
                    log.warning("eman hub: refused service=%s peer=%s code=%s", name, session.peer, code)
                    session.leave()
        if self.hub.due() < self._wakes_at:
            self._sooner.set()

    @contextmanager
    def gather(self) -> Iterator[None]:
        """What sessions are to send meanwhile leaves at the end, of each of them together."""
        gathered: list[Session] = []
        self._gathered = gathered
        try:
            yield
        finally:
            self._gathered = None
            for session in gathered:
                session.send()

    def gathers(self, session: "Session") -> bool:
        """Does it leave later? Told once for each session that has something."""
        if self._gathered is not None:
            self._gathered.append(session)
        return self._gathered is not None


def _error(code: int, status: int = 400) -> Response:
    return Response(status, JSON, msgspec.json.encode({"code": code, "message": ERRORS[code]}))


async def serve_hub(
    address: str,
    settings: HubSettings,
    is_right: Callable[[IAm], bool],
    *,
    metrics: Metrics,
    tls: "ssl.SSLContext | None" = None,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve a hub at "HOST:PORT" until cancelled; `started` gives the address that is bound. Raises OSError."""
    server, most = HubServer(settings, is_right, metrics=metrics), port_connections(settings)
    _allow_descriptors(most + OWN_DESCRIPTORS)
    guard = Guard((), {}, False, settings.origins, trio.current_time)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        serve = partial(
            listen.serve, [address], server.routes, guard, metrics=metrics, tls=tls,
            max_connections=most, max_message=MAX_MESSAGE,
        )  # fmt: skip
        (bound, *_) = await nursery.start(serve)
        log.info("eman hub listens address=%s auth=%s", bound, settings.auth)
        task_status.started(bound)


def port_connections(settings: HubSettings) -> int:
    """How many connections a hub's port has to take."""
    return EACH_CONNECTIONS * settings.max_connections + MORE_CONNECTIONS


def _allow_descriptors(most: int) -> None:
    """Many systems give a process 1024, and more to who asks for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
    if allowed < most:
        log.warning("only %d descriptors are allowed, %d may be needed (ulimit -n)", allowed, most)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def authority(settings: HubSettings, address: str, find: Callable[[str], Path]) -> Callable[[IAm], bool]:
    """Who decides about keys. Raises HubUnsafe, OSError and TokenUnusable for the files."""
    match settings.auth:
        case "md5":
            if not settings.salt_file:
                raise HubUnsafe("eman.hub.salt_file is not set", remedy="Name the file with the salt of the keys.")
            return by_salt(read_token(find(settings.salt_file)))
        case "keys":
            if not settings.services:
                raise HubUnsafe("eman.hub.services has no service", remedy="Name each with the file of its key.")
            return by_keys({name: read_token(find(each.key_file)) for name, each in settings.services.items()})
        case "any":
            if not is_loopback(listen.split_address(address)[0]):
                raise HubUnsafe(
                    f'eman.hub.auth = "any" takes every key, and {address} is not loopback',
                    remedy='Set auth to "md5" or "keys".',
                )
            return any_key
        case _:
            assert_never(settings.auth)


def any_key(who: IAm) -> bool:
    """Takes every service; for loopback only."""
    return True
