"""One listening port: TLS, the HTTP head, who may come in, then an HTTP handler or a websocket.

Every connection has bounds: the handshake (TLS and head) in 10 s, a head of 16 KiB, bodies as the route says, answers
that the client takes piece by piece. A websocket is handed to trio-websocket with a head of our own making, so that it
sees nothing that was not checked.

Source: protocols/settings.md, "Names that several folders share" (a listening port); protocols/emissary.md, "Control
server" and "Auth, limits".
"""

import base64
import logging
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, nullcontext
from ipaddress import IPv6Address, ip_address
from typing import Any, NoReturn

import h11
import msgspec
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_server_stream
from wsproto.connection import ConnectionState
from wsproto.events import CloseConnection
from wsproto.utilities import LocalProtocolError

from agent.core.channel import CLOSE_S, GOODBYE_S, ungrouped
from agent.core.envelope import MAX_MESSAGE
from agent.core.errors import PeerBrokeProtocol, PeerError, PeerUnreachable
from agent.core.guard import Guard, require
from agent.core.head import MAX_HEAD, Head, HttpError, Scope, cut_head, read_head
from agent.core.metrics import Metrics
from agent.core.upgraded import Stream, Upgraded

log = logging.getLogger(__name__)

IDLE_S = 60.0  # s that a kept-alive connection may be silent between two requests
PIECE_S = 30.0  # s for the client to send the next piece of a body, or to take one of an answer
LINGER_S = 1.0  # s in which what the client still sends is read and dropped, or a reset would eat our last answer
PIECE = 64 * 1024  # bytes
DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
# Of http.client, whose import takes as long as that of all the rest here.
PHRASES = {
    **{200: "OK", 201: "Created", 202: "Accepted", 204: "No Content", 206: "Partial Content", 303: "See Other"},
    **{304: "Not Modified", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found"},
    **{405: "Method Not Allowed", 408: "Request Timeout", 409: "Conflict", 413: "Content Too Large"},
    **{415: "Unsupported Media Type", 416: "Range Not Satisfiable", 422: "Unprocessable Content"},
    **{426: "Upgrade Required", 429: "Too Many Requests", 431: "Request Header Fields Too Large"},
    **{500: "Internal Server Error", 501: "Not Implemented", 503: "Service Unavailable"},
    505: "HTTP Version Not Supported",
}


class Response(msgspec.Struct, frozen=True):
    """An answer. A body that is not `bytes` is sent as it comes, in chunks or as long as a Content-Length says."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | AsyncIterable[bytes] = b""


class Body:
    """The body of a request, as an async iterator of bytes; or all of it by `read`.

    Raises HttpError, which the handler need not catch: 413 beyond `limit` (the route's `max_body`, or what the handler
    has set below it), 400 for broken chunks, 408 when nothing came for 30 s.
    """

    def __init__(self, wire: "_Wire", limit: int) -> None:
        self._wire, self.limit = wire, limit

    async def read(self) -> bytes:
        return b"".join([piece async for piece in self])

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        while (piece := await self._wire.receive_body()) is not None:
            size += len(piece)
            if size > self.limit:
                raise HttpError(413, f"the body has more than {self.limit} bytes")
            yield piece


HttpHandler = Callable[[Head, Body], Awaitable[Response]]
WsHandler = Callable[[Head, WebSocketConnection], Awaitable[None]]


class Route(msgspec.Struct, frozen=True):
    """What answers at a path: exactly "/x", or all below "/x/" for "/x/*". GET brings HEAD with it.

    `scope` is the least that a client needs; with "open" the handler looks at `head.scope` itself. `max_body` in bytes.
    `refuse` may answer a request for a websocket in place of the upgrade, `reword` give an error the form that the
    clients of an exact path know. With `is_diverted` the websocket says nothing before its handler has called
    Upgraded.divert.
    """

    path: str
    http: HttpHandler | None = None
    websocket: WsHandler | None = None
    scope: Scope = "control"
    methods: tuple[str, ...] = ("GET",)
    max_body: int = 0
    refuse: Callable[[Head], Response | None] | None = None
    reword: Callable[[HttpError], Response | None] | None = None
    is_diverted: bool = False


async def serve(
    listen: Sequence[str],
    routes: Sequence[Route],
    guard: Guard,
    *,
    metrics: Metrics,
    tls: "ssl.SSLContext | None" = None,
    max_connections: int = 64,
    max_message: int = MAX_MESSAGE,
    handshake_s: float = 10.0,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> NoReturn:
    """Serve until cancelled at each "HOST:PORT" ("[::1]:0": any free port of that address).

    `started` gives the addresses that are bound. Raises OSError when one cannot be bound, ValueError for what is none.
    """
    port = Port(routes, guard, metrics, tls, max_connections, max_message, handshake_s)
    async with AsyncExitStack() as stack:
        listeners: list[trio.SocketListener] = []
        for address in listen:
            host, number = split_address(address)
            try:
                opened = await trio.open_tcp_listeners(number, host=host)
            except OSError as err:
                raise OSError(err.errno, err.strerror, address) from err
            for listener in opened:
                listeners.append(await stack.enter_async_context(listener))
        task_status.started([_bound(listener) for listener in listeners])
        await trio.serve_listeners(port.handle, listeners)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT" or "[ADDRESS]:PORT". Raises ValueError."""
    host, colon, number = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if not colon or not host or not number.isascii() or not number.isdigit() or int(number) > 65535:
        raise ValueError(f"{address!r} is no HOST:PORT")
    if ":" in host and not bracketed:
        raise ValueError(f"{address!r}: an IPv6 address stands in brackets")
    return host.strip("[]"), int(number)


class Port:
    """What is served at one port, for who accepts its connections by other means than `serve`; see there."""

    def __init__(
        self,
        routes: Sequence[Route],
        guard: Guard,
        metrics: Metrics,
        tls: "ssl.SSLContext | None" = None,
        max_connections: int = 64,
        max_message: int = MAX_MESSAGE,
        handshake_s: float = 10.0,
    ) -> None:
        self._exact = {route.path: route for route in routes if not route.path.endswith("/*")}
        prefixes = [route for route in routes if route.path.endswith("/*")]
        self._prefixes = sorted(prefixes, key=lambda route: len(route.path), reverse=True)
        self._guard, self._metrics, self._tls = guard, metrics, tls
        self._max_connections, self._max_message, self._handshake_s = max_connections, max_message, handshake_s
        self._open = 0

    async def handle(self, tcp: trio.SocketStream) -> None:
        """One connection, from accept to close. Nothing it does ends the port."""
        try:
            peer, port = _peer(tcp)
        except OSError as err:
            log.debug("connection gone before it was served error=%s", err)
            await trio.aclose_forcefully(tcp)
            return
        self._open += 1
        try:
            if self._open > self._max_connections:
                await self._turn_away(tcp, peer)
            else:
                await self._serve(tcp, peer, port)
        except trio.TooSlowError:
            self._metrics.count("http_slow_readers_total")
            log.info("client took nothing for %g s peer=%s", PIECE_S, peer)
        except (trio.BrokenResourceError, trio.ClosedResourceError, _ClientGone) as err:
            log.debug("connection broken peer=%s error=%s", peer, err)
        except Exception:  # a connection's border
            self._metrics.count("http_internal_errors_total")
            log.exception("connection failed peer=%s", peer)
        finally:
            self._open -= 1
            await trio.aclose_forcefully(tcp)

    async def _turn_away(self, tcp: trio.SocketStream, peer: str) -> None:
        self._metrics.count("http_turned_away_total")
        log.warning("too many connections limit=%d peer=%s", self._max_connections, peer)
        # Not many more are told so, and none by TLS: a handshake is what costs.
        if self._tls is None and self._open <= 2 * self._max_connections:
            wire = _Wire(tcp, peer)
            await wire.refuse(HttpError(503, "too many connections", (("Retry-After", "5"),)))
            await wire.linger()

    async def _serve(self, tcp: trio.SocketStream, peer: str, port: int) -> None:
        stream: Stream = tcp
        until = trio.current_time() + self._handshake_s
        client_cert = None
        if self._tls is not None:
            stream = trio.SSLStream(tcp, self._tls, server_side=True, https_compatible=True)
            if not await self._shake_hands(stream, peer, until):
                return
            client_cert = _name_in(stream.getpeercert())
        wire = _Wire(stream, peer, port)
        while await self._exchange(wire, client_cert, until):
            if not await wire.wait_for_more(IDLE_S):
                return
            until = trio.current_time() + self._handshake_s
        await wire.linger()

    async def _shake_hands(self, stream: trio.SSLStream[trio.SocketStream], peer: str, until: float) -> bool:
        try:
            with trio.move_on_at(until):
                await stream.do_handshake()
                return True
        except trio.BrokenResourceError as err:
            log.info("TLS refused peer=%s error=%s", peer, err.__cause__)
            # trio keeps the alert that tells the client why (no certificate, an unknown authority).
            await stream.transport_stream.send_all(stream._outgoing.read())
            await _Wire(stream, peer).linger()
        self._metrics.count("http_tls_failures_total")
        return False

    async def _exchange(self, wire: "_Wire", client_cert: str | None, until: float) -> bool:
        """One request and its answer; whether another may follow."""
        head: Head | None = None
        try:
            head = await self._receive_head(wire, client_cert, until)
            if head is None:
                return False
            head = msgspec.structs.replace(head, peer_port=wire.peer_port)
            head = msgspec.structs.replace(head, scope=self._guard.admit(head))
            route = self._find(head)
            require(head, route.scope)
            if route.websocket is not None and "websocket" in head.headers.words("upgrade"):
                refusal = None if route.refuse is None else route.refuse(head)
                if refusal is not None:
                    return await wire.respond(refusal, close=True)
                await self._open_websocket(wire, head, route.websocket, is_diverted=route.is_diverted)
                return False
            return await wire.respond(await self._call(route, head, wire))
        except HttpError as err:
            self._metrics.count("http_refused_total", status=str(err.status))
            # Who guesses on is not told of again: the refusal that began it said for how long.
            level = logging.DEBUG if err.status == 429 else logging.INFO
            log.log(level, "refused peer=%s status=%d why=%s", wire.peer, err.status, err.text)
            reword = self._exact[head.path].reword if head is not None and head.path in self._exact else None
            worded = None if reword is None else reword(err)
            return await (wire.refuse(err, close=head is None) if worded is None else wire.respond(worded))

    async def _receive_head(self, wire: "_Wire", client_cert: str | None, until: float) -> Head | None:
        with trio.move_on_at(until):
            return await wire.receive_head(client_cert)
        if not wire.has_more:
            return None
        raise HttpError(408, f"the head was not complete within {self._handshake_s:g} s")

    def _find(self, head: Head) -> Route:
        route = self._exact.get(head.path)
        if route is None:
            within = (route for route in self._prefixes if head.path.startswith(route.path[:-1]))
            route = next(within, None)
        if route is None:
            raise HttpError(404, "there is nothing at this path")
        return route

    async def _call(self, route: Route, head: Head, wire: "_Wire") -> Response:
        if route.http is None:
            raise HttpError(426, "this path speaks websocket", (("Upgrade", "websocket"), ("Connection", "Upgrade")))
        methods = (*route.methods, "HEAD") if "GET" in route.methods else route.methods
        if head.method not in methods:
            raise HttpError(405, f"{head.method} does not work here", (("Allow", ", ".join(methods)),))
        has_chunks = head.headers.get("transfer-encoding") is not None
        if int(head.headers.get("content-length") or 0) > route.max_body or (has_chunks and not route.max_body):
            raise HttpError(413, f"the body has more than {route.max_body} bytes")
        try:
            return await route.http(head, Body(wire, route.max_body))
        except (HttpError, _ClientGone):
            raise
        except Exception as err:  # a handler's bug ends its request, not the port
            self._metrics.count("http_internal_errors_total")
            log.exception("request failed peer=%s method=%s path=%s", head.peer, head.method, head.path)
            raise HttpError(500, "the request failed here; the log has the details") from err

    async def _open_websocket(self, wire: "_Wire", head: Head, handler: WsHandler, *, is_diverted: bool) -> None:
        opening = _upgrade_head(head)
        if wire.has_more:
            raise HttpError(400, "data behind the request, before it was answered")
        line = Upgraded(wire.hand_over(), opening, head.peer, is_diverted=is_diverted)
        try:
            with ungrouped():
                async with trio.open_nursery() as nursery:
                    request = await wrap_server_stream(
                        nursery,
                        line,  # type: ignore[arg-type]  # it has what a stream has
                        max_message_size=self._max_message,
                        receive_buffer_size=PIECE,
                    )
                    ws = await request.accept()
                    await self._talk(ws, head, handler)
                    if ws._wsproto.state is ConnectionState.OPEN and ws.closed is not None:
                        # A frame that is none: the library drops the line without a close frame.
                        last = CloseConnection(ws.closed.code, ws.closed.reason)
                        await line.send_last(ws._wsproto.send(last), CLOSE_S)
                    nursery.cancel_scope.cancel()
        except LocalProtocolError:  # the library answered a ping behind our close frame
            log.debug("websocket went on after the close peer=%s", head.peer)

    async def _talk(self, ws: WebSocketConnection, head: Head, handler: WsHandler) -> None:
        code, limit_s = 1001, GOODBYE_S  # unless it ends otherwise, the port is being closed
        try:
            await handler(head, ws)
            code, limit_s = 1000, CLOSE_S
        except (PeerError, ConnectionClosed) as err:
            code, limit_s = 1002 if isinstance(err, PeerBrokeProtocol) else 1001, CLOSE_S
            log.info("websocket ended peer=%s path=%s why=%s", head.peer, head.path, err)
        except Exception:  # a handler's bug ends its connection, not the port
            code, limit_s = 1011, CLOSE_S
            self._metrics.count("http_internal_errors_total")
            log.exception("websocket failed peer=%s path=%s", head.peer, head.path)
        finally:
            with trio.move_on_after(limit_s, shield=True):
                await ws.aclose(code)


class _ClientGone(PeerUnreachable):
    """The client closed or broke the connection in the middle of its request."""

    def __init__(self, peer: str) -> None:
        super().__init__(f"{peer} went away in the middle of a request", remedy="None is needed.")


class _Wire:
    """The bytes of one connection, and the request that is under way."""

    def __init__(self, stream: Stream, peer: str, peer_port: int = 0) -> None:
        self.stream, self.peer, self.peer_port = stream, peer, peer_port
        self._buffer = bytearray()  # what came and no request has taken yet
        self._http = h11.Connection(h11.SERVER, MAX_HEAD)
        self._is_head = self._is_chunked = False

    @property
    def has_more(self) -> bool:
        """Did something come behind the request?"""
        return bool(self._buffer)

    def hand_over(self) -> Stream:
        """The stream, for another protocol. What reads requests goes: that may last for months, a thousand times."""
        del self._http
        return self.stream

    async def wait_for_more(self, limit_s: float) -> bool:
        """Wait for the first bytes of a next request; whether they came."""
        if not self._buffer:
            with trio.move_on_after(limit_s):
                self._buffer += await self.stream.receive_some(PIECE)
        return self.has_more

    async def receive_head(self, client_cert: str | None) -> Head | None:
        """The next head; None when the client closes instead. Raises HttpError."""
        self._http = h11.Connection(h11.SERVER, MAX_HEAD)
        self._is_head = self._is_chunked = False
        while (raw := cut_head(self._buffer)) is None:
            data = await self.stream.receive_some(PIECE)
            if not data:
                self._buffer.clear()
                return None
            self._buffer += data
        head = read_head(self._http, raw, self.peer, client_cert)
        self._is_head = head.method == "HEAD"
        # The end of chunks is where two readers differ most easily: nothing behind it is taken for a request.
        self._is_chunked = head.headers.get("transfer-encoding") is not None
        return head

    async def receive_body(self) -> bytes | None:
        """The next piece of the body; None at its end. Raises HttpError, and _ClientGone."""
        if self._http.they_are_waiting_for_100_continue:
            await self._send(h11.InformationalResponse(status_code=100, headers=[]))
        while (event := self._next_of_body()) is h11.NEED_DATA:
            self._http.receive_data(await self._more_of_body())
        return bytes(event.data) if isinstance(event, h11.Data) else None

    def _next_of_body(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED] | None:
        if self._http.their_state is not h11.SEND_BODY:
            return None
        try:
            event = self._http.next_event()
        except h11.RemoteProtocolError as err:
            raise HttpError(err.error_status_hint, f"the body: {err}") from err
        if isinstance(event, h11.EndOfMessage):
            self._buffer[:0] = self._http.trailing_data[0]
            return None
        return event

    async def _more_of_body(self) -> bytes:
        if self._buffer:
            data = bytes(self._buffer)
            self._buffer.clear()
            return data
        try:
            with trio.move_on_after(PIECE_S):
                return bytes(await self.stream.receive_some(PIECE))
        except trio.BrokenResourceError as err:
            raise _ClientGone(self.peer) from err
        raise HttpError(408, f"nothing more of the body came for {PIECE_S:g} s")

    async def refuse(self, err: HttpError, *, close: bool = True) -> bool:
        """Answer by an error; whether another request may follow."""
        headers = (("Content-Type", "text/plain; charset=utf-8"), *err.headers)
        return await self.respond(Response(err.status, headers, f"{err.text}\n".encode()), close=close)

    async def respond(self, response: Response, *, close: bool = False) -> bool:
        """Answer the request that is under way; whether another may follow on this connection."""
        headers = [("Date", _http_date(time.time())), ("X-Content-Type-Options", "nosniff"), *response.headers]
        body = response.body
        if isinstance(body, bytes) and response.status not in (204, 304):
            headers.append(("Content-Length", str(len(body))))
        if close or self._is_chunked or not self._body_is_read():
            headers.append(("Connection", "close"))
        phrase = PHRASES.get(response.status, "").encode()
        await self._send(h11.Response(status_code=response.status, headers=headers, reason=phrase))
        if isinstance(body, bytes):
            if body and not self._is_head:
                await self._send(h11.Data(data=body))
        else:
            async with aclosing(body) if isinstance(body, AsyncGenerator) else nullcontext(body) as pieces:
                if not self._is_head:
                    async for piece in pieces:
                        await self._send(h11.Data(data=piece))
        await self._send(h11.EndOfMessage())
        return self._http.our_state is h11.DONE and self._http.their_state is h11.DONE

    def _body_is_read(self) -> bool:
        try:
            self._next_of_body()  # for a request without body, its end
        except HttpError:
            return False
        return self._http.their_state is not h11.SEND_BODY

    async def _send(self, event: h11.InformationalResponse | h11.Response | h11.Data | h11.EndOfMessage) -> None:
        data = memoryview(self._http.send(event))
        for at in range(0, len(data), PIECE):
            with trio.fail_after(PIECE_S):
                await self.stream.send_all(data[at : at + PIECE])

    async def linger(self) -> None:
        """Before a close of ours: let the client read our last words."""
        tcp = self.stream.transport_stream if isinstance(self.stream, trio.SSLStream) else self.stream
        with trio.move_on_after(LINGER_S):
            await tcp.send_eof()
            while await tcp.receive_some(PIECE):
                pass


def _http_date(at: float) -> str:
    """A time as RFC 9110, 5.6.7 writes it: in English, whatever the locale is. email.utils would bring all of email."""
    when = time.gmtime(at)
    day, month = DAYS[when.tm_wday], MONTHS[when.tm_mon - 1]
    return f"{day}, {when.tm_mday:02} {month} {when.tm_year} {when.tm_hour:02}:{when.tm_min:02}:{when.tm_sec:02} GMT"


def _upgrade_head(head: Head) -> bytes:
    """What opens a websocket, checked and rebuilt; no extension is offered on. Raises HttpError."""
    headers = head.headers
    if head.method != "GET" or "upgrade" not in headers.words("connection"):
        raise HttpError(400, "a websocket is opened by GET with Connection: Upgrade")
    if headers.get("host") is None or headers.get("content-length") or headers.get("transfer-encoding"):
        raise HttpError(400, "a websocket is opened by HTTP/1.1 without a body")
    if headers.get("sec-websocket-version") != "13":
        raise HttpError(426, "websocket version 13 is spoken here", (("Sec-WebSocket-Version", "13"),))
    key = headers.get("sec-websocket-key") or ""
    try:
        fits = len(base64.b64decode(key, validate=True)) == 16
    except ValueError:
        fits = False
    if not fits:
        raise HttpError(400, "Sec-WebSocket-Key is not 16 bytes in base64")
    # The Host was checked before; the library would decode any as IDNA, and fail.
    return (
        f"GET {head.target} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n\r\n"
    ).encode("ascii")


def _peer(tcp: trio.SocketStream) -> tuple[str, int]:
    """Its address and port."""
    host, port, *_ = tcp.socket.getpeername()
    address = ip_address(host.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return str(mapped or address), port


def _bound(listener: trio.SocketListener) -> str:
    host, port, *_ = listener.socket.getsockname()
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _name_in(cert: Mapping[str, Any] | None) -> str | None:
    """The common name of a client's certificate, or else its first DNS name."""
    if cert is None:
        return None
    names = [value for part in cert.get("subject", ()) for key, value in part if key == "commonName"]
    names += [value for key, value in cert.get("subjectAltName", ()) if key == "DNS"]
    return names[0] if names else None
