"""The outgoing link: what one connection ends in, and how it is tried again. Servers are streams on loopback."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import pytest
import trio
from trio.testing import MockClock
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_server_stream

from agent.core.channel import Channel, ungrouped
from agent.core.envelope import Request
from agent.core.errors import ActionError, PeerBrokeProtocol, PeerError, PeerRefused, PeerUnreachable
from agent.core.events import Alert, AlertCleared, LinkChanged
from agent.core.link import MAX_ANSWER, Dial, connect, keep, redial
from agent.core.metrics import Metrics
from agent.core.tls import TlsSettings, TlsUnusable, server_context
from agent.core.token import TokenUnusable
from tests.certificates import Issued, authority, issue
from tests.raw_websocket import pings_at_the_close

Serve = Callable[[trio.abc.Stream], Awaitable[None]]


@pytest.fixture
def clock() -> MockClock:
    """Jumps when nothing has happened for 20 ms: what is on its way through the loopback is no silence."""
    return MockClock(autojump_threshold=0.02)


@asynccontextmanager
async def server(serve: Serve, *, context: Any = None) -> AsyncIterator[int]:
    """A port where each connection is given to `serve`, then closed."""
    async with trio.open_nursery() as nursery:

        async def handle(stream: trio.abc.Stream) -> None:
            if context is not None:
                stream = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
            try:
                with ungrouped():
                    await serve(stream)
            except (trio.BrokenResourceError, ConnectionClosed):
                pass
            finally:
                await trio.aclose_forcefully(stream)

        (listener,) = await nursery.start(partial(trio.serve_tcp, handle, 0, host="127.0.0.1"))
        yield listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel()


def websocket(use: Callable[[WebSocketConnection], Awaitable[None]], seen: list[Any] | None = None) -> Serve:
    """Serve that opens a websocket; what its head said goes to `seen`."""

    async def serve(stream: trio.abc.Stream) -> None:
        async with trio.open_nursery() as nursery:
            request = await wrap_server_stream(nursery, stream)
            if seen is not None:
                seen.append((request.path, dict(request.headers)))
            ws = await request.accept()
            await use(ws)
            await ws.aclose()

    return serve


async def echo(ws: WebSocketConnection) -> None:
    while True:
        await ws.send_message(await ws.get_message())


def answering(raw: bytes) -> Serve:
    async def serve(stream: trio.abc.Stream) -> None:
        await stream.receive_some(4096)
        await stream.send_all(raw)

    return serve


async def failure(dial: Dial) -> PeerError:
    with pytest.raises(PeerError) as failed:
        async with connect(dial):
            raise AssertionError("it is connected")
    return failed.value


# ---- one connection ------------------------------------------------------------------------------------------------


async def test_a_connection_shows_its_token_and_headers(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("sesame\n")
    token.chmod(0o600)
    seen: list[Any] = []
    async with server(websocket(echo, seen)) as port:
        dial = Dial(f"ws://127.0.0.1:{port}/seneschal?a=b", token, headers=(("Drill-Group", "g1"),))
        async with connect(dial) as ws:
            await ws.send_message("hi")
            assert await ws.get_message() == "hi"
            assert ws.remote == f"127.0.0.1:{port}"
    ((path, headers),) = seen
    assert path == "/seneschal?a=b"
    assert headers[b"authorization"] == b"Bearer sesame"
    assert headers[b"drill-group"] == b"g1"


@pytest.mark.parametrize(
    ("answer", "kind", "text"),
    [
        (b"HTTP/1.1 401 No\r\nContent-Length: 9\r\n\r\nwho's it?", PeerRefused, "answered 401 .*: who's it?"),
        (b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n", PeerRefused, "answered 404 instead of opening a websocket"),
        (b"HTTP/1.1 301 No\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n", PeerRefused, "answered 301"),
        (b"HTTP/1.1 429 No\r\nContent-Length: 0\r\n\r\n", PeerUnreachable, "answered 429"),
        (b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n", PeerUnreachable, "answered 503"),
        (b"HTTP/1.1 401 No\r\nContent-Length: 9\r\n\r\nwho", PeerRefused, "answered 401 .*: who"),
        (b"HTTP/1.5 999 No\r\nContent-Length: 9\r\n\r\nwho", PeerUnreachable, "answered 999 .*: who"),
        (b"HTTP/1.0 403 No\r\n\r\nup to the end", PeerRefused, "answered 403 .*: up to the end"),
        (b"HTTP/1.1 503 N", PeerUnreachable, "answered 503 instead of opening a websocket"),
        (b"", PeerUnreachable, "closed the connection instead of opening a websocket"),
        (b"220 mail ready\r\n", PeerUnreachable, "closed the connection instead"),
        (b"220 mail ready\r\n\r\n", PeerBrokeProtocol, "answered what is no HTTP"),
        (b"HTTP/1.1 101 Go\r\nUpgrade: websocket\r\n\r\n", PeerBrokeProtocol, "answered what is no HTTP"),
        (b"HTTP/1.1 500 No\r\n\r\n" + b"x" * (MAX_ANSWER + 1), PeerUnreachable, "answered 500 .*: xxx"),
        (b"HTTP/1.1 101 Go\r\nX: " + b"x" * (MAX_ANSWER + 1), PeerBrokeProtocol, "answered what is no HTTP"),
        (b"x" * 3 * MAX_ANSWER, PeerBrokeProtocol, "answered what is no HTTP"),
    ],
)
async def test_what_does_not_open_a_websocket_is_told(answer: bytes, kind: type[PeerError], text: str) -> None:
    async with server(answering(answer)) as port:
        error = await failure(Dial(f"ws://127.0.0.1:{port}/"))
    assert isinstance(error, kind)
    with pytest.raises(kind, match=text):
        raise error


async def test_nobody_listens() -> None:
    async with server(echo_nothing) as port:
        pass
    with pytest.raises(PeerUnreachable, match=f"127.0.0.1:{port} cannot be reached: Connection refused"):
        raise await failure(Dial(f"ws://127.0.0.1:{port}/"))


async def echo_nothing(stream: trio.abc.Stream) -> None:
    await trio.sleep_forever()


@pytest.mark.parametrize("scheme", ["ws", "wss"])
async def test_a_server_that_says_nothing_is_given_ten_seconds(scheme: str, clock: MockClock) -> None:
    async with server(echo_nothing) as port:
        error = await failure(Dial(f"{scheme}://127.0.0.1:{port}/"))
        assert "was not connected within 10 s" in error.what
        assert trio.current_time() == pytest.approx(10, abs=0.1)


async def test_a_refusal_whose_body_does_not_come_is_told_after_ten_seconds(clock: MockClock) -> None:
    async def refuse(stream: trio.abc.Stream) -> None:
        await stream.send_all(b"HTTP/1.1 403 No\r\nContent-Length: 1000000\r\n\r\nno")
        await trio.sleep_forever()

    async with server(refuse) as port:
        error = await failure(Dial(f"ws://127.0.0.1:{port}/"))
    assert isinstance(error, PeerRefused)
    assert error.what == f"127.0.0.1:{port} answered 403 instead of opening a websocket: no"


@pytest.mark.parametrize(
    "url",
    [
        "http://h/",
        "ws:///x",
        "ws://h:port/",
        "ws://user@h/",
        "ws://h/#f",
        "ws://h/ü",
        "ws://h/a b",
        "ws://h:99999/",
        "ws://a..b/",
        "ws://.a/",
    ],
)
def test_what_is_no_websocket_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Dial(url)


async def test_a_ping_that_crosses_our_close_is_no_error(clock: MockClock) -> None:
    async with server(pings_at_the_close) as port, connect(Dial(f"ws://127.0.0.1:{port}/")) as ws:
        assert ws.closed is None


async def test_what_the_context_raises_leaves_it_alone() -> None:
    async with server(websocket(echo)) as port:
        with pytest.raises(KeyError, match="mine"):
            async with connect(Dial(f"ws://127.0.0.1:{port}/")):
                raise KeyError("mine")


# ---- TLS -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def ca(folder: Path) -> Issued:
    return authority(folder)


@pytest.fixture(scope="module")
def lab(ca: Issued, folder: Path) -> Issued:
    return issue(ca, folder, "lab")


async def test_tls_checks_certificate_and_name(ca: Issued, lab: Issued, folder: Path) -> None:
    async with server(websocket(echo), context=server_context(lab.cert, lab.key)) as port:
        trusted = TlsSettings(ca_file=ca.cert)
        async with connect(Dial(f"wss://127.0.0.1:{port}/", tls=trusted)) as ws:
            await ws.send_message("hi")
            assert await ws.get_message() == "hi"
        error = await failure(Dial(f"wss://localhost:{port}/", tls=trusted))
        assert isinstance(error, PeerRefused)
        assert f"the certificate of localhost:{port} does not hold: Hostname mismatch" in error.what
        stranger = TlsSettings(ca_file=authority(folder, "stranger").cert)
        error = await failure(Dial(f"wss://127.0.0.1:{port}/", tls=stranger))
        assert isinstance(error, PeerRefused)
        assert "unable to get local issuer certificate" in error.what
    async with server(answering(b"HTTP/1.1 400 plain\r\n\r\n")) as port:
        error = await failure(Dial(f"wss://127.0.0.1:{port}/", tls=trusted))
        assert isinstance(error, PeerUnreachable)
        assert "Look at port and scheme" in error.remedy


async def test_mutual_tls_shows_our_certificate(ca: Issued, lab: Issued, folder: Path) -> None:
    async with server(websocket(echo), context=server_context(lab.cert, lab.key, client_ca=ca.cert)) as port:
        us = issue(ca, folder, "us")
        async with connect(Dial(f"wss://127.0.0.1:{port}/", tls=TlsSettings(ca.cert, us.cert, us.key))) as ws:
            await ws.send_message("hi")
            assert await ws.get_message() == "hi"


async def test_files_of_ours_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    with pytest.raises(TokenUnusable):
        async with connect(Dial("ws://127.0.0.1:1/", token_file=tmp_path / "absent")):
            pass
    with pytest.raises(TlsUnusable):
        async with connect(Dial("wss://127.0.0.1:1/", tls=TlsSettings(tmp_path / "absent"))):
            pass


# ---- again and again -----------------------------------------------------------------------------------------------


class Dice(Random):
    """Gives the upper end, and remembers it."""

    def __init__(self) -> None:
        super().__init__(0)
        self.rolled: list[float] = []

    def uniform(self, a: float, b: float) -> float:  # type: ignore[explicit-override]  # typing.override needs Python 3.12
        assert a == 0
        self.rolled.append(b)
        return b


class Told:
    """What a link published; `until` waits for something of it."""

    def __init__(self) -> None:
        self.events: list[LinkChanged | Alert | AlertCleared] = []
        self._came = trio.Event()

    def publish(self, event: LinkChanged | Alert | AlertCleared) -> None:
        self.events.append(event)
        self._came.set()
        self._came = trio.Event()

    async def until(self, what: Callable[[Any], bool], times: int = 1) -> None:
        while sum(map(what, self.events)) < times:
            await self._came.wait()

    @property
    def states(self) -> list[str]:
        return [event.state for event in self.events if isinstance(event, LinkChanged)]

    @property
    def alerts(self) -> list[Alert | AlertCleared]:
        return [event for event in self.events if not isinstance(event, LinkChanged)]


def is_state(state: str) -> Callable[[Any], bool]:
    return lambda event: isinstance(event, LinkChanged) and event.state == state


@asynccontextmanager
async def keeping(dial: Dial, talk: Callable[[Channel], Awaitable[None]]) -> AsyncIterator[tuple[Told, Dice]]:
    told, dice = Told(), Dice()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(
            partial(keep, "lab", dial, no_answers, talk, publish=told.publish, metrics=Metrics(), random=dice)
        )
        yield told, dice
        nursery.cancel_scope.cancel()


async def no_answers(request: Request) -> NoReturn:
    raise ActionError("unknown_action", "nothing is answered here")


async def register(channel: Channel) -> None:
    channel.state("registering")
    await channel.ask("register", {})
    channel.state("replaying")
    channel.state("ready")
    await trio.sleep_forever()


def registrar(*answers: dict[str, Any], then: int | None = None) -> Callable[[WebSocketConnection], Awaitable[None]]:
    """Answers each registration by the next of `answers`, the last for ever; then closes with a code, or stays."""
    left = list(answers)

    async def use(ws: WebSocketConnection) -> None:
        await ws.get_message()
        answer = left.pop(0) if len(left) > 1 else left[0]
        await ws.send_message(json.dumps({"rsp_id": 0} | answer))
        if answer["result"] == "success" and then is not None:
            await ws.aclose(then)
        await trio.sleep_forever()

    return use


GOOD = {"result": "success", "payload": {}}


async def test_a_link_goes_through_its_states_and_comes_back(clock: MockClock) -> None:
    async with (
        server(websocket(registrar(GOOD, then=1001))) as port,
        keeping(Dial(f"ws://127.0.0.1:{port}/"), register) as (told, _),
    ):
        await told.until(is_state("ready"), times=2)
    one = ["connecting", "registering", "replaying", "ready", "offline"]
    assert told.states[:9] == [*one, *one[:4]]
    offline = next(event for event in told.events if is_state("offline")(event))
    assert isinstance(offline, LinkChanged)
    assert offline.error == "closed: 1001 GOING_AWAY"
    assert told.alerts == []


async def test_retries_wait_with_full_jitter_doubling_to_30_s(clock: MockClock) -> None:
    async with server(echo_nothing) as port:
        pass
    async with keeping(Dial(f"ws://127.0.0.1:{port}/"), register) as (told, dice):
        await told.until(is_state("connecting"), times=9)
    assert dice.rolled[:8] == [0.5, 1, 2, 4, 8, 16, 30, 30]


async def test_a_minute_of_connection_makes_the_next_retry_quick_again(clock: MockClock) -> None:
    lasts = iter([0.1, 0.1, 61, 0.1])

    async def last(ws: WebSocketConnection, tell: Callable[[str], None]) -> None:
        await trio.sleep(next(lasts))

    told, dice = Told(), Dice()
    async with server(websocket(echo)) as port, trio.open_nursery() as nursery:
        dial = Dial(f"ws://127.0.0.1:{port}/")
        nursery.start_soon(partial(redial, "lab", dial, last, publish=told.publish, random=dice))
        await told.until(is_state("connecting"), times=5)
        nursery.cancel_scope.cancel()
    assert dice.rolled == [0.5, 1, 0.5, 1]


@pytest.mark.parametrize("code", ["ident_taken", "unauthorized"])
async def test_a_refused_registration_is_loud_and_tried_again_after_30_s(code: str, clock: MockClock) -> None:
    refused = {"result": "error", "reason": f"{code}: no"}
    async with (
        server(websocket(registrar(refused, refused, GOOD))) as port,
        keeping(Dial(f"ws://127.0.0.1:{port}/"), register) as (told, dice),
    ):
        await told.until(is_state("ready"))
        assert trio.current_time() == pytest.approx(60, abs=0.5)
    assert dice.rolled == []
    alert, cleared = told.alerts
    assert isinstance(alert, Alert)
    assert (alert.code, alert.text) == ("link.lab", f"lab: 127.0.0.1:{port} refused register: {code}: no")
    assert cleared == AlertCleared(code="link.lab")


async def test_another_refusal_is_tried_again_like_a_failure(clock: MockClock) -> None:
    async with (
        server(websocket(registrar({"result": "error", "reason": "internal: later"}, GOOD))) as port,
        keeping(Dial(f"ws://127.0.0.1:{port}/"), register) as (told, dice),
    ):
        await told.until(is_state("ready"))
    assert dice.rolled == [0.5]
    assert told.alerts == []


async def test_an_answer_that_does_not_come_takes_the_link_offline(clock: MockClock) -> None:
    async with (
        server(websocket(echo_nothing_back)) as port,
        keeping(Dial(f"ws://127.0.0.1:{port}/"), register) as (told, _),
    ):
        await told.until(is_state("offline"))
        assert trio.current_time() == pytest.approx(10, abs=0.5)
    offline = told.events[-1]
    assert isinstance(offline, LinkChanged)
    assert offline.error == f"127.0.0.1:{port} did not answer register within 10 s"


async def echo_nothing_back(ws: WebSocketConnection) -> None:
    await trio.sleep_forever()


async def test_to_be_superseded_is_loud(clock: MockClock) -> None:
    async with (
        server(websocket(registrar(GOOD, then=4001))) as port,
        keeping(Dial(f"ws://127.0.0.1:{port}/"), register) as (told, dice),
    ):
        await told.until(is_state("ready"), times=2)
        assert trio.current_time() == pytest.approx(30, abs=0.5)
    assert dice.rolled == []
    alert = told.alerts[0]
    assert isinstance(alert, Alert)
    assert alert.remedy == "Give each machine its own ident and state.dir."


async def test_a_minute_without_connection_is_loud_once(clock: MockClock) -> None:
    async with server(echo_nothing) as port:
        pass
    async with keeping(Dial(f"ws://127.0.0.1:{port}/"), register) as (told, _):
        await told.until(lambda event: isinstance(event, Alert))
        assert 60 <= trio.current_time() < 120
        await trio.sleep(600)
        (alert,) = told.alerts
    assert isinstance(alert, Alert)
    assert alert.text == f"lab: 127.0.0.1:{port} cannot be reached: Connection refused"


async def test_a_link_that_is_given_up_is_offline_and_its_alert_is_over(clock: MockClock) -> None:
    refused = {"result": "error", "reason": "unauthorized: no"}

    async def fail(ws: WebSocketConnection, tell: Callable[[str], None]) -> None:
        tell("ready")
        raise KeyError("a bug of ours")

    told = Told()
    async with server(websocket(echo)) as port:
        with pytest.raises(KeyError):
            await redial("lab", Dial(f"ws://127.0.0.1:{port}/"), fail, publish=told.publish, random=Dice())
    assert told.states == ["connecting", "ready", "offline"]
    async with (
        server(websocket(registrar(refused))) as port,
        keeping(Dial(f"ws://127.0.0.1:{port}/"), register) as (told, _),
    ):
        await told.until(lambda event: isinstance(event, Alert))
    assert told.alerts[1:] == [AlertCleared(code="link.lab")]


async def test_the_token_is_read_at_every_connect(tmp_path: Path, clock: MockClock) -> None:
    token = tmp_path / "token"
    seen: list[Any] = []
    async with (
        server(websocket(registrar(GOOD, then=1000), seen)) as port,
        keeping(Dial(f"ws://127.0.0.1:{port}/", token), register) as (told, _),
    ):
        await told.until(lambda event: isinstance(event, Alert))
        token.write_text("first")
        token.chmod(0o600)
        await told.until(is_state("ready"))
        token.write_text("second")
        await told.until(is_state("ready"), times=2)
    assert [headers[b"authorization"] for _, headers in seen[:2]] == [b"Bearer first", b"Bearer second"]
    alert = told.alerts[0]
    assert isinstance(alert, Alert)
    assert alert.text == f"lab: {token}: No such file or directory"


async def test_a_token_that_goes_out_without_tls_is_warned_of(
    tmp_path: Path, clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    for host, warned in (("192.0.2.1", True), ("127.0.0.1", False)):
        caplog.clear()
        async with keeping(Dial(f"ws://{host}:1/", tmp_path / "absent"), register) as (told, _):
            await told.until(is_state("offline"))
        assert ("link=lab sends its token without TLS" in caplog.text) == warned


async def test_a_bug_in_the_talk_leaves_the_link(clock: MockClock) -> None:
    async def talk(channel: Channel) -> None:
        raise KeyError("a bug")

    async with server(websocket(echo_nothing_back)) as port:
        with pytest.raises(KeyError, match="a bug"), ungrouped():
            async with keeping(Dial(f"ws://127.0.0.1:{port}/"), talk):
                await trio.sleep_forever()
