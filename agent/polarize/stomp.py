"""STOMP 1.2, sans-IO: bytes in, frames out, and the client's end of one connection to the CI Bus.

`Reader` and `encode` are the codec, `Session` is the client: it gives the bytes to send and turns what comes into
events. How the bytes were chunked never changes the frames. A body beyond MAX_BODY is cut and the frame says by how
much: one huge message of somebody else must not end the connection, for a durable subscription gets it at each connect.

Source: the STOMP 1.2 specification; protocols/emissary.md, "CI Bus".
"""

import re
from collections.abc import Iterator, Mapping
from typing import Literal, TypeAlias

import msgspec

from agent.core.errors import PeerBrokeProtocol, ProtocolMisuse

MAX_HEAD = 64 * 1024  # bytes of command and headers
MAX_BODY = 1024 * 1024  # bytes of a body that are kept
HEART_BEAT_MS = 10_000  # protocols/emissary.md: 10 s both ways

State = Literal["new", "connecting", "connected", "closing", "closed"]

_COMMANDS = frozenset(
    (
        *("CONNECT", "STOMP", "SEND", "SUBSCRIBE", "UNSUBSCRIBE", "ACK", "NACK", "BEGIN", "COMMIT", "ABORT"),
        *("DISCONNECT", "CONNECTED", "MESSAGE", "RECEIPT", "ERROR"),
    )
)
# These carry their headers as they are, for the sake of STOMP 1.0 on the other side.
_UNESCAPED = frozenset({"CONNECT", "CONNECTED"})
_ESCAPES = {"\\": "\\\\", "\r": "\\r", "\n": "\\n", ":": "\\c"}
_UNESCAPES = {escape: char for char, escape in _ESCAPES.items()}
_TO_ESCAPE = re.compile(r"[\\\r\n:]")
_ESCAPE = re.compile(r"\\.?", re.DOTALL)
_LINE_ENDS = re.compile(rb"(?:\r?\n)*")
_HEAD_END = re.compile(rb"\n\r?\n")

# What the broker may send in which state, and the state after it.
_NEXT: dict[tuple[State, str], State] = {
    ("connecting", "CONNECTED"): "connected",
    ("connecting", "ERROR"): "closed",
    ("connected", "MESSAGE"): "connected",
    ("connected", "RECEIPT"): "connected",
    ("connected", "ERROR"): "closed",
    ("closing", "MESSAGE"): "closing",
    ("closing", "RECEIPT"): "closing",
    ("closing", "ERROR"): "closed",
}


class Frame(msgspec.Struct, frozen=True):
    """One frame. Of a repeated header the first one counts; `cut` is the number of bytes that the body lost."""

    command: str
    headers: dict[str, str]
    body: bytes = b""
    cut: int = 0


class Connected(msgspec.Struct, frozen=True):
    """The broker took us. Send something every `send_every_s`, expect something each `expect_s`; 0: no need."""

    server: str
    send_every_s: float
    expect_s: float


class Message(msgspec.Struct, frozen=True):
    """A message of a subscription. With `ack` it waits for Session.acknowledge; topics of coilmq have none."""

    headers: dict[str, str]
    body: bytes
    cut: int

    @property
    def ack(self) -> str | None:
        """By what it is acknowledged."""
        return self.headers.get("ack")


class Receipt(msgspec.Struct, frozen=True):
    """The broker has handled the frame of ours that asked for this receipt."""

    receipt: str


class Failed(msgspec.Struct, frozen=True):
    """An ERROR frame: the broker closes the connection. `in_greeting`: it did not even take us."""

    message: str
    in_greeting: bool


Happening: TypeAlias = Connected | Message | Receipt | Failed


def encode(frame: Frame) -> bytes:
    """A frame's bytes; `content-length` is added where there is a body.

    Raises ProtocolMisuse: a NUL in a header, or in CONNECT, which knows no escapes, a line end.
    """
    headers = dict(frame.headers)
    if frame.body:
        headers["content-length"] = str(len(frame.body))
    lines = [frame.command]
    for name, value in headers.items():
        if frame.command in _UNESCAPED:
            if "\n" in name + value or "\r" in name + value or ":" in name:
                raise _misuse(f"header {name!r} of {frame.command} holds what cannot be sent there")
            lines.append(f"{name}:{value}")
        else:
            lines.append(f"{_escape(name)}:{_escape(value)}")
    head = "\n".join(lines)
    if "\0" in head:
        raise _misuse(f"a header of {frame.command} holds a NUL")
    return head.encode() + b"\n\n" + frame.body + b"\0"


class Reader:
    """Cuts bytes into frames. Line ends between frames, which are heart-beats, are taken and not told."""

    def __init__(self) -> None:
        self._buf = bytearray()
        self._searched = 0
        self._head: tuple[str, dict[str, str]] | None = None
        self._body, self._cut = bytearray(), 0
        self._left: int | None = None  # bytes of the body still to come; None: it ends at a NUL

    def feed(self, data: bytes) -> list[Frame]:
        """Take what was read; return the frames that are complete, in order. Raises PeerBrokeProtocol."""
        self._buf += data
        frames: list[Frame] = []
        while (self._head is not None or self._read_head()) and self._read_body():
            assert self._head is not None
            command, headers = self._head
            frames.append(Frame(command, headers, bytes(self._body), self._cut))
            self._head, self._body, self._cut = None, bytearray(), 0
        return frames

    def _read_head(self) -> bool:
        if (ends := _LINE_ENDS.match(self._buf)) and ends.end():
            del self._buf[: ends.end()]
            self._searched = 0
        end = _HEAD_END.search(self._buf, max(0, self._searched - 2))
        if end is None:
            self._searched = len(self._buf)
            if self._searched > MAX_HEAD:
                raise _broken(f"a head of more than {MAX_HEAD} bytes", self._buf)
            return False
        if end.start() > MAX_HEAD:
            raise _broken(f"a head of more than {MAX_HEAD} bytes", self._buf)
        self._head = _parse_head(bytes(self._buf[: end.start()]))
        del self._buf[: end.end()]
        self._searched = 0
        length = self._head[1].get("content-length")
        if length is not None and not re.fullmatch(r"[0-9]{1,15}", length):
            raise _broken(f"content-length is {length[:40]!r}, not a number of bytes", b"")
        self._left = None if length is None else int(length)
        return True

    def _read_body(self) -> bool:
        if self._left is None:
            end = self._buf.find(0)
            size, complete = (len(self._buf), False) if end < 0 else (end, True)
        else:
            size = min(self._left, len(self._buf))
            self._left -= size
            complete = self._left == 0 and len(self._buf) > size
        kept = min(size, MAX_BODY - len(self._body))
        self._body += self._buf[:kept]
        self._cut += size - kept
        del self._buf[:size]
        if not complete:
            return False
        if self._buf[0] != 0:
            raise _broken("no NUL after as many bytes as content-length says", self._buf)
        del self._buf[:1]
        return True


class Session:
    """The client's end of one connection. Its methods give the bytes to send; `feed` tells what came."""

    def __init__(self, *, vhost: str, client_id: str, login: str = "", passcode: str = "") -> None:
        self.state: State = "new"
        self._reader = Reader()
        self._connect = {"accept-version": "1.2", "host": vhost, "heart-beat": f"{HEART_BEAT_MS},{HEART_BEAT_MS}"}
        self._connect["client-id"] = client_id
        if login:
            self._connect |= {"login": login, "passcode": passcode}
        self._receipts = 0
        self._open: set[str] = set()

    def connect(self) -> bytes:
        """The greeting; the answer is Connected or Failed."""
        self._must_be("new")
        self.state = "connecting"
        return encode(Frame("CONNECT", self._connect))

    def subscribe(self, subscription: str, destination: str, headers: Mapping[str, str]) -> tuple[str, bytes]:
        """Subscribe with `ack: client-individual`. The receipt that tells that it stands, and the bytes."""
        fixed = {"id": subscription, "destination": destination, "ack": "client-individual"}
        return self._with_receipt("SUBSCRIBE", fixed | dict(headers))

    def send(self, destination: str, body: bytes, headers: Mapping[str, str]) -> tuple[str, bytes]:
        """Send a message. The receipt that tells that the broker has it, and the bytes."""
        return self._with_receipt("SEND", {"destination": destination} | dict(headers), body)

    def acknowledge(self, ack: str) -> bytes:
        """Tell the broker that the message with this `ack` is dealt with."""
        self._must_be("connected")
        return encode(Frame("ACK", {"id": ack}))

    def disconnect(self) -> tuple[str, bytes]:
        """Leave in order. After the receipt the connection may be closed."""
        answer = self._with_receipt("DISCONNECT", {})
        self.state = "closing"
        return answer

    def feed(self, data: bytes) -> Iterator[Happening]:
        """Take what was read; what it means, one after the other: the state is that of the one that was taken last.

        Raises PeerBrokeProtocol.
        """
        for frame in self._reader.feed(data):
            following = _NEXT.get((self.state, frame.command))
            if following is None:
                raise _broken(f"a {frame.command} frame while {self.state}", b"")
            in_greeting, self.state = self.state == "connecting", following
            match frame.command:
                case "CONNECTED":
                    yield self._greeted(frame.headers)
                case "MESSAGE":
                    yield Message(frame.headers, frame.body, frame.cut)
                case "RECEIPT":
                    receipt = frame.headers.get("receipt-id", "")
                    if receipt in self._open:
                        self._open.discard(receipt)
                        yield Receipt(receipt)
                case _:
                    yield Failed(_error_text(frame), in_greeting)

    def _greeted(self, headers: dict[str, str]) -> Connected:
        version = headers.get("version", "1.0")
        if version != "1.2":
            raise _broken(f"the broker speaks STOMP {version[:20]}, not 1.2", b"")
        found = re.fullmatch(r"([0-9]{1,9}),([0-9]{1,9})", headers.get("heart-beat", "0,0"))
        if found is None:
            raise _broken(f"heart-beat is {headers['heart-beat'][:40]!r}, not two numbers of milliseconds", b"")
        sends, wants = int(found[1]), int(found[2])
        return Connected(
            headers.get("server", ""),
            max(wants, HEART_BEAT_MS) / 1000 if wants else 0.0,
            max(sends, HEART_BEAT_MS) / 1000 if sends else 0.0,
        )

    def _with_receipt(self, command: str, headers: dict[str, str], body: bytes = b"") -> tuple[str, bytes]:
        self._must_be("connected")
        self._receipts += 1
        receipt = f"r{self._receipts}"
        data = encode(Frame(command, headers | {"receipt": receipt}, body))
        self._open.add(receipt)
        return receipt, data

    def _must_be(self, state: State) -> None:
        if self.state != state:
            raise _misuse(f"this needs a session that is {state}, and it is {self.state}")


def _parse_head(head: bytes) -> tuple[str, dict[str, str]]:
    try:
        command, *lines = head.decode().split("\n")
    except UnicodeDecodeError as err:
        raise _broken("a head that is not UTF-8", head) from err
    if b"\0" in head:
        raise _broken("a NUL in a head", head)
    command = command.removesuffix("\r")
    if command not in _COMMANDS:
        raise _broken(f"{command[:40]!r} is no command", head)
    headers: dict[str, str] = {}
    for line in lines:
        name, colon, value = line.removesuffix("\r").partition(":")
        if not colon or not name:
            raise _broken(f"the header line {line[:80]!r} is not name:value", head)
        if command not in _UNESCAPED:
            name, value = _unescape(name), _unescape(value)
        headers.setdefault(name, value)
    return command, headers


def _escape(text: str) -> str:
    return _TO_ESCAPE.sub(lambda found: _ESCAPES[found[0]], text)


def _unescape(text: str) -> str:
    if "\\" not in text:
        return text
    for found in _ESCAPE.finditer(text):
        if found[0] not in _UNESCAPES:
            raise _broken(f"the escape {found[0]!r} is not defined", b"")
    return _ESCAPE.sub(lambda found: _UNESCAPES[found[0]], text)


def _error_text(frame: Frame) -> str:
    said = frame.headers.get("message", "no message")
    detail = frame.body.decode(errors="replace").strip().split("\n", 1)[0]
    return f"{said}: {detail}"[:500] if detail and detail != said else said[:500]


def _misuse(what: str) -> ProtocolMisuse:
    return ProtocolMisuse(f"STOMP: {what}", remedy="This is a bug of the agent; report it.")


def _broken(what: str, data: bytes | bytearray) -> PeerBrokeProtocol:
    shown = f": {bytes(data[:80])!r}" if data else ""
    return PeerBrokeProtocol(f"STOMP: {what}{shown}", remedy="The connection is closed and made anew.")
