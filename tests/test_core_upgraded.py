"""The stream below a websocket: whole frames at once, their rests in order, and frames that another library reads."""

import socket
import ssl

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked
from wsproto import ConnectionType
from wsproto.connection import Connection
from wsproto.events import TextMessage

from agent.core.upgraded import FRAGMENT, Upgraded, text_frames

FRAME = b"x" * 1000


def pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    ours, theirs = socket.socketpair()
    return tuple(trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in (ours, theirs))  # type: ignore[return-value]


def read(frames: list[bytes]) -> list[tuple[str, bool]]:
    """What wsproto's client reads: text, and whether the message ends with it."""
    client = Connection(ConnectionType.CLIENT)
    got = []
    for frame in frames:
        client.receive_data(frame)
        for event in client.events():
            assert isinstance(event, TextMessage)
            got.append((event.data, event.message_finished))
    return got


@pytest.mark.parametrize("size", [0, 125, 126, 2**16 - 1, 2**16, 2**16 + 1, 2 * FRAGMENT, 10 * FRAGMENT + 7])
def test_frames_of_any_size_are_read_by_another_library(size: int) -> None:
    frames = text_frames("x" * size)
    assert len(frames) == max(1, -(-size // FRAGMENT))
    assert max(map(len, frames)) <= FRAGMENT + 10
    got = read(frames)
    assert "".join(text for text, _ in got) == "x" * size
    assert [finished for _, finished in got] == [False] * (len(got) - 1) + [True]


@given(st.text(max_size=8), st.integers(0, 70_000))
def test_a_fragment_may_end_within_a_character(text: str, before: int) -> None:
    whole = "x" * before + text * 3000
    assert "".join(part for part, _ in read(text_frames(whole))) == whole


async def test_a_frame_leaves_at_once_and_what_the_kernel_leaves_of_it_goes_first() -> None:
    ours, theirs = pair()
    line = Upgraded(ours, b"", "lab")
    async with ours, theirs:
        sent = 0
        while line.send_now(b"%06d" % sent + FRAME):
            sent += 1
            if line.has_rest:
                break
        assert not line.send_now(FRAME)
        got = b""

        async def receive() -> None:
            nonlocal got
            async for data in theirs:
                got += data

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await line.send_all(b"behind it")
            assert not line.has_rest
            assert line.send_now(b", and on")
            await ours.send_eof()
    assert got == b"".join(b"%06d" % n + FRAME for n in range(sent)) + b"behind it, and on"


async def test_while_another_sends_no_frame_goes_between() -> None:
    ours, theirs = pair()
    line = Upgraded(ours, b"", "lab")
    async with ours, theirs, trio.open_nursery() as nursery:
        nursery.start_soon(line.send_all, b"x" * 10_000_000)
        await wait_all_tasks_blocked()
        assert not line.send_now(FRAME)
        nursery.cancel_scope.cancel()


async def test_a_broken_line_is_told_by_the_next_send() -> None:
    ours, theirs = pair()
    line = Upgraded(ours, b"", "lab")
    await theirs.aclose()
    async with ours:
        assert not line.send_now(FRAME)
        with pytest.raises(trio.BrokenResourceError):
            await line.send_all(FRAME)


async def test_nothing_leaves_past_tls_and_nothing_behind_the_close() -> None:
    ours, theirs = pair()
    async with ours, theirs:
        over_tls = trio.SSLStream(ours, ssl.create_default_context(), server_hostname="lab")
        assert not Upgraded(over_tls, b"", "lab").send_now(FRAME)
        line = Upgraded(ours, b"GET / HTTP/1.1\r\n\r\n", "lab")
        assert repr(line) == "lab"
        assert await line.receive_some() == b"GET / HTTP/1.1\r\n\r\n"
        await theirs.send_all(b"what the client sends")
        assert await line.receive_some() == b"what the client sends"
        await line.aclose()
        assert not line.send_now(FRAME)
        with pytest.raises(trio.ClosedResourceError):
            await line.send_all(FRAME)
        await line.send_last(b"bye", 1.0)
        assert await theirs.receive_some() == b"bye"
