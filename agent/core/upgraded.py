"""The byte stream below a server's websocket, and the frames of a message of ours.

The websocket library sends through the stream like through any other. Beside it, `send_now` hands whole frames to the
kernel without a turn of the loop: with hundreds of clients, those turns are most of what a message costs.

Source: RFC 6455, 5.2 (frames); protocols/emissary.md, "Run states on the agent" (chunks of 64 KiB).
"""

import os

import trio

FRAGMENT = 64 * 1024  # bytes of a message that go out without a chance for a ping or pong to overtake

Stream = trio.SocketStream | trio.SSLStream[trio.SocketStream]


class Upgraded:
    """First a head, rebuilt from what was checked, then what the client sends. Its text is the client's address.

    Closed by the websocket, it only ends for the websocket: the port says its last words before it closes the line.
    """

    def __init__(self, stream: Stream, head: bytes, peer: str) -> None:
        self._stream, self._head, self._peer = stream, head, peer
        self._is_closed = self._is_sending = False
        self._rest = b""  # what the kernel did not take of a frame

    def __repr__(self) -> str:  # type: ignore[explicit-override]  # typing.override needs Python 3.12
        return self._peer  # what the websocket gives as its remote end

    @property
    def has_rest(self) -> bool:
        """Was a frame taken in part? Its rest goes out before anything else, by the next `send_all`."""
        return bool(self._rest)

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

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if self._head:
            head, self._head = self._head, b""
            return head
        if self._is_closed:
            await trio.sleep_forever()  # the library's reader asks once more; then it is cancelled
        return await self._stream.receive_some(max_bytes)

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
            await self._stream.send_all(data)
        finally:
            self._is_sending = False


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
