"""JaCoCo's remote control, as its agent speaks it with `output=tcpserver`: bytes in, execution data out.

    both   01 C0C0 1007                      header: magic number, version
    to     40 <dump> <reset>                 a command; each flag is a byte
    from   10 <utf id> <long> <long>         a session: its start and when it was dumped
           11 <long id> <utf name> <bits>    a class that ran: how many flags (varint), then 8 a byte, low first
           20                                the end of the dump

Numbers are big-endian; texts are Java's: two bytes of length, then modified UTF-8.

Source: drill sheet, "Probe sources", JaCoCo; JaCoCo's ExecutionDataReader and RemoteControlReader.
"""

import struct
from collections.abc import Iterator
from typing import TypeAlias

import msgspec

from agent.core.errors import PeerBrokeProtocol

HEADER = b"\x01\xc0\xc0\x10\x07"
MOST_PROBES = 1 << 20  # of a class: a class file has no room for as many

_COMMAND, _SESSION, _CLASS, _END = 0x40, 0x10, 0x11, 0x20
_REMEDY = "Give the address of a JaCoCo agent, 0.7.5 or newer, with output=tcpserver."


class Executed(msgspec.Struct, frozen=True):
    """A class that ran: `id` is of its bytes, `name` has slashes, bit n of `probes` is probe n of `count`."""

    id: int
    name: str
    count: int
    probes: int


class Dumped(msgspec.Struct, frozen=True):
    """All of a dump has come."""


Event: TypeAlias = Executed | Dumped


def dump(*, reset: bool) -> bytes:
    """The command that has the agent tell what ran since the last reset, and forget it if `reset`."""
    return bytes((_COMMAND, True, reset))


class _Short(Exception):
    """More bytes are needed."""


class Reader:
    """Cuts what an agent says, or what stands in an exec file, into events. How it was chunked changes nothing."""

    def __init__(self) -> None:
        self._buf = bytearray()
        self._is_greeted = False

    def feed(self, data: bytes | bytearray) -> Iterator[Event]:
        """Take what was read; yield what is complete. Raises PeerBrokeProtocol; then no more can be read."""
        self._buf += data
        at = 0
        try:
            while at < len(self._buf):
                event, at = self._block(at)
                if event is not None:
                    yield event
        except _Short:
            pass
        del self._buf[:at]

    def _block(self, at: int) -> tuple[Event | None, int]:
        kind = self._buf[at]
        if kind == HEADER[0]:
            if self._take(at, len(HEADER)) != HEADER:
                raise _broken(f"header {self._take(at, len(HEADER)).hex(' ')}, and {HEADER.hex(' ')} was expected")
            self._is_greeted = True
            return None, at + len(HEADER)
        if not self._is_greeted:
            raise _broken(f"byte {kind:#04x} where a header was expected")
        at += 1
        if kind == _SESSION:
            _, at = self._text(at)
            self._take(at, 16)
            return None, at + 16
        if kind == _CLASS:
            (ident,) = struct.unpack(">Q", self._take(at, 8))
            name, at = self._text(at + 8)
            count, at = self._number(at)
            if count > MOST_PROBES:
                raise _broken(f"{count} probes of class {name!r}")
            size = (count + 7) // 8
            probes = int.from_bytes(self._take(at, size), "little") & ((1 << count) - 1)
            return Executed(ident, name, count, probes), at + size
        if kind == _END:
            return Dumped(), at
        raise _broken(f"byte {kind:#04x} where a block was expected")

    def _take(self, at: int, size: int) -> bytes:
        if len(self._buf) < at + size:
            raise _Short
        return bytes(self._buf[at : at + size])

    def _text(self, at: int) -> tuple[str, int]:
        (size,) = struct.unpack(">H", self._take(at, 2))
        return _from_java(self._take(at + 2, size)), at + 2 + size

    def _number(self, at: int) -> tuple[int, int]:
        number = 0
        for shift in range(0, 35, 7):
            (part,) = self._take(at, 1)
            at += 1
            number |= (part & 0x7F) << shift
            if part < 0x80:
                return number, at
        raise _broken("a number of more than 5 bytes")


def _from_java(data: bytes) -> str:
    """Modified UTF-8: NUL takes two bytes, what is beyond 16 bits two surrogates. What is neither becomes U+FFFD."""
    try:
        text = data.replace(b"\xc0\x80", b"\0").decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return data.decode("utf-8", "replace")
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _broken(what: str) -> PeerBrokeProtocol:
    return PeerBrokeProtocol(f"what answers is no JaCoCo agent of today: {what}", remedy=_REMEDY)
