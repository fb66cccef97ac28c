"""Heads of any bytes, in any pieces: read, refused or waited for, and nothing else."""

import re

import h11
from hypothesis import example, given
from hypothesis import strategies as st

from agent.core.head import MAX_HEAD, Head, HttpError, cut_head, read_head

LINES = st.sampled_from(
    [
        *(
            b"GET / HTTP/1.1",
            b"POST /a%20b?c=d HTTP/1.1",
            b"GET /../x HTTP/1.0",
            b"PUT * HTTP/1.1",
            b"GET /%ff HTTP/1.1",
        ),
        *(b"Host: a", b"Host: [::1]:80", b"host:b ", b"Host: \xe9", b"Host:", b"X: y", b" folded", b"\tfolded", b": x"),
        *(b"Content-Length: 3", b"Content-Length: 3, 3", b"Content-Length: x", b"Transfer-Encoding: chunked"),
        *(b"Transfer-Encoding: gzip", b"Expect: 100-continue", b"Upgrade: websocket", b"Connection: upgrade", b""),
    ]
)
ENDS = st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r", b"\r\r\n", b"\0\r\n"])
HEADS = st.lists(st.tuples(LINES | st.binary(max_size=20), ENDS).map(b"".join), max_size=12).map(b"".join)


def read(pieces: list[bytes]) -> Head | int | None:
    """What came of it: the head, a refusal's status, or None when it waits for more."""
    buffer = bytearray()
    try:
        for piece in pieces:
            buffer += piece
            raw = cut_head(buffer)
            if raw is not None:
                return read_head(h11.Connection(h11.SERVER, MAX_HEAD), raw, "192.0.2.1")
    except HttpError as err:
        return err.status
    return None


@given(HEADS | st.binary(), st.lists(st.integers(1, 40), max_size=20))
@example(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", [1] * 20)
def test_any_bytes_in_any_pieces_have_one_meaning(wire: bytes, cuts: list[int]) -> None:
    whole = read([wire])
    if isinstance(whole, int):
        assert whole in (400, 431, 501, 505)
    pieces, rest = [], wire
    for cut in cuts:
        pieces.append(rest[:cut])
        rest = rest[cut:]
    in_pieces = read([*pieces, rest])
    if isinstance(whole, Head):
        assert isinstance(in_pieces, Head)
        assert (in_pieces.method, in_pieces.target, list(in_pieces.headers)) == (
            whole.method,
            whole.target,
            list(whole.headers),
        )
    else:
        assert in_pieces == whole


@given(HEADS | st.binary())
def test_what_is_read_cannot_be_read_in_two_ways(wire: bytes) -> None:
    head = read([wire])
    if not isinstance(head, Head):
        return
    raw = wire[: wire.index(b"\r\n\r\n") + 4]
    assert not re.search(rb"(?<!\r)\n|\r(?!\n)|\r\n[ \t]|\0", raw)
    assert len(head.headers.all("host")) <= 1
    assert len(set(head.headers.all("content-length"))) <= 1
    assert not (head.headers.all("content-length") and head.headers.all("transfer-encoding"))
    assert head.path.startswith("/")
    assert ".." not in head.path.split("/")


@given(st.integers(0, 2000))
def test_no_head_is_longer_than_the_limit(over: int) -> None:
    wire = b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * (MAX_HEAD - 1000 + over) + b"\r\n\r\n"
    assert isinstance(read([wire]), Head) == (len(wire) <= MAX_HEAD)
