"""The port of one layer: who may come in, and the envelope as Gator speaks it.

On loopback a peer must be of the same user, or root; elsewhere an address ends in a path that only who was told it
knows. A connection is converse() of core/channel.py, with Gator's words: `identify` is told as Gator tells it, and
errors are sentences.

Source: protocols/gator.md, "The wire", "Limits and security".
"""

import hmac
import os
import secrets
import socket
from collections.abc import Awaitable, Callable, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any

import trio
from trio_websocket import WebSocketConnection

import agent
from agent.core.channel import Answerer, Channel, converse
from agent.core.guard import Guard, is_loopback
from agent.core.head import Head, HttpError, Scope
from agent.core.listen import Route, serve
from agent.core.metrics import Metrics
from agent.gator.messages import MAX_MESSAGE_IN

IDENTITY = {"tool": "gator", "version": "1.0", "emissary": agent.__version__}
DEADLINE_S, PING_S = 60.0, 20.0
MORE_CONNECTIONS = 64  # beside those of children

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


async def serve_layer(
    host: str,
    path_secret: bool,
    opened: Callable[[WebSocketConnection], Awaitable[None]],
    *,
    children: int,
    metrics: Metrics,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Listen on a free port of `host` until cancelled; `started` gives the address as peers use it, without a scheme.

    Raises OSError.
    """
    secret = secrets.token_urlsafe(16) if path_secret and not is_loopback(host) else None

    async def websocket(head: Head, ws: WebSocketConnection) -> None:
        await opened(ws)

    bracketed = f"[{host}]" if ":" in host else host
    async with trio.open_nursery() as nursery:
        (address, *_) = await nursery.start(
            _serve, f"{bracketed}:0", Route("/*", websocket=websocket, scope="open"), Gate(secret), metrics, children
        )
        address = f"{_reachable(host)}:{address.rpartition(':')[2]}"
        task_status.started(f"{address}/t/{secret}" if secret else address)


def _reachable(host: str) -> str:
    """How others call this machine: a wildcard by its name."""
    host = socket.getfqdn() if host in ("0.0.0.0", "::") else host
    return f"[{host}]" if ":" in host else host


async def _serve(
    listen: str, route: Route, gate: Gate, metrics: Metrics, children: int, *, task_status: trio.TaskStatus[list[str]]
) -> None:
    await serve(
        [listen],
        [route],
        gate,
        metrics=metrics,
        max_connections=children + MORE_CONNECTIONS,
        max_message=MAX_MESSAGE_IN,
        task_status=task_status,
    )


async def talk(ws: WebSocketConnection, answer: Answerer, opened: Opened, metrics: Metrics) -> None:
    """One connection, until it ends. Raises PeerUnreachable when the peer is silent."""
    identity: Mapping[str, Any] = IDENTITY
    await converse(ws, answer, opened, metrics=metrics, deadline_s=DEADLINE_S, ping_s=PING_S, identity=identity)
