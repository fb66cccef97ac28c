"""Log sources that are no files: the journal's export stream, and records of /dev/kmsg. Bytes in, records out.

Source: protocols/logs.md 5, "Journal and kernel"; the formats are systemd's "Journal Export Format" and that of the
kernel's Documentation/ABI/testing/dev-kmsg.
"""

import re
import struct

import msgspec

from agent.core.errors import PeerBrokeProtocol

MAX_FIELD = 1 << 20  # bytes of one value; longer ones (core dumps) are cut
MAX_ENTRY = 4 << 20  # bytes of all values of an entry; fields beyond are left out
MAX_NAME = 64  # characters of a field's name, as the journal has it
MAX_SIZE = 1 << 30  # of a binary value; the journal itself takes 768 MiB

AGAIN = "The stream is begun again at the last cursor."

_SIZE = struct.Struct("<Q")
_NAME = re.compile(rb"[A-Z0-9_]{1,64}")
_SEQUENCE = re.compile(r"(?:^|;)i=([0-9a-f]{1,16})(?:;|$)")


class Entry(msgspec.Struct, frozen=True):
    """One entry of the journal. `cursor` takes an offset's place; `fields` has MESSAGE too, the first of each name."""

    cursor: str
    message: bytes
    fields: dict[str, bytes]

    @property
    def sequence(self) -> int:
        """The number that journald gave it, which its cursor holds; 0 where that is written otherwise."""
        found = _SEQUENCE.search(self.cursor)
        return int(found[1], 16) if found else 0


class JournalReader:
    """Cuts `journalctl --output=export` into entries. How the bytes were chunked never changes the result.

    `broken` is what was wrong with the stream, if it is none: nothing is taken after that.
    """

    def __init__(self) -> None:
        self.broken: PeerBrokeProtocol | None = None
        self._buf = bytearray()
        self._fields: dict[str, bytes] = {}
        self._size = 0  # bytes of their values
        self._name = ""  # of the binary field whose value is being read
        self._kept = bytearray()
        self._left = -1  # bytes of it that are still to come, its LF included; -1: none is read

    def feed(self, data: bytes) -> list[Entry]:
        """Take what was read; return the entries that are complete."""
        entries: list[Entry] = []
        if self.broken:
            return entries
        self._buf += data
        try:
            while (self._left >= 0 and self._value()) or (self._left < 0 and self._line(entries)):
                pass
        except PeerBrokeProtocol as err:
            self.broken = err
        return entries

    def _line(self, entries: list[Entry]) -> bool:
        """One line: a field, the name of a binary one, or the end of an entry. False: more is needed."""
        end = self._buf.find(b"\n")
        if end < 0:
            if len(self._buf) > MAX_FIELD + MAX_NAME + 1:
                del self._buf[MAX_FIELD + MAX_NAME + 1 :]  # cut; the rest of the line is dropped as it comes
            return False
        line = bytes(self._buf[:end])
        name, equals, value = line.partition(b"=")
        if line and not _NAME.fullmatch(name):
            raise PeerBrokeProtocol(f"journalctl sent {line[:60]!r}, which is no field", remedy=AGAIN)
        if line and not equals:
            if len(self._buf) < end + 1 + _SIZE.size:
                return False
            (size,) = _SIZE.unpack_from(self._buf, end + 1)
            if size > MAX_SIZE:
                raise PeerBrokeProtocol(f"journalctl sent a {name.decode()} of {size} bytes", remedy=AGAIN)
            self._name, self._left, self._kept = name.decode(), size + 1, bytearray()
            del self._buf[: end + 1 + _SIZE.size]
            return True
        del self._buf[: end + 1]
        if line:
            self._take(name.decode(), value)
        elif self._fields:
            fields, self._fields, self._size = self._fields, {}, 0
            if "__CURSOR" not in fields:
                raise PeerBrokeProtocol("journalctl sent an entry without __CURSOR", remedy=AGAIN)
            cursor = fields["__CURSOR"].decode(errors="backslashreplace")
            entries.append(Entry(cursor, fields.get("MESSAGE", b""), fields))
        return True

    def _take(self, name: str, value: bytes) -> None:
        """A field is complete."""
        value = value[:MAX_FIELD]
        if name in ("__CURSOR", "MESSAGE") or self._size + len(value) <= MAX_ENTRY:
            self._fields.setdefault(name, value)
            self._size += len(value)

    def _value(self) -> bool:
        """More of a binary value. False: more is needed."""
        part = self._buf[: self._left]
        self._kept += part[: MAX_FIELD + 1 - len(self._kept)]
        self._left -= len(part)
        del self._buf[: len(part)]
        if self._left:
            return False
        if part[-1:] != b"\n":
            raise PeerBrokeProtocol(f"journalctl sent a {self._name} that is longer than its size", remedy=AGAIN)
        if len(self._kept) <= MAX_FIELD:
            del self._kept[-1:]
        self._take(self._name, bytes(self._kept))
        self._left = -1
        return True


class KernelRecord(msgspec.Struct, frozen=True):
    """One record of /dev/kmsg. `sequence` takes an offset's place; `at_us` is microseconds since boot."""

    sequence: int
    priority: int
    at_us: int
    message: bytes
    fields: dict[str, bytes]


_KMSG = re.compile(rb"(\d{1,10}),(\d{1,20}),(\d{1,20}),[^;\n]*;([^\n]*)\n?", re.DOTALL)
_ESCAPE = re.compile(rb"\\x([0-9a-f]{2})")


def kernel_record(data: bytes) -> KernelRecord:
    """What one read of /dev/kmsg returns: "6,339,5140900,-;message", then lines " KEY=value". Raises PeerBrokeProtocol.

    Sequence numbers that are left out between two records are records that were overwritten: a LogGap.
    """
    head = _KMSG.match(data)
    if not head:
        raise PeerBrokeProtocol(f"/dev/kmsg sent {data[:60]!r}, which is no record", remedy="It is left out.")
    fields = {}
    for line in data[head.end() :].split(b"\n"):
        name, equals, value = line.strip(b" ").partition(b"=")
        if equals:
            fields[name.decode(errors="backslashreplace")] = _unescaped(value)
    return KernelRecord(int(head[2]), int(head[1]), int(head[3]), _unescaped(head[4]), fields)


def _unescaped(text: bytes) -> bytes:
    return _ESCAPE.sub(lambda found: bytes([int(found[1], 16)]), text)
