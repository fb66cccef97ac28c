"""Socket.IO packets, of protocols 1.x to 4.x: `TYPE [N-] [/namespace[?query],] [ackid] [JSON]`.

Source: protocols/eman.md, "The wire"; github.com/socketio/socket.io-protocol.
"""

import json
import re
from typing import Literal

import msgspec

from agent.core.payload import UNREADABLE
from agent.eman.engineio import PacketBroken

Type = Literal["connect", "disconnect", "event", "ack", "error", "binary_event", "binary_ack"]

TYPES: tuple[Type, ...] = ("connect", "disconnect", "event", "ack", "error", "binary_event", "binary_ack")
MAX_ATTACHMENTS = 16

_HEAD = re.compile(r"([0-6])(?:(\d{1,3})-)?(?:(/[^,\[{\"]*)(,?))?(\d{1,15})?")
_OTHERS = re.compile(r"[^\x00-\x7f]+")
# Every escape of JSON, so that of two backslashes none begins one. A pair of surrogates is one character.
_ESCAPE = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\(u[dD][89a-fA-F][0-9a-fA-F]{2}|.)")


class Packet(msgspec.Struct, frozen=True):
    """One packet. `data` is the raw JSON, "" for none; `attachments` binary frames follow a binary one.

    `with_comma` tells whether the namespace ended in one, which 1.x leaves out where nothing follows.
    """

    type: Type
    namespace: str = "/"
    data: str = ""
    id: int | None = None
    attachments: int = 0
    with_comma: bool = True


def encode(packet: Packet) -> str:
    """The text of a packet, always with a comma behind the namespace."""
    binary = f"{packet.attachments}-" if packet.type.startswith("binary") else ""
    namespace = "" if packet.namespace == "/" else f"{packet.namespace},"
    ack = "" if packet.id is None else str(packet.id)
    return f"{TYPES.index(packet.type)}{binary}{namespace}{ack}{packet.data}"


def decode(text: str) -> Packet:
    """Read a packet; its JSON is not looked at. Raises PacketBroken."""
    head = _HEAD.match(text)
    if head is None:
        raise PacketBroken(f"a packet begins with a digit from 0 to 6, not {text[:1]!r}")
    number, attachments, namespace, comma, ack = head.groups()
    kind, data = TYPES[int(number)], text[head.end() :]
    count = int(attachments or 0)
    if kind.startswith("binary") != (attachments is not None) or count > MAX_ATTACHMENTS:
        raise PacketBroken(f"{kind} with {count} attachments")
    if data and data[0] not in '[{"':
        raise PacketBroken(f"{data[:20]!r} where JSON should begin")
    path = (namespace or "/").partition("?")[0]
    return Packet(kind, path, data, None if ack is None else int(ack), count, not namespace or comma == ",")


def event(name: str, payload: object = msgspec.UNSET) -> str:
    """The JSON of an event, in pure ASCII: what is not, Socket.IO 1.x and 2.x count in two ways.

    A payload that is unset is left out.
    """
    parts = [name] if payload is msgspec.UNSET else [name, payload]
    text = msgspec.json.encode(parts).decode()
    return text if text.isascii() else _OTHERS.sub(lambda found: json.dumps(found[0])[1:-1], text)


class Event(msgspec.Struct, frozen=True):
    """An event's name and its first argument as raw JSON; `b"null"` without one."""

    name: str
    payload: msgspec.Raw


_NULL = msgspec.Raw(b"null")
_ARGUMENTS = msgspec.json.Decoder(list[msgspec.Raw])


def read_event(data: str) -> Event:
    """Read an event's JSON. Half a character, which JavaScript may send, is U+FFFD. Raises PacketBroken."""
    try:
        name, *payload = _ARGUMENTS.decode(_without_halves(data) if "\\ud" in data or "\\uD" in data else data)
        return Event(msgspec.json.decode(name, type=str), payload[0] if payload else _NULL)
    except (ValueError, *UNREADABLE) as err:
        raise PacketBroken(f"an event that cannot be read: {err}") from err


def _without_halves(data: str) -> str:
    """JSON without escapes of surrogates that have no other beside them."""
    return _ESCAPE.sub(lambda found: "\\ufffd" if (found[1] or "")[1:2] in ("d", "D") else found[0], data)
