"""The port of one layer: who may come in, and the envelope as Gator speaks it.

On loopback a peer must be of the same user, or root; elsewhere an address ends in a path that only who was told it
knows. A connection is converse() of core/channel.py, with Gator's words: `identify` is told as Gator tells it, and
errors are sentences.

Source: protocols/gator.md, "The wire", "Limits and security".
"""

import hmac
import logging
import os
import secrets
import select
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import NoReturn

import trio
from trio_websocket import WebSocketConnection

import agent
from agent.core.channel import Answerer, AtOnce, Channel, converse
from agent.core.guard import Guard, is_loopback
from agent.core.head import Head, HttpError, Scope
from agent.core.listen import Port, Route
from agent.core.metrics import Metrics
from agent.gator.messages import MAX_MESSAGE_IN
from agent.gator.settings import GatorSettings

IDENTITY = {"tool": "gator", "version": "1.0", "emissary": agent.__version__}
DEADLINE_S, PING_S = 60.0, 20.0
MORE_CONNECTIONS = 64  # beside those of children
BACKLOG = 1024  # connections that wait to be accepted; the kernel may allow fewer
ACCEPT_AGAIN_S, ACCEPTED_AT_ONCE = 0.1, 16

log = logging.getLogger(__name__)

Connected = Callable[[WebSocketConnection], Awaitable[None]]
Opened = Callable[[Channel], Awaitable[None]]


class Gate(Guard):
    """Admits peers of our user on loopback, and those who know the path elsewhere."""

    def __init__(self, secret: str | None, proc: Path = Path("/proc/net")) -> None:
        super().__init__((), {}, False, (), trio.current_time)
        self._secret, self._proc = secret, proc

    def admit(self, head: Head) -> Scope:  # type: ignore[explicit-override]  # typing.override needs Python 3.12
        """Raises HttpError 403."""
        if self._secret is not None:
            given = head.path.removeprefix("/t/").encode()
            if not head.path.startswith("/t/") or not hmac.compare_digest(given, self._secret.encode()):
                raise HttpError(403, "this address ends in a path that the parent gives to its children")
            return "open"
        if is_loopback(head.peer):
            uid = user_of(head.peer, head.peer_port, self._proc)
            if uid not in (os.getuid(), 0):
                raise HttpError(403, "only the user of this layer, and root, may talk to it")
        return "open"


def user_of(address: str, port: int, proc: Path = Path("/proc/net")) -> int | None:
    """The uid of the local process at that end of a TCP connection; None where it cannot be found."""
    ip = ip_address(address)
    for name, own in _spellings(ip):
        wanted = f"{own}:{port:04X}"
        try:
            lines = (proc / name).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if len(fields) > 7 and fields[1] == wanted:
                return int(fields[7])
    return None


def _spellings(ip: IPv4Address | IPv6Address) -> list[tuple[str, str]]:
    """The files an address may be in, and how it is written there: 32-bit words in the machine's order."""
    mapped = IPv6Address(b"\0" * 10 + b"\xff\xff" + ip.packed) if ip.version == 4 else ip
    return [
        (name, _words(each.packed))
        for name, each in (("tcp", ip), ("tcp6", mapped))
        if name == "tcp6" or ip.version == 4
    ]


def _words(packed: bytes) -> str:
    words = (packed[at : at + 4] for at in range(0, len(packed), 4))
    return "".join(f"{socket.htonl(int.from_bytes(word, 'big')):08X}" for word in words)


class Ports:
    """The ports of the layers of one process, at free numbers of `host`. One task waits at all of them, `run`: those of
    an array's jobs come and go by the thousand, and mostly nobody calls.
    """

    def __init__(self, host: str, path_secret: bool, metrics: Metrics) -> None:
        self._host, self._metrics = host, metrics
        self._has_secret = path_secret and not is_loopback(host)
        self._where: tuple[socket.AddressFamily, str, str] | None = None  # the host, resolved; as others call it
        self._epoll = select.epoll()
        self._open: dict[int, OpenPort] = {}  # by the listening descriptor

    async def open(self, connected: Connected, *, children: int = 0) -> "OpenPort":
        """Listen for a layer; `connected` serves each connection. Raises OSError with the setting it is about."""
        try:
            return await self._opened(connected, children)
        except OSError as err:
            raise OSError(err.errno, f"gator.listen: {err.strerror}", self._host) from err

    async def _opened(self, connected: Connected, children: int) -> "OpenPort":
        if self._where is None:
            kind, _, _, _, (host, *_) = (await trio.socket.getaddrinfo(self._host, 0, type=socket.SOCK_STREAM))[0]
            self._where = kind, str(host), _reachable(self._host)
        family, host, name = self._where
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setblocking(False)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            listener.bind((host, 0))
            listener.listen(BACKLOG)
            number = listener.getsockname()[1]
            self._epoll.register(listener, select.EPOLLIN)
        except OSError:
            listener.close()
            raise
        secret = secrets.token_urlsafe(16) if self._has_secret else None

        async def websocket(head: Head, ws: WebSocketConnection) -> None:
            await connected(ws)

        served = Port(
            [Route("/*", websocket=websocket, scope="open", is_diverted=True)],
            Gate(secret),
            self._metrics,
            max_connections=children + MORE_CONNECTIONS,
            max_message=MAX_MESSAGE_IN,
        )
        address = f"{name}:{number}/t/{secret}" if secret else f"{name}:{number}"
        self._open[listener.fileno()] = port = OpenPort(listener, served, address, self._close)
        return port

    def _close(self, port: "OpenPort") -> None:
        if port.listener.fileno() >= 0:
            del self._open[port.listener.fileno()]
            self._epoll.unregister(port.listener)
            port.listener.close()
            for scope in port.scopes:
                scope.cancel()

    async def run(self) -> NoReturn:
        """Serve, until cancelled; then all are closed."""
        try:
            async with trio.open_nursery() as nursery:
                while True:
                    await trio.lowlevel.wait_readable(self._epoll.fileno())
                    for fd, _ in self._epoll.poll(0):
                        try:
                            self._accept(self._open[fd], nursery)
                        except OSError as err:  # gone before it was served; or no descriptor is free
                            log.warning("connection not accepted error=%s", err)
                            await trio.sleep(ACCEPT_AGAIN_S)
                            break
        finally:
            for port in list(self._open.values()):
                self._close(port)
            self._epoll.close()

    def _accept(self, port: "OpenPort", nursery: trio.Nursery) -> None:
        with suppress(BlockingIOError):
            for _ in range(ACCEPTED_AT_ONCE):
                tcp = port.listener.accept()[0]
                nursery.start_soon(self._serve, port, tcp)

    async def _serve(self, port: "OpenPort", tcp: socket.socket) -> None:
        with trio.CancelScope() as scope:
            port.scopes.add(scope)
            await port.served.handle(trio.SocketStream(trio.socket.from_stdlib_socket(tcp)))
        port.scopes.discard(scope)


class OpenPort:
    """A port that is open; `address` is what peers use, without a scheme. Behind the block nobody listens, and its
    connections end.
    """

    def __init__(
        self, listener: socket.socket, served: Port, address: str, close: Callable[["OpenPort"], None]
    ) -> None:
        self.listener, self.served, self.address, self._close = listener, served, address, close
        self.scopes: set[trio.CancelScope] = set()  # of its connections

    def __enter__(self) -> "OpenPort":
        return self

    def __exit__(self, *_: object) -> None:
        self._close(self)


def keep(nursery: trio.Nursery, settings: GatorSettings, metrics: Metrics) -> Ports:
    """Ports that are served as long as the nursery lives."""
    ports = Ports(settings.listen, settings.path_secret, metrics)
    nursery.start_soon(ports.run)
    return ports


def _reachable(host: str) -> str:
    """How others call this machine: a wildcard by its name."""
    host = socket.getfqdn() if host in ("0.0.0.0", "::") else host
    return f"[{host}]" if ":" in host else host


async def talk(
    ws: WebSocketConnection,
    answer: Answerer,
    opened: Opened,
    metrics: Metrics,
    at_once: AtOnce = lambda request: None,
) -> None:
    """One connection, until it ends; `at_once` as for converse(). Raises PeerUnreachable when the peer is silent."""
    await converse(
        ws,
        answer,
        opened,
        metrics=metrics,
        deadline_s=DEADLINE_S,
        ping_s=PING_S,
        identity=IDENTITY,
        at_once=at_once,
    )
