"""What the control server takes from clients that do everything wrong, by its real sockets.

Each is refused as the sheet says, is told of once in the log, and costs nobody else anything: a bystander gets its
answers and its events all the while.

Source: issue 4, "Bad input"; protocols/emissary.md, "The envelope", "Auth, limits".
"""

import base64
import json
import logging
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock
from trio_websocket import ConnectionClosed, WebSocketConnection

from agent.control.settings import ControlSettings, ControlTls
from agent.core.errors import PeerError
from agent.core.events import Logged
from agent.core.link import Dial, connect
from agent.core.tls import TlsSettings, client_context
from tests.certificates import Issued, expire
from tests.control_house import LOOPBACK, Client, House, client, house
from tests.json_schema import check_frame

Line = trio.SocketStream | trio.SSLStream[trio.SocketStream]

LIMIT_S = 60.0
MASK = b"\0\0\0\0"  # a mask that leaves the frame readable


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[House]:
    async with house(tmp_path, tls=request.param) as built:
        yield built


@pytest.fixture
def clock() -> MockClock:
    """Runs as time does, until it is told to jump."""
    return MockClock(rate=1.0)


@pytest.fixture
def slow_clock() -> MockClock:
    """What happens within a minute has ten of them, as a slow machine may need."""
    return MockClock(rate=0.1)


@asynccontextmanager
async def bystander(server: House) -> AsyncIterator[Client]:
    """A client that was there before, and must be served after, what stands in the block."""
    async with client(server.dial()) as them:
        await them.ask("subscribe", {"kinds": ["Logged"]})
        await served(server, them)
        yield them
        await served(server, them)


async def served(server: House, them: Client) -> None:
    """It gets an answer, and an event."""
    count = len(them.events)
    assert (await them.ask("status", {}))["ident"] == "lab-07"
    server.publish(Logged(severity="INFO", message="for the bystander"))
    await them.told(count + 1)


async def later(seconds: int, clock: MockClock, server: House, them: Client) -> None:
    """So many seconds later; who answers pings has had the time to."""
    for _ in range(0, seconds, 5):
        clock.jump(5)
        await served(server, them)


async def wire(server: House) -> Line:
    """A connection without any protocol on it yet but TLS."""
    host, port = server.address.rsplit(":", 1)
    tcp = await trio.open_tcp_stream(host, int(port))
    if not server.tls.ca_file:
        return tcp
    return trio.SSLStream(tcp, client_context(server.tls), server_hostname=host, https_compatible=True)


async def heard(stream: Line) -> bytes:
    """All that comes until the other side closes."""
    got = bytearray()
    with trio.fail_after(LIMIT_S):
        while data := await stream.receive_some():
            got += data
    return bytes(got)


def statuses(got: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 ([1-5]\d\d) ", got)]


async def upgraded(stream: Line) -> None:
    """Open a websocket by hand."""
    key = base64.b64encode(b"0123456789abcdef").decode()
    head = (
        "GET / HTTP/1.1\r\nHost: lab\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        f"Sec-WebSocket-Key: {key}\r\nAuthorization: Bearer sesame\r\n\r\n"
    )
    await stream.send_all(head.encode())
    assert statuses(bytes(await stream.receive_some())) == [101]


async def closing(ws: WebSocketConnection) -> tuple[int, str | None]:
    """What is said until the close, and the close."""
    with trio.fail_after(LIMIT_S):
        try:
            while True:
                await ws.get_message()
        except ConnectionClosed:
            pass
    assert ws.closed is not None
    return ws.closed.code, ws.closed.reason


def lines(caplog: pytest.LogCaptureFixture, what: str) -> list[str]:
    """The lines at INFO and above that an operator reads of it."""
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.INFO and what in r.getMessage()]


def counted(server: House, name: str) -> float:
    return sum(value for found, _, value in server.metrics if found == name)


# ---- before anybody was let in -------------------------------------------------------------------------------------


async def test_heads_that_trickle_in_hold_every_place_for_ten_seconds_and_no_longer(
    tmp_path: Path, clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with house(tmp_path) as server, bystander(server) as them, AsyncExitStack() as stack:
        slow = [await wire(server) for _ in range(LOOPBACK.max_connections - 1)]
        for stream in slow:
            await stack.enter_async_context(stream)

        for byte in b"GET / HTTP/1.1\r\nX: y":
            for stream in slow:
                await stream.send_all(bytes([byte]))
        await later(5, clock, server, them)
        late = await wire(server)  # there is no place for it
        await stack.enter_async_context(late)
        await late.send_all(b"GET /healthz HTTP/1.1\r\nHost: lab\r\n\r\n")
        assert statuses(await heard(late)) == [503]
        for stream in slow:
            await stream.send_all(b"z")
        await later(10, clock, server, them)
        assert [statuses(await heard(stream)) for stream in slow] == [[408]] * len(slow)
        await later(5, clock, server, them)
        again = await wire(server)
        await stack.enter_async_context(again)
        await again.send_all(b"GET /healthz HTTP/1.1\r\nHost: lab\r\nConnection: close\r\n\r\n")
        assert statuses(await heard(again)) == [200]
    assert len(lines(caplog, "status=408")) == len(slow)
    assert len(lines(caplog, "too many connections")) == 1


SMUGGLED = b"GET /metrics HTTP/1.1\r\nHost: lab\r\nAuthorization: Bearer sesame\r\n\r\n"
SHAPES = {
    "length and chunks": b"Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and length": b"Transfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n0\r\n\r\n",
    "two lengths": b"Content-Length: 0\r\nContent-Length: 44\r\n\r\n",
    "a list of lengths": b"Content-Length: 0, 44\r\n\r\n",
    "a signed length": b"Content-Length: +0\r\n\r\n",
    "a length in hex": b"Content-Length: 0x0\r\n\r\n",
    "an unknown coding": b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "two codings": b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "two lines of codings": b"Transfer-Encoding: identity\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a coding behind a tab": b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
    "a space before the colon": b"Content-Length : 0\r\n\r\n",
    "a folded line": b"X: y\r\n Content-Length: 44\r\n\r\n",
    "a lone line feed": b"X: y\nContent-Length: 44\r\n\r\n",
    "a lone carriage return": b"X: y\rContent-Length: 44\r\n\r\n",
    "a NUL": b"X: y\0\r\n\r\n",
    "two hosts": b"Host: elsewhere\r\n\r\n",
    "chunks that end by line feeds": b"Transfer-Encoding: chunked\r\n\r\n0\n\n",
    "a chunk longer than it says": b"Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n",
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
async def test_what_two_readers_could_read_in_two_ways_is_refused_and_nothing_behind_it_is_read(
    server: House, shape: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with bystander(server), await wire(server) as stream:
        await stream.send_all(b"GET /healthz HTTP/1.1\r\nHost: lab\r\n" + shape + SMUGGLED)
        got = await heard(stream)
    (status,) = statuses(got)
    assert status in (400, 413, 501)
    assert b"Connection: close" in got
    assert b"emissary_" not in got
    assert len(lines(caplog, f"status={status}")) == 1


async def test_an_expired_certificate_is_told_so_and_does_not_come_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tls = ControlTls(cert="lab-07.pem", client_ca="ca.pem", names={"laptop": "control"})
    async with house(tmp_path, ControlSettings(listen=("127.0.0.1:0",), tls=tls), tls=True) as server:
        old = expire(Issued(tmp_path / "ca.pem", tmp_path / "ca.key"), tmp_path, "laptop")
        with pytest.raises(PeerError, match="CERTIFICATE_EXPIRED"):
            async with client(Dial(server.url, tls=TlsSettings(server.tls.ca_file, old.cert, old.key))) as them:
                await them.ask("status", {})
        assert counted(server, "http_tls_failures_total") == 1
    (line,) = lines(caplog, "TLS refused")
    assert "certificate has expired" in line


async def test_ten_thousand_wrong_tokens_are_slowed_to_five_a_minute_and_told_once(
    slow_clock: MockClock, server: House, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    count = 1000 if server.tls.ca_file else 10_000
    async with bystander(server), await wire(server) as stream, trio.open_nursery() as nursery:

        async def guess() -> None:
            head = b"GET /metrics HTTP/1.1\r\nHost: lab\r\nAuthorization: Bearer %d\r\n%b\r\n"
            for n in range(0, count, 100):
                await stream.send_all(b"".join(head % (n + more, b"") for more in range(99)))
                await stream.send_all(head % (n, b"Connection: close\r\n" if n == count - 100 else b""))

        nursery.start_soon(guess)
        told = statuses(await heard(stream))
        assert told == [401] * 5 + [429] * (count - 5)
        with pytest.raises(PeerError, match="answered 429"):  # nor is the right one heard now
            async with connect(server.dial()):
                pass
    refused = lines(caplog, "refused peer=127.0.0.1")
    assert len(refused) == 5
    assert refused[-1].endswith("nobody at 127.0.0.1 is let in for 60 s")
    assert counted(server, "http_refused_total") == count + 1


async def test_wrong_tokens_by_the_action_auth_are_slowed_and_told_once(
    server: House, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with bystander(server), connect(server.dial(None)) as ws:
        codes = []
        for n in range(500):
            await ws.send_message(json.dumps({"action": "auth", "req_id": n, "payload": {"token": f"guess {n}"}}))
            codes.append(json.loads(await ws.get_message())["reason"].partition(":")[0])
        assert codes == ["unauthorized"] * 5 + ["rate"] * 495
    assert len(lines(caplog, "refused peer=127.0.0.1 action='auth'")) == 2
    assert counted(server, "control_refused_total") == 500


async def test_before_a_token_is_shown_a_message_has_16_kib(server: House) -> None:
    """Of 1 MiB, decoded, one connection that takes no answers could have us keep a GiB."""
    large = json.dumps({"action": "log", "req_id": 1, "payload": {"message": "x" * 2**17}})
    async with bystander(server), connect(server.dial(None)) as ws:
        await ws.send_message(json.dumps({"action": "auth", "payload": {"token": "sesame"}}))
        assert json.loads(await ws.get_message())["result"] == "success"
        await ws.send_message(large)
        assert json.loads(await ws.get_message())["result"] == "success"
    async with bystander(server), connect(server.dial(None)) as ws:
        await ws.send_message(large)
        assert (await closing(ws))[0] == 1009


async def test_pages_of_others_are_refused_by_their_origin(server: House, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    foreign = ["http://evil.example", "null", server.http + ".evil.example", "file://", "http://127.0.0.1:1"]
    async with bystander(server):
        for origin in foreign:
            with pytest.raises(PeerError, match="answered 403"):
                async with connect(server.dial("sesame", origin=origin)):
                    pass
    assert len(lines(caplog, "status=403")) == len(foreign)


# ---- frames --------------------------------------------------------------------------------------------------------


async def test_a_message_over_1_mib_closes_with_1009(server: House) -> None:
    async with bystander(server), connect(server.dial(), max_message=2**22) as ws:
        whole = json.dumps({"action": "log", "req_id": 1, "payload": {"message": "x" * (2**20 - 100)}})
        await ws.send_message(whole)  # within the limit, and too long for what it is
        assert json.loads(await ws.get_message())["reason"].startswith("bad_payload: key message: ")
        await ws.send_message("x" * (2**20 + 1))
        assert (await closing(ws))[0] == 1009


@pytest.mark.parametrize("head", [b"\x81\xff" + (2**62).to_bytes(8), b"\x01\xff" + (2**20).to_bytes(8)])
async def test_a_frame_without_end_closes_with_1009(server: House, head: bytes) -> None:
    """One says that it has 4 EiB; the other is the first of many fragments."""
    async with bystander(server), await wire(server) as stream, trio.open_nursery() as nursery:
        await upgraded(stream)
        await stream.send_all(head + MASK)

        async def send() -> None:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                while True:
                    await stream.send_all(b"x" * 2**20 + (b"\0\xff" + (2**20).to_bytes(8) + MASK) * (head[0] == 1))

        nursery.start_soon(send)
        got = b""
        with trio.fail_after(LIMIT_S):
            while b"\x03\xf1" not in got:  # 1009
                got += await stream.receive_some()
        await stream.aclose()


FRAMES: dict[str, tuple[str | bytes, str]] = {
    "no JSON": ("{", "bad_json: not a JSON object"),
    "no object": ("[]", "bad_json: not a JSON object"),
    "nested too deeply": ("[" * 100_000, "bad_json: not a JSON object"),
    "binary": (b"{}", "bad_json: a binary frame"),
    "nothing": ("", "bad_json: not a JSON object"),
    "half a surrogate": ('{"action":"\\ud800"}', "bad_json: not a JSON object: \\ud800 is half of a character"),
    "an action that is no text": ('{"action":7,"req_id":1}', "bad_payload: action is a number, not text"),
    "a req_id that is none": ('{"action":"status","req_id":{}}', "bad_payload: req_id is an object"),
    "posted that is no boolean": ('{"action":"status","posted":1}', "bad_payload: posted is a number"),
    "a payload that is no object": ('{"action":"status","payload":[]}', "bad_payload: payload is a list"),
    "an unknown action": ('{"action":"shell","payload":{"cmd":"id"}}', "unknown_action: nothing here answers 'shell'"),
    "a wrong type": ('{"action":"subscribe","payload":{"kinds":"Log*"}}', "bad_payload: key kinds: Expected `array`"),
    "a missing key": ('{"action":"cancel","payload":{}}', "bad_payload: key run is missing"),
}


@pytest.mark.parametrize("what", FRAMES)
async def test_a_bad_frame_gets_its_error_and_the_connection_stays(
    server: House, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    sent, reason = FRAMES[what]
    async with bystander(server), connect(server.dial()) as ws:
        for _ in range(3):
            await ws.send_message(sent)
            answer = check_frame(str(await ws.get_message()))
            assert answer["result"] == "error"
            assert answer["reason"].startswith(reason)
        await ws.send_message('{"action":"identify"}')  # without req_id: it is 0
        assert (json.loads(await ws.get_message())["rsp_id"], ws.closed) == (0, None)
    assert len(lines(caplog, "unreadable frame")) <= 1


async def test_ten_unreadable_frames_in_a_row_close_with_1007_and_are_told_once(
    server: House, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with bystander(server), connect(server.dial()) as ws:
        for n in range(9):
            await ws.send_message("{" * (n + 1))
        await ws.send_message('{"action":"identify"}')  # one that is good: they are in a row no longer
        for n in range(10):
            await ws.send_message("{" * (n + 1))
        assert await closing(ws) == (1007, "too many unreadable frames")
    assert len(lines(caplog, "unreadable frame")) == 1
    assert counted(server, "link_bad_frames_total") == 19


# ---- silence -------------------------------------------------------------------------------------------------------


async def test_a_half_open_connection_is_noticed_after_40_s(tmp_path: Path, clock: MockClock) -> None:
    async with house(tmp_path) as server, bystander(server) as them, await wire(server) as stream:
        await upgraded(stream)
        await stream.send_all(_masked({"action": "subscribe"}))
        await later(35, clock, server, them)
        assert (await numbers(server))["control_clients"] == 2
        await later(15, clock, server, them)
        assert b'"sub":1' in await heard(stream)  # it took all, and answered no ping
        await trio.testing.wait_all_tasks_blocked()
        after = await numbers(server)
        assert (after["control_clients"], after["control_subscriptions"]) == (1, 1)


async def test_a_client_that_never_reads_is_given_up_and_no_client_waits_for_it(
    tmp_path: Path, clock: MockClock
) -> None:
    async with house(tmp_path) as server, bystander(server) as them, await wire(server) as stream:
        await upgraded(stream)
        await stream.send_all(_masked({"action": "subscribe"}))
        for _ in range(20):
            server.publish(*(Logged(severity="INFO", message="x" * 1000) for _ in range(500)))
            await served(server, them)
        await later(60, clock, server, them)
        assert (await numbers(server))["control_clients"] == 1


async def numbers(server: House) -> dict[str, Any]:
    return dict(await server.bus.ask("metrics", {}))


def _masked(message: dict[str, Any]) -> bytes:
    data = json.dumps(message).encode()
    assert len(data) < 126
    return b"\x81" + bytes([0x80 | len(data)]) + MASK + data
