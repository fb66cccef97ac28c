"""Who may come to a layer's port, and when it is closed."""

import errno
import os
import socket
from pathlib import Path

import pytest
import trio
from trio_websocket import WebSocketConnection

from agent.core.errors import PeerRefused, PeerUnreachable
from agent.core.head import Head, Headers, HttpError
from agent.core.link import Dial, connect
from agent.core.metrics import Metrics
from agent.gator import port as ports_of_layers
from agent.gator.port import Gate, keep, user_of
from agent.gator.settings import GatorSettings
from tests.gator_tree import WITHIN_S

OWN = ("127.0.0.1", 1)


def head(path: str = "/", peer: str = "127.0.0.1", port: int = 40000, origin: str = "") -> Head:
    headers = Headers((("Origin", origin),) if origin else ())
    return Head("GET", path, path, {}, headers, peer, peer_port=port)


def proc(folder: Path, uid: int, state: str = "01", inode: int = 7) -> Path:
    title = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    line = "   0: {0}:9C40 {0}:1F90 {1} 00000000:00000000 00:00000000 00000000 {2:>5} 0 {3} 1\n"
    (folder / "tcp").write_text(title + line.format("0100007F", state, uid, inode))
    (folder / "tcp6").write_text(title + line.format("00000000000000000000000001000000", state, uid, inode))
    return folder


@pytest.mark.parametrize("peer", ["127.0.0.1", "::1"])
def test_on_loopback_only_our_user_and_root_come_in(tmp_path: Path, peer: str) -> None:
    own = (peer, 1)
    assert user_of((peer, 40000), own, proc(tmp_path, 4242)) == 4242
    with pytest.raises(HttpError, match="only the user of this layer"):
        Gate(None, own, proc(tmp_path, os.getuid() + 4242)).admit(head(peer=peer))
    for uid in (os.getuid(), 0):
        assert Gate(None, own, proc(tmp_path, uid)).admit(head(peer=peer)) == "open"


@pytest.mark.parametrize("origin", ["http://evil.example", "http://127.0.0.1:1", "null"])
def test_a_page_in_our_users_browser_does_not_come_in(tmp_path: Path, origin: str) -> None:
    """Any site could have the jobs stopped. It chooses its name, so that the Host may be the same."""
    with pytest.raises(HttpError, match="pages in a browser"):
        Gate(None, OWN, proc(tmp_path, os.getuid())).admit(head(origin=origin))


@pytest.mark.parametrize(("state", "inode"), [("04", 0), ("05", 0), ("06", 0), ("01", 0), ("05", 7)])
def test_an_end_that_is_closed_is_nobodys_though_the_kernel_calls_it_roots(
    tmp_path: Path, state: str, inode: int
) -> None:
    with pytest.raises(HttpError, match="403"):
        Gate(None, OWN, proc(tmp_path, 0, state, inode)).admit(head())


def test_a_peer_that_cannot_be_found_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HttpError, match="403"):
        Gate(None, OWN, proc(tmp_path, 0)).admit(head(port=1))
    with pytest.raises(HttpError, match="403"):
        Gate(None, OWN, tmp_path / "none").admit(head())


@pytest.mark.parametrize("by", ["netlink", "proc"])
@pytest.mark.parametrize("peer", ["127.0.0.1", "::1", "::ffff:127.0.0.1"])
def test_a_real_connection_is_found_in_the_kernels_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, peer: str, by: str
) -> None:
    if ":" in peer and not Path("/proc/net/tcp6").exists():
        pytest.skip("this machine has no IPv6")
    files = Path("/proc/net")
    if by == "netlink":
        files = tmp_path
    else:
        monkeypatch.setattr(ports_of_layers, "NETLINK_SOCK_DIAG", 99)  # as where the kernel has none
    family, host = (socket.AF_INET6, "::1") if peer == "::1" else (socket.AF_INET, "127.0.0.1")
    with socket.create_server((host, 0), family=family) as server:
        own: tuple[str, int] = server.getsockname()[:2]
        client = socket.socket(socket.AF_INET6 if ":" in peer else family)
        client.connect((peer, own[1]))
        end = host, client.getsockname()[1]
        accepted, _ = server.accept()
        assert user_of(end, own, files) == os.getuid()
        assert user_of(end, ("0.0.0.0", own[1]), files) == os.getuid()  # where all addresses are listened at
        client.close()
        assert user_of(end, own, files) is None
        accepted.close()
        assert user_of(end, own, files) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes sockets of another user")
@pytest.mark.parametrize("by", ["netlink", "proc"])
def test_it_is_the_peers_end_whose_user_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    if by == "proc":
        monkeypatch.setattr(ports_of_layers, "NETLINK_SOCK_DIAG", 99)
    with socket.create_server(("127.0.0.1", 0)) as server:
        os.seteuid(4242)
        try:
            client = socket.socket()
        finally:
            os.seteuid(0)
        with client:
            client.connect(server.getsockname())
            files = tmp_path if by == "netlink" else Path("/proc/net")
            assert user_of(client.getsockname(), server.getsockname(), files) == 4242


@pytest.mark.parametrize("path", ["/", "/t/", "/t/wrong", "/t/secret/x", "/secret"])
def test_a_wrong_path_is_refused_where_one_is_needed(path: str) -> None:
    with pytest.raises(HttpError, match="403: this address ends in a path"):
        Gate("secret", OWN).admit(head(path, peer="192.0.2.1"))
    assert Gate("secret", OWN).admit(head("/t/secret", peer="192.0.2.1")) == "open"


async def opened(ws: WebSocketConnection) -> None:
    await trio.sleep_forever()


async def test_a_port_for_others_has_a_secret_path_and_one_on_loopback_none() -> None:
    async with trio.open_nursery() as nursery:

        async def start(host: str, path_secret: bool) -> str:
            ports = keep(nursery, GatorSettings(listen=host, path_secret=path_secret), Metrics())
            return (await ports.open(opened)).address

        local = await start("127.0.0.1", True)
        assert "/" not in local
        public = await start("0.0.0.0", True)
        name, _, secret = public.partition("/t/")
        assert len(secret) >= 22  # 128 bits in base64
        port = name.rpartition(":")[2]
        async with connect(Dial(url=f"ws://127.0.0.1:{port}/t/{secret}")):
            pass
        with pytest.raises(PeerRefused, match="403"):
            async with connect(Dial(url=f"ws://127.0.0.1:{port}/")):
                pass
        open_to_all = await start("0.0.0.0", False)
        assert "/" not in open_to_all
        nursery.cancel_scope.cancel()


async def test_behind_its_block_a_port_is_closed_and_so_are_its_connections() -> None:
    served, ended = trio.Event(), trio.Event()

    async def connected(ws: WebSocketConnection) -> None:
        served.set()
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with trio.open_nursery() as nursery:
        ports = keep(nursery, GatorSettings(), Metrics())
        with await ports.open(opened) as other:
            with await ports.open(connected) as port:
                async with connect(Dial(url=f"ws://{port.address}/")):
                    await served.wait()
            with trio.fail_after(WITHIN_S):
                await ended.wait()
            with pytest.raises(PeerUnreachable):
                async with connect(Dial(url=f"ws://{port.address}/")):
                    pass
            async with connect(Dial(url=f"ws://{other.address}/")):
                pass
        nursery.cancel_scope.cancel()


async def test_where_no_descriptor_is_free_a_connection_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports_of_layers, "ACCEPT_AGAIN_S", 0.01)
    failures = 3
    async with trio.open_nursery() as nursery:
        ports = keep(nursery, GatorSettings(), Metrics())
        listening = await ports.open(opened)
        real = listening.listener

        class Listener:
            def accept(self) -> object:
                nonlocal failures
                failures -= 1
                if failures >= 0:
                    raise OSError(errno.EMFILE, "too many open files")
                return real.accept()

            def __getattr__(self, name: str) -> object:
                return getattr(real, name)

        listening.listener = Listener()  # type: ignore[assignment]
        async with connect(Dial(url=f"ws://{listening.address}/")):
            assert failures < 0
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("host", ["203.0.113.7", "not a name"])
async def test_an_address_that_is_not_ours_is_told_with_its_setting(host: str) -> None:
    async with trio.open_nursery() as nursery:
        ports = keep(nursery, GatorSettings(listen=host), Metrics())
        with pytest.raises(OSError, match=rf"gator\.listen: .*: '{host}'"):
            await ports.open(opened)
        nursery.cancel_scope.cancel()
