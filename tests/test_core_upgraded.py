"""The stream below a websocket: whole frames at once, their rests in order, and frames that another library reads."""

import socket
import ssl

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked
from wsproto import ConnectionType
from wsproto.connection import Connection
from wsproto.events import TextMessage

from agent.core.upgraded import FRAGMENT, Upgraded, simple_frames, text_frames

FRAME = b"x" * 1000


async def receive(stream: trio.abc.ReceiveStream, got: bytearray) -> None:
    async for data in stream:
        got += data


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
        got = bytearray()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive, theirs, got)
            await line.send_all(b"behind it")
            assert not line.has_rest
            assert line.send_now(b", and on")
            await ours.send_eof()
    assert got == b"".join(b"%06d" % n + FRAME for n in range(sent)) + b"behind it, and on"


async def test_a_frame_that_is_given_up_in_the_middle_still_ends_before_the_next(autojump_clock: MockClock) -> None:
    ours, theirs = pair()
    line = Upgraded(ours, b"", "lab")
    frame = bytes(range(256)) * 10_000
    async with ours, theirs:
        with trio.move_on_after(1) as limit:
            await line.send_all(frame)
        assert limit.cancelled_caught
        assert line.has_rest
        assert not line.send_now(FRAME)
        got = bytearray()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive, theirs, got)
            await line.send_all(b"the close")
            await ours.send_eof()
    assert got == frame + b"the close"


async def test_while_another_sends_no_frame_goes_between() -> None:
    ours, theirs = pair()
    line = Upgraded(ours, b"", "lab")
    async with ours, theirs, trio.open_nursery() as nursery:
        nursery.start_soon(line.send_all, b"x" * 10_000_000)
        await wait_all_tasks_blocked()
        assert not line.send_now(FRAME)
        nursery.cancel_scope.cancel()


async def test_what_the_other_machine_has_not_taken_is_told() -> None:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    theirs = await trio.open_tcp_stream(*listener.socket.getsockname())
    ours = await listener.accept()
    line = Upgraded(ours, b"", "lab")
    async with listener, theirs:
        async with ours:
            assert line.unacknowledged == 0
            while line.send_now(FRAME) and not line.has_rest:
                pass
            assert line.unacknowledged > 0  # nobody reads there, and its kernel has no more room
        assert line.unacknowledged == 0


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


def masked(kind: int, data: bytes, mask: bytes = b"\x01\x02\x03\x04", *, length: bytes | None = None) -> bytes:
    """A client's frame."""
    size = len(data)
    length = length or (bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2))
    return bytes([kind]) + length + mask + bytes(byte ^ mask[n % 4] for n, byte in enumerate(data))


TEXT, PING, CLOSE = 0x81, 0x89, 0x88


@given(st.lists(st.text(max_size=200), max_size=8), st.binary(min_size=4, max_size=4), st.integers(0, 20))
def test_texts_come_out_as_another_library_made_them(texts: list[str], mask: bytes, cut: int) -> None:
    client = Connection(ConnectionType.CLIENT)
    data = b"".join(client.send(TextMessage(text)) for text in texts) + masked(TEXT, b"more", mask)
    whole = data[: len(data) - cut % 10 - 1]
    assert simple_frames(whole) == (texts, b"", whole[len(data) - 10 :], True)
    assert simple_frames(data) == ([*texts, "more"], b"", b"", True)


@given(st.binary(max_size=300))
def test_whatever_comes_is_taken_or_left_and_nothing_is_lost(data: bytes) -> None:
    texts, control, rest, _ = simple_frames(masked(TEXT, b"a") + data)
    assert texts[0] == "a"
    assert (masked(TEXT, b"a") + data).endswith(control + rest)
    assert not control or control[0] in (0x88, 0x89, 0x8A)


@pytest.mark.parametrize(
    "frame",
    [
        masked(0x01, b"a"), masked(0x80, b"a"), masked(0x82, b"a"), masked(0xC1, b"a"), masked(0x83, b""), b"\x81\x01a",
        masked(TEXT, b"\xff"), masked(TEXT, b"a", length=b"\xfe\x00\x01"), masked(0x09, b""),
        masked(TEXT, b"x" * 2**16, length=b"\xff" + (2**16).to_bytes(8)), masked(PING, b"x" * 126),
    ],
    ids=["part", "continuation", "bytes", "extension", "unknown", "unmasked", "not UTF-8", "length", "control in parts",
         "long", "long ping"],
)  # fmt: skip
def test_what_is_not_simple_is_left_with_all_behind_it(frame: bytes) -> None:
    rest = frame + masked(TEXT, b"b")
    assert simple_frames(masked(TEXT, b"a") + rest) == (["a"], b"", rest, False)


def test_a_control_frame_ends_what_is_taken_and_a_close_all() -> None:
    ping, behind = masked(PING, b"hello"), masked(TEXT, b"b")
    assert simple_frames(masked(TEXT, b"a") + ping + behind) == (["a"], ping, behind, True)
    assert simple_frames(masked(TEXT, b"a") + ping[:-1]) == (["a"], b"", ping[:-1], True)
    assert simple_frames(masked(CLOSE, b"") + behind) == ([], masked(CLOSE, b""), behind, False)


async def test_simple_messages_pass_the_library_by_in_order() -> None:
    ours, theirs = pair()
    line = Upgraded(ours, b"head", "lab", is_diverted=True)
    took: list[list[str]] = []
    given: list[bytes] = []

    async def read_as_the_library() -> None:
        while data := await line.receive_some(65_536):
            given.append(bytes(data))

    async with ours, theirs, trio.open_nursery() as nursery:
        nursery.start_soon(read_as_the_library)
        await theirs.send_all(masked(TEXT, b"early") + masked(TEXT, b"bird"))
        await wait_all_tasks_blocked()
        assert (took, given) == ([], [b"head"])  # nothing is read before there is somebody to take it
        line.divert(took.append)
        await wait_all_tasks_blocked()
        assert took.pop() == ["early", "bird"]
        for piece in (masked(TEXT, b"in two")[:9], masked(TEXT, b"in two")[9:]):
            await theirs.send_all(piece)
            await wait_all_tasks_blocked()
        assert took.pop() == ["in two"]
        ping = masked(PING, b"")
        await theirs.send_all(masked(TEXT, b"before") + ping + masked(TEXT, b"behind"))
        await wait_all_tasks_blocked()
        assert (took, given) == ([["before"], ["behind"]], [b"head", ping])
        rest = masked(0x01, b"a part") + masked(0x80, b", the end")
        await theirs.send_all(rest)
        await wait_all_tasks_blocked()
        await theirs.send_all(masked(TEXT, b"x"))
        await wait_all_tasks_blocked()
        assert b"".join(given[2:]) == rest + masked(TEXT, b"x")
        assert took == [["before"], ["behind"]]
        await theirs.send_eof()
