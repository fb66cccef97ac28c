"""A server's end of a websocket, byte by byte: what a library would not let it do, and when."""

import base64
import hashlib

import trio

PING, CLOSE = b"\x89\x00", b"\x88\x02\x03\xe8"


async def pings_at_the_close(stream: trio.abc.Stream, answer: bytes = b"") -> None:
    """Open a websocket; say `answer` (less than 126 bytes) to the first message; ping when the client closes."""
    head = b""
    while b"\r\n\r\n" not in head:
        head += await stream.receive_some(4096)
    key = next(line[19:] for line in head.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key: "))
    accepted = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: %b\r\n\r\n" % accepted
    await stream.send_all(b"HTTP/1.1 101 Switching Protocols\r\n" + upgrade)
    read = bytearray()
    while not read.startswith(b"\x88"):  # whatever a client sends at a time comes in one read
        read = bytearray(await stream.receive_some(4096))
        if read.startswith(b"\x81"):
            await stream.send_all(b"\x81%c%b" % (len(answer), answer))
    await stream.send_all(PING + CLOSE)
    await stream.receive_some(4096)
