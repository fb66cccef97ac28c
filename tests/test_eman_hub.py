"""The hub over real sockets: the example of the sheet, long-polling, who is turned away, who reads too slowly."""

import json
import re
import resource
import signal
import subprocess
import sys
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from agent.core.link import Dial, connect
from agent.eman.hub import HubUnsafe, authority
from agent.eman.messages import IAm
from agent.eman.settings import HubSettings, ServiceKey
from agent.eman.shake import md5_key
from tests.eman_hub import SALT, hub, peer

NS = "/communication,"


def websocket(url: str) -> AbstractAsyncContextManager[WebSocketConnection]:
    return connect(Dial(url=url))


def browser(url: str = "") -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=url, timeout=60)


async def test_the_example_of_the_sheet() -> None:
    async with hub() as address, peer(address) as one:
        opened = json.loads((await one.hear()).removeprefix("0"))
        assert (opened["upgrades"], opened["pingInterval"]) == ([], 25_000)
        assert re.fullmatch(r"[A-Za-z0-9_-]{20}", opened["sid"])
        assert await one.hear() == "40"
        await one.ws.send_message("40/communication")  # as 1.x writes it
        assert await one.hear() == f"40{NS}"
        assert await one.hear() == f'42{NS}["shake_who"]'
        await one.ws.send_message(f'42{NS}["shake_i_am",{{"name":"test","key":"{md5_key("test", SALT)}"}}]')
        said = re.fullmatch(
            r'42/communication,\["shake_id",\{"id":"(test\.\d{13}\.[0-9a-f]{16})"\}\]', await one.hear()
        )
        assert said is not None
        await one.ws.send_message(f'42{NS}["shake_ready",{{"id":"{said[1]}"}}]')
        assert await one.hear() == f'42{NS}["shake_online"]'
        await one.ws.send_message(f'42{NS}7["_service:api:request:subscribe",{{"name":"post"}}]')
        assert await one.hear() == f"43{NS}7[]"
        await one.ws.send_message("2")
        assert await one.hear() == "3"
        await one.ws.send_message(f"41{NS}")
        with pytest.raises(ConnectionClosed):
            await one.hear()


async def test_the_namespace_without_a_name_is_there_and_who_leaves_it_leaves() -> None:
    async with hub() as address, peer(address, "other") as other, peer(address, "one", "post") as one:
        await one.ws.send_message("40")
        await other.ask("post")
        assert (await one.event())[0] == "post"
        await one.ws.send_message("41")
        await one.until_closed()
        assert (await other.event())[1]["error"]["code"] == "listener_gone"


async def test_protocol_4_over_a_websocket() -> None:
    async with hub() as address, websocket(f"ws://{address}/socket.io/?EIO=4&transport=websocket") as ws:
        opened = json.loads((await ws.get_message())[1:])
        assert opened["maxPayload"] == 1_000_000
        await ws.send_message(f"40{NS}")
        assert await ws.get_message() == f'40{NS}{{"sid":"{opened["sid"]}"}}'
        assert await ws.get_message() == f'42{NS}["shake_who"]'
        await ws.send_message("40/other,")
        assert await ws.get_message() == '44/other,{"message":"Invalid namespace"}'


async def test_what_services_may_do_to_each_other() -> None:
    async with hub() as address, peer(address, "worker", "post") as worker, peer(address, "asker") as asker:
        await asker.ask("post", data={"text": "é😀"})
        event, request = await worker.event()
        assert (event, request["sender_id"], request["data"]) == ("post", asker.id, {"text": "é😀"})
        await worker.emit("api:response", request | {"recipient_id": "x", "data": "done"})
        event, response = await asker.event()
        assert (event, response["data"], response["recipient_id"]) == ("api:response", "done", worker.id)
        await asker.ask("post", "2")
        await worker.event()
        await worker.ws.aclose()
        assert (await asker.event())[1]["error"]["code"] == "listener_gone"


async def test_what_is_broken_closes_its_connection_alone() -> None:
    async with hub() as address, peer(address, "other", "post") as other:
        broken: list[Any] = ["9", "4x", f"42{NS}{{}}", f'42{NS}["a"', b"\x05no", "x" * 1_000_001]
        for data in broken:
            async with peer(address, "one") as one:
                await one.ws.send_message(data)
                await one.until_closed()
        async with peer(address, "binary") as one:
            await one.ws.send_message(f'451-{NS}["a",{{"_placeholder":true,"num":0}}]')
            await one.ws.send_message(b"\x04bytes")
            assert (await one.event())[1]["code"] == "binary_not_supported"
            await one.ask("post")
            assert (await other.event())[0] == "post"


async def test_who_is_not_known_yet_has_16_kib_each_way() -> None:
    async with hub() as address:
        for data in (f"2{'x' * 20_000}", f"2{'x' * 100_000}"):
            async with peer(address) as one:
                await one.ws.send_message(data)
                await one.until_closed()
        async with peer(address, "one") as one:
            await one.ws.send_message(f"2{'x' * 100_000}")
            assert await one.hear() == f"3{'x' * 100_000}"
        async with browser(f"http://{address}/socket.io/") as http:  # and fetches nothing of what is said to it
            opened = await http.get("?EIO=4&transport=polling")
            url = f"?EIO=4&transport=polling&sid={json.loads(opened.text[1:])['sid']}"
            for _ in range(3):
                await http.post(url, content=f"2{'x' * 10_000}")
            assert (await http.get(url)).status_code == 400


async def test_long_polling_and_the_upgrade() -> None:
    key = md5_key("poller", SALT)
    async with hub() as address, browser(f"http://{address}") as http:
        url = "/socket.io/?EIO=4&transport=polling"
        opened = await http.get(url)
        assert opened.headers["content-type"] == "text/plain; charset=UTF-8"
        sid = json.loads(opened.text[1:])["sid"]
        url += f"&sid={sid}"

        async def say(*packets: str) -> None:
            answer = await http.post(url, content="\x1e".join(packets), headers={"Content-Type": "text/plain"})
            assert (answer.status_code, answer.text, answer.headers["content-type"]) == (200, "ok", "text/html")

        async def hear() -> list[str]:
            return (await http.get(url)).text.split("\x1e")

        await say(f"40{NS}")
        assert await hear() == [f'40{NS}{{"sid":"{sid}"}}', f'42{NS}["shake_who"]']
        await say(f'42{NS}["shake_i_am",{{"name":"poller","key":"{key}"}}]')
        [shake_id] = await hear()
        held: list[list[str]] = []
        async with trio.open_nursery() as nursery:

            async def hold() -> None:
                held.append(await hear())

            async with websocket(f"ws://{address}/socket.io/?EIO=4&transport=websocket&sid={sid}") as ws:
                nursery.start_soon(hold)
                await trio.testing.wait_all_tasks_blocked(0.1)  # it is held: all that was sent has come
                await ws.send_message("2probe")
                assert await ws.get_message() == "3probe"
                await ws.send_message("5")
                ready = shake_id.replace("shake_id", "shake_ready")
                await ws.send_message(ready)
                assert await ws.get_message() == f'42{NS}["shake_online"]'
                assert (await http.get(url)).json() == {"code": 3, "message": "Bad request"}
        assert held == [["6"]]


async def test_what_polls_are_refused_for() -> None:
    async with hub() as address, browser(f"http://{address}/socket.io/") as http:

        async def refused(query: str, method: str = "GET", **more: Any) -> int:
            answer = await http.request(method, f"?{query}", **more)
            assert (answer.status_code, answer.headers["content-type"]) == (400, "application/json")
            return int(answer.json()["code"])

        assert await refused("EIO=3&transport=smoke") == 0
        assert await refused("EIO=3&transport=polling&sid=none") == 1
        assert await refused("EIO=3&transport=polling", "POST") == 2
        assert await refused("EIO=3&transport=polling&j=0") == 3
        assert await refused("EIO=2&transport=polling") == 5

        async def session() -> str:
            opened = await http.get("?EIO=3&transport=polling")
            [sid] = re.findall('"sid":"([^"]+)"', opened.text)
            return f"EIO=3&transport=polling&sid={sid}"

        query = await session()
        assert await refused(query, "POST", content="nonsense") == 3
        assert await refused(query) == 1  # that closed it
        query = await session()
        assert await refused(query, "POST", content=b"1", headers={"Content-Type": "application/octet-stream"}) == 3
        query = await session()
        got: list[tuple[int, str]] = []

        async def get() -> None:
            answer = await http.get(f"?{query}")
            got.append((answer.status_code, answer.text))

        async with trio.open_nursery() as nursery:  # whichever is first is held, and ended by the other
            nursery.start_soon(get)
            nursery.start_soon(get)
        assert sorted(got) == [(200, "1:1"), (400, '{"code":3,"message":"Bad request"}')]
        too_long = await http.post(f"?{await session()}", content="x" * 1_000_001)
        assert too_long.status_code == 413
        from_anybody = await http.post(f"?{await session()}", content=f"20001:2{'x' * 20_000}")
        assert from_anybody.status_code == 413


UPGRADE = {
    "Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "MDEyMzQ1Njc4OWFiY2RlZg==",
}  # fmt: skip


async def test_a_websocket_is_refused_before_the_upgrade() -> None:
    async with hub(max_connections=1) as address, browser(f"http://{address}/socket.io/") as http:
        for query, code in (("EIO=2", 5), ("sid=x", 5), ("EIO=3&sid=none", 1)):
            answer = await http.get(f"?{query}&transport=websocket", headers=UPGRADE)
            assert (answer.status_code, answer.json()["code"]) == (400, code)
        async with peer(address) as one:
            sid = json.loads((await one.hear()).removeprefix("0"))["sid"]
            answer = await http.get(f"?EIO=3&transport=websocket&sid={sid}", headers=UPGRADE)
            assert (answer.status_code, answer.json()["code"]) == (400, 3)
            answer = await http.get("?EIO=3&transport=websocket", headers=UPGRADE)
            assert (answer.status_code, answer.text) == (503, "too many connections\n")


async def test_pages_of_other_sites_are_turned_away() -> None:
    async with hub(origins=("https://good.example",)) as address, browser() as http:
        url = f"http://{address}/socket.io/?EIO=4&transport=polling"
        bad = await http.get(url, headers={"Origin": "https://bad.example"})
        assert (bad.status_code, bad.json()) == (403, {"code": 4, "message": "Forbidden"})
        own = await http.get(url, headers={"Origin": f"http://{address}"})  # as Python's websocket-client says
        assert own.status_code == 200
        good = await http.get(url, headers={"Origin": "https://good.example"})
        assert good.headers["access-control-allow-origin"] == "https://good.example"
        assert (await http.options(url, headers={"Origin": "https://good.example"})).status_code == 204


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example"])
async def test_a_page_whose_name_leads_here_is_turned_away_where_no_key_is_wanted(host: str) -> None:
    async with hub(auth="any") as address, browser(f"http://{address}/socket.io/") as http:
        for transport, more in (("polling", {}), ("polling", {"Origin": f"http://{host}"}), ("websocket", UPGRADE)):
            bad = await http.get(f"?EIO=4&transport={transport}", headers={"Host": host, **more})
            assert bad.status_code == 403
        good = await http.get("?EIO=4&transport=polling", headers={"Host": "localhost"})
        assert good.status_code == 200


async def test_who_is_there() -> None:
    async with hub() as address, peer(address, "worker", "post") as worker, browser() as http:
        assert (await http.get(f"http://{address}/")).json() == {"result": {"id": "eman"}}
        await worker.ask("nobody")
        await worker.event()  # what was said before it is heard
        shown = (await http.get(f"http://{address}/services")).json()
        assert shown == {"result": {worker.id: {"id": worker.id, "name": "worker", "subscribed_events": ["post"]}}}
    async with hub(services_page="off") as address, browser() as http:
        assert (await http.get(f"http://{address}/services")).status_code == 403


async def test_a_hub_allows_itself_the_descriptors_for_all_its_connections() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = min(soft, 500)
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, hard))
    try:
        async with hub(max_connections=500):  # a service that polls has two
            allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert allowed == (1164 if hard == resource.RLIM_INFINITY else min(1164, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_who_never_reads_is_closed_and_nobody_else_notices() -> None:
    async with hub() as address, peer(address, "slow", "flood") as slow, peer(address, "asker") as asker:
        big = "x" * 100_000
        async with peer(address, "other", "post") as other:
            with trio.fail_after(60):
                while True:  # the slow one's socket, and then its queue, fill
                    await asker.ask("flood", timeout_ms=0, data=big)
                    await asker.ask("post", data=1)
                    _, request = await other.event()
                    await other.emit("api:response", request | {"recipient_id": "x", "data": 1})
                    await asker.event()
                    await asker.ask("flood", "probe", timeout_ms=1)
                    _, answer = await asker.event()
                    if answer["error"]["code"] in ("no_listeners", "listener_gone"):
                        break
        assert slow.ws.closed is None or slow.ws.closed.code


async def test_who_is_refused_is_told_of_by_name_and_no_key(caplog: pytest.LogCaptureFixture) -> None:
    async with hub() as address, peer(address) as one:
        await one.ws.send_message(f"40{NS}")
        await one.event()
        await one.emit("shake_i_am", {"name": "worker", "key": "a wrong key"})
        assert (await one.event())[1]["error"] == {"message": "Invalid key", "code": "invalid_key", "status": 403}
        await one.until_closed()
    assert "eman hub: refused service=worker peer=127.0.0.1 code=invalid_key" in caplog.messages
    assert "a wrong key" not in caplog.text


async def test_the_command_ends_its_connections_in_order(tmp_path: Path) -> None:
    config = tmp_path / "agent.toml"
    config.write_text('[eman.hub]\nauth = "any"\nhandshake_s = 60\n')
    argv = [sys.executable, "-m", "agent", "eman", "hub", "--listen", "127.0.0.1:0", "--config", str(config)]
    process = await trio.lowlevel.open_process(argv, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        with trio.fail_after(60):
            url = urlsplit((await process.stdout.receive_some()).decode().strip())
        assert (url.scheme, url.path) == ("http", "/communication")
        async with peer(url.netloc, "one") as one:
            process.send_signal(signal.SIGTERM)
            await one.until_closed()
            assert one.ws.closed is not None
            assert one.ws.closed.code == 1001
        with trio.fail_after(60):
            assert await process.wait() == 0
    finally:
        process.kill()
        await process.wait()


def test_who_decides_about_keys(tmp_path: Any) -> None:
    for name, text in (("salt", "a-salt"), ("key", "a-key")):
        (tmp_path / name).write_text(f"{text}\n")
        (tmp_path / name).chmod(0o600)

    def check(settings: HubSettings, address: str = "127.0.0.1:0") -> Any:
        return authority(settings, address, lambda name: tmp_path / name)

    assert check(HubSettings(salt_file="salt"))(IAm("a", md5_key("a", "a-salt")))
    keys = HubSettings(auth="keys", services={"a": ServiceKey(key_file="key")})
    assert check(keys)(IAm("a", "a-key"))
    assert not check(keys)(IAm("b", "a-key"))
    assert check(HubSettings(auth="any"))(IAm("a", "whatever"))
    with pytest.raises(HubUnsafe, match="not loopback"):
        check(HubSettings(auth="any"), "0.0.0.0:9001")
    with pytest.raises(HubUnsafe, match="salt_file is not set"):
        check(HubSettings())
    with pytest.raises(HubUnsafe, match="services has no service"):
        check(HubSettings(auth="keys"))
