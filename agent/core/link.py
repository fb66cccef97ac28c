"""One outgoing websocket that never gives up: resolve, connect, TLS, token, upgrade, talk, and again.

`connect` is one connection, `redial` repeats it for ever, `keep` does so for links that speak the envelope. What a
retry may mend is tried again with full jitter, 0.5 s doubling to 30 s; what a person must mend (a refused token, a
certificate that does not hold, an ident in use) every 30 s, with an Alert.

Source: protocols/emissary.md, "Seneschal", "Link states"; protocols/packaging.md 3, trap 2.
"""

import logging
import os
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any, NoReturn
from urllib.parse import urlsplit

import h11
import msgspec
import trio
from trio_websocket import ConnectionClosed, ConnectionRejected, WebSocketConnection, wrap_client_stream
from wsproto.utilities import ProtocolError

from agent.core.channel import (
    CLOSE_S,
    GOODBYE_S,
    IDENTITY,
    Answerer,
    Channel,
    Refused,
    Tell,
    closing,
    converse,
    ungrouped,
)
from agent.core.envelope import MAX_MESSAGE
from agent.core.errors import PeerBrokeProtocol, PeerError, PeerRefused, PeerUnreachable
from agent.core.events import Alert, AlertCleared, LinkChanged
from agent.core.guard import is_loopback
from agent.core.metrics import Metrics
from agent.core.tls import TlsSettings, TlsUnusable, client_context
from agent.core.token import TokenUnusable, read_token
from agent.core.url import fault, shown

log = logging.getLogger(__name__)

CONNECT_S = 10.0  # s from the name's resolution to the upgraded websocket
FIRST_RETRY_S, MAX_RETRY_S, GOOD_AFTER_S = 0.5, 30.0, 60.0
REFUSED_RETRY_S = 30.0
LOUD_AFTER_S = 60.0  # s without a connection, then an Alert: a wrong address looks just like a server that is down
MAX_ANSWER = 64 * 1024  # bytes of a refusal, with its body; the library bounds what is none
SUPERSEDED = 4001  # close code: another connection with our ident and instance took over
REFUSALS = {"ident_taken", "unauthorized", "forbidden"}  # codes that a retry alone does not change

Publish = Callable[[LinkChanged | Alert | AlertCleared], None]


class Dial(msgspec.Struct, frozen=True):
    """Where a link goes: `url` is `ws://` or `wss://` with path; the token's file is read at every connect.

    `remedy` is what helps where the server refuses to open a websocket.
    """

    url: str
    token_file: Path | None = None
    tls: TlsSettings = TlsSettings()
    headers: tuple[tuple[str, str], ...] = ()
    remedy: str = "Look at the url and the token file."

    def __post_init__(self) -> None:
        """Raises ValueError for an `url` that is none."""
        _parts(self.url)


async def keep(
    name: str,
    dial: Dial,
    answer: Answerer,
    talk: Callable[[Channel], Awaitable[None]],
    *,
    publish: Publish,
    metrics: Metrics,
    random: Random,
    deadline_s: float = 20.0,
    ping_s: float = 5.0,
    identity: Mapping[str, Any] = IDENTITY,
) -> NoReturn:
    """Hold a connection that speaks the envelope (core/channel.py), for ever.

    `talk` serves one connection: it tells its states by `channel.state("registering" | "replaying" | "ready")` and runs
    until cancelled. What the peer or the network does to it (PeerError) leads to the next connection; all else it
    raises is a bug, and leaves.
    """

    async def use(ws: WebSocketConnection, tell: Tell) -> None:
        await converse(
            ws, answer, talk, metrics=metrics, deadline_s=deadline_s, ping_s=ping_s, identity=identity, tell=tell
        )

    await redial(name, dial, use, publish=publish, random=random)


async def redial(
    name: str,
    dial: Dial,
    use: Callable[[WebSocketConnection, Tell], Awaitable[None]],
    *,
    publish: Publish,
    random: Random,
    max_message: int = MAX_MESSAGE,
    headers: Callable[[], tuple[tuple[str, str], ...]] = tuple,
    clock: Callable[[], float] = time.time,
) -> NoReturn:
    """Hold a websocket for ever; `use(ws, tell)` serves one connection and tells its states, "ready" above all.

    `headers` gives what a connection's request has beside those of `dial`.

    `publish` gets a LinkChanged at each change of state, an Alert `link.<name>` for what a person must mend (or when
    there was no connection for 60 s), and AlertCleared when the link is ready again. Who is cancelled, or raises, is
    offline, and nobody is to look at its alert.
    """
    states = _States(name, publish, clock)
    try:
        await _connect_for_ever(states, dial, use, random=random, max_message=max_message, headers=headers)
    finally:
        states.end()


async def _connect_for_ever(
    states: "_States",
    dial: Dial,
    use: Callable[[WebSocketConnection, Tell], Awaitable[None]],
    *,
    random: Random,
    max_message: int,
    headers: Callable[[], tuple[tuple[str, str], ...]],
) -> NoReturn:
    secure, host, _, _ = _parts(dial.url)
    if dial.token_file is not None and not secure and not is_loopback(host):
        log.warning("link=%s sends its token without TLS url=%s", states.name, dial.url)
    retry_s = FIRST_RETRY_S
    while True:
        states.become("connecting")
        began: float | None = None
        refused = False
        try:
            dressed = msgspec.structs.replace(dial, headers=(*dial.headers, *headers()))
            async with connect(dressed, max_message=max_message) as ws:
                began = trio.current_time()
                try:
                    await use(ws, states.become)
                except PeerError as err:
                    states.become("offline", err.what)  # now, and not once the close of a dead line is over
                    raise
            error, refused = f"closed: {closing(ws)}", ws.closed is not None and ws.closed.code == SUPERSEDED
            remedy = "Give each machine its own ident and state.dir." if refused else "Look at the other side's log."
        except Refused as err:
            error, remedy, refused = err.what, err.remedy, err.code in REFUSALS
        except (PeerRefused, TlsUnusable, TokenUnusable) as err:
            error, remedy, refused = err.what, err.remedy, True
        except PeerError as err:
            error, remedy = err.what, err.remedy
        except ConnectionClosed as err:
            error, remedy = f"closed: {err}", "Look at the other side's log."
        states.become("offline", error)
        if began is not None and trio.current_time() - began >= GOOD_AFTER_S:
            retry_s = FIRST_RETRY_S
        if began is not None:
            states.connected_at = trio.current_time()
        if refused or trio.current_time() - states.connected_at >= LOUD_AFTER_S:
            states.alert(error, remedy)
        if refused:
            await trio.sleep(REFUSED_RETRY_S)
        else:
            await trio.sleep(random.uniform(0, retry_s))
            retry_s = min(2 * retry_s, MAX_RETRY_S)


class _States:
    """What was told of a link: its state, and the alert that stands."""

    def __init__(self, name: str, publish: Publish, clock: Callable[[], float]) -> None:
        self.name, self._publish, self._clock = name, publish, clock
        self._state = ""
        self._alert = ""
        self.connected_at = trio.current_time()  # or the start: when there was last a connection

    def become(self, state: str, error: str | None = None) -> None:
        if state != self._state:
            self._state = state
            log.info("link=%s state=%s error=%s", self.name, state, error)
            self._publish(LinkChanged(name=self.name, state=state, error=error))
        if state == "ready":
            self._take_back()

    def end(self) -> None:
        self.become("offline")
        self._take_back()

    def _take_back(self) -> None:
        if self._alert:
            self._alert = ""
            self._publish(AlertCleared(code=f"link.{self.name}"))

    def alert(self, text: str, remedy: str) -> None:
        if text != self._alert:
            self._alert = text
            code, text = f"link.{self.name}", f"{self.name}: {text}"
            self._publish(Alert(code=code, text=text, remedy=remedy, since=self._clock()))


@asynccontextmanager
async def connect(dial: Dial, *, max_message: int = MAX_MESSAGE) -> AsyncIterator[WebSocketConnection]:
    """One connection, closed when the context ends. What the context raises leaves it without a group around it.

    Raises PeerUnreachable (name, connection, TLS or upgrade failed or took more than 10 s; the server answered 408, 429
    or 5xx), PeerRefused (its certificate does not hold; it answered another status), PeerBrokeProtocol (that was no
    HTTP), TlsUnusable and TokenUnusable (files of ours).
    """
    secure, host, port, target = _parts(dial.url)
    headers = [(name.encode(), value.encode()) for name, value in dial.headers]
    if dial.token_file is not None:
        headers.append((b"Authorization", f"Bearer {read_token(dial.token_file)}".encode()))
    context = client_context(dial.tls) if secure else None
    peer = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    line = _Line(peer, dial.remedy)
    is_left = False
    try:
        with ungrouped():
            async with trio.open_nursery() as nursery:
                with trio.move_on_after(CONNECT_S) as limit:
                    await line.open(host, port, context)
                    nursery.start_soon(line.must_be_upgraded)
                    ws = await wrap_client_stream(
                        nursery,
                        line,  # type: ignore[arg-type]  # its documentation allows any stream
                        peer,
                        target,
                        extra_headers=headers,
                        max_message_size=max_message,
                        receive_buffer_size=64 * 1024,
                    )
                    line.upgraded.set()
                if limit.cancelled_caught:
                    raise line.refusal() or PeerUnreachable(
                        f"{peer} was not connected within {CONNECT_S:g} s", remedy="Look at its address."
                    )
                limit_s = CLOSE_S
                try:
                    yield ws
                    is_left = True
                except (trio.Cancelled, BaseExceptionGroup, PeerUnreachable):  # a group: a nursery was cancelled
                    limit_s = GOODBYE_S
                    raise
                finally:
                    with trio.move_on_after(limit_s, shield=True):
                        await ws.aclose()
                nursery.cancel_scope.cancel()
    except ConnectionRejected as err:
        raise _rejected(peer, err.status_code, err.body or b"", dial.remedy) from err
    except (h11.ProtocolError, ProtocolError) as err:
        if is_left:
            return  # as below, when all was over: nobody missed anything
        if line.upgraded.is_set():  # the library answered a ping behind our close frame
            raise PeerUnreachable(f"{peer} is closed", remedy="Wait for the next connection.") from err
        # The library tries to refuse what it could not read, as if it were the server.
        raise PeerBrokeProtocol(f"{peer} answered what is no HTTP", remedy="Look at the url.") from err
    finally:
        await line.aclose()


class _Line:
    """The byte stream below the websocket. Says how it ended while the websocket is not there to say it."""

    def __init__(self, peer: str, remedy: str) -> None:
        self._peer, self._remedy = peer, remedy
        self._stream: trio.abc.Stream | None = None
        self._answer = bytearray()  # what came before it was upgraded
        self._broken: BaseException | None = None
        self._ended = trio.Event()
        self.upgraded = trio.Event()

    def __repr__(self) -> str:  # type: ignore[explicit-override]  # typing.override needs Python 3.12
        return self._peer  # what the websocket gives as its remote end

    async def open(self, host: str, port: int, context: "ssl.SSLContext | None") -> None:
        try:
            tcp = self._stream = await trio.open_tcp_stream(host, port)
        except OSError as err:
            raise PeerUnreachable(
                f"{self._peer} cannot be reached: {cause_of(err)}", remedy="Look at its address and whether it runs."
            ) from err
        if context is not None:
            tls = self._stream = trio.SSLStream(tcp, context, server_hostname=host, https_compatible=True)
            try:
                await tls.do_handshake()
            except trio.BrokenResourceError as err:
                raise self._tls_failed(err.__cause__) from err

    async def must_be_upgraded(self) -> None:
        """Raise when the line ends before the websocket is open: the library would wait on."""
        await self._ended.wait()
        if not self.upgraded.is_set():
            if isinstance(self._broken, ssl.SSLError):
                raise self._tls_failed(self._broken)
            raise self.refusal() or PeerUnreachable(
                f"{self._peer} closed the connection instead of opening a websocket", remedy="Look at its log."
            )

    def refusal(self) -> PeerError | None:
        """What it answered, if that was a refusal whose body did not end: many bodies do only with the connection."""
        head, _, body = self._answer.partition(b"\r\n\r\n")
        status = re.match(rb"HTTP/\d\.\d ([2-9]\d\d)\b", head)  # as the library reads it
        return _rejected(self._peer, int(status[1]), body, self._remedy) if status else None

    def _tls_failed(self, cause: BaseException | None) -> PeerError:
        match cause:
            case ssl.SSLCertVerificationError():
                return PeerRefused(
                    f"the certificate of {self._peer} does not hold: {cause.verify_message}",
                    remedy="Look at tls.ca_file, the host name in the url, and the certificate's dates.",
                )
            case ssl.SSLError() if "ALERT" in (cause.reason or ""):
                return PeerRefused(
                    f"{self._peer} refused TLS: {cause.reason}",
                    remedy="Look at cert_file and key_file, and at its log.",
                )
            case _:
                return PeerUnreachable(f"TLS with {self._peer} failed: {cause}", remedy="Look at port and scheme.")

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        try:
            data = await self._below.receive_some(max_bytes)
        except trio.BrokenResourceError as err:
            self._broken = err.__cause__
            self._ended.set()
            raise
        if not data:
            self._ended.set()
        elif not self.upgraded.is_set():
            self._answer += data
            if len(self._answer) > MAX_ANSWER and (refusal := self.refusal()):
                raise refusal
        return data

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._below.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._below.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        self._ended.set()
        if self._stream is not None:
            await trio.aclose_forcefully(self._stream)

    @property
    def _below(self) -> trio.abc.Stream:
        if self._stream is None:
            raise trio.ClosedResourceError
        return self._stream


def _parts(url: str) -> tuple[bool, str, int, str]:
    """With TLS?, host, port, request target. Raises ValueError."""
    if why := fault(url, ("ws", "wss")):
        raise ValueError(f"{shown(url)} is no ws://HOST[:PORT]/PATH or wss://HOST[:PORT]/PATH: {why}")
    parts = urlsplit(url)
    secure = parts.scheme == "wss"
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return secure, parts.hostname or "", parts.port or (443 if secure else 80), target


def cause_of(err: OSError) -> str:
    """What the system said; trio's own error only tells that every address failed."""
    cause: BaseException = err.__cause__ or err
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    if isinstance(cause, socket.gaierror):  # its number is the resolver's own
        return cause.strerror or str(cause)
    if isinstance(cause, OSError) and cause.errno:
        return os.strerror(cause.errno)
    return str(cause)


def _rejected(peer: str, status: int, body: bytes | bytearray, remedy: str) -> PeerError:
    said = body[:200].decode("utf-8", "replace").strip()
    what = f"{peer} answered {status} instead of opening a websocket{': ' if said else ''}{said}"
    if status in (408, 429) or status >= 500:
        return PeerUnreachable(what, remedy="Look at its log.")
    return PeerRefused(what, remedy=remedy)
