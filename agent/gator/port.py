"""The port of one layer: who may come in, and the envelope as Gator speaks it.

On loopback a peer must be of the same user, or root, and no page in a browser; elsewhere an address ends in a path that
only who was told it knows. A connection is converse() of core/channel.py, with Gator's words: `identify` is told as
Gator tells it, and errors are sentences.

Source: protocols/gator.md, "The wire", "Limits and security".
"""

import errno
import hmac
import logging
import os
import secrets
import select
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import suppress
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import NoReturn, TypeAlias

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

NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST = 4, 20, 1
ESTABLISHED = 1  # the state of TCP, as the kernel numbers it

log = logging.getLogger(__name__)

_Address: TypeAlias = IPv4Address | IPv6Address

Connected = Callable[[WebSocketConnection], Awaitable[None]]
Opened = Callable[[Channel], Awaitable[None]]


class Gate(Guard):
    """Admits peers of our user on loopback, and those who know the path elsewhere."""

    def __init__(self, secret: str | None, own: tuple[str, int], proc: Path = Path("/proc/net")) -> None:
        super().__init__((), {}, False, (), trio.current_time)
        self._secret, self._own, self._proc = secret, own, proc

    def admit(self, head: Head) -> Scope:  # type: ignore[explicit-override]  # typing.override needs Python 3.12
        """Raises HttpError 403."""
        if head.headers.get("origin") is not None:
            # Of a page in the user's browser, which may have come from anywhere; layers, tasks and Gator send none.
            raise HttpError(403, "pages in a browser may not talk to a layer")
        if self._secret is not None:
            given = head.path.removeprefix("/t/").encode()
            if not head.path.startswith("/t/") or not hmac.compare_digest(given, self._secret.encode()):
                raise HttpError(403, "this address ends in a path that the parent gives to its children")
            return "open"
        if is_loopback(head.peer):
            uid = user_of((head.peer, head.peer_port), self._own, self._proc)
            if uid not in (os.getuid(), 0):
                raise HttpError(403, "only the user of this layer, and root, may talk to it")
        return "open"


def user_of(peer: tuple[str, int], own: tuple[str, int], proc: Path = Path("/proc/net")) -> int | None:
    """The uid of the local process at the end `peer` of a TCP connection to `own`; None where that cannot be told.

    Of an end that was closed it cannot: the kernel says 0 of one that no process has any more.
    """
    ip, port = ip_address(peer[0]), peer[1]
    with suppress(OSError):
        return _told_by_kernel(ip, port, ip_address(own[0]) if is_loopback(own[0]) else ip, own[1])
    for name, address in _spellings(ip):
        wanted = f"{address}:{port:04X}"
        try:
            lines = (proc / name).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if len(fields) > 9 and fields[1] == wanted and int(fields[3], 16) == ESTABLISHED and fields[9] != "0":
                return int(fields[7])
    return None


def _told_by_kernel(ip: _Address, port: int, own_ip: _Address, own_port: int) -> int | None:
    """Of one connection by both its ends, while /proc tells of all. Raises OSError where it does not know.

    Source: sock_diag(7), Linux's include/uapi/linux/inet_diag.h.
    """
    family = socket.AF_INET if ip.version == 4 else socket.AF_INET6
    ends = struct.pack("!HH16s16s", port, own_port, ip.packed, own_ip.packed)
    wanted = struct.pack("=BBxxI", family, socket.IPPROTO_TCP, 1 << ESTABLISHED) + ends + bytes(4) + b"\xff" * 8
    with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, NETLINK_SOCK_DIAG) as kernel:
        kernel.setblocking(False)  # it answers at once
        kernel.send(struct.pack("=IHHII", 16 + len(wanted), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST, 1, 0) + wanted)
        answer = kernel.recv(4096)
    if len(answer) < 16 + 72 or struct.unpack_from("=H", answer, 4)[0] != SOCK_DIAG_BY_FAMILY:
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    uid, inode = struct.unpack_from("=II", answer, 16 + 64)
    return int(uid) if answer[16 + 1] == ESTABLISHED and inode else None


def _spellings(ip: _Address) -> list[tuple[str, str]]:
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
            Gate(secret, (host, number)),
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
