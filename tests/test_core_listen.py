"""The listening port: HTTP by raw bytes on loopback, websockets, limits."""

import logging
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from trio_websocket import ConnectionClosed, WebSocketConnection

from agent.core.channel import Channel, converse
from agent.core.envelope import Request
from agent.core.errors import PeerRefused, PeerUnreachable
from agent.core.guard import Guard
from agent.core.head import MAX_HEAD, Head, HttpError
from agent.core.link import Dial, connect
from agent.core.listen import IDLE_S, PIECE, PIECE_S, Body, Response, Route, serve, split_address
from agent.core.metrics import Metrics
from agent.core.tls import TlsSettings, server_context
from tests.certificates import authority, issue


@pytest.fixture
def clock() -> MockClock:
    """Jumps when nothing has happened for 20 ms: what is on its way through the loopback is no silence."""
    return MockClock(autojump_threshold=0.02)


@asynccontextmanager
async def port(*routes: Route, guard: Guard | None = None, **options: Any) -> AsyncIterator[str]:
    guard = guard or Guard([("sesame", "control"), ("peek", "read")], {"laptop": "read"}, False, [], trio.current_time)
    async with trio.open_nursery() as nursery:
        serving = partial(serve, ["127.0.0.1:0"], routes, guard, **{"metrics": Metrics()} | options)
        (address,) = await nursery.start(serving)
        yield address
        nursery.cancel_scope.cancel()


async def dial(address: str) -> trio.SocketStream:
    host, number = split_address(address)
    return await trio.open_tcp_stream(host, number)


async def exchange(address: str, *sent: bytes) -> bytes:
    """Send it all, and read until the port closes."""
    async with await dial(address) as stream:
        for piece in sent:
            await stream.send_all(piece)
            await wait_all_tasks_blocked()
        return b"".join([data async for data in stream])


def statuses(got: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 ([1-5]\d\d) ", got)]


def get(target: str = "/", *headers: str, method: str = "GET") -> bytes:
    return "\r\n".join([f"{method} {target} HTTP/1.1", "Host: lab", *headers, "", ""]).encode()


CLOSE = "Connection: close"


async def hello(head: Head, body: Body) -> Response:
    return Response(200, (("Content-Type", "text/plain"),), b"hello " + await body.read())


HELLO = Route("/", hello, scope="open", methods=("GET", "POST"), max_body=10)


# ---- requests and answers ------------------------------------------------------------------------------------------


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with port(HELLO) as address:
        post = get("/", "Content-Length: 3", method="POST") + b"abc"
        got = await exchange(address, get() + post + get("/nothing") + get("/", CLOSE))
    assert statuses(got) == [200, 200, 404, 200]
    assert got.count(b"\r\n\r\nhello ") == 3
    assert b"\r\n\r\nhello abcHTTP/1.1 404" in got
    assert got.count(b"Connection: close") == 1


async def test_a_request_may_come_byte_by_byte() -> None:
    async with port(HELLO) as address:
        sent = get("/", "Content-Length: 3", CLOSE, method="POST") + b"abc"
        got = await exchange(address, *(sent[at : at + 1] for at in range(len(sent))))
    assert got.endswith(b"hello abc")


async def test_every_answer_says_when_and_what_it_is() -> None:
    async with port(HELLO) as address:
        lines = (await exchange(address, get("/", CLOSE))).split(b"\r\n")
    assert lines[0] == b"HTTP/1.1 200 OK"
    told = parsedate_to_datetime(lines[1].decode().removeprefix("Date: "))
    assert abs((datetime.now(UTC) - told).total_seconds()) < 60
    assert {b"X-Content-Type-Options: nosniff", b"Content-Type: text/plain", b"Content-Length: 6"} <= set(lines)


async def test_http_1_0_is_answered_and_closed() -> None:
    async with port(HELLO) as address:
        got = await exchange(address, b"GET / HTTP/1.0\r\n\r\n")
    assert got.endswith(b"\r\n\r\nhello ")
    assert b"Connection: close" in got


async def test_head_gives_the_head_of_get() -> None:
    async def pieces(head: Head, body: Body) -> Response:
        return Response(200, (), several())

    async with port(HELLO, Route("/pieces", pieces, scope="open")) as address:
        got = await exchange(address, get(method="HEAD") + get("/pieces", method="HEAD") + get("/", CLOSE))
    first, second, third = got.split(b"HTTP/1.1 ")[1:]
    assert b"Content-Length: 6" in first
    assert first.endswith(b"\r\n\r\n")
    assert second.endswith(b"\r\n\r\n")
    assert third.endswith(b"hello ")


async def several() -> AsyncIterator[bytes]:
    for piece in (b"one,", b"", b"x" * 3 * PIECE):
        yield piece


@pytest.mark.parametrize("head", [b"HTTP/1.1\r\nHost: lab", b"HTTP/1.0"])
async def test_a_body_may_be_sent_as_it_comes(head: bytes) -> None:
    async def pieces(head: Head, body: Body) -> Response:
        return Response(200, (), several())

    async with port(Route("/", pieces, scope="open")) as address:
        got = await exchange(address, b"GET / %b\r\nConnection: close\r\n\r\n" % head)
    assert got.count(b"x") >= 3 * PIECE
    assert (b"Transfer-Encoding: chunked" in got) == (b"1.1" in head)
    assert got.endswith(b"0\r\n\r\n") == (b"1.1" in head)


async def test_a_download_may_say_how_long_it_is() -> None:
    async def download(head: Head, body: Body) -> Response:
        return Response(200, (("Content-Length", str(4 + 3 * PIECE)),), several())

    async with port(Route("/", download, scope="open")) as address:
        got = await exchange(address, get() + get("/", CLOSE))
    assert got.count(b"Content-Length: 196612") == 2
    assert got.endswith(b"x" * 100)


async def test_a_client_that_waits_for_100_gets_it_only_when_its_body_is_wanted() -> None:
    async with port(HELLO) as address:
        expect = get("/", "Content-Length: 3", "Expect: 100-continue", CLOSE, method="POST")
        got = await exchange(address, expect, b"abc")
        assert statuses(got) == [100, 200]
        refused = await exchange(address, expect.replace(b"h: 3", b"h: 30"))
        assert statuses(refused) == [413]


async def test_chunks_are_read_and_nothing_behind_them() -> None:
    chunked = (
        get("/", "Transfer-Encoding: chunked", method="POST") + b"2\r\nab\r\n1;x=y\r\nc\r\n0\r\nTrailer: t\r\n\r\n"
    )
    async with port(HELLO) as address:
        got = await exchange(address, chunked + get())
    assert statuses(got) == [200]
    assert got.endswith(b"hello abc")


@pytest.mark.parametrize(
    "body", [b"x\r\n", b"-1\r\n", b"0x1\r\na", b"1\na\n0\n\n", b"1\r\nab\r\n0\r\n\r\n", b"ffffffffffffffffffffff\r\n"]
)
async def test_bad_chunks_are_refused(body: bytes) -> None:
    async with port(HELLO) as address, await dial(address) as stream:
        await stream.send_all(get("/", "Transfer-Encoding: chunked", method="POST") + body)
        await stream.send_eof()
        got = b"".join([data async for data in stream])
    assert statuses(got) == [400]
    assert b"Connection: close" in got


async def test_a_body_over_the_routes_limit_is_refused() -> None:
    async with port(HELLO) as address:
        long = await exchange(address, get("/", "Content-Length: 11", method="POST") + b"x" * 11)
        chunked = get("/", "Transfer-Encoding: chunked", method="POST") + b"b\r\nxxxxxxxxxxx\r\n" * 1000
        for got in (long, await exchange(address, chunked)):
            assert statuses(got) == [413]
            assert got.endswith(b"the body has more than 10 bytes\n")


async def test_a_body_that_the_handler_leaves_ends_the_connection() -> None:
    async def ignore(head: Head, body: Body) -> Response:
        return Response(204)

    async with port(Route("/", ignore, scope="open", methods=("PUT",), max_body=10)) as address:
        got = await exchange(address, get("/", "Content-Length: 3", method="PUT") + b"abc" + get())
    assert statuses(got) == [204]
    assert b"Connection: close" in got
    assert b"Content-Length" not in got


async def test_a_body_that_ends_early_is_refused() -> None:
    async with port(HELLO) as address, await dial(address) as stream:
        await stream.send_all(get("/", "Content-Length: 3", method="POST") + b"a")
        await stream.send_eof()
        assert statuses(b"".join([data async for data in stream])) == [400]


# ---- routes and refusals -------------------------------------------------------------------------------------------


async def test_the_longest_route_answers() -> None:
    def named(name: str) -> Any:
        async def answer(head: Head, body: Body) -> Response:
            return Response(200, (), f"<{name} {head.path}>".encode())

        return answer

    routes = [Route(path, named(path), scope="open") for path in ("/a", "/a/*", "/a/b/*", "/a/b/c")]
    async with port(*routes) as address:
        targets = ("/a", "/a/", "/a/x", "/a/b", "/a/b/x%20y", "/a/b/c")
        got = await exchange(address, b"".join(map(get, targets)) + get("/ab", CLOSE))
    assert [part[: part.index(b">")].decode() for part in got.split(b"<")[1:]] == [
        "/a /a",
        "/a/* /a/",
        "/a/* /a/x",
        "/a/* /a/b",
        "/a/b/* /a/b/x y",
        "/a/b/c /a/b/c",
    ]
    assert statuses(got)[-1] == 404


@pytest.mark.parametrize(
    ("request_", "status", "header"),
    [
        (get("/nothing", CLOSE), 404, b""),
        (get("/", CLOSE, method="DELETE"), 405, b"Allow: GET, POST, HEAD"),
        (get("/secret", CLOSE), 401, b'WWW-Authenticate: Bearer realm="emissary"'),
        (get("/secret", CLOSE, "Authorization: Bearer no"), 401, b'WWW-Authenticate: Bearer realm="emissary"'),
        (get("/secret", CLOSE, "Authorization: Bearer peek"), 403, b""),
        (get("/", CLOSE, "Origin: http://evil"), 403, b""),
        (get("/ws", CLOSE), 426, b"Upgrade: websocket"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, b"Connection: close"),
        (b"GET / HTTP/1.1\nHost: lab\n\n", 400, b"Connection: close"),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400, b"Connection: close"),
        (b"GET / HTTP/1.1\r\nX: " + b"x" * MAX_HEAD, 431, b"Connection: close"),
    ],
)
async def test_what_is_refused_says_why(
    request_: bytes, status: int, header: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Metrics()
    caplog.set_level(logging.INFO)
    routes = [HELLO, Route("/secret", hello, scope="control"), Route("/ws", websocket=no_words, scope="open")]
    async with port(*routes, metrics=metrics) as address:
        got = await exchange(address, request_)
    assert statuses(got) == [status]
    assert header in got
    assert list(metrics) == [("http_refused_total", (("status", str(status)),), 1)]
    assert f"status={status}" in caplog.text
    assert "Bearer no" not in caplog.text


async def no_words(head: Head, ws: WebSocketConnection) -> None:
    return


async def test_a_refusal_leaves_the_connection_open() -> None:
    async with port(HELLO, Route("/secret", hello)) as address:
        got = await exchange(address, get("/nothing") + get("/secret") + get("/", CLOSE))
    assert statuses(got) == [404, 401, 200]


async def test_five_wrong_tokens_block_the_address() -> None:
    async with port(HELLO) as address:
        got = await exchange(address, get("/", "Authorization: Bearer no") * 5 + get("/", CLOSE))
    assert statuses(got) == [401] * 5 + [429]
    assert b"Retry-After: 60" in got


async def test_handlers_see_what_the_client_may_do() -> None:
    async def scope(head: Head, body: Body) -> Response:
        return Response(200, (), f"<{head.scope} {head.peer}>".encode())

    async with port(Route("/", scope, scope="open")) as address:
        got = await exchange(address, get() + get("/", CLOSE, "Authorization: Bearer peek"))
    assert b"<open 127.0.0.1>" in got
    assert b"<read 127.0.0.1>" in got


async def test_a_handlers_own_refusal_and_its_bug_end_the_request_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def gone(head: Head, body: Body) -> Response:
        raise HttpError(410, "it was here", (("X-Was", "here"),))

    async def broken(head: Head, body: Body) -> Response:
        raise ZeroDivisionError("on purpose")

    async with port(HELLO, Route("/gone", gone, scope="open"), Route("/broken", broken, scope="open")) as address:
        got = await exchange(address, get("/gone") + get("/broken") + get("/", CLOSE))
    assert statuses(got) == [410, 500, 200]
    assert b"X-Was: here" in got
    assert b"on purpose" not in got
    assert "ZeroDivisionError: on purpose" in caplog.text


async def test_a_body_that_fails_midway_is_cut_short(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> AsyncIterator[bytes]:
        yield b"begun"
        raise OSError("on purpose")

    async def answer(head: Head, body: Body) -> Response:
        return Response(200, (), fail())

    async with port(Route("/", answer, scope="open")) as address:
        got = await exchange(address, get())
    assert got.endswith(b"5\r\nbegun\r\n")
    assert "OSError: on purpose" in caplog.text


# ---- time and numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "after_s", "answer"),
    [
        ([], 10, []),
        ([b"GET / HTTP/1.1\r\n"], 10, [408]),
        ([get()], IDLE_S, [200]),
        ([get(), b"GET"], 10, [200, 408]),
        ([get("/", "Content-Length: 3", method="POST")], PIECE_S, [408]),
    ],
)
async def test_a_silent_client_is_not_waited_for(
    sent: list[bytes], after_s: float, answer: list[int], clock: MockClock
) -> None:
    async with port(HELLO) as address:
        got = await exchange(address, *sent)
        assert trio.current_time() == pytest.approx(after_s, abs=0.5)
    assert statuses(got) == answer


async def test_a_head_that_trickles_in_has_ten_seconds_in_all(clock: MockClock) -> None:
    async def trickle(stream: trio.SocketStream) -> None:
        for _ in range(100):
            await stream.send_all(b"X")
            await trio.sleep(1)

    async with port(HELLO) as address, await dial(address) as stream, trio.open_nursery() as nursery:
        nursery.start_soon(trickle, stream)
        assert statuses(await stream.receive_some()) == [408]
        assert trio.current_time() == pytest.approx(10, abs=0.5)
        nursery.cancel_scope.cancel()


async def test_a_client_that_takes_nothing_is_given_up(clock: MockClock) -> None:
    metrics = Metrics()

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * PIECE

    async def answer(head: Head, body: Body) -> Response:
        return Response(200, (), endless())

    async with port(Route("/", answer, scope="open"), metrics=metrics) as address, await dial(address) as stream:
        await stream.send_all(get())
        await trio.sleep(PIECE_S + 1)
        assert list(metrics) == [("http_slow_readers_total", (), 1)]


async def test_one_connection_too_many_is_told_so() -> None:
    metrics = Metrics()
    async with port(HELLO, metrics=metrics, max_connections=2) as address:
        async with await dial(address), await dial(address):
            got = await exchange(address, get())
            assert statuses(got) == [503]
            assert b"Retry-After: 5" in got
        await wait_all_tasks_blocked()
        assert statuses(await exchange(address, get("/", CLOSE))) == [200]
    assert ("http_turned_away_total", (), 1) in list(metrics)


async def test_ports_are_told_and_those_in_use_are_an_error() -> None:
    async with port(HELLO) as address:
        with pytest.raises(OSError, match=f"Address already in use: '{address}'"):
            await serve([address], [], Guard([], {}, False, [], trio.current_time), metrics=Metrics())


@pytest.mark.parametrize(
    ("address", "parts"),
    [("127.0.0.1:1", ("127.0.0.1", 1)), ("[::1]:0", ("::1", 0)), ("lab:65535", ("lab", 65535))],
)
def test_an_address_is_host_and_port(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


@pytest.mark.parametrize("address", ["lab", ":80", "lab:", "lab:x", "lab:65536", "lab:-1", "::1:80", "lab:²"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r"is no HOST:PORT|in brackets"):
        split_address(address)


# ---- websockets ----------------------------------------------------------------------------------------------------


async def echo(head: Head, ws: WebSocketConnection) -> None:
    while True:
        await ws.send_message(f"{ws.remote} {head.query} {await ws.get_message()!r}")


ECHO = Route("/ws/*", websocket=echo, scope="open")


async def ending(ws: WebSocketConnection) -> int:
    """Wait for the close; its code."""
    while ws.closed is None:
        with suppress(ConnectionClosed):
            await ws.get_message()
    return ws.closed.code


async def test_a_websocket_is_opened_on_its_route() -> None:
    async with port(ECHO) as address, connect(Dial(f"ws://{address}/ws/x?a=b")) as ws:
        await ws.send_message("hi")
        assert await ws.get_message() == "127.0.0.1 {'a': 'b'} 'hi'"


async def test_a_handler_that_returns_closes_with_1000() -> None:
    async with port(Route("/", websocket=no_words, scope="open")) as address, connect(Dial(f"ws://{address}/")) as ws:
        assert await ending(ws) == 1000


async def test_a_handlers_bug_closes_with_1011(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(head: Head, ws: WebSocketConnection) -> None:
        raise ZeroDivisionError("on purpose")

    async with port(Route("/", websocket=broken, scope="open")) as address, connect(Dial(f"ws://{address}/")) as ws:
        assert await ending(ws) == 1011
    assert "ZeroDivisionError: on purpose" in caplog.text


async def test_a_port_that_ends_closes_its_websockets_with_1001() -> None:
    async with trio.open_nursery() as nursery:
        guard = Guard([], {}, False, [], trio.current_time)
        serving = trio.CancelScope()

        async def until_told(task_status: trio.TaskStatus[list[str]]) -> None:
            with serving:
                await serve(["127.0.0.1:0"], [ECHO], guard, metrics=Metrics(), task_status=task_status)

        (address,) = await nursery.start(until_told)
        async with connect(Dial(f"ws://{address}/ws/")) as ws:
            serving.cancel()
            assert await ending(ws) == 1001


async def test_a_message_over_the_limit_closes_with_1009() -> None:
    async with port(ECHO, max_message=1000) as address, connect(Dial(f"ws://{address}/ws/")) as ws:
        await ws.send_message("x" * 1000)
        await ws.get_message()
        await ws.send_message("x" * 300_000)
        assert await ending(ws) == 1009


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        (b"\x81\x82\0\0\0\0\xff\xfe", 1007),  # text that is not UTF-8
        (b"\x81\x02hi", 1002),  # not masked
        (b"\xc1\x82\0\0\0\0hi", 1002),  # compressed, which was not agreed on
        (b"\x83\x80\0\0\0\0", 1002),  # an opcode that is none
        (b"\x88\x81\0\0\0\0x", 1002),  # half a close code
    ],
)
async def test_a_frame_that_is_none_closes_with_its_code(frame: bytes, code: int) -> None:
    async with port(ECHO) as address:
        got = await exchange(address, get("/ws/", *UPGRADE), frame)
    (close,) = re.findall(rb"\x88[\x02-\x7d]([\x03-\x0f].)", got, re.DOTALL)
    assert int.from_bytes(close) == code


UPGRADE = (
    "Connection: keep-alive, Upgrade",
    "Upgrade: websocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
)


async def test_the_upgrade_is_that_of_the_standard(clock: MockClock) -> None:
    async with port(Route("/", websocket=no_words, scope="open")) as address:
        got = await exchange(address, get("/", *UPGRADE, "Sec-WebSocket-Extensions: permessage-deflate"))
    assert got.startswith(b"HTTP/1.1 101 ")
    assert b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in got
    assert b"Extensions" not in got
    assert got.endswith(b"\r\n\r\n\x88\x02\x03\xe8")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (get("/", *UPGRADE[1:]), 400),
        (get("/", *UPGRADE[:2], UPGRADE[3]), 426),
        (get("/", *UPGRADE[:2], "Sec-WebSocket-Version: 8", UPGRADE[3]), 426),
        (get("/", *UPGRADE[:3]), 400),
        (get("/", *UPGRADE[:3], "Sec-WebSocket-Key: dGhlIHNhbXBsZQ=="), 400),
        (get("/", *UPGRADE[:3], "Sec-WebSocket-Key: ?"), 400),
        (get("/", *UPGRADE, method="POST"), 400),
        (get("/", *UPGRADE, "Content-Length: 5"), 400),
        (get("/", *UPGRADE) + b"\x81\x80", 400),
        (get("/", *UPGRADE).replace(b"HTTP/1.1\r\nHost: lab", b"HTTP/1.0"), 400),
    ],
)
async def test_what_does_not_open_a_websocket_is_refused(request_: bytes, status: int) -> None:
    async with port(Route("/", websocket=no_words, scope="open")) as address, await dial(address) as stream:
        await stream.send_all(request_)
        await stream.send_eof()
        assert statuses(b"".join([data async for data in stream])) == [status]


async def test_a_websocket_needs_the_routes_scope(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.touch(0o600)
    async with port(Route("/", websocket=no_words, scope="control")) as address:
        for content, status in (("peek", 403), ("wrong", 401)):
            token.write_text(content)
            with pytest.raises(PeerRefused, match=f"answered {status} instead of opening a websocket"):
                async with connect(Dial(f"ws://{address}/", token)):
                    pass
        token.write_text("sesame")
        async with connect(Dial(f"ws://{address}/", token)) as ws:
            assert await ending(ws) == 1000


async def test_a_client_that_stops_answering_pings_is_closed(clock: MockClock) -> None:
    async def answer(request: Request) -> dict[str, Any]:
        return request.payload

    async def idle(channel: Channel) -> None:
        await trio.sleep_forever()

    async def control(head: Head, ws: WebSocketConnection) -> None:
        await converse(ws, answer, idle, metrics=Metrics(), ping_s=20, deadline_s=40)

    async with port(Route("/", websocket=control, scope="open")) as address, await dial(address) as stream:
        await stream.send_all(get("/", *UPGRADE))
        got = b"".join([data async for data in stream])
        assert trio.current_time() == pytest.approx(40, abs=3)
    assert b"\x89\x04" in got  # a ping
    assert got.endswith(b"\x88\x02\x03\xe9")  # close, 1001


# ---- TLS -----------------------------------------------------------------------------------------------------------


async def test_a_clients_certificate_comes_in_by_its_name(tmp_path: Path) -> None:
    ca = authority(tmp_path)
    lab, laptop = issue(ca, tmp_path, "lab"), issue(ca, tmp_path, "laptop")

    async def who(head: Head, ws: WebSocketConnection) -> None:
        await ws.send_message(f"{head.client_cert} {head.scope}")

    metrics, mutual = Metrics(), server_context(lab.cert, lab.key, client_ca=ca.cert)
    async with port(Route("/", websocket=who, scope="read"), metrics=metrics, tls=mutual) as address:
        url, trusted = f"wss://{address}/", TlsSettings(ca.cert)
        async with connect(Dial(url, tls=TlsSettings(ca.cert, laptop.cert, laptop.key))) as ws:
            assert await ws.get_message() == "laptop read"
        with pytest.raises(PeerRefused, match="refused TLS: TLSV13_ALERT_CERTIFICATE_REQUIRED"):
            async with connect(Dial(url, tls=trusted)):
                pass
        async with await dial(address) as stream:
            await stream.send_all(get())
            await stream.send_eof()
            assert b"HTTP" not in b"".join([data async for data in stream])
    assert list(metrics) == [("http_tls_failures_total", (), 2)]


async def test_a_tls_handshake_has_ten_seconds(tmp_path: Path, clock: MockClock) -> None:
    lab = issue(authority(tmp_path), tmp_path, "lab")
    async with port(HELLO, tls=server_context(lab.cert, lab.key)) as address:
        assert await exchange(address, b"\x16\x03\x01") == b""
        assert trio.current_time() == pytest.approx(10, abs=0.5)


async def test_a_port_without_tls_does_not_understand_it(tmp_path: Path) -> None:
    async with port(HELLO) as address:
        with pytest.raises(PeerUnreachable, match=r"TLS with .* failed"):
            async with connect(Dial(f"wss://{address}/", tls=TlsSettings(authority(tmp_path).cert))):
                pass
