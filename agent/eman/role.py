"""The agent as a service on a lab's Eman bus: it answers its actions by name, and tells its events.

What is to be told is owed by the store. Eman acknowledges nothing, so a websocket ping goes behind each event: its pong
says that the hub's socket has read what stood before it. With `acked` a listener's answer without error does instead.

Source: protocols/eman.md, "State machines" (service), "How the agent uses it", "Failure behaviour".
"""

import logging
import math
import random
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NoReturn
from urllib.parse import urlsplit

import msgspec
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from agent.core import link
from agent.core.bus import Bus
from agent.core.channel import Tell
from agent.core.errors import ActionError, PeerRefused, PeerUnreachable
from agent.core.held import Held
from agent.core.metrics import Metrics
from agent.core.payload import MAX_NESTED, is_too_deep
from agent.core.store import Owed, Store
from agent.core.supervise import Health
from agent.eman import engineio, messages, socketio
from agent.eman.engineio import Heartbeat, Packet
from agent.eman.messages import Fault, Named, Request, Response, answer
from agent.eman.settings import EmanSettings
from agent.eman.shake import (
    ANSWER_S,
    Answered,
    Asked,
    Caller,
    Complaint,
    Heard,
    IsOnline,
    IsRefused,
    Say,
    answer_limit_s,
)

log = logging.getLogger(__name__)

SINK = "eman"
SHAKE_S = 10.0  # from the connection to shake_online
REMEMBERED_S = 600.0  # a request that is repeated gets its first answer again
MAX_REMEMBERED = 10_000
MAX_READ_BYTES = 4 * 2**20  # of answers to who only reads: older ones are found anew
ACTION_S = 300.0
MAX_UNDER_WAY = 1000  # requests: as many as a hub keeps open for one who asks
AGAIN_S = 5.0  # with `acked`: an event that nobody took is told again then
UNANSWERED_S = ANSWER_S + 5.0  # the same where the hub says nothing: the original does not, when nobody listens
BATCH = 64
LEAVE_S = 1.0  # for the last words, when we go
LOOK_AT_EIO = "Look at eman.url, and at eman.eio: Socket.IO 1 and 2 speak 3, later ones 4."
MAX_ANSWER = engineio.MAX_PAYLOAD - 100  # bytes; the rest is for what stands around it
MAX_EVENT = engineio.MAX_PAYLOAD // 3  # bytes of its data: two of UTF-8 become six in ASCII
READ_ONLY = ("status", "search_log")
MUTATING = ("run_suite", "cancel")


def dial_url(url: str, eio: int) -> str:
    """The websocket's address behind `eman.url`. Raises ValueError for what is no URL."""
    parts = urlsplit(url)
    scheme = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}.get(parts.scheme)
    if scheme is None or not parts.hostname:
        raise ValueError(f"{url!r} is not http(s)://HOST:PORT/communication")
    return f"{scheme}://{parts.netloc}/socket.io/?EIO={eio}&transport=websocket"


async def run(
    bus: Bus,
    store: Store,
    settings: EmanSettings,
    key: str,
    name: str,
    health: Health,
    *,
    dial: link.Dial,
    metrics: Metrics,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> NoReturn:
    """Be the service `name` on the bus at `dial`, for ever. Events of `settings.emit` are owed from `started` on."""
    box = store.owe(SINK, lambda event: type(event).__name__ in settings.emit)
    held = Held(bus, store, box)
    service = _Service(bus, settings, name, metrics)

    async def use(ws: WebSocketConnection, tell: Tell) -> None:
        connection = _Connection(ws, settings, Caller(name, key), service, tell)

        async def emit() -> None:
            await connection.online.wait()
            after = 0
            while True:
                owed = await box.due(after, BATCH)
                for each in owed:
                    if len(each.event.data) > MAX_EVENT:
                        held.hold(each.n, f"{each.event.kind} of {len(each.event.data)} bytes is too long for the bus")
                fitting = [each for each in owed if len(each.event.data) <= MAX_EVENT]
                with health.busy(limit=math.inf if settings.acked else 120.0):  # a silent hub is dead after 85 s
                    await connection.tell_events(fitting, store.instance)
                after = owed[-1].n
                box.ack(after)

        await connection.serve(emit)

    task_status.started()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(held.run)
        service.under_way = nursery
        dial = msgspec.structs.replace(dial, remedy=LOOK_AT_EIO)
        await link.redial(
            SINK, dial, use, publish=bus.publish, random=random.Random(), max_message=engineio.MAX_PAYLOAD
        )
    raise AssertionError("a link never ends")


class _Service:
    """What outlives a connection: the actions under way, and the answers that may be asked for again.

    `under_way` is where the actions run; `online` is the connection that may be spoken on.
    """

    under_way: trio.Nursery

    def __init__(self, bus: Bus, settings: EmanSettings, name: str, metrics: Metrics) -> None:
        self._bus, self._settings, self._metrics = bus, settings, metrics
        self._changes, self._reads = _Answers(math.inf), _Answers(MAX_READ_BYTES)
        self.actions = {f"{name}.{action}": action for action in (*READ_ONLY, *MUTATING)}
        self.actions |= {f"agent.{action}": action for action in READ_ONLY}
        self._online: _Connection | None = None
        self._came = trio.Event()

    async def asked(self, request: Request, connection: "_Connection") -> None:
        """Carry it out, though its connection may be lost meanwhile, and answer on the one that is there then."""
        if len(self.under_way.child_tasks) < MAX_UNDER_WAY:
            self.under_way.start_soon(self._respond, request)
        elif request.timeout_ms != 0:
            fault = Fault(f"{MAX_UNDER_WAY} requests are under way", "busy", 503)
            await connection.respond(answer(request, "", error=fault))

    def is_online(self, connection: "_Connection | None") -> None:
        """This one may be spoken on; None: there is none now."""
        self._online = connection
        if connection is not None:
            self._came.set()
            self._came = trio.Event()

    async def _respond(self, request: Request) -> None:
        until = trio.current_time() + answer_limit_s(request)
        response = await self._answer(request)
        if request.timeout_ms == 0:
            return
        with trio.move_on_at(max(until, trio.current_time() + 1)):
            while True:
                connection = self._online
                if connection is None:
                    await self._came.wait()
                    continue
                try:
                    await connection.respond(response)
                except ConnectionClosed:
                    if self._online is connection:  # and not one that has come meanwhile
                        self.is_online(None)
                else:
                    return

    async def _answer(self, request: Request) -> Response:
        """The answer to a request; to one that is repeated, the first again."""
        key = (request.sender_id, request.request_id)
        answers = self._changes if self.actions.get(request.name) in MUTATING else self._reads
        while isinstance(known := answers.find(key), trio.Event):
            await known.wait()
        if isinstance(known, Response):
            return known
        under_way = trio.Event()
        answers.keep(key, under_way)
        try:
            response = await self._carry_out(request)
            answers.keep(key, response)
        except BaseException:
            answers.forget(key)
            raise
        finally:
            under_way.set()
        return response

    async def _carry_out(self, request: Request) -> Response:
        """The answer, but for who gives it: that is the connection's id."""
        action = self.actions.get(request.name)
        self._metrics.count("eman_requests_total", action=action or "unknown")
        if action is None:
            return answer(request, "", error=Fault(f"{request.name} is not answered here", "unknown_action", 404))
        if action in MUTATING and action not in self._settings.allow:
            return answer(request, "", error=Fault(f"eman.allow has no {action}", "forbidden", 403))
        try:
            text = "{}" if request.data is msgspec.UNSET else bytes(request.data).decode()
            payload = msgspec.json.decode(text)
            if not isinstance(payload, dict | None):
                raise ActionError("bad_payload", "data is not an object")
            if payload and is_too_deep(text, payload):
                raise ActionError("bad_payload", f"data has more than {MAX_NESTED} objects and lists in each other")
            given = dict(payload or {}) | ({"origin": "eman"} if action == "run_suite" else {})
            with trio.fail_after(ACTION_S):
                said: Mapping[str, Any] | msgspec.Raw = await self._bus.ask(action, given)
        except ActionError as err:
            return answer(request, "", error=Fault(err.what, err.code, 500))
        except trio.TooSlowError:
            return answer(request, "", error=Fault(f"{action} took too long", "timeout", 500))
        except Exception as err:
            log.exception("action failed action=%s", action)
            return answer(request, "", error=Fault(f"{type(err).__name__}: {err}", "internal", 500))
        return answer(request, "", data=said)


class _Answers:
    """The first answers to requests, or the events of their ends: of REMEMBERED_S, MAX_REMEMBERED and `most_bytes`."""

    def __init__(self, most_bytes: float) -> None:
        self._kept: OrderedDict[tuple[str, str], tuple[float, int, Response | trio.Event]] = OrderedDict()
        self._bytes, self._most_bytes = 0, most_bytes

    def find(self, key: tuple[str, str]) -> Response | trio.Event | None:
        """By sender and id of the request."""
        oldest = trio.current_time() - REMEMBERED_S
        while self._kept and next(iter(self._kept.values()))[0] < oldest:
            self.forget(next(iter(self._kept)))
        known = self._kept.get(key)
        return known[2] if known else None

    def keep(self, key: tuple[str, str], what: Response | trio.Event) -> None:
        """In place of what was kept for it. The oldest go where there are too many."""
        self.forget(key)
        size = len(msgspec.json.encode(what)) if isinstance(what, Response) else 0
        self._kept[key] = trio.current_time(), size, what
        self._bytes += size
        while len(self._kept) > MAX_REMEMBERED or self._bytes > self._most_bytes:
            self.forget(next(iter(self._kept)))

    def forget(self, key: tuple[str, str]) -> None:
        """It is to be carried out when it comes again."""
        known = self._kept.pop(key, None)
        self._bytes -= known[1] if known else 0


class _Connection:
    """One websocket to the hub."""

    def __init__(
        self, ws: WebSocketConnection, settings: EmanSettings, caller: Caller, service: _Service, tell: Tell
    ) -> None:
        self._ws, self._settings, self._caller, self._service, self._tell = ws, settings, caller, service, tell
        self.online = trio.Event()
        self._heartbeat: Heartbeat | None = None
        self._waiting: dict[str, Response | trio.Event] = {}  # events of ours that a listener has to take

    async def serve(self, emit: Callable[[], Any]) -> None:
        """From the open packet to the end of the connection. Raises PeerError."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._must_be_online)
                nursery.start_soon(emit)
                nursery.start_soon(self._watch)
                while True:
                    await self._receive(engineio.decode(await self._ws.get_message(), self._settings.eio))
        except* ConnectionClosed as group:
            raise PeerUnreachable("the hub closed the connection", remedy="Look at its log.") from group
        finally:
            self._service.is_online(None)
            if self.online.is_set():
                with trio.move_on_after(LEAVE_S, shield=True), suppress(ConnectionClosed):
                    await self._leave()

    async def _leave(self) -> None:
        """Nobody shall ask us any more, and wait for an answer."""
        for name in self._service.actions:
            await self._emit(messages.UNSUBSCRIBE, Named(name))
        await self._say(socketio.Packet("disconnect", messages.NAMESPACE))

    async def _must_be_online(self) -> None:
        with trio.move_on_after(SHAKE_S):
            await self.online.wait()
            return
        raise PeerUnreachable(
            f"the hub's handshake stopped in {self._caller.state}",
            remedy="Look at its log, and at eman.eio: Socket.IO 1 and 2 speak 3, later ones 4.",
        )

    async def _watch(self) -> None:
        """Ping where that is ours to do, and notice a hub that is silent."""
        while True:
            if self._heartbeat is None:
                await trio.sleep(1)
                continue
            await trio.sleep_until(self._heartbeat.due())
            now = trio.current_time()
            if now >= self._heartbeat.dead_at:
                raise PeerUnreachable("the hub was silent for too long", remedy="Look at the network between.")
            if now >= self._heartbeat.next_ping:
                self._heartbeat.pinged(now)
                await self._send(Packet("ping"))

    async def _receive(self, packet: Packet) -> None:
        now, eio = trio.current_time(), self._settings.eio
        if self._heartbeat is not None:
            self._heartbeat.heard(now)
        match packet.type:
            case "open":
                shake = engineio.read_handshake(packet.data)
                self._heartbeat = Heartbeat(
                    eio,
                    is_server=False,
                    interval_s=max(shake.ping_interval, 100) / 1000,
                    timeout_s=max(shake.ping_timeout, 100) / 1000,
                    now=now,
                )
                if eio == 4:
                    await self._say(socketio.Packet("connect", messages.NAMESPACE))
            case "ping":
                await self._send(Packet("pong", packet.data))
            case "close":
                raise PeerUnreachable("the hub ended the session", remedy="Wait for the next connection.")
            case "message" if isinstance(packet.data, str):
                await self._receive_message(socketio.decode(packet.data))
            case _:
                pass

    async def _receive_message(self, packet: socketio.Packet) -> None:
        match packet.type, packet.namespace:
            case "connect", "/" if self._settings.eio == 3:
                await self._say(socketio.Packet("connect", messages.NAMESPACE))
            case "error", _:
                raise PeerRefused(
                    f"the hub refuses {packet.namespace}: {packet.data[:200]}", remedy="Look at eman.url and eman.eio."
                )
            case "disconnect", _:
                raise PeerUnreachable("the hub ended the namespace", remedy="Wait for the next connection.")
            case "event", messages.NAMESPACE:
                event = socketio.read_event(packet.data)
                if packet.id is not None:
                    await self._say(socketio.Packet("ack", messages.NAMESPACE, "[]", packet.id))
                for heard in self._caller.feed(event.name, event.payload):
                    await self._do(heard)
            case _:
                pass

    async def _do(self, heard: Heard) -> None:
        match heard:
            case Say(event, payload):
                await self._emit(event, payload)
            case IsOnline():
                for name in self._service.actions:
                    await self._emit(messages.SUBSCRIBE, Named(name))
                self._tell("ready")
                self.online.set()
                self._service.is_online(self)
            case IsRefused(fault):
                text = f"the hub refuses us: {fault.message} ({fault.code})"
                if fault.status in (400, 403):
                    raise PeerRefused(text, remedy="Look at eman.name, eman.key_file and eman.salt_file.")
                raise PeerUnreachable(text, remedy="Look at its log.")
            case Asked(request):
                await self._service.asked(request, self)
            case Answered(response):
                waiting = self._waiting.get(response.request_id)
                if isinstance(waiting, trio.Event):
                    self._waiting[response.request_id] = response
                    waiting.set()
            case Complaint(event, text):
                log.warning("eman hub complains event=%s text=%s", event, text)

    async def respond(self, response: Response) -> None:
        """Answer as who we are on this connection. What a hub would close it for is an error instead."""
        said = msgspec.structs.replace(response, recipient_id=self._caller.id)
        size = len(socketio.event(messages.RESPONSE, said))
        if size > MAX_ANSWER:
            fault = Fault(f"the answer has {size} bytes; ask for less", "too_big", 500)
            said = msgspec.structs.replace(said, data=msgspec.UNSET, error=msgspec.Raw(msgspec.json.encode(fault)))
        await self._emit(messages.RESPONSE, said)

    async def tell_events(self, owed: list[Owed], instance: str) -> None:
        """Returns once the hub, or with `acked` a listener, has them all."""
        for each in owed:
            request = Request(
                name=f"agent.event.{each.event.kind}",
                request_id=f"{instance}-{each.event.seq}",
                sender_id=self._caller.id,
                data=msgspec.Raw(msgspec.json.encode(each.event)),
                timeout_ms=None if self._settings.acked else 0,
            )
            if self._settings.acked:
                await self._until_taken(request)
            else:
                await self._emit(messages.REQUEST, request)
        if not self._settings.acked:
            await self._ws.ping()

    async def _until_taken(self, request: Request) -> None:
        while True:
            came = trio.Event()
            self._waiting[request.request_id] = came
            await self._emit(messages.REQUEST, request)
            with trio.move_on_after(UNANSWERED_S):
                await came.wait()
            response = self._waiting.pop(request.request_id)
            if isinstance(response, Response) and response.error is msgspec.UNSET:
                return
            await trio.sleep(AGAIN_S)

    async def _emit(self, event: str, payload: msgspec.Struct) -> None:
        await self._say(socketio.Packet("event", messages.NAMESPACE, socketio.event(event, payload)))

    async def _say(self, packet: socketio.Packet) -> None:
        await self._send(Packet("message", socketio.encode(packet)))

    async def _send(self, packet: Packet) -> None:
        await self._ws.send_message(engineio.encode(packet, self._settings.eio))
