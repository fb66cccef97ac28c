"""The listening port: HTTP by raw bytes on loopback, websockets, limits."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from agent.core.guard import Guard
from agent.core.head import Head
from agent.core.link import Dial, connect
from agent.core.listen import Body, Response, Route, serve
from agent.core.metrics import Metrics


@asynccontextmanager
async def port(*routes: Route, guard: Guard | None = None, **options: Any) -> AsyncIterator[str]:
    guard = guard or Guard([("sesame", "control"), ("peek", "read")], {}, False, [], trio.current_time)
    async with trio.open_nursery() as nursery:
        serving = partial(serve, ["127.0.0.1:0"], routes, guard, **{"metrics": Metrics()} | options)
        (address,) = await nursery.start(serving)
        yield address
        nursery.cancel_scope.cancel()


async def exchange(address: str, sent: bytes) -> bytes:
    """Send it all, and read until the port closes."""
    host, _, number = address.rpartition(":")
    async with await trio.open_tcp_stream(host, int(number)) as stream:
        await stream.send_all(sent)
        return b"".join([data async for data in stream])


async def hello(head: Head, body: Body) -> Response:
    return Response(200, (("Content-Type", "text/plain"),), b"hello " + await body.read())


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with port(Route("/", hello, scope="open", methods=("GET", "POST"), max_body=10)) as address:
        got = await exchange(
            address,
            b"GET / HTTP/1.1\r\nHost: a\r\n\r\nPOST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc"
            b"GET /x HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
        )
    assert [line for line in got.splitlines() if b"HTTP/1.1" in line or b"hello" in line] == [
        b"HTTP/1.1 200 OK",
        b"hello HTTP/1.1 200 OK",
        b"hello abcHTTP/1.1 404 Not Found",
    ]


async def test_a_handler_that_returns_closes_its_websocket_with_1000() -> None:
    async def echo(head: Head, ws: WebSocketConnection) -> None:
        await ws.send_message(f"{head.peer} {await ws.get_message()!r}")

    async with port(Route("/", websocket=echo, scope="open")) as address, connect(Dial(f"ws://{address}/")) as ws:
        await ws.send_message("hi")
        assert await ws.get_message() == "127.0.0.1 'hi'"
        with pytest.raises(ConnectionClosed):
            await ws.get_message()
        assert ws.closed is not None
        assert ws.closed.code == 1000
