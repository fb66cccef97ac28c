"""A session on a websocket: what comes and what goes keeps its order, however it is cut and however long it is."""

import json
from contextlib import suppress

import httpx
import pytest
import trio
from trio_websocket import ConnectionClosed
from wsproto.events import Ping, TextMessage

from agent.core.link import Dial, connect
from agent.eman import connection
from tests.eman_hub import Peer, hub, peer

NS = "/communication,"


async def test_frames_of_one_read_and_in_any_number_of_parts_are_heard_in_order() -> None:
    async with hub() as address, peer(address, "listener", "x") as listener, peer(address, "asker") as asker:
        requests = [
            f'42{NS}["api:request",{{"name":"x","request_id":"{n}","sender_id":"a","timeout_ms":0}}]' for n in range(60)
        ]
        frames = [asker.ws._wsproto.send(TextMessage(text)) for text in requests[:40]]
        parts = [TextMessage(text[:30], message_finished=False) for text in requests[40:]]
        rests = [TextMessage(text[30:]) for text in requests[40:]]
        for part, rest in zip(parts, rests, strict=True):
            frames += [asker.ws._wsproto.send(part), asker.ws._wsproto.send(Ping(b"?")), asker.ws._wsproto.send(rest)]
        await asker.ws._stream.send_all(b"".join(frames))
        for n in range(60):
            name, request = await listener.event()
            assert (name, request["request_id"]) == ("x", str(n))


async def test_a_large_message_does_not_let_later_ones_overtake_it() -> None:
    async with hub() as address, peer(address, "listener", "x") as listener, peer(address, "asker") as asker:
        for n in range(20):
            data = "x" * (200_000 if n % 3 == 0 else 5)
            await asker.ask("x", str(n), timeout_ms=0, data=data)
        for n in range(20):
            name, request = await listener.event()
            assert (name, request["request_id"], len(request["data"])) == ("x", str(n), 200_000 if n % 3 == 0 else 5)


async def test_answers_to_pings_wait_within_bounds_for_who_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever makes the hub say something, and does not take it, costs it no more than any slow reader."""
    monkeypatch.setattr(connection, "LAST_WORDS_S", 0.1)
    async with hub() as address, peer(address) as one:
        with trio.fail_after(60), suppress(ConnectionClosed):
            for _ in range(100):  # 90 MB: more than all buffers between the two
                await one.ws.send_message("2" + "x" * 900_000)
        answers = 0
        with suppress(ConnectionClosed):
            while True:
                answers += (await one.hear()).startswith("3")
        assert answers < 80


async def test_what_one_read_makes_the_hub_say_is_not_taken_for_a_slow_reader() -> None:
    async with hub() as address, peer(address) as one:
        frames = [one.ws._wsproto.send(TextMessage("2")) for _ in range(5 * connection.MAX_QUEUED)]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one.ws._stream.send_all, b"".join(frames))
            said = [await one.hear() for _ in range(2 + 5 * connection.MAX_QUEUED)]
        assert said[1:] == ["40", *("3" for _ in frames)]


async def test_a_poller_that_does_not_fetch_is_closed_too() -> None:
    async with hub() as address, httpx.AsyncClient(base_url=f"http://{address}/socket.io/", timeout=60) as http:
        query = "?EIO=4&transport=polling"
        opened = await http.get(query)
        query += f"&sid={json.loads(opened.text[1:])['sid']}"
        many = "\x1e".join(["2"] * (connection.MAX_QUEUED + 1))
        assert (await http.post(query, content=many, headers={"Content-Type": "text/plain"})).status_code == 200
        assert (await http.get(query)).json()["code"] == 1


async def test_who_says_too_much_is_read_more_slowly_and_nothing_is_lost() -> None:
    async with hub(rate=100) as address, peer(address, "asker") as asker:
        began = trio.current_time()
        for n in range(150):
            await asker.ask("nobody", str(n))
        answers = [(await asker.event())[1] for _ in range(150)]
        assert [answer["request_id"] for answer in answers] == [str(n) for n in range(150)]
        await asker.ask("nobody")
        await asker.event()
        assert trio.current_time() - began > 0.4  # 100 of them at once, and 50 at 100 a second


async def test_a_poller_that_says_too_much_is_answered_more_slowly() -> None:
    async with hub(rate=100) as address, httpx.AsyncClient(base_url=f"http://{address}/socket.io/", timeout=60) as http:
        query = "?EIO=4&transport=polling"
        opened = await http.get(query)
        query += f"&sid={json.loads(opened.text[1:])['sid']}"
        began = trio.current_time()
        many = "\x1e".join(["40/communication,", *(['42/communication,["x"]'] * 150)])
        assert (await http.post(query, content=many, headers={"Content-Type": "text/plain"})).status_code == 200
        assert trio.current_time() - began > 0.4


async def test_a_poll_during_the_upgrade_is_not_held() -> None:
    """A client that has begun one stops polling at its answer, and only then goes over to the websocket."""
    async with hub() as address, httpx.AsyncClient(base_url=f"http://{address}/socket.io/", timeout=20) as http:
        opened = await http.get("?EIO=4&transport=polling")
        query = f"EIO=4&sid={json.loads(opened.text[1:])['sid']}"
        async with connect(Dial(url=f"ws://{address}/socket.io/?{query}&transport=websocket")) as ws:
            await ws.send_message("2probe")
            assert await ws.get_message() == "3probe"
            assert (await http.get(f"?{query}&transport=polling")).text == "6"
            await ws.send_message("5")
            one = Peer(ws)
            await ws.send_message("40/communication,")
            assert (await one.hear()).startswith("40/communication,")


async def test_only_one_websocket_takes_a_session_over() -> None:
    async with hub() as address, httpx.AsyncClient(base_url=f"http://{address}/socket.io/", timeout=20) as http:
        opened = await http.get("?EIO=4&transport=polling")
        url = f"ws://{address}/socket.io/?EIO=4&transport=websocket&sid={json.loads(opened.text[1:])['sid']}"
        async with connect(Dial(url=url)) as first, connect(Dial(url=url)) as second:
            for ws in (first, second):
                await ws.send_message("2probe")
                assert await ws.get_message() == "3probe"
            await first.send_message("5")
            await first.send_message("40/communication,")
            assert (await Peer(first).hear()).startswith("40/communication,")
            await second.send_message("5")
            await Peer(second).until_closed()
            assert await Peer(first).event() == ("shake_who", None)
