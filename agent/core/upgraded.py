"""The byte stream below a server's websocket, and the frames of a message of ours.

The websocket library sends through the stream like through any other. Beside it, `send_now` hands whole frames to the
kernel without a turn of the loop: with hundreds of clients, those turns are most of what a message costs. The same in
the other direction: what `divert` is given gets the messages of one read together. It gets only what is simple, a text
in one frame of less than 64 KiB; control frames go to the library as ever, and so does everything from the first
frame on that is anything else, so that only one judges what a client does wrong.

Source: RFC 6455, 5.2 (frames); protocols/emissary.md, "Run states on the agent" (chunks of 64 KiB).
"""

import fcntl
import os
import sys
import termios
from collections.abc import Callable

import trio

FRAGMENT = 64 * 1024  # bytes of a message that go out without a chance for a ping or pong to overtake

_TEXT, _CLOSE = 0x81, 0x88  # final frames: the opcode and FIN
_SIMPLE = (_TEXT, _CLOSE, 0x89, 0x8A)

Stream = trio.SocketStream | trio.SSLStream[trio.SocketStream]


class Upgraded:
    """First a head, rebuilt from what was checked, then what the client sends. Its text is the client's address.

    Closed by the websocket, it only ends for the websocket: the port says its last words before it closes the line.
    """

    def __init__(self, stream: Stream, head: bytes, peer: str, *, is_diverted: bool = False) -> None:
        """With `is_diverted` nothing is read before `divert`."""
        self._stream, self._head, self._peer = stream, head, peer
        self._is_closed = self._is_sending = False
        self.is_diverted = self._is_simple = is_diverted  # the latter: so far
        self._take: Callable[[list[str]], None] | None = None
        self._has_taker: trio.Event | None = None
        self._came = b""  # the beginning of a frame, or what came behind one for the library
        self._rest = b""  # what the kernel did not take of a frame

    def __repr__(self) -> str:  # type: ignore[explicit-override]  # typing.override needs Python 3.12
        return self._peer  # what the websocket gives as its remote end

    @property
    def has_rest(self) -> bool:
        """Was a frame taken in part? Its rest goes out before anything else, by the next `send_all`."""
        return bool(self._rest)

    @property
    def unacknowledged(self) -> int:
        """Bytes of ours that the client's kernel has not taken. It takes them for a client that stands still, too, as
        long as there is room; when the line is dead it does not. 0 where the kernel does not tell.
        """
        socket = self._stream.socket if isinstance(self._stream, trio.SocketStream) else None
        if socket is None or self._is_closed or socket.fileno() < 0:
            return 0
        try:
            return int.from_bytes(fcntl.ioctl(socket.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        except OSError:
            return 0

    def send_now(self, frame: bytes) -> bool:
        """Hand a whole frame to the kernel; False when that cannot be done now, and nothing of it was sent.

        A line that is broken is told by the next `send_all`.
        """
        if self._is_closed or self._is_sending or self._rest or not isinstance(self._stream, trio.SocketStream):
            return False
        try:
            sent = os.write(self._stream.socket.fileno(), frame)
        except OSError:
            return False
        self._rest = frame[sent:]
        return True

    def divert(self, take: Callable[[list[str]], None] | None) -> None:
        """Give messages to `take` from now on. What it raises ends the connection. With None nothing more is read."""
        self._take = take
        if take is not None and self._has_taker is not None:
            self._has_taker.set()
            self._has_taker = None

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if self._head:
            head, self._head = self._head, b""
            return head
        if self._is_closed:
            await trio.sleep_forever()  # the library's reader asks once more; then it is cancelled
        while self._is_simple:
            take = await self._taker()
            texts, control, self._came, self._is_simple = simple_frames(self._came)
            if texts:
                take(texts)
                await self._taker()  # what is behind them is later
            if control:
                return control
            if self._is_simple:
                data = await self._stream.receive_some(max_bytes)
                if not data:
                    return data
                self._came += data
        data, self._came = self._came, b""
        return data or await self._stream.receive_some(max_bytes)

    async def _taker(self) -> Callable[[list[str]], None]:
        while self._take is None:
            self._has_taker = trio.Event()
            await self._has_taker.wait()
        return self._take

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        if self._is_closed:
            raise trio.ClosedResourceError
        await self._send(data)

    async def send_last(self, data: bytes, limit_s: float) -> None:
        """Send behind the close of the websocket."""
        with trio.move_on_after(limit_s):
            await self._send(data)

    async def aclose(self) -> None:
        self._is_closed = True

    async def _send(self, data: bytes | bytearray | memoryview) -> None:
        if self._rest:
            data, self._rest = self._rest + data, b""
        self._is_sending = True
        try:
            if isinstance(self._stream, trio.SocketStream):
                await self._send_plain(self._stream.socket, memoryview(data))
            else:  # one that is cancelled in the middle sends nothing more by itself
                await self._stream.send_all(data)
        finally:
            self._is_sending = False

    async def _send_plain(self, socket: trio.socket.SocketType, data: memoryview) -> None:
        """As the stream's own `send_all`. But what it had not sent when it was cancelled goes first the next time: the
        close of a client that stands still would stand in the middle of a frame.
        """
        sent = 0
        try:
            while sent < len(data):
                sent += await socket.send(data[sent:])
        except OSError as err:
            raise trio.BrokenResourceError from err
        except trio.Cancelled:
            self._rest = bytes(data[sent:])
            raise


def simple_frames(data: bytes) -> tuple[list[str], bytes, bytes, bool]:
    """What a client sent, cut into its simple messages; a control frame that ends them; and what is behind that.

    Last: may more simple ones follow? Not behind a close, and not if what is behind begins with another kind of frame.
    """
    texts: list[str] = []
    at, size = 0, len(data)
    while size - at >= 2:
        kind, length = data[at], data[at + 1] - 0x80
        begin = at + 6
        if length == 126 and kind == _TEXT:
            begin += 2
            length = int.from_bytes(data[at + 2 : at + 4])
            if begin <= size and length < 126:
                return texts, b"", data[at:], False
        elif kind not in _SIMPLE or not 0 <= length < 126:
            return texts, b"", data[at:], False
        end = begin + length
        if end > size:
            break
        if kind != _TEXT:
            return texts, data[at:end], data[end:], kind != _CLOSE
        try:
            texts.append(_unmasked(data[begin - 4 : begin], data[begin:end]).decode())
        except UnicodeDecodeError:
            return texts, b"", data[at:], False
        at = end
    return texts, b"", data[at:], True


def _unmasked(mask: bytes, data: bytes) -> bytes:
    # As two large numbers: a loop over the bytes would cost more than all the rest of a message.
    size = len(data)
    whole = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(data, "little") ^ int.from_bytes(whole, "little")).to_bytes(size, "little")


def text_frames(text: str) -> list[bytes]:
    """A text message as a server's frames, which are not masked: one for each 64 KiB, and at least one."""
    data = text.encode()
    if len(data) <= FRAGMENT:
        return [_frame(0x81, data)]
    last = (len(data) - 1) // FRAGMENT * FRAGMENT
    heads = {0: 0x01, last: 0x80}  # the opcode stands in the first one, the end in the last
    return [_frame(heads.get(at, 0x00), data[at : at + FRAGMENT]) for at in range(0, len(data), FRAGMENT)]


def _frame(head: int, data: bytes) -> bytes:
    """The length is written as short as may be; a longer form is refused by the other side."""
    size = len(data)
    if size < 126:
        return b"%c%c%b" % (head, size, data)
    if size < 2**16:
        return b"%c\x7e%b%b" % (head, size.to_bytes(2), data)
    return b"%c\x7f%b%b" % (head, size.to_bytes(8), data)
