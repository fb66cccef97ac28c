"""The agent as a service: its actions and events on our hub; nothing lost, nothing done twice."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from agent.core import listen
from agent.core.bus import Bus, Handler
from agent.core.errors import ActionError
from agent.core.events import Alert, LinkChanged, RunChanged, SlotsChanged
from agent.core.guard import Guard
from agent.core.head import Head
from agent.core.link import Dial
from agent.core.listen import Route
from agent.core.metrics import Metrics
from agent.core.payload import MAX_NESTED
from agent.core.store import Store, open_store
from agent.core.supervise import Health
from agent.eman import role
from agent.eman.messages import Request
from agent.eman.settings import EmanSettings
from agent.eman.shake import md5_key
from tests.eman_hub import SALT, Peer, hub, peer

NAME = "agent-lab7"


class Station:
    """A service that runs, and what was asked of it."""

    def __init__(self, bus: Bus, store: Store) -> None:
        self.bus, self.store = bus, store
        self.asked: list[tuple[str, Mapping[str, Any]]] = []
        self.links: list[Any] = []
        self._heard = trio.Event()

    async def listen(self, *, task_status: trio.TaskStatus[None]) -> None:
        with self.bus.subscribe(LinkChanged, Alert) as events:
            task_status.started()
            async for event in events:
                self.links.append(event)
                self._heard.set()
                self._heard = trio.Event()

    async def until(self, state: str, times: int = 1) -> None:
        with trio.fail_after(60):
            while sum(isinstance(each, LinkChanged) and each.state == state for each in self.links) < times:
                await self._heard.wait()

    async def until_all_is_told(self) -> None:
        with trio.fail_after(60):
            while True:
                committed = self.store._committed
                if not (await self.store.depths())["eman"].waiting:
                    return
                await committed.wait()

    async def handle(self, action: str, payload: dict[str, Any]) -> dict[str, Any]:
        self.asked.append((action, payload))
        if payload.get("fail"):
            raise ActionError("no_such_run", "there is none")
        if "long" in payload:
            return {"text": payload["long"] * 500_000}
        if payload.get("break"):
            raise RuntimeError("a bug")
        return {"run": "r-1"} if action == "run_suite" else {"asked": len(self.asked)}


@asynccontextmanager
async def station(
    folder: Path, address: str, key: str = "", run_suite: Handler | None = None, **settings: Any
) -> AsyncIterator[Station]:
    store = open_store(folder / "state", reserve=4096)
    bus = Bus(store)
    here = Station(bus, store)
    given = EmanSettings(url=f"http://{address}/communication", **settings)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            await nursery.start(here.listen)
            with (
                bus.answer("status", partial(here.handle, "status")),
                bus.answer("run_suite", run_suite or partial(here.handle, "run_suite")),
            ):
                start = partial(
                    role.run, bus, store, given, key or md5_key(NAME, SALT), NAME, Health("eman"), metrics=Metrics(),
                    dial=Dial(url=role.dial_url(given.url, given.eio)),
                )  # fmt: skip
                await nursery.start(start)
                yield here
            nursery.cancel_scope.cancel()
    finally:
        store.close()


async def answer(asker: Peer, name: str, request_id: str, data: Any) -> dict[str, Any]:
    await asker.ask(name, request_id, data=data)
    event, response = await asker.event()
    assert event == "api:response", response
    assert response["request_id"] == request_id
    return dict(response)


@pytest.mark.parametrize("eio", [3, 4])
async def test_everybody_may_ask_what_is_read_only(tmp_path: Path, eio: int) -> None:
    async with hub() as address, station(tmp_path, address, eio=eio) as here, peer(address, "asker") as asker:
        await here.until("ready")
        for n, name in enumerate(("agent.status", f"{NAME}.status")):
            said = await answer(asker, name, f"s{n}", {})
            assert (said["data"], said["recipient_id"].startswith(f"{NAME}.")) == ({"asked": n + 1}, True)
        refused = await answer(asker, f"{NAME}.run_suite", "r", {"path": "/x"})
        assert (refused["error"]["code"], refused["error"]["status"]) == ("forbidden", 403)
        failed = await answer(asker, "agent.status", "f", {"fail": True})
        assert failed["error"] == {"message": "there is none", "code": "no_such_run", "status": 500}
        broken = await answer(asker, "agent.status", "b", {"break": True})
        assert (broken["error"]["code"], broken["error"]["status"]) == ("internal", 500)
        assert (await answer(asker, "agent.status", "l", [1]))["error"]["code"] == "bad_payload"
        deep: list[Any] = []
        for _ in range(MAX_NESTED):
            deep = [deep]
        assert (await answer(asker, "agent.status", "d", {"deep": deep}))["error"]["code"] == "bad_payload"
        assert len((await answer(asker, "agent.status", "x", {"long": "x"}))["data"]["text"]) == 500_000
        too_big = await answer(asker, "agent.status", "é", {"long": "é"})  # three times as long in ASCII
        assert too_big["error"]["code"] == "too_big"
        assert (await answer(asker, "agent.search_log", "n", {}))["error"]["code"] == "unknown_action"


async def test_a_repeated_request_runs_nothing_twice(tmp_path: Path) -> None:
    async with hub() as address, station(tmp_path, address, allow=("run_suite",)) as here:
        await here.until("ready")
        async with peer(address, "asker") as asker:
            first = await answer(asker, f"{NAME}.run_suite", "r", {"path": "/x"})
            second = await answer(asker, f"{NAME}.run_suite", "r", {"path": "/x"})
        assert first["data"] == second["data"] == {"run": "r-1"}
        assert here.asked == [("run_suite", {"path": "/x", "origin": "eman"})]


async def test_answers_to_who_only_reads_are_remembered_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(role, "MAX_READ_BYTES", 1000)
    async with hub() as address, station(tmp_path, address, allow=("run_suite",)) as here:
        await here.until("ready")
        async with peer(address, "asker") as asker:
            await answer(asker, f"{NAME}.run_suite", "r", {"path": "/x"})
            first = await answer(asker, "agent.status", "0", {})
            assert (await answer(asker, "agent.status", "0", {}))["data"] == first["data"]
            for n in range(1, 10):
                await answer(asker, "agent.status", str(n), {})
            assert (await answer(asker, "agent.status", "0", {}))["data"] != first["data"]  # too long ago: read anew
            await answer(asker, f"{NAME}.run_suite", "r", {"path": "/x"})
        assert [action for action, _ in here.asked].count("run_suite") == 1


async def test_more_requests_than_can_be_under_way_are_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(role, "MAX_UNDER_WAY", 0)
    async with hub() as address, station(tmp_path, address) as here, peer(address, "asker") as asker:
        await here.until("ready")
        assert (await answer(asker, "agent.status", "s", {}))["error"]["code"] == "busy"
        assert here.asked == []


async def greeted(ws: WebSocketConnection, service_id: str) -> Peer:
    """The service, as a hub by hand sees it, once it is online."""
    asked = Peer(ws)
    await ws.send_message('0{"sid":"s","upgrades":[],"pingInterval":25000,"pingTimeout":60000}')
    await ws.send_message("40")
    assert await asked.hear() == "40/communication,"
    await ws.send_message("40/communication,")
    await asked.emit("shake_who", {})
    await asked.event()
    await asked.emit("shake_id", {"id": service_id})
    await asked.event()
    await asked.emit("shake_online", {})
    return asked


@asynccontextmanager
async def by_hand(serve: Callable[[Head, WebSocketConnection], Awaitable[None]]) -> AsyncIterator[str]:
    """The address of a hub that is `serve`."""
    async with trio.open_nursery() as nursery:
        guard = Guard((), {}, False, (), trio.current_time)
        routes = [Route("/socket.io/", websocket=serve, scope="open")]
        [address] = await nursery.start(partial(listen.serve, ["127.0.0.1:0"], routes, guard, metrics=Metrics()))
        yield address
        nursery.cancel_scope.cancel()


async def test_an_action_goes_on_without_its_connection_and_is_answered_under_the_new_id(tmp_path: Path) -> None:
    """The hub is one by hand that forwards, as the original does, and closes when it has asked."""
    reached, go = trio.Event(), trio.Event()
    ids = [f"{NAME}.1", f"{NAME}.2"]
    responses: list[Any] = []
    over = trio.Event()

    async def run_suite(payload: dict[str, Any]) -> dict[str, Any]:
        reached.set()
        await go.wait()
        return {"run": "r-1"}

    async def serve(head: Head, ws: WebSocketConnection) -> None:
        asked = await greeted(ws, ids[0])
        if len(ids) == 2:
            name = f"{NAME}.run_suite"
            request = {"name": name, "request_id": "r", "sender_id": "asker.1", "data": {"path": "/x"}}
            await asked.emit(name, request)
            with trio.fail_after(60):
                await reached.wait()
            del ids[0]
            return
        go.set()
        while (event := await asked.event())[0] != "api:response":
            pass
        responses.append(event[1])
        over.set()
        await trio.sleep_forever()

    async with by_hand(serve) as address, station(tmp_path, address, allow=("run_suite",), run_suite=run_suite):
        with trio.fail_after(60):
            await over.wait()
    (response,) = responses
    assert (response["data"], response["recipient_id"]) == ({"run": "r-1"}, f"{NAME}.2")


async def events(listener: Peer, count: int) -> list[int]:
    return [int((await listener.event())[1]["data"]["data"]["free"]) for _ in range(count)]


def slots(free: int) -> SlotsChanged:
    return SlotsChanged(free=free, total=9, draining=False)


async def test_events_wait_for_the_hub_and_come_in_order(tmp_path: Path, held_port: int) -> None:
    address = f"127.0.0.1:{held_port}"
    async with station(tmp_path, address, emit=("SlotsChanged",)) as here:
        for n in range(5):
            here.bus.publish(slots(n))
        await here.store.commit()
    async with hub(address) as again, peer(again, "listener", "agent.event.SlotsChanged") as listener:
        await listener.ask("nobody")
        await listener.event()  # so its subscription is heard
        async with station(tmp_path, again, emit=("SlotsChanged",)) as here:
            here.bus.publish(slots(5))
            assert await events(listener, 6) == [0, 1, 2, 3, 4, 5]
            await here.until_all_is_told()


async def test_a_hub_that_is_cut_is_found_again_with_all_subscriptions(tmp_path: Path, held_port: int) -> None:
    address = f"127.0.0.1:{held_port}"
    async with trio.open_nursery() as nursery:
        ends = trio.Event()

        async def first_hub(*, task_status: trio.TaskStatus[None]) -> None:
            async with hub(address):
                task_status.started()
                await ends.wait()

        await nursery.start(first_hub)
        async with station(tmp_path, address) as here:
            await here.until("ready")
            first = await _id(address)
            ends.set()
            await here.until("offline")
            async with hub(address):
                await here.until("ready", times=2)
                assert await _id(address) != first


async def _id(address: str) -> str:
    async with peer(address, "asker") as asker:
        return str((await answer(asker, f"{NAME}.status", "1", {}))["recipient_id"])


async def test_with_acked_an_event_is_told_until_a_listener_takes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(role, "AGAIN_S", 0.05)
    async with hub() as address, station(tmp_path, address, emit=("SlotsChanged",), acked=True) as here:
        await here.until("ready")
        here.bus.publish(slots(1))
        async with peer(address, "listener", "agent.event.SlotsChanged") as listener:
            _, first = await listener.event()
            error = {"message": "full", "code": "full", "status": 500}
            await listener.emit("api:response", first | {"recipient_id": "x", "error": error})
            _, second = await listener.event()
            assert second["request_id"] == first["request_id"]
            await listener.emit("api:response", second | {"recipient_id": "x", "data": {}})
            await here.until_all_is_told()


async def test_with_acked_an_event_that_no_hub_answers_for_is_told_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original forgets a request that nobody listens to, and says nothing."""
    monkeypatch.setattr(role, "AGAIN_S", 0.05)
    monkeypatch.setattr(role, "UNANSWERED_S", 0.5)
    requests: list[Any] = []

    async def serve(head: Head, ws: WebSocketConnection) -> None:
        asked = await greeted(ws, f"{NAME}.1")
        while True:
            event, payload = await asked.event()
            if event == "api:request":
                requests.append(payload)
                if len(requests) > 1:  # an answer that comes too late is none, and the event told once more
                    await asked.emit("api:response", payload | {"recipient_id": "listener", "data": {}})

    async with (
        by_hand(serve) as address,
        station(tmp_path, address, emit=("SlotsChanged",), acked=True) as here,
    ):
        here.bus.publish(slots(1))
        await here.store.commit()
        await here.until_all_is_told()
    assert len(requests) > 1
    assert all(each == requests[0] for each in requests)


async def test_an_event_too_long_for_the_bus_is_held_and_the_next_one_told(tmp_path: Path) -> None:
    async with (
        hub() as address,
        peer(address, "listener", "agent.event.RunChanged") as listener,
        station(tmp_path, address, emit=("RunChanged",)) as here,
    ):
        await listener.ask("nobody")
        await listener.event()  # so its subscription is heard
        await here.until("ready")
        for reason in ("x" * 400_000, "short"):
            here.bus.publish(RunChanged(run="r", state="running", reason=reason))
        assert (await listener.event())[1]["data"]["data"]["reason"] == "short"
        alerts = [each.text for each in here.links if isinstance(each, Alert)]
        assert len(alerts) == 1
        assert "RunChanged of 4000" in alerts[0]
        assert "is too long for the bus" in alerts[0]


async def test_a_wrong_key_is_an_alert(tmp_path: Path) -> None:
    async with hub() as address, station(tmp_path, address, key="wrong") as here:
        await here.until("offline")
        with trio.fail_after(60):
            while not (alerts := [each for each in here.links if isinstance(each, Alert)]):
                await here._heard.wait()
        assert "Invalid key (invalid_key)" in alerts[0].text
        assert "eman.salt_file" in alerts[0].remedy
        assert "wrong" not in repr(here.links)


async def test_a_server_that_opens_no_websocket_is_an_alert_that_names_the_setting(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        guard = Guard((), {}, False, (), trio.current_time)
        [address] = await nursery.start(partial(listen.serve, ["127.0.0.1:0"], [], guard, metrics=Metrics()))
        async with station(tmp_path, address) as here:
            with trio.fail_after(60):
                while not (alerts := [each for each in here.links if isinstance(each, Alert)]):
                    await here._heard.wait()
            assert "answered 404 instead of opening a websocket: there is nothing at this path" in alerts[0].text
            assert "eman.eio" in alerts[0].remedy
        nursery.cancel_scope.cancel()


async def test_it_leaves_before_it_closes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(role, "LEAVE_S", 60.0)
    caplog.set_level("INFO", "agent.eman.hub")
    async with hub() as address, httpx.AsyncClient(base_url=f"http://{address}", timeout=60) as http:
        async with station(tmp_path, address) as here:
            await here.until("ready")
        with trio.fail_after(60):  # the hub reads it some time after it was sent
            while (await http.get("/services")).json() != {"result": {}}:
                pass
    assert [text for text in caplog.messages if text.startswith("eman hub: gone")] == [
        f"eman hub: gone service={NAME} peer=127.0.0.1 why=left the namespace"
    ]


def test_the_address_behind_the_setting() -> None:
    for url in ("http://h:9001/communication", "ws://h:9001/communication"):
        assert role.dial_url(url, 3) == "ws://h:9001/socket.io/?EIO=3&transport=websocket"
    assert role.dial_url("https://h/communication", 4) == "wss://h/socket.io/?EIO=4&transport=websocket"
    with pytest.raises(ValueError, match="is not http"):
        role.dial_url("h:9001", 3)


async def test_an_answer_that_a_lost_line_did_not_take_goes_by_the_one_that_came_meanwhile() -> None:
    service = role._Service(Bus(), EmanSettings(), NAME, Metrics())
    said: list[Any] = []

    class Line:
        def __init__(self, then: "Line | None" = None) -> None:
            self._then = then

        async def respond(self, response: Any) -> None:
            if self._then is None:
                said.append(response.error)
            else:
                service.is_online(self._then)  # type: ignore[arg-type]  # what is asked of a connection here
                raise ConnectionClosed(None)

    service.is_online(Line(then=Line()))  # type: ignore[arg-type]
    with trio.fail_after(60):
        await service._respond(Request(name="nobody.asks", request_id="1", sender_id="a"))
    assert len(said) == 1
