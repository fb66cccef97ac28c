"""The hub on trio: Engine.IO by websocket and long-polling on one port, and what `shake.Hub` decides on it.

| path | what |
|---|---|
| `/socket.io/` | Engine.IO 3 and 4: websocket, long-polling, the upgrade from one to the other |
| `/` | `{"result": {"id": "eman"}}` |
| `/services` | who is online and listens to what, by `services_page` |

Source: protocols/eman.md, "The wire", "Long-polling", "Failure behaviour", "Limits and security".
"""

import base64
import logging
import math
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
from wsproto.connection import ConnectionState

from agent.core import listen
from agent.core.errors import AgentError
from agent.core.guard import Guard, is_loopback
from agent.core.head import Head, HttpError
from agent.core.listen import Body, Response, Route
from agent.core.metrics import Metrics
from agent.core.token import read_token
from agent.core.upgraded import FRAGMENT, Upgraded, text_frames
from agent.eman import engineio, messages, socketio
from agent.eman.engineio import Eio, Handshake, Heartbeat, Packet, PacketBroken
from agent.eman.messages import IAm, ServiceError
from agent.eman.settings import HubSettings
from agent.eman.shake import LEAVE_S, Act, Emit, Hub, Leave, by_keys, by_salt

log = logging.getLogger(__name__)

PING_S, PONG_S = 25.0, 20.0
LOOK_S = 1.0
MAX_MESSAGE = engineio.MAX_PAYLOAD
MAX_QUEUED, MAX_QUEUED_BYTES = 1000, 8 * 2**20  # what may wait for a slow reader
MORE_CONNECTIONS = 100  # of the port beside those of services: polls, and who asks for a page
LAST_WORDS_S = 5.0  # for a closing websocket to take what is queued
JSON = (("Content-Type", "application/json"),)
ERRORS = {
    0: "Transport unknown",
    1: "Session ID unknown",
    2: "Bad handshake method",
    3: "Bad request",
    5: "Unsupported protocol version",
}


class HubUnsafe(AgentError):
    """The settings would let everybody in, or nobody."""


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
        self._sessions: dict[str, _Session] = {}
        self._numbers: dict[int, _Session] = {}
        self._next = 0
        self._sooner, self._wakes_at = trio.Event(), math.inf
        self._gathered: list[_Session] | None = None
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

    async def _take(
        self, session: "_Session", head: Head, body: Body, allowed: tuple[tuple[str, str], ...]
    ) -> Response:
        if session.is_posting:
            session.close("a POST while another is under way")
            return _error(3)
        session.is_posting = True
        try:
            raw = await body.read()
        finally:
            session.is_posting = False
        if (head.headers.get("content-type") or "").startswith("application/octet-stream"):
            session.close("a binary POST")
            return _error(3)
        try:
            packets = engineio.decode_payload(raw.decode(), session.eio)
            for packet in packets:
                session.receive(packet, is_poll=True)
        except (PacketBroken, UnicodeDecodeError) as err:
            session.close(str(err))
            return _error(3)
        return Response(200, (("Content-Type", "text/html"), *allowed), b"ok")

    # ---- websocket -------------------------------------------------------------------------------------------------

    async def _websocket(self, head: Head, ws: WebSocketConnection) -> None:
        query = head.query
        eio: Eio = 4 if query.get("EIO") == "4" else 3
        if query.get("EIO") not in ("3", "4"):
            log.info("eman hub refuses a websocket peer=%s why=%s", head.peer, ERRORS[5])
            await ws.aclose(1008, ERRORS[5])
            return
        sid = query.get("sid")
        if sid is not None:
            session = self._sessions.get(sid)
            if session is None or session.is_websocket:
                await ws.aclose(1008, ERRORS[1])
                return
            if not await self._upgrade(session, ws):
                return
        else:
            if len(self._sessions) >= self._settings.max_connections:
                await ws.aclose(1013, "too many connections")
                return
            session = self._open(eio, head.peer, is_websocket=True)
        async with trio.open_nursery() as nursery:
            session.attach(ws, nursery)
            try:
                while not session.is_closed:  # what is not simple comes this way, and the end
                    session.receive(engineio.decode(await ws.get_message(), session.eio))
            except ConnectionClosed as err:
                session.close(f"closed by the service: {err.reason}")
            except PacketBroken as err:
                session.close(str(err))
            finally:
                session.close("the hub ends")

    async def _upgrade(self, session: "_Session", ws: WebSocketConnection) -> bool:
        """From long-polling to this websocket: probe, and from `upgrade` on only the websocket carries packets."""
        probed, upgraded = trio.Event(), trio.Event()

        def take(texts: list[str]) -> None:
            for text in texts:
                if upgraded.is_set():
                    session.take([text])
                elif text == "2probe" and not probed.is_set():
                    probed.set()
                elif text == "5" and probed.is_set() and not session.is_closed:
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
                _line(ws).divert(take)
                await probed.wait()
                await ws.send_message("3probe")
                session.release()
                await upgraded.wait()
                session.release()
                nursery.cancel_scope.cancel()
        return upgraded.is_set()

    # ---- sessions --------------------------------------------------------------------------------------------------

    def _open(self, eio: Eio, peer: str, *, is_websocket: bool = False) -> "_Session":
        self._next += 1
        session = _Session(self, self._next, eio, peer, is_websocket=is_websocket)
        self._sessions[session.sid] = self._numbers[session.number] = session
        self.act(self.hub.opened(session.number, peer, trio.current_time()))
        log.debug("eman hub: opened sid=%s peer=%s eio=%d", session.sid, peer, eio)
        return session

    def forget(self, session: "_Session", why: str) -> None:
        """The session is over."""
        if self._sessions.pop(session.sid, None) is None:
            return
        del self._numbers[session.number]
        log.info("eman hub: gone peer=%s why=%s", session.peer, why)
        self.act(self.hub.gone(session.number))

    def act(self, acts: list[Act]) -> None:
        """Carry out what the hub decided. What many listeners get is written once."""
        written: tuple[object, str] = (None, "")
        for act in acts:
            session = self._numbers.get(act.to)
            if session is None:
                continue
            match act:
                case Emit(_, event, payload):
                    if payload is not written[0] or payload is msgspec.UNSET:
                        written = (payload, socketio.event(event, payload))
                    session.emit(written[1])
                case Leave():
                    session.leave()
        if self.hub.due() < self._wakes_at:
            self._sooner.set()

    @contextmanager
    def gather(self) -> Iterator[None]:
        """What sessions are to send meanwhile leaves at the end, of each of them together."""
        gathered: list[_Session] = []
        self._gathered = gathered
        try:
            yield
        finally:
            self._gathered = None
            for session in gathered:
                session.send()

    def gathers(self, session: "_Session") -> bool:
        """Does it leave later? Told once for each session that has something."""
        if self._gathered is not None:
            self._gathered.append(session)
        return self._gathered is not None


class _Session:
    """One Engine.IO session on whichever transport it has now."""

    def __init__(self, server: HubServer, number: int, eio: Eio, peer: str, *, is_websocket: bool) -> None:
        self.sid = base64.urlsafe_b64encode(secrets.token_bytes(15)).decode()
        self.number, self.eio, self.peer, self.is_websocket = number, eio, peer, is_websocket
        self.is_held = self.is_posting = self.is_closed = False
        self._server = server
        self._queue: list[Packet] = []  # a deque would take 700 bytes of each idle session
        self._size = 0
        self._wake = trio.Event()
        self._ws: WebSocketConnection | None = None
        self._nursery: trio.Nursery | None = None  # of the websocket
        self._is_writing = self._is_gathered = False
        self._encodes_twice = False
        self._attachments = 0
        self._closes_at = math.inf
        self._last_words_until = math.inf
        self._writing = trio.CancelScope()
        self._last = Packet("close")  # what a GET gets when all is over
        self._heartbeat = Heartbeat(
            eio, is_server=True, interval_s=PING_S, timeout_s=PONG_S, now=trio.current_time()
        )  # fmt: skip
        upgrades = () if is_websocket else ("websocket",)
        shake = Handshake(self.sid, upgrades, round(PING_S * 1000), round(PONG_S * 1000))
        self._put(Packet("open", engineio.write_handshake(shake, eio)))
        if eio == 3:
            self._put(Packet("message", socketio.encode(socketio.Packet("connect"))))

    def attach(self, ws: WebSocketConnection, nursery: trio.Nursery) -> None:
        """This websocket carries what is queued, and what comes; at the end of the session `nursery` is cancelled."""
        self._ws, self._nursery = ws, nursery
        self.send()
        _line(ws).divert(self.take)

    # ---- in --------------------------------------------------------------------------------------------------------

    def take(self, texts: list[str]) -> None:
        """Take the packets of one read of a websocket."""
        with self._server.gather():
            try:
                for text in texts:
                    if not self.is_closed:
                        self.receive(engineio.decode(text, self.eio))
            except PacketBroken as err:
                self.close(str(err))

    def receive(self, packet: Packet, *, is_poll: bool = False) -> None:
        """Take a packet. Raises PacketBroken."""
        if len(packet.data) > MAX_MESSAGE:
            raise PacketBroken(f"a packet of more than {MAX_MESSAGE} bytes")
        self._heartbeat.heard(trio.current_time())
        match packet.type:
            case "ping":
                self._put(Packet("pong", packet.data))
            case "message" if isinstance(packet.data, bytes):
                if not self._attachments:
                    raise PacketBroken("a binary packet that nothing announced")
                self._attachments -= 1
            case "message":
                text = packet.data
                assert isinstance(text, str)
                if is_poll and self._encodes_twice:
                    text = engineio.undo_second_encoding(text)
                self._receive_message(socketio.decode(text))
            case "close":
                self._last = Packet("noop")
                self.close("closed by the service")
            case "pong" | "noop" | "upgrade" | "open":
                pass

    def _receive_message(self, packet: socketio.Packet) -> None:
        now = trio.current_time()
        if packet.namespace == "/" and packet.type in ("connect", "disconnect"):
            if packet.type == "disconnect":
                self.close("left")
            return
        if packet.namespace != messages.NAMESPACE:
            self._refuse_namespace(packet.namespace)
            return
        match packet.type:
            case "connect":
                self._encodes_twice = self.eio == 3 and not packet.with_comma
                data = msgspec.json.encode({"sid": self.sid}).decode() if self.eio == 4 else ""
                self._say(socketio.Packet("connect", messages.NAMESPACE, data))
                self._server.act(self._server.hub.joined(self.number, now))
            case "disconnect":
                self.close("left the namespace")
            case "event":
                event = socketio.read_event(packet.data)
                if packet.id is not None:
                    self._say(socketio.Packet("ack", messages.NAMESPACE, "[]", packet.id))
                self._server.act(self._server.hub.event(self.number, event.name, event.payload, now))
            case "binary_event" | "binary_ack":
                self._attachments = packet.attachments
                error = ServiceError("Eman's events are JSON only", "binary_not_supported")
                self.emit(socketio.event(messages.SERVICE_ERROR, error))
            case "ack" | "error":
                pass

    def _refuse_namespace(self, namespace: str) -> None:
        text = '"Invalid namespace"' if self.eio == 3 else '{"message":"Invalid namespace"}'
        self._say(socketio.Packet("error", namespace, text))

    # ---- out -------------------------------------------------------------------------------------------------------

    def emit(self, event: str) -> None:
        """Send the JSON of an event. Who does not read fast enough is told so, and closed."""
        if self.is_closed:
            return
        if len(self._queue) >= MAX_QUEUED or self._size >= MAX_QUEUED_BYTES:
            self._queue.clear()
            error = socketio.event(messages.SERVICE_ERROR, ServiceError("read faster", "too_slow"))
            self._say(socketio.Packet("event", messages.NAMESPACE, error))
            self.close("a slow reader")
            return
        self._say(socketio.Packet("event", messages.NAMESPACE, event))

    def leave(self) -> None:
        """Leave the namespace; close when the service has not within LEAVE_S."""
        self._say(socketio.Packet("disconnect", messages.NAMESPACE))
        self._closes_at = trio.current_time() + LEAVE_S

    def _say(self, packet: socketio.Packet) -> None:
        self._put(Packet("message", socketio.encode(packet)))

    def _put(self, packet: Packet) -> None:
        self._queue.append(packet)
        self._size += len(packet.data)
        if self._nursery is None:
            self.release()
        elif not self._is_gathered:
            self._is_gathered = self._server.gathers(self)
            if not self._is_gathered:
                self.send()

    def send(self) -> None:
        """Send what is queued by the websocket: at once if the kernel takes it, else by a task."""
        self._is_gathered = False
        if self._is_writing or self._nursery is None or self._ws is None:
            return
        line = _line(self._ws)
        if self._ws._wsproto.state is ConnectionState.OPEN and self._leaves_now(line):
            self._all()
        if self._queue or line.has_rest:
            self._is_writing = True
            self._nursery.start_soon(self._write)
        elif self.is_closed:
            self._nursery.cancel_scope.cancel()

    def _leaves_now(self, line: Upgraded) -> bool:
        """Does the kernel take all that is queued, or at least a part of it?"""
        frames: list[bytes] = []
        for packet in self._queue:
            text = engineio.encode(packet, self.eio)
            if not isinstance(text, str) or len(text) > FRAGMENT:
                return False
            frames += text_frames(text)
        return bool(frames) and line.send_now(b"".join(frames))

    def release(self) -> None:
        """Wake a GET that waits for something to send."""
        self._wake.set()

    def close(self, why: str) -> None:
        """End the session; what is queued still goes out."""
        if not self.is_closed:
            self.is_closed = True
            self._last_words_until = self._writing.deadline = trio.current_time() + LAST_WORDS_S
            self._server.forget(self, why)
            self.release()
            self.send()

    def tick(self, now: float) -> None:
        """Time has passed: a ping, or the end."""
        if now >= self._closes_at:
            self.close("refused, and still there")
        elif now >= self._heartbeat.dead_at:
            self.close("nothing was heard of it")
        elif now >= self._heartbeat.next_ping:
            self._heartbeat.pinged(now)
            self._put(Packet("ping"))

    async def give(self) -> str:
        """What a GET gets: held until there is something, the transport changes, or the session is over."""
        self.is_held = True
        try:
            if not self._queue and not self.is_closed:
                self._wake = trio.Event()
                await self._wake.wait()
        finally:
            self.is_held = False
        if self.is_websocket or not self._queue:
            return engineio.encode_payload([self._last if self.is_closed else Packet("noop")], self.eio)
        return engineio.encode_payload(self._all(), self.eio)

    async def _write(self) -> None:
        """Send what is queued by the websocket, with the kernel's time."""
        assert self._ws is not None
        assert self._nursery is not None
        line = _line(self._ws)
        with trio.CancelScope(deadline=self._last_words_until) as self._writing:
            try:
                while self._queue or line.has_rest:
                    if line.has_rest:
                        await line.send_all(b"")
                    for packet in self._all():
                        await self._ws.send_message(engineio.encode(packet, self.eio))
            except (ConnectionClosed, trio.BrokenResourceError, trio.ClosedResourceError):
                self.close("closed while we wrote")
        self._is_writing = False
        if self.is_closed:
            self._nursery.cancel_scope.cancel()

    def _all(self) -> list[Packet]:
        packets, self._queue, self._size = self._queue, [], 0
        return packets


def _line(ws: WebSocketConnection) -> Upgraded:
    line = ws._stream
    assert isinstance(line, Upgraded)
    return line


def _error(code: int) -> Response:
    return Response(400, JSON, msgspec.json.encode({"code": code, "message": ERRORS[code]}))


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
    server = HubServer(settings, is_right, metrics=metrics)
    guard = Guard((), {}, False, settings.origins, trio.current_time)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run)
        serve = partial(
            listen.serve, [address], server.routes, guard, metrics=metrics, tls=tls,
            max_connections=settings.max_connections + MORE_CONNECTIONS, max_message=MAX_MESSAGE,
        )  # fmt: skip
        (bound, *_) = await nursery.start(serve)
        log.info("eman hub listens address=%s auth=%s", bound, settings.auth)
        task_status.started(bound)


def authority(settings: HubSettings, address: str, find: Callable[[str], Path]) -> Callable[[IAm], bool]:
    """Who decides about keys. Raises HubUnsafe, OSError and TokenUnusable for the files."""
    match settings.auth:
        case "md5":
            if not settings.salt_file:
                raise HubUnsafe("eman.hub.salt_file is not set", remedy="Name the file with the salt of the keys.")
            return by_salt(read_token(find(settings.salt_file)))
        case "keys":
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
