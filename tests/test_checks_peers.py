"""A peer that is good, slow, silent or refuses: the check names the step that failed, and leaves nothing behind."""

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import trio
from trio.testing import MockClock

from agent.checks import peers
from agent.checks.subject import Finding, Subject
from agent.core import tls
from agent.coverage.settings import CoverageSettings
from agent.eman.settings import EmanSettings
from agent.lab.server import Lab, serve_lab
from agent.mimir.settings import MimirSettings
from agent.polarize.settings import CibusSettings, PolarizeSettings
from agent.seneschal.settings import SeneschalSettings
from agent.settings import Settings, StateSettings
from tests.certificates import Issued, authority, issue
from tests.stomp_broker import CONNECTED

Serve = Callable[[trio.abc.Stream], Awaitable[None]]


@pytest.fixture(autouse=True)
def no_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine may be slow, and the peers are good."""
    monkeypatch.setattr(peers, "STEP_S", 60.0)
    monkeypatch.setattr(peers, "SLOW_S", 60.0)


def subject(folder: Path, **tables: Any) -> Subject:
    return Subject(settings=Settings(state=StateSettings(dir=str(folder)), **tables))


@asynccontextmanager
async def peer(serve: Serve, context: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A server on loopback; each connection is served by `serve`."""

    async def handle(tcp: trio.SocketStream) -> None:
        stream: trio.abc.Stream = tcp
        if context is not None:
            stream = trio.SSLStream(tcp, context, server_side=True, https_compatible=True)
        try:
            await serve(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return
        finally:
            await trio.aclose_forcefully(stream)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, handle, 0, host="127.0.0.1"))
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


def answers(data: bytes) -> Serve:
    async def serve(stream: trio.abc.Stream) -> None:
        await stream.receive_some()
        await stream.send_all(data)

    return serve


async def is_silent(stream: trio.abc.Stream) -> None:
    await trio.sleep_forever()


async def mimir(folder: Path, port: int, scheme: str = "ws", **more: str) -> Finding:
    settings = MimirSettings(url=f"{scheme}://127.0.0.1:{port}/mimir", **more)
    return await peers.mimir(subject(folder, mimir=settings))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("certificates")


@pytest.fixture(scope="module")
def ca(folder: Path) -> Issued:
    return authority(folder)


@pytest.fixture(scope="module")
def served(ca: Issued, folder: Path) -> ssl.SSLContext:
    issued = issue(ca, folder, "server")
    return tls.server_context(issued.cert, issued.key)


async def test_what_is_not_configured_is_not_used(tmp_path: Path) -> None:
    for check in (peers.seneschal, peers.mimir, peers.polarize, peers.cibus, peers.eman, peers.coverage):
        assert await check(subject(tmp_path)) == ("ok", "not used", "", {})
    assert peers.tls_roots(subject(tmp_path)).detail == "not used"


async def test_the_lab_is_good_with_its_token_and_fails_without(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        lab: Lab = await nursery.start(serve_lab, "127.0.0.1:0", tmp_path / "lab")
        ws = lab.url.replace("http", "ws", 1)
        (tmp_path / "wrong").write_text("not-the-token")
        (tmp_path / "wrong").chmod(0o600)

        def asked(token: Path) -> Subject:
            return subject(
                tmp_path,
                seneschal=SeneschalSettings(url=f"{ws}/seneschal", token_file=str(token)),
                mimir=MimirSettings(url=f"{ws}/mimir", token_file=str(token)),
                polarize=PolarizeSettings(url=lab.url),
            )

        good = asked(lab.token_file)
        for check in (peers.seneschal, peers.mimir, peers.polarize):
            found = await check(good)
            assert found.status in ("ok", "warn"), found
            assert list(found.data["steps_ms"]) == ["name", "connect", "hello"]
        found = await peers.seneschal(asked(tmp_path / "wrong"))
        assert (found.status, found.data["failed"]) == ("fail", "token")
        found = await peers.mimir(asked(tmp_path / "none"))
        assert (found.status, found.detail) == ("fail", f"token: {tmp_path}/none: No such file or directory")
        nursery.cancel_scope.cancel()


async def test_a_name_that_does_not_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def unknown(*_: object, **__: object) -> list[Any]:
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr(trio.socket, "getaddrinfo", unknown)
    found = await mimir(tmp_path, 1)
    assert (found.status, found.data["failed"]) == ("fail", "name")


async def test_a_port_on_which_nobody_listens(tmp_path: Path) -> None:
    async with peer(is_silent) as port:
        pass
    found = await mimir(tmp_path, port)
    assert (found.status, found.detail) == ("fail", f"connect: 127.0.0.1:{port}: Connection refused")


async def test_a_peer_that_never_answers_holds_the_check_for_two_seconds(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    async def refuses_to_connect(*_: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(peers, "STEP_S", 2.0)
    walk = peers._Walk(urlsplit("ws://127.0.0.1:1/"), tls.TlsSettings(), refuses_to_connect)
    with pytest.raises(trio.TooSlowError):
        await walk._take("hello", refuses_to_connect)
    assert trio.current_time() == pytest.approx(peers.STEP_S)
    assert walk.data["steps_ms"] == {"hello": 1000 * peers.STEP_S}


async def test_a_peer_that_takes_the_connection_and_says_nothing(tmp_path: Path, autojump_clock: MockClock) -> None:
    autojump_clock.autojump_threshold = 0.02  # what is on its way through the loopback is no silence
    async with peer(is_silent) as port:
        found = await mimir(tmp_path, port)
    assert (found.status, found.detail) == ("fail", f"hello: 127.0.0.1:{port}: no answer within 60 s")


@pytest.mark.parametrize(
    ("answer", "step", "said"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "hello", "answered with status 404"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "hello", "answered with status 200"),
        (b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n", "token", "refused with status 401"),
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", "token", "refused with status 403"),
        (b"220 mail.example ESMTP\r\n", "hello", ""),
        (b"", "hello", "closed without an answer"),
    ],
)
async def test_what_is_no_websocket(tmp_path: Path, answer: bytes, step: str, said: str) -> None:
    async with peer(answers(answer)) as port:
        found = await mimir(tmp_path, port)
    assert (found.status, found.data["failed"]) == ("fail", step)
    assert said in found.detail


async def test_a_slow_peer_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "SLOW_S", 0.0)
    async with peer(answers(b"HTTP/1.1 200 OK\r\n\r\n")) as port:
        found = await peers.polarize(subject(tmp_path, polarize=PolarizeSettings(url=f"http://127.0.0.1:{port}")))
    assert (found.status, found.remedy) == ("warn", "Look at the network.")


# ---- TLS -------------------------------------------------------------------------------------------------------------


async def test_a_certificate_that_soon_ends_is_a_warning(
    tmp_path: Path, ca: Issued, served: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    ok = answers(b"HTTP/1.1 200 OK\r\n\r\n")
    async with peer(ok, served) as port:
        settings = PolarizeSettings(url=f"https://127.0.0.1:{port}", ca_file=str(ca.cert))
        found = await peers.polarize(subject(tmp_path, polarize=settings))
        assert (found.status, found.detail) == ("warn", "its certificate ends in 1 days")
        assert list(found.data["steps_ms"]) == ["name", "connect", "TLS", "hello"]
        monkeypatch.setattr(peers, "SOON_S", 0.0)
        assert (await peers.polarize(subject(tmp_path, polarize=settings))).status == "ok"


async def test_a_certificate_of_an_unknown_authority_fails_at_tls(
    tmp_path: Path, folder: Path, served: ssl.SSLContext
) -> None:
    other = authority(folder, "other")
    async with peer(answers(b""), served) as port:
        found = await mimir(tmp_path, port, "wss", ca_file=str(other.cert))
    assert (found.status, found.data["failed"]) == ("fail", "TLS")
    assert "CERTIFICATE_VERIFY_FAILED" in found.detail


async def test_a_peer_without_tls_fails_at_tls(tmp_path: Path, ca: Issued) -> None:
    async with peer(answers(b"HTTP/1.1 400 Bad Request\r\n\r\n")) as port:
        found = await mimir(tmp_path, port, "wss", ca_file=str(ca.cert))
    assert (found.status, found.data["failed"]) == ("fail", "TLS")


def test_roots_that_are_missing_or_broken_fail_where_tls_is_used(
    tmp_path: Path, ca: Issued, monkeypatch: pytest.MonkeyPatch
) -> None:
    secure = MimirSettings(url="wss://mimir.example/mimir")
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    monkeypatch.setattr(tls, "SYSTEM_ROOTS", ())
    found = peers.tls_roots(subject(tmp_path, mimir=secure))
    assert found.status == "fail"
    assert found.detail.startswith("mimir: no trusted certificates")
    monkeypatch.setenv("SSL_CERT_FILE", str(ca.cert))
    assert peers.tls_roots(subject(tmp_path, mimir=secure)).detail == str(ca.cert)
    (tmp_path / "broken.pem").write_text("x")
    broken = CibusSettings(url="stomp+ssl://bus:61612", ca_file=str(tmp_path / "broken.pem"))
    assert peers.tls_roots(subject(tmp_path, cibus=broken)).status == "fail"


# ---- the CI Bus and Polarion -----------------------------------------------------------------------------------------


@pytest.fixture
def password(tmp_path: Path) -> str:
    (tmp_path / "password").write_text("sesame")
    (tmp_path / "password").chmod(0o600)
    return str(tmp_path / "password")


@pytest.mark.parametrize(
    ("answer", "status", "detail"),
    [
        (CONNECTED, "ok", "127.0.0.1:"),
        (b"ERROR\nmessage:User name or password is invalid.\n\n\0", "fail", "token: 127.0.0.1:"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n\0", "fail", "hello: 127.0.0.1:"),
    ],
)
async def test_the_broker_is_greeted_under_a_name_of_its_own(
    tmp_path: Path, password: str, answer: bytes, status: str, detail: str
) -> None:
    heard: list[bytes] = []

    async def serve(stream: trio.abc.Stream) -> None:
        heard.append(bytes(await stream.receive_some()))
        await stream.send_all(answer)
        while data := await stream.receive_some():
            heard.append(bytes(data))

    async with peer(serve) as port:
        settings = CibusSettings(url=f"stomp://127.0.0.1:{port}", login="emissary", password_file=password)
        found = await peers.cibus(subject(tmp_path, cibus=settings))
        assert (found.status, found.detail[: len(detail)]) == (status, detail)
    said = b"".join(heard)
    assert b"login:emissary\npasscode:sesame\n" in said
    assert b"client-id:emissary-selftest-" in said
    assert b"SUBSCRIBE" not in said


@pytest.mark.parametrize(("status", "finding"), [(302, "ok"), (404, "ok"), (503, "fail"), (401, "fail")])
async def test_polarion_is_asked_for_nothing_with_its_user(
    tmp_path: Path, password: str, status: int, finding: str
) -> None:
    heard: list[bytes] = []

    async def serve(stream: trio.abc.Stream) -> None:
        heard.append(bytes(await stream.receive_some()))
        await stream.send_all(b"HTTP/1.1 %d x\r\nContent-Length: 0\r\n\r\n" % status)

    async with peer(serve) as port:
        settings = PolarizeSettings(
            mode="polarion", url=f"http://127.0.0.1:{port}/polarion", user="u", password_file=password
        )
        assert (await peers.polarize(subject(tmp_path, polarize=settings))).status == finding
    assert heard[0].startswith(b"HEAD /polarion HTTP/1.1\r\n")
    assert b"authorization: basic dtpzzxnhbwu=\r\n" in heard[0].lower()


async def test_a_password_that_cannot_be_read_fails_before_the_peer_is_asked(tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    bus = CibusSettings(url="stomp://127.0.0.1:1", login="u", password_file=missing)
    assert (await peers.cibus(subject(tmp_path, cibus=bus))).detail.startswith("token: ")
    polarion = PolarizeSettings(mode="polarion", url="http://127.0.0.1:1", user="u", password_file=missing)
    assert (await peers.polarize(subject(tmp_path, polarize=polarion))).detail.startswith("token: ")
    url = "http://127.0.0.1:1"
    for eman in (EmanSettings(url=url, salt_file=missing), EmanSettings(url=url, key_file=missing)):
        assert (await peers.eman(subject(tmp_path, eman=eman))).detail.startswith("token: ")


async def test_polarize_by_websocket_is_upgraded_where_it_takes_reports(tmp_path: Path) -> None:
    heard: list[bytes] = []

    async def serve(stream: trio.abc.Stream) -> None:
        heard.append(bytes(await stream.receive_some()))

    async with peer(serve) as port:
        settings = PolarizeSettings(mode="polarize-ws", url=f"http://127.0.0.1:{port}/base/")
        assert (await peers.polarize(subject(tmp_path, polarize=settings))).status == "fail"
    assert heard[0].startswith(b"GET /base/ws/xunit/import HTTP/1.1\r\n")


async def test_the_eman_hub_is_upgraded_and_not_joined(tmp_path: Path) -> None:
    heard: list[bytes] = []

    async def serve(stream: trio.abc.Stream) -> None:
        heard.append(bytes(await stream.receive_some()))
        await stream.send_all(b"HTTP/1.1 403 Forbidden\r\n\r\n")

    async with peer(serve) as port:
        settings = EmanSettings(url=f"http://127.0.0.1:{port}/communication")
        found = await peers.eman(subject(tmp_path, eman=settings))
    assert (found.status, found.data["failed"]) == ("fail", "token")
    assert heard[0].startswith(b"GET /socket.io/?EIO=3&transport=websocket HTTP/1.1\r\n")


async def test_the_drill_admin_is_connected_to_and_sees_no_agent(tmp_path: Path) -> None:
    heard: list[bytes] = []

    async def listen(stream: trio.abc.Stream) -> None:
        heard.append(bytes(await stream.receive_some(100)))

    async with peer(listen) as port:
        settings = CoverageSettings(enabled=True, admin=f"ws://127.0.0.1:{port}")
        found = await peers.coverage(subject(tmp_path, coverage=settings))
    assert (found.status, list(found.data["steps_ms"])) == ("ok", ["name", "connect", "hello"])
    assert b"".join(heard) == b""
    gone = await peers.coverage(subject(tmp_path, coverage=settings))
    assert (gone.status, gone.data["failed"]) == ("fail", "connect")
