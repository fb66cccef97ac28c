"""Frames of the orchestrator/monitor protocol: bytes in, messages and noise out.

A header is believed only if its length suits its keyword; everything else is noise, told line by line. How the bytes
were cut never changes what comes out, but for a body that does not arrive: after PATIENCE_S without a byte its header
is noise too, and what stood behind it is read again. Of floods of short lines only the first ones of a read come out.

Source: protocols/monitors.md, "Reader rules"; seeds/orchestrator-monitor-protocol.md, "Message Syntax".
"""

import re

from agent.core.errors import ProtocolMisuse
from agent.monitors.messages import Message, Noise, parse

MAX_BODY = 99_999  # real monitors read exactly six bytes of header
MAX_LINE = 8192  # of noise; the rest of a longer line is counted
MAX_LINES = 2500  # of one read, more than a run forwards at once (session.py): a look at each of 32,000 takes 60 ms
PATIENCE_S = 3.0

_MOST = 2**20
_LENGTHS: dict[bytes, range] = {
    b"Started ": range(9, 41),
    b"Ready": range(5, 9),
    b"Configured": range(10, 14),
    b"Exit": range(4, 9),
    b"Step OK": range(7, 8193),
    b"Step Time ": range(10, 8193),
    b"Step Error": range(10, _MOST + 1),
    b"Wait For Webhook ": range(18, 1025),
    b"Log ": range(4, _MOST + 1),
}
# One digit before the space is enough to find it; how many there are is counted backwards, which keeps this linear.
_HEADER = re.compile(rb"(?<=\d) (" + b"|".join(map(re.escape, _LENGTHS)) + rb")")
_BEGINNINGS = sorted({b" " + word[:n] for word in _LENGTHS for n in range(len(word))} | {b""}, key=len, reverse=True)
# Seven digits are too many for a length, so they tell that of a longer number only the end may be one.
_TAIL = re.compile(rb"\d{1,7}(?:" + b"|".join(map(re.escape, _BEGINNINGS)) + rb")\Z")
_LONGEST_TAIL = 7 + 1 + max(map(len, _LENGTHS))


def frame(text: str) -> bytes:
    """Frame one message for a monitor: five digits, a space, at most MAX_BODY bytes of UTF-8."""
    body = text.encode()
    if len(body) > MAX_BODY:
        raise ProtocolMisuse(f"a message of {len(body)} bytes does not fit a frame", remedy="Send less than 100 kB.")
    return b"%05d %b" % (len(body), body)


class Lines:
    """Cuts bytes into lines of noise. `longest` bytes of a line are kept, the rest is counted; blank lines go.

    Of what is fed at once MAX_LINES are kept, and the bytes of the rest counted together, as one Noise without text.
    """

    def __init__(self, longest: int) -> None:
        self._line, self._dropped, self._longest = bytearray(), 0, longest

    def feed(self, data: bytes | bytearray) -> list[Noise]:
        """The lines that are complete."""
        events: list[Noise] = []
        *lines, rest = data.split(b"\n")
        for line in lines[:MAX_LINES]:
            self._keep(line)
            events += self.end()
        if dropped := sum(map(len, lines[MAX_LINES:])):
            events.append(Noise("", dropped))
        self._keep(rest)
        return events

    def end(self) -> list[Noise]:
        """The line ends here."""
        text, dropped = self._line.decode(errors="replace").rstrip(), self._dropped
        self._line, self._dropped = bytearray(), 0
        return [Noise(text, dropped)] if text or dropped else []

    def _keep(self, part: bytes | bytearray) -> None:
        room = self._longest - len(self._line)
        self._line += part[:room]
        self._dropped += max(0, len(part) - room)


class Reader:
    """Cuts a monitor's stdout into messages and noise. `longest` bytes of a line of noise are kept."""

    def __init__(self, longest: int = MAX_LINE) -> None:
        self._buf = bytearray()
        self._searched = 0  # no header begins before it
        self._believed: list[
            tuple[int, int, int]
        ] = []  # a header: where it, its body and what follows begin; or others
        self._heard = 0.0
        self._noise = Lines(longest)

    def feed(self, data: bytes, now: float) -> list[Message | Noise]:
        """Take what was read at `now`; return what is complete, in order."""
        self._buf += data
        self._heard = now
        return self._read(is_whole=False)

    def due(self) -> float | None:
        """When the body that is waited for will have taken too long; None: nothing is waited for."""
        return self._heard + PATIENCE_S if self._believed else None

    def tick(self, now: float) -> list[Message | Noise]:
        """Time has passed: a header whose body stays away is noise."""
        due = self.due()
        return self._read(is_whole=True) if due is not None and now >= due else []

    def eof(self) -> list[Message | Noise]:
        """No more will come."""
        events = self._read(is_whole=True)
        return [*events, *self._take_noise(len(self._buf)), *self._noise.end()]

    def _read(self, *, is_whole: bool) -> list[Message | Noise]:
        """Everything up to what may still become a header or its body; `is_whole`: no body will come to its end."""
        events: list[Message | Noise] = []
        while self._believed or self._find():
            head, begin, end = self._believed[0]
            message = parse(bytes(self._buf[begin:end])) if len(self._buf) >= end else None
            if message is not None:
                events += [*self._take_noise(head), *self._noise.end()]
                del self._buf[: end - head]
                self._searched, self._believed = 0, []
                events.append(message)
            elif len(self._buf) >= end or is_whole:
                self._believed.pop(0)
            else:
                return events
        tail = _TAIL.search(self._buf, max(0, len(self._buf) - _LONGEST_TAIL))
        events += self._take_noise(tail.start() if tail else len(self._buf))
        self._searched = 0
        return events

    def _find(self) -> bool:
        """Look for the next header that can be believed."""
        while not self._believed and (found := _HEADER.search(self._buf, self._searched)):
            self._searched, space = found.end(), found.start()
            digits = 1
            while digits < 7 and self._buf[space - digits - 1 : space - digits].isdigit():
                digits += 1
            for count in {6: (6, 5), 7: (5,)}.get(digits, (digits,)):
                length = int(self._buf[space - count : space])
                if length in _LENGTHS[found[1]]:
                    self._believed.append((space - count, space + 1, space + 1 + length))
        return bool(self._believed)

    def _take_noise(self, end: int) -> list[Noise]:
        """What stands before `end` is no message."""
        data = self._buf[:end]
        del self._buf[:end]
        return self._noise.feed(data)
