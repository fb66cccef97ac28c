"""Heads of requests: what is read, and what two readers could understand in two ways."""

import h11
import pytest

from agent.core.head import MAX_HEAD, Head, Headers, HttpError, cut_head, host_name, read_head


def read(raw: bytes) -> Head:
    buffer = bytearray(raw)
    head = cut_head(buffer)
    assert head is not None
    return read_head(h11.Connection(h11.SERVER, MAX_HEAD), head, "192.0.2.1")


def refusal(raw: bytes) -> HttpError:
    with pytest.raises(HttpError) as refused:
        read(raw)
    return refused.value


def test_a_head_is_read() -> None:
    head = read(
        b"GET /runs/r%201/a%C3%A9?x=1&y=&x=2+3 HTTP/1.1\r\n"
        b"Host: Lab:80\r\nX-a:  1 \r\nx-A: 2\r\nConnection: a, Upgrade\r\n\r\n"
    )
    assert (head.method, head.target) == ("GET", "/runs/r%201/a%C3%A9?x=1&y=&x=2+3")
    assert (head.path, head.query) == ("/runs/r 1/aé", {"x": "2 3", "y": ""})
    assert (head.peer, head.client_cert, head.scope) == ("192.0.2.1", None, "open")
    headers = head.headers
    assert (headers.get("X-A"), headers.all("x-a"), headers.get("none")) == ("1", ["1", "2"], None)
    assert headers.words("CONNECTION") == {"a", "upgrade"}
    assert ("host", "Lab:80") in list(headers)


def test_a_head_ends_with_its_blank_line() -> None:
    raw = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    for end in range(len(raw)):
        assert cut_head(bytearray(raw[:end])) is None
    buffer = bytearray(raw + b"GET")
    assert cut_head(buffer) == raw
    assert buffer == b"GET"


@pytest.mark.parametrize(
    "raw",
    [
        b"GET / HTTP/1.1\nHost: a\n\n",
        b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\rX: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n folded\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n\tfolded\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\0b\r\n\r\n",
    ],
)
def test_lines_that_do_not_end_in_crlf_or_go_on_are_refused(raw: bytes) -> None:
    assert refusal(raw).status == 400


def test_a_bare_line_feed_is_refused_before_the_head_is_complete() -> None:
    with pytest.raises(HttpError, match="400: a line of the head does not end with CRLF"):
        cut_head(bytearray(b"GET / HTTP/1.1\nHost"))


def test_a_head_may_have_16_kib() -> None:
    most = b"GET / HTTP/1.1\r\nHost: a\r\nX: %b\r\n\r\n"
    room = MAX_HEAD - len(most) + 2
    assert len(read(most % (b"x" * room)).headers.get("x") or "") == room
    assert refusal(most % (b"x" * (room + 1))).status == 431
    assert refusal(b"x" * MAX_HEAD).status == 431


@pytest.mark.parametrize(
    ("raw", "status"),
    [
        (b"\r\n\r\n", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
        (b"GET / HTTP/0.9\r\nHost: a\r\n\r\n", 505),
        (b"GET http://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /%ff HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /%00 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /%0a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /a/../b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /a/%2e%2e%2fb HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /?x=%ff HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET /?" + b"x&" * 65 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer a\r\nAuthorization: Bearer b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nOrigin: a\r\nOrigin: b\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1, 2\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: \x0bchunked\r\n\r\n", 400),
        (b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
    ],
)
def test_what_is_no_request_or_could_be_two_is_refused(raw: bytes, status: int) -> None:
    assert refusal(raw).status == status


@pytest.mark.parametrize(
    ("host", "name"),
    [("Lab", "lab"), ("lab:80", "lab"), ("127.0.0.1:1", "127.0.0.1"), ("[::1]:80", "::1"), ("[::1]", "::1")],
)
def test_a_host_header_names_a_host(host: str, name: str) -> None:
    assert host_name(host) == name


def test_headers_are_found_in_any_case() -> None:
    assert Headers([("Content-Type", "a")]).get("content-TYPE") == "a"
