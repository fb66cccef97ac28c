"""Who may come to a layer's port."""

import os
import socket
from pathlib import Path

import pytest
import trio
from trio_websocket import WebSocketConnection

from agent.core.errors import PeerRefused
from agent.core.head import Head, Headers, HttpError
from agent.core.link import Dial, connect
from agent.core.metrics import Metrics
from agent.gator.port import Gate, serve_layer, user_of


def head(path: str = "/", peer: str = "127.0.0.1", port: int = 40000) -> Head:
    return Head("GET", path, path, {}, Headers(()), peer, peer_port=port)


def proc(folder: Path, uid: int) -> Path:
    title = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
    line = "   0: {}:9C40 {}:1F90 01 00000000:00000000 00:00000000 00000000 {:>5} 0 1 1\n"
    (folder / "tcp").write_text(title + line.format("0100007F", "0100007F", uid))
    loopback = "00000000000000000000000001000000"
    (folder / "tcp6").write_text(title + line.format(loopback, loopback, uid))
    return folder


@pytest.mark.parametrize("peer", ["127.0.0.1", "::1"])
def test_on_loopback_only_our_user_and_root_come_in(tmp_path: Path, peer: str) -> None:
    assert user_of(peer, 40000, proc(tmp_path, 4242)) == 4242
    with pytest.raises(HttpError, match="only the user of this layer"):
        Gate(None, proc(tmp_path, os.getuid() + 4242)).admit(head(peer=peer))
    for uid in (os.getuid(), 0):
        assert Gate(None, proc(tmp_path, uid)).admit(head(peer=peer)) == "open"


def test_a_peer_that_cannot_be_found_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HttpError, match="403"):
        Gate(None, proc(tmp_path, 0)).admit(head(port=1))
    with pytest.raises(HttpError, match="403"):
        Gate(None, tmp_path / "none").admit(head())


def test_a_real_connection_is_found_in_the_kernels_table() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert user_of("127.0.0.1", client.getsockname()[1]) == os.getuid()


@pytest.mark.parametrize("path", ["/", "/t/", "/t/wrong", "/t/secret/x", "/secret"])
def test_a_wrong_path_is_refused_where_one_is_needed(path: str) -> None:
    with pytest.raises(HttpError, match="403: this address ends in a path"):
        Gate("secret").admit(head(path, peer="192.0.2.1"))
    assert Gate("secret").admit(head("/t/secret", peer="192.0.2.1")) == "open"


async def opened(ws: WebSocketConnection) -> None:
    await trio.sleep_forever()


async def test_a_port_for_others_has_a_secret_path_and_one_on_loopback_none() -> None:
    async with trio.open_nursery() as nursery:

        async def start(host: str, path_secret: bool, *, task_status: trio.TaskStatus[str]) -> None:
            await serve_layer(host, path_secret, opened, children=1, metrics=Metrics(), task_status=task_status)

        local = await nursery.start(start, "127.0.0.1", True)
        assert "/" not in local
        public = await nursery.start(start, "0.0.0.0", True)
        name, _, secret = public.partition("/t/")
        assert len(secret) >= 22  # 128 bits in base64
        port = name.rpartition(":")[2]
        async with connect(Dial(url=f"ws://127.0.0.1:{port}/t/{secret}")):
            pass
        with pytest.raises(PeerRefused, match="403"):
            async with connect(Dial(url=f"ws://127.0.0.1:{port}/")):
                pass
        open_to_all = await nursery.start(start, "0.0.0.0", False)
        assert "/" not in open_to_all
        nursery.cancel_scope.cancel()
