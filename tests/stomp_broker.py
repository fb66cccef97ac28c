"""A STOMP broker for tests, of our own codec: the test reads what comes and says what is sent."""

import ssl

import trio

from agent.polarize.stomp import Frame, Reader, encode

CONNECTED = b"CONNECTED\nversion:1.2\nheart-beat:10000,10000\n\n\0"


class Broker:
    """Takes connections on loopback; a test reads what came and says what is sent."""

    def __init__(self, listener: trio.SocketListener) -> None:
        self._listener = listener
        self.port = listener.socket.getsockname()[1]
        self.tls: ssl.SSLContext | None = None
        self.greeting = CONNECTED
        self._streams: list[trio.abc.Stream] = []
        self._reader, self._frames = Reader(), list[Frame]()

    async def accept(self) -> Frame:
        """Take the next connection and greet it; its CONNECT."""
        tcp = await self._listener.accept()
        self._streams.append(
            trio.SSLStream(tcp, self.tls, server_side=True, https_compatible=True) if self.tls else tcp
        )
        self._reader, self._frames = Reader(), []
        connect = await self.next()
        await self._streams[-1].send_all(self.greeting)
        return connect

    async def next(self) -> Frame:
        """The next frame that came. The line being closed raises EndOfChannel."""
        while not self._frames:
            self._frames = self._reader.feed(await self.receive())
        return self._frames.pop(0)

    async def receive(self) -> bytes:
        """What comes next, heart-beats too."""
        data = await self._streams[-1].receive_some()
        if not data:
            raise trio.EndOfChannel
        return bytes(data)

    async def send(self, *frames: Frame) -> None:
        await self._streams[-1].send_all(b"".join(map(encode, frames)))

    async def receipt(self, frame: Frame) -> None:
        await self.send(Frame("RECEIPT", {"receipt-id": frame.headers["receipt"]}))

    async def cut(self) -> None:
        for stream in self._streams:
            await trio.aclose_forcefully(stream)
