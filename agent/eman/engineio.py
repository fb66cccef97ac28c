"""Engine.IO, protocols 3 and 4: packets in websocket frames and in polling payloads, and who has to be heard when.

    PeerBrokeProtocol
    └── PacketBroken        bytes that are no packet of this protocol

Source: protocols/eman.md, "The wire", "Long-polling"; github.com/socketio/engine.io-protocol (v3, v4).
"""

import base64
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec

from agent.core.errors import PeerBrokeProtocol
from agent.core.payload import UNREADABLE

Eio = Literal[3, 4]
Type = Literal["open", "close", "ping", "pong", "message", "upgrade", "noop"]

TYPES: tuple[Type, ...] = ("open", "close", "ping", "pong", "message", "upgrade", "noop")
MAX_PAYLOAD = 1_000_000
SEPARATOR = "\x1e"  # of packets in a payload of protocol 4

_LENGTH = re.compile(r"[0-9]{1,7}:")
_ASTRAL = re.compile("[\U00010000-\U0010ffff]")


class PacketBroken(PeerBrokeProtocol):
    """What came is no packet. The connection is closed."""

    def __init__(self, what: str) -> None:
        super().__init__(what, remedy="Look at the other side's Engine.IO version.")


class Packet(msgspec.Struct, frozen=True):
    """One packet. Only a message may hold bytes."""

    type: Type
    data: str | bytes = ""


Milliseconds = Annotated[int, msgspec.Meta(le=2**53)]  # as exact as JavaScript has it; a float of it is one


class Handshake(msgspec.Struct, frozen=True, rename="camel"):
    """What stands in the open packet. Times are milliseconds."""

    sid: str
    upgrades: tuple[str, ...] = ()
    ping_interval: Milliseconds = 25_000
    ping_timeout: Milliseconds = 20_000
    max_payload: int = MAX_PAYLOAD


def encode(packet: Packet, eio: Eio) -> str | bytes:
    """A packet as a websocket frame, text or binary."""
    if isinstance(packet.data, bytes):
        return packet.data if eio == 4 else b"\x04" + packet.data
    return f"{TYPES.index(packet.type)}{packet.data}"


def decode(frame: str | bytes, eio: Eio) -> Packet:
    """Read a websocket frame. Raises PacketBroken."""
    if isinstance(frame, bytes):
        if eio == 4:
            return Packet("message", frame)
        if frame[:1] != b"\x04":
            raise PacketBroken("a binary frame that is no message")
        return Packet("message", frame[1:])
    if not "0" <= frame[:1] <= "6":
        raise PacketBroken(f"a packet begins with a digit from 0 to 6, not {frame[:1]!r}")
    return Packet(TYPES[int(frame[0])], frame[1:])


def encode_payload(packets: list[Packet], eio: Eio) -> str:
    """Packets as the body of a polling answer or POST."""
    texts = [_text(packet, eio) for packet in packets]
    if eio == 4:
        return SEPARATOR.join(texts)
    return "".join(f"{_units(text)}:{text}" for text in texts)


def decode_payload(body: str, eio: Eio) -> Iterator[Packet]:
    """Read the body of a poll, which may hold half a million packets, one after the other. Raises PacketBroken."""
    return (_from_text(text, eio) for text in (body.split(SEPARATOR) if eio == 4 else _by_length(body)))


def undo_second_encoding(text: str) -> str:
    """Socket.IO 1.x encodes twice in polls: UTF-8's bytes as characters. What cannot be that stays as it is."""
    try:
        return text.encode("latin-1").decode()
    except UnicodeError:
        return text


def _text(packet: Packet, eio: Eio) -> str:
    if isinstance(packet.data, bytes):
        return ("b4" if eio == 3 else "b") + base64.b64encode(packet.data).decode()
    return f"{TYPES.index(packet.type)}{packet.data}"


def _from_text(text: str, eio: Eio) -> Packet:
    if not text.startswith("b"):
        return decode(text, eio)
    data = text[2:] if eio == 3 else text[1:]
    if eio == 3 and text[1:2] != "4":
        raise PacketBroken("a binary packet that is no message")
    try:
        return Packet("message", base64.b64decode(data, validate=True))
    except ValueError as err:
        raise PacketBroken("a binary packet that is no base64") from err


def _by_length(body: str) -> Iterator[str]:
    """Packets of protocol 3. Their lengths count UTF-16 units."""
    # As UTF-16 every unit has two bytes, so a length is an offset; lone surrogates have come through JSON before.
    units = body.encode("utf-16-le", "surrogatepass")
    at = 0
    while at < len(units):
        head = _LENGTH.match(units[at : at + 16].decode("utf-16-le", "replace"))
        if head is None:
            raise PacketBroken("a packet of a payload begins with its length and a colon")
        begin = at + 2 * head.end()
        at = begin + 2 * int(head[0][:-1])
        if at > len(units) or at == begin:
            raise PacketBroken(f"a packet of {head[0][:-1]} units is not there")
        yield units[begin:at].decode("utf-16-le", "surrogatepass")


def _units(text: str) -> int:
    return len(text) + len(_ASTRAL.findall(text))


def read_handshake(data: str | bytes) -> Handshake:
    """The open packet's data. Raises PacketBroken."""
    try:
        return msgspec.json.decode(data, type=Handshake)
    except UNREADABLE as err:
        raise PacketBroken(f"the open packet cannot be read: {err}") from err


def write_handshake(handshake: Handshake, eio: Eio) -> str:
    """The open packet's data; protocol 3 knows no maxPayload."""
    fields: dict[str, Any] = msgspec.to_builtins(handshake)
    if eio == 3:
        del fields["maxPayload"]
    return msgspec.json.encode(fields).decode()


class Heartbeat:
    """Who pings, and until when the other side has to be heard: the client pings in protocol 3, the server in 4.

    Times are seconds of the caller's clock.
    """

    def __init__(self, eio: Eio, *, is_server: bool, interval_s: float, timeout_s: float, now: float) -> None:
        self.pings = (eio == 4) == is_server
        self._interval_s, self._timeout_s = interval_s, timeout_s
        self.next_ping = now + interval_s if self.pings else float("inf")
        self._heard, self._pinged = now, float("-inf")

    def heard(self, now: float) -> None:
        """Something came from the other side: it lives."""
        self._heard = now

    def pinged(self, now: float) -> None:
        """We have sent a ping."""
        self._pinged, self.next_ping = now, now + self._interval_s

    @property
    def dead_at(self) -> float:
        """When the other side counts as dead, if nothing more comes from it."""
        if not self.pings:
            return self._heard + self._interval_s + self._timeout_s
        return self._pinged + self._timeout_s if self._heard < self._pinged else float("inf")

    def due(self) -> float:
        """The next time at which something is to be done."""
        return min(self.next_ping, self.dead_at)
