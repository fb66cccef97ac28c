"""The checks of `agent --selftest` that ask a peer: name, connect, TLS, hello, token; which step failed, and why.

A peer is greeted and left: no agent registers, subscribes or submits.

Source: protocols/packaging.md 7 (`peer.NAME`, `tls.roots`).
"""

import base64
import os
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any
from urllib.parse import SplitResult, urlsplit

import h11
import trio
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, CloseConnection, RejectConnection, Request
from wsproto.utilities import ProtocolError

from agent.checks.subject import NOT_USED, Finding, Subject
from agent.core.errors import AgentError
from agent.core.link import cause_of
from agent.core.tls import TlsSettings, TlsUnusable, client_context, find_roots
from agent.core.token import TokenUnusable, read_token
from agent.mimir.settings import MimirSettings
from agent.polarize.settings import CibusSettings, PolarizeSettings
from agent.polarize.stomp import Connected, Failed, Session
from agent.seneschal.settings import SeneschalSettings
from agent.settings import Tls, certificates, find

SLOW_S = 1.0
SOON_S = 14 * 24 * 3600.0  # a certificate that ends within
STEP_S = 2.0  # for each step; all together have selftest.py's limit
PORTS = {"ws": 80, "http": 80, "wss": 443, "https": 443, "stomp": 61613, "stomp+ssl": 61613}

PeerSettings = SeneschalSettings | MimirSettings | PolarizeSettings | CibusSettings | Tls
Hello = Callable[[trio.abc.Stream], Awaitable[None]]


class _Refused(Exception):
    """The peer said no to who we are."""


class _Failed(Exception):
    """The step failed: what happened."""


def tls_roots(subject: Subject) -> Finding:
    """Are there certificates to trust, where a peer is reached by TLS?"""
    settings = subject.settings
    peers: dict[str, tuple[str, PeerSettings]] = {
        "seneschal": (settings.seneschal.url, settings.seneschal),
        "mimir": (settings.mimir.url, settings.mimir),
        "polarize": (settings.polarize.url, settings.polarize),
        "cibus": (settings.cibus.url, settings.cibus),
        "eman": (settings.eman.url, settings.tls),
        "coverage": (settings.coverage.admin if settings.coverage.enabled else "", settings.tls),
    }
    secure = {name: peer for name, (url, peer) in peers.items() if url and _is_secure(urlsplit(url))}
    if not secure:
        return NOT_USED
    found = set()
    for name, peer in secure.items():
        tls = TlsSettings(*certificates(settings, peer, subject.folder))
        try:
            client_context(tls)
        except TlsUnusable as err:
            return Finding("fail", f"{name}: {err.what}", err.remedy)
        found.add(str(find_roots(tls.ca_file)))
    return Finding("ok", ", ".join(sorted(found)))


async def seneschal(subject: Subject) -> Finding:
    """The Seneschal's websocket, opened and closed."""
    return await _websocket(subject, subject.settings.seneschal)


async def mimir(subject: Subject) -> Finding:
    """Mimir's websocket, opened and closed."""
    return await _websocket(subject, subject.settings.mimir)


async def polarize(subject: Subject) -> Finding:
    """One request to Polarize or Polarion that asks for nothing; its websocket in mode polarize-ws."""
    settings = subject.settings.polarize
    url = urlsplit(settings.url)
    if settings.mode == "polarize-ws":
        scheme = {"http": "ws", "https": "wss"}.get(url.scheme, url.scheme)
        url = url._replace(scheme=scheme, path=f"{url.path.rstrip('/')}/ws/xunit/import")
        return await _ask(subject, settings, url, partial(_upgrade, url, {}))
    headers: dict[str, str] = {}
    if settings.mode == "polarion" and settings.user:
        try:
            password = read_token(find(settings.password_file, subject.folder))
        except TokenUnusable as err:
            return Finding("fail", f"token: {err.what}", err.remedy)
        credentials = base64.b64encode(f"{settings.user}:{password}".encode()).decode()
        headers["authorization"] = f"Basic {credentials}"
    return await _ask(subject, settings, url, partial(_head, url, headers))


async def cibus(subject: Subject) -> Finding:
    """The broker's greeting, under a client id of our own: the agent that runs keeps its connection."""
    settings = subject.settings.cibus
    url = urlsplit(settings.url)
    password = ""
    if settings.password_file:
        try:
            password = read_token(find(settings.password_file, subject.folder))
        except TokenUnusable as err:
            return Finding("fail", f"token: {err.what}", err.remedy)
    session = Session(
        vhost=settings.vhost or url.hostname or "",
        client_id=f"emissary-selftest-{socket.gethostname()}-{os.getpid()}",
        login=settings.login,
        passcode=password,
    )
    return await _ask(subject, settings, url, partial(_greet, session))


async def eman(subject: Subject) -> Finding:
    """The hub's websocket, opened and closed: a second service of our name would throw out the first."""
    from agent.eman.role import dial_url

    settings = subject.settings
    if settings.eman.url and (name := settings.eman.key_file or settings.eman.salt_file):
        try:
            read_token(find(name, subject.folder))
        except TokenUnusable as err:
            return Finding("fail", f"token: {err.what}", err.remedy)
    url = urlsplit(dial_url(settings.eman.url, settings.eman.eio) if settings.eman.url else "")
    return await _ask(subject, settings.tls, url, partial(_upgrade, url, {}))


async def coverage(subject: Subject) -> Finding:
    """The Drill admin is connected to, and not spoken to: each websocket there is an agent that attaches."""
    settings = subject.settings
    url = urlsplit(settings.coverage.admin if settings.coverage.enabled else "")
    return await _ask(subject, settings.tls, url, _say_nothing)


def _is_secure(url: SplitResult) -> bool:
    return url.scheme in ("wss", "https", "stomp+ssl")


async def _websocket(subject: Subject, settings: SeneschalSettings | MimirSettings) -> Finding:
    headers: dict[str, str] = {}
    if settings.token_file:
        try:
            headers["authorization"] = f"Bearer {read_token(find(settings.token_file, subject.folder))}"
        except TokenUnusable as err:
            return Finding("fail", f"token: {err.what}", err.remedy)
    url = urlsplit(settings.url)
    return await _ask(subject, settings, url, partial(_upgrade, url, headers))


async def _ask(subject: Subject, settings: PeerSettings, url: SplitResult, hello: Hello) -> Finding:
    """Go step by step; the Finding names the one that failed."""
    if not url.netloc:
        return NOT_USED
    walk = _Walk(url, TlsSettings(*certificates(subject.settings, settings, subject.folder)), hello)
    began = trio.current_time()
    try:
        ends_at = await walk.run()
    except trio.TooSlowError:
        return walk.failed(f"no answer within {STEP_S:g} s", "Look at the address, and whether it runs.")
    except _Refused as err:
        walk.step = "token"
        return walk.failed(str(err), "Give it the token or password that the peer knows.")
    except (_Failed, ProtocolError, h11.ProtocolError) as err:
        return walk.failed(str(err), "Look at the url, and at the peer's log.")
    except AgentError as err:  # files of ours; what is no STOMP
        return walk.failed(err.what, err.remedy)
    except ssl.SSLError as err:
        return walk.failed(str(err.reason or err), "Look at tls.ca_file, the host name and the certificate's dates.")
    except OSError as err:
        return walk.failed(cause_of(err), "Look at the address, and whether it runs.")
    except trio.BrokenResourceError as err:
        return walk.failed(f"cut: {err.__cause__ or err}", "Look at the peer's log.")
    took = trio.current_time() - began
    if ends_at is not None and ends_at - time.time() < SOON_S:
        days = max(0, int((ends_at - time.time()) / 86400))
        return Finding("warn", f"its certificate ends in {days} days", "Renew it.", walk.data)
    if took > SLOW_S:
        return Finding("warn", f"{walk.address} took {took:.1f} s", "Look at the network.", walk.data)
    return Finding("ok", f"{walk.address} in {1000 * took:.0f} ms", data=walk.data)


class _Walk:
    """One way to a peer. `step` is where it is."""

    def __init__(self, url: SplitResult, tls: TlsSettings, hello: Hello) -> None:
        self.step = ""
        self._host, self._port = url.hostname or "", url.port or PORTS[url.scheme]
        self._is_secure, self._tls, self._hello = _is_secure(url), tls, hello
        self.data: dict[str, Any] = {"host": self._host, "port": self._port, "steps_ms": {}}

    @property
    def address(self) -> str:
        return f"{self._host}:{self._port}"

    def failed(self, what: str, remedy: str) -> Finding:
        return Finding("fail", f"{self.step}: {self.address}: {what}", remedy, self.data | {"failed": self.step})

    async def run(self) -> float | None:
        """Take all steps; when the peer's certificate ends, if it has one."""
        await self._take("name", trio.socket.getaddrinfo, self._host, self._port)
        tcp: trio.SocketStream = await self._take("connect", trio.open_tcp_stream, self._host, self._port)
        stream: trio.abc.Stream = tcp
        try:
            ends_at = None
            if self._is_secure:
                stream = await self._take("TLS", self._shake_hands, tcp)
                certificate = stream.getpeercert()  # type: ignore[attr-defined]  # passed on to the ssl module's object
                ends_at = float(ssl.cert_time_to_seconds(certificate["notAfter"]))
            await self._take("hello", self._hello, stream)
        finally:
            await trio.aclose_forcefully(stream)
        return ends_at

    async def _take(self, step: str, work: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        self.step = step
        began = trio.current_time()
        try:
            with trio.fail_after(STEP_S):
                return await work(*args)
        finally:
            self.data["steps_ms"][step] = round(1000 * (trio.current_time() - began), 1)

    async def _shake_hands(self, tcp: trio.SocketStream) -> trio.SSLStream[trio.SocketStream]:
        tls = trio.SSLStream(tcp, client_context(self._tls), server_hostname=self._host, https_compatible=True)
        try:
            await tls.do_handshake()
        except trio.BrokenResourceError as err:
            raise err.__cause__ or err from None
        return tls


async def _read(stream: trio.abc.Stream) -> bytes:
    try:
        data = bytes(await stream.receive_some(64 * 1024))
    except trio.BrokenResourceError as err:
        raise _Failed(f"cut: {err.__cause__ or err}") from err
    if not data:
        raise _Failed("closed without an answer")
    return data


def _judge(status: int, expected: bool) -> None:
    if status in (401, 403):
        raise _Refused(f"refused with status {status}")
    if not expected:
        raise _Failed(f"answered with status {status}")


async def _say_nothing(stream: trio.abc.Stream) -> None:
    """Name, connection and TLS are all that is asked."""


async def _upgrade(url: SplitResult, headers: dict[str, str], stream: trio.abc.Stream) -> None:
    ws = WSConnection(ConnectionType.CLIENT)
    more = [(name.encode(), value.encode()) for name, value in headers.items()]
    target = (url.path or "/") + (f"?{url.query}" if url.query else "")
    await stream.send_all(ws.send(Request(host=url.netloc, target=target, extra_headers=more)))
    while True:
        ws.receive_data(await _read(stream))
        for event in ws.events():
            match event:
                case AcceptConnection():
                    await stream.send_all(ws.send(CloseConnection(code=1000)))
                    return
                case RejectConnection(status_code=status):
                    _judge(status, expected=False)


async def _head(url: SplitResult, headers: dict[str, str], stream: trio.abc.Stream) -> None:
    http = h11.Connection(h11.CLIENT)
    fields = [("Host", url.netloc), ("Connection", "close"), *headers.items()]
    request = h11.Request(method="HEAD", target=url.path or "/", headers=fields)
    await stream.send_all((http.send(request) or b"") + (http.send(h11.EndOfMessage()) or b""))
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            http.receive_data(await _read(stream))
        elif isinstance(event, h11.Response):
            _judge(event.status_code, expected=event.status_code < 500)
            return


async def _greet(session: Session, stream: trio.abc.Stream) -> None:
    await stream.send_all(session.connect())
    while True:
        for happening in session.feed(await _read(stream)):
            match happening:
                case Connected():
                    await stream.send_all(session.disconnect()[1])
                    return
                case Failed(message=message):
                    raise _Refused(message)
