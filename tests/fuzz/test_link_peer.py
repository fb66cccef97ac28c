"""A peer that answers anything: a connection ends in an error of the tree, and a port in nothing at all."""

import base64
import hashlib
import re
from functools import partial

import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from trio_websocket import ConnectionClosed

from agent.core.channel import Channel, converse, ungrouped
from agent.core.envelope import Request
from agent.core.errors import ActionError, PeerError
from agent.core.guard import Guard
from agent.core.head import Head
from agent.core.link import Dial, connect
from agent.core.listen import Route, serve
from agent.core.metrics import Metrics

REPLIES = st.lists(
    st.sampled_from(
        [
            *(b"HTTP/1.1 101 Switching Protocols\r\n", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 401 No\r\n", b"220 mail\r\n"),
            *(
                b"Upgrade: websocket\r\n",
                b"Connection: Upgrade\r\n",
                b"Sec-WebSocket-Accept: x\r\n",
                b"\r\n",
                b"\r\n\r\n",
            ),
            *(b"Sec-WebSocket-Extensions: x\r\n", b"Sec-WebSocket-Protocol: x\r\n", b"Content-Length: 3\r\n", b"abc"),
            *(b"Transfer-Encoding: chunked\r\n", b"3\r\nabc\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"),
        ]
    )
    | st.binary(max_size=30),
    max_size=10,
).map(b"".join)


def frame(mask: bool) -> st.SearchStrategy[bytes]:
    """A frame that is right, nearly right, or wrong in its first bytes."""

    def build(first: int, payload: bytes, told: int | None, cut: int) -> bytes:
        length = len(payload) if told is None else told
        whole = bytes([first, (0x80 if mask else 0) | length]) + (b"\0\0\0\0" if mask else b"") + payload
        return whole[: len(whole) - cut]

    payload = st.binary(max_size=30) | st.sampled_from([b'{"action":"a"}', b'{"rsp_id":0}', b"\x03\xe8", b"\xff\xfe"])
    return st.builds(
        build,
        st.sampled_from([0x81, 0x82, 0x01, 0x80, 0x88, 0x89, 0x8A, 0x00, 0x09]) | st.integers(0, 255),
        payload,
        st.none() | st.integers(0, 127),
        st.integers(0, 2),
    )


async def refuse(request: Request) -> dict[str, object]:
    raise ActionError("unknown_action", "nothing is answered here")


async def ask_once(channel: Channel) -> None:
    await channel.ask("a", {}, timeout_s=0.02)


async def talk(dial: Dial) -> None:
    try:
        async with connect(dial) as ws:
            await converse(ws, refuse, ask_once, metrics=Metrics())
    except (PeerError, ConnectionClosed):
        return


@settings(max_examples=150)
@given(REPLIES, st.booleans())
async def test_any_reply_to_an_upgrade_is_a_refusal_or_no_answer(reply: bytes, closes: bool) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            await stream.send_all(reply)
            if not closes:
                await trio.sleep(0.05)

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, answer, 0, host="127.0.0.1"))
        await talk(Dial(f"ws://127.0.0.1:{listener.socket.getsockname()[1]}/"))
        nursery.cancel_scope.cancel()


@settings(max_examples=150)
@given(st.lists(frame(mask=False), max_size=5).map(b"".join))
async def test_any_frames_of_a_server_end_in_an_error_of_the_tree(frames: bytes) -> None:
    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            found = re.search(rb"Sec-WebSocket-Key: (\S+)", await stream.receive_some(), re.IGNORECASE)
            assert found
            accept = base64.b64encode(hashlib.sha1(found[1] + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
            head = b"HTTP/1.1 101 Go\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %b\r\n\r\n"
            await stream.send_all(head % accept + frames)

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, answer, 0, host="127.0.0.1"))
        await talk(Dial(f"ws://127.0.0.1:{listener.socket.getsockname()[1]}/"))
        nursery.cancel_scope.cancel()


@settings(max_examples=150)
@given(st.lists(frame(mask=True) | frame(mask=False), max_size=5).map(b"".join))
async def test_any_frames_of_a_client_leave_the_port_as_it_was(frames: bytes) -> None:
    async def hold(head: Head, ws: object) -> None:
        await converse(ws, refuse, ask_once, metrics=Metrics())  # type: ignore[arg-type]

    metrics = Metrics()
    async with trio.open_nursery() as nursery:
        guard, route = Guard([], {}, False, [], trio.current_time), Route("/", websocket=hold, scope="open")
        (address,) = await nursery.start(partial(serve, ["127.0.0.1:0"], [route], guard, metrics=metrics))
        host, _, port = address.rpartition(":")
        with ungrouped():
            async with await trio.open_tcp_stream(host, int(port)) as stream:
                await stream.send_all(
                    b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
                )
                await stream.receive_some()
                await stream.send_all(frames)
                await stream.send_eof()
                async for _ in stream:
                    pass
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert list(metrics) == []
