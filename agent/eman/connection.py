"""One Engine.IO session of the hub, on whichever transport it has now: what it is told, and what it is to be sent.

Source: protocols/eman.md, "The wire", "Long-polling", "Failure behaviour".
"""

import base64
import math
import secrets
from typing import TYPE_CHECKING

import msgspec
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection
from wsproto.connection import ConnectionState

from agent.core.upgraded import FRAGMENT, Upgraded, text_frames
from agent.eman import engineio, messages, socketio
from agent.eman.engineio import Eio, Handshake, Heartbeat, Packet, PacketBroken
from agent.eman.messages import ServiceError
from agent.eman.shake import LEAVE_S

if TYPE_CHECKING:
    from agent.eman.hub import HubServer

PING_S, PONG_S = 25.0, 20.0
MAX_MESSAGE = engineio.MAX_PAYLOAD
MAX_FIRST = 16 * 1024  # of a message, and of what waits, while it may be anybody: who can hold a thousand connections
MAX_QUEUED, MAX_QUEUED_BYTES = 1000, 8 * 2**20  # what may wait for a slow reader
LAST_WORDS_S = 5.0  # for a closing websocket to take what is queued
BURST_S = 1.0  # what may be said at once, at the rate that is allowed for long
PROBED_S = 0.1  # between two polls of a client that is about to leave polling


class Session:
    """One Engine.IO session on whichever transport it has now."""

    def __init__(self, server: "HubServer", number: int, eio: Eio, peer: str, *, rate: int, is_websocket: bool) -> None:
        """`rate`: events a second."""
        self.sid = base64.urlsafe_b64encode(secrets.token_bytes(15)).decode()
        self.number, self.eio, self.peer, self.is_websocket = number, eio, peer, is_websocket
        self.is_known = False
        self.is_held = self.is_posting = self.is_probed = self.is_closed = False
        self._server, self._each_s = server, 1 / rate
        self._paid_until = -math.inf  # what it has said so far is within the rate then
        self._queue: list[Packet] = []  # a deque would take 700 bytes of each idle session
        self._size = 0
        self._wake: trio.Event | None = None  # of a GET that is held
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
        ws._max_message_size = self.max_message
        self.send()
        line_of(ws).divert(self.take)

    def identified(self) -> None:
        """The hub knows who it is."""
        self.is_known = True
        if self._ws is not None:
            self._ws._max_message_size = self.max_message

    @property
    def max_message(self) -> int:
        """Bytes of a frame or a POST."""
        return MAX_MESSAGE if self.is_known else MAX_FIRST

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
        if self._paid_until > trio.current_time() and self._nursery is not None and not self.is_closed:
            assert self._ws is not None
            line_of(self._ws).divert(None)
            self._nursery.start_soon(self._take_later, self._ws)

    async def _take_later(self, ws: WebSocketConnection) -> None:
        await self.rest()
        line_of(ws).divert(self.take)

    async def rest(self) -> None:
        """Wait until what it has said is within the rate."""
        if self._paid_until > trio.current_time():
            await trio.sleep_until(self._paid_until)

    def receive(self, packet: Packet, *, is_poll: bool = False) -> None:
        """Take a packet. Raises PacketBroken."""
        if len(packet.data) > self.max_message:
            raise PacketBroken(f"a packet of more than {self.max_message} bytes")
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
                self._paid_until = max(self._paid_until, now - BURST_S) + self._each_s
                event = socketio.read_event(packet.data)
                if packet.id is not None:
                    self._say(socketio.Packet("ack", messages.NAMESPACE, "[]", packet.id))
                self._server.act(self._server.hub.event(self.number, event.name, event.payload, now))
            case "binary_event" | "binary_ack":
                self._attachments = packet.attachments
                self._complain(ServiceError("Eman's events are JSON only", "binary_not_supported"))
            case "ack" | "error":
                pass

    def _refuse_namespace(self, namespace: str) -> None:
        text = '"Invalid namespace"' if self.eio == 3 else '{"message":"Invalid namespace"}'
        self._say(socketio.Packet("error", namespace, text))

    # ---- out -------------------------------------------------------------------------------------------------------

    def emit(self, packet: Packet) -> None:
        """Send an event."""
        if not self.is_closed:
            self._put(packet)

    def _complain(self, error: ServiceError) -> None:
        text = socketio.event(messages.SERVICE_ERROR, error)
        self._say(socketio.Packet("event", messages.NAMESPACE, text))

    def leave(self) -> None:
        """Leave the namespace; close when the service has not within LEAVE_S. Said once of a session."""
        self._say(socketio.Packet("disconnect", messages.NAMESPACE))
        self._closes_at = trio.current_time() + LEAVE_S

    def _say(self, packet: socketio.Packet) -> None:
        self._put(Packet("message", socketio.encode(packet)))

    def _put(self, packet: Packet) -> None:
        """Send a packet. Who does not read fast enough is told so, and closed."""
        if len(self._queue) >= MAX_QUEUED or self._size >= (MAX_QUEUED_BYTES if self.is_known else MAX_FIRST):
            self.send()  # it may be that it only was not given what is gathered
            if self._queue:
                self._all()
                self._complain(ServiceError("read faster", "too_slow"))
                self.close("a slow reader")
                return
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
        line = line_of(self._ws)
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
        if self._wake is not None:
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
                with trio.move_on_after(PROBED_S if self.is_probed else math.inf):
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
        line = line_of(self._ws)
        with trio.CancelScope(deadline=self._last_words_until) as self._writing:
            try:
                while self._queue or line.has_rest:
                    if line.has_rest:
                        async with self._ws._stream_lock:  # the library's reader answers a close meanwhile
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


def line_of(ws: WebSocketConnection) -> Upgraded:
    """The stream below a websocket of ours."""
    line = ws._stream
    assert isinstance(line, Upgraded)
    return line
